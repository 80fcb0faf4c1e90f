"""Which files of a folder are images, the same for every command; names fit to be shown; texts."""

from __future__ import annotations

import os
import stat
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath

# Of every format that is decoded, in any case.
SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".gif", ".bmp"),
    *(".tif", ".tiff", ".avif", ".heic", ".heif", ".hif"),
)
_NAMED = 3  # of what was skipped, in a note
_KINDS_NAMED = 6
_BIDIRECTIONAL = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # show names backwards


class FilesError(ValueError):
    """A folder cannot be searched, or a file not be read. One line that says what to do."""


@dataclass(frozen=True)
class FoundFiles:
    """The image files below a folder.

    Attributes:
        names: their paths, relative to the folder, sorted.
        others: of the files that no suffix tells to be an image, and of those that are none
            (a link that leads nowhere, a socket).
        hidden: of the files and folders whose name begins with a dot; nothing below them is listed.
        repeated: of the links to folders that are listed under another path.
    """

    names: tuple[str, ...]
    others: tuple[str, ...] = ()
    hidden: tuple[str, ...] = ()
    repeated: tuple[str, ...] = ()

    @property
    def note(self) -> str:
        """What was skipped, and why, in one line; empty where nothing was."""
        said = []
        if self.others:
            kinds = Counter(PurePath(name).suffix.lower() or "no suffix" for name in self.others)
            counts = [f"{shown(kind)} {count}" for kind, count in kinds.most_common(_KINDS_NAMED)]
            more = ", …" if len(kinds) > _KINDS_NAMED else ""
            files = _count(len(self.others), "file", "files")
            said.append(f"{files} of other kinds ({', '.join(counts)}{more}): {_few(self.others)}")
        if self.hidden:
            said.append(f"{len(self.hidden)} hidden: {_few(self.hidden)}")
        if self.repeated:
            links = _count(len(self.repeated), "link", "links")
            said.append(f"{links} to folders already listed: {_few(self.repeated)}")
        return f"skipped {'; '.join(said)}" if said else ""


def find_files(folder: Path) -> FoundFiles:
    """List the image files below a folder, at every depth.

    A link to a file or to a folder counts as what it leads to. A folder that is reached twice, or
    in a circle, is listed once: under its own path, where it lies below `folder` itself.

    Args:
        folder: may be hidden itself.

    Raises:
        FilesError: the folder, or one below it that is not hidden, cannot be listed.
    """
    names, others, hidden, repeated = list[str](), list[str](), list[str](), list[str]()
    waiting, links, seen = [""], list[str](), set[tuple[int, int]]()
    while waiting or links:
        # Links last: what they lead to may lie here under a name of its own.
        inside = waiting.pop() if waiting else links.pop(0)
        try:
            status = os.stat(folder / inside)
            entries = sorted(os.scandir(folder / inside), key=lambda entry: entry.name)
        except OSError as error:
            raise FilesError(
                f"cannot list {shown(folder / inside)}: {error.strerror}; change that or move it"
            ) from None
        if (status.st_dev, status.st_ino) in seen:
            repeated.append(inside)
            continue
        seen.add((status.st_dev, status.st_ino))
        for entry in entries:
            name = f"{inside}/{entry.name}" if inside else entry.name
            kind = _mode(entry)
            if entry.name.startswith("."):
                hidden.append(name)
            elif stat.S_ISDIR(kind):
                (links if entry.is_symlink() else waiting).append(name)
            elif stat.S_ISREG(kind) and name.lower().endswith(SUFFIXES):
                names.append(name)
            else:
                others.append(name)
    return FoundFiles(*(tuple(sorted(found)) for found in (names, others, hidden, repeated)))


def read_text(file: Path, what: str) -> str:
    """A file of UTF-8 text, without the mark that some editors put before it.

    Args:
        file: that is read.
        what: is in it, in words.

    Raises:
        FilesError: it cannot be read as that.
    """
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise FilesError(f"cannot read {what} from {shown(file)}: {reason}") from None


def read_labels(file: Path) -> list[str]:
    """Names of classes, one a line.

    Raises:
        FilesError: the file cannot be read as text, or holds none.
    """
    names = read_text(file, "labels").splitlines()
    if not names:
        raise FilesError(f"{shown(file)} holds no labels; it needs one class name per line")
    return names


def shown(name: str | PurePath) -> str:
    r"""A file's name as it can be printed and stored.

    What would break a line, steer a terminal or is no Unicode, such as a byte of another encoding,
    becomes an escape with a backslash (`caf\xe9.jpg`). To open the file, take the name itself.
    """
    return "".join(_escaped(str(name)))


def _escaped(name: str) -> Iterator[str]:
    for character in name:
        if "\udc80" <= character <= "\udcff":  # how Python keeps a byte that is no UTF-8
            yield f"\\x{ord(character) - 0xDC00:02x}"
        elif character in _BIDIRECTIONAL or (
            unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")
        ):
            yield character.encode("unicode_escape").decode()
        else:
            yield character


def _mode(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat().st_mode
    except OSError:  # a link that leads nowhere, or to itself
        return 0


def _few(names: tuple[str, ...]) -> str:
    return ", ".join(map(shown, names[:_NAMED])) + (", …" if len(names) > _NAMED else "")


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"
