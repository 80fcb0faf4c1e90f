"""SHA-256 of every file of an assembled model repository, so that a mixed one cannot start.

Nor one with more in it: Triton takes a folder of any number for a version of its model, and Python
a file of the right name for a module, so what is not listed could be served in place of what is.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

NAME = "MANIFEST.json"
SCHEMA_VERSION = 1
BYTECODE = "__pycache__"
# `policy.cpython-311.pyc`, and with a number behind it while Python writes it.
_BYTECODE_NAME = re.compile(r"([^.]+)\.[^.]+(?:\.opt-\w+)?\.pyc(\.\d+)?")


class ManifestError(ValueError):
    """The repository's files are not those it was assembled from. One line, naming the file."""


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


@dataclass(frozen=True)
class Manifest:
    """The content of `MANIFEST.json`.

    Attributes:
        files: the SHA-256 of every listed file, by its path in the repository.
        live: the version of the router that answers; None: one that was assembled by an earlier
            release, which did not say.
        replaced: while files are being replaced, the SHA-256 of what they were.
        apart: folders that come or go, which are not looked at.
    """

    files: Mapping[str, str]
    live: int | None = None
    replaced: Mapping[str, str] = field(default_factory=dict)
    apart: Sequence[str] = ()

    @classmethod
    def read(cls, repository: Path) -> Manifest:
        """Read it.

        Raises:
            ManifestError: there is none that can be read.
        """
        try:
            content = json.loads((repository / NAME).read_text())
            rest = (content.get(name) for name in ("live", "replaced", "apart"))
            live, replaced, apart = rest
            return cls(dict(content["files"]), live, dict(replaced or {}), tuple(apart or ()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ManifestError(
                f"{NAME} is missing or unreadable ({error}); copy it along with the models, or run "
                "python -m export repository again"
            ) from None


def listed(repository: Path) -> Mapping[str, str]:
    """The SHA-256 of every listed file, by its path in the repository.

    Raises:
        ManifestError: no readable manifest.
    """
    return Manifest.read(repository).files


def verify(repository: Path, but: str = "") -> None:
    """Compare every listed file with its hash, and refuse whatever is not listed.

    What lies in the folder `but` does not matter.

    Raises:
        ManifestError: no readable manifest; a file that is missing or differs, or a file, a folder
            or a link that is not listed, by name.
    """
    found = Manifest.read(repository)
    passed = [folder for folder in (*found.apart, but) if folder]
    _refuse_unlisted(repository, found.files, passed)
    for name, expected in found.files.items():
        if is_below(name, passed):
            continue
        path = repository / name
        if not path.is_file():
            raise ManifestError(f"{name} is listed in {NAME} but missing; assemble again")
        if sha256_file(path) not in (expected, found.replaced.get(name)):
            raise ManifestError(f"{name} differs from its SHA-256 in {NAME}; assemble again")


def refuse_unlisted(repository: Path) -> None:
    """The part of `verify` that reads no file but the manifest, and takes milliseconds.

    Raises:
        ManifestError: no readable manifest, or a file, a folder or a link that is not listed.
    """
    found = Manifest.read(repository)
    _refuse_unlisted(repository, found.files, found.apart)


def is_below(name: str, folders: Sequence[str]) -> bool:
    """Whether a path in the repository lies in one of these folders of it."""
    return any(folder and name.startswith(folder + "/") for folder in folders)


def _refuse_unlisted(repository: Path, files: Mapping[str, str], passed: Sequence[str]) -> None:
    """Refuse the first entry that nobody listed.

    Not looked at: the manifest, the folders in `passed`, and the new content of a listed file that
    an interrupted update has not put in its place. Of bytecode, what Python itself has left for a
    listed source: it lies there as long as a server runs. What a forged file holds is not seen
    here, so `python -m server` removes such files before it starts one.
    """
    folders = {parent.as_posix() for name in files for parent in PurePosixPath(name).parents}
    for name, is_folder in entries(repository, passed):
        if name in (folders if is_folder else files):
            continue
        if _is_left_by_python(repository, name, is_folder, files, folders):
            continue
        base, _, number = name.rpartition(".")
        if not is_folder and (name == NAME or (number.isdigit() and base in {NAME, *files})):
            continue
        raise ManifestError(
            f"{name} is not listed in {NAME}, and could be served in place of what is; remove it, "
            "or assemble again"
        )


def entries(repository: Path, passed: Sequence[str]) -> Iterator[tuple[str, bool]]:
    """Paths in the repository, a folder's content before itself, and whether each is a folder.

    A link to a folder counts as a file: no such thing is ever listed.
    """

    def complain(error: OSError) -> None:
        if isinstance(error, FileNotFoundError):  # Gone since, as bytecode of a server that stops.
            return
        name = Path(error.filename).relative_to(repository).as_posix()
        raise ManifestError(f"{name} cannot be looked at ({error.strerror})") from None

    for place, folders, names in os.walk(repository, onerror=complain):
        here = Path(place)
        below = here.relative_to(repository)
        inner = [name for name in sorted(folders) if not (here / name).is_symlink()]
        names += [name for name in folders if name not in inner]
        folders[:] = [name for name in inner if (below / name).as_posix() not in passed]
        yield from (((below / name).as_posix(), False) for name in sorted(names))
        if not folders and not names and here != repository:
            yield below.as_posix(), True


def _is_left_by_python(
    repository: Path,
    name: str,
    is_folder: bool,
    files: Collection[str],
    folders: Collection[str],
) -> bool:
    """Whether it is bytecode of a listed source, of the kind that Python writes by itself.

    That names its source's time and size. The other kind, which names a hash and may be loaded
    without a look at the source, is only made on purpose.
    """
    path = PurePosixPath(name)
    if is_folder:
        return path.name == BYTECODE and path.parent.as_posix() in folders
    found = _BYTECODE_NAME.fullmatch(path.name)
    if path.parent.name != BYTECODE or not found:
        return False
    if (path.parent.parent / f"{found[1]}.py").as_posix() not in files:
        return False
    file = repository / name
    if file.is_symlink():
        return False
    if found[2]:  # On its way to its name, under which it is looked at.
        return True
    try:
        with file.open("rb") as opened:
            return opened.read(8)[4:] == bytes(4)
    except FileNotFoundError:  # Gone since, as by a server that stops.
        return True
    except OSError:
        return False
