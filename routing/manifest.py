"""SHA-256 of every file of an assembled model repository, so that a mixed one cannot start.

Nor one with more in it: Triton takes a folder of any number for a version of its model, and Python
a file of the right name for a module, so what is not listed could be served in place of what is.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

NAME = "MANIFEST.json"
SCHEMA_VERSION = 1
_BYTECODE = "__pycache__"
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


def write(repository: Path) -> None:
    """Write `MANIFEST.json` over everything below a freshly assembled repository."""
    files = {
        path.relative_to(repository).as_posix(): sha256_file(path)
        for path in sorted(repository.rglob("*"))
        if path.is_file() and path != repository / NAME
    }
    (repository / NAME).write_text(_text(files))


def listed(repository: Path) -> dict[str, str]:
    """The SHA-256 of every listed file, by its path in the repository.

    Raises:
        ManifestError: no readable manifest.
    """
    return _load(repository)[0]


def verify(repository: Path, but: str = "") -> None:
    """Compare every listed file with its hash, and refuse whatever is not listed.

    Args:
        repository: the assembled repository.
        but: a folder of it that does not matter.

    Raises:
        ManifestError: no readable manifest; a file that is missing or differs, or a file, a folder
            or a link that is not listed, by name.
    """
    files, replaced, apart = _load(repository)
    passed = [folder for folder in (*apart, but) if folder]
    _refuse_unlisted(repository, files, passed)
    for name, expected in files.items():
        if _is_below(name, passed):
            continue
        path = repository / name
        if not path.is_file():
            raise ManifestError(f"{name} is listed in {NAME} but missing; assemble again")
        if sha256_file(path) not in (expected, replaced.get(name)):
            raise ManifestError(f"{name} differs from its SHA-256 in {NAME}; assemble again")


def refuse_unlisted(repository: Path) -> None:
    """The part of `verify` that reads no file but the manifest, and takes milliseconds.

    Raises:
        ManifestError: no readable manifest, or a file, a folder or a link that is not listed.
    """
    files, _, apart = _load(repository)
    _refuse_unlisted(repository, files, apart)


def unlisted_bytecode(repository: Path) -> list[Path]:
    """The files in folders of bytecode that are not listed.

    Raises:
        ManifestError: no readable manifest, or a folder that cannot be looked at.
    """
    files, _, apart = _load(repository)
    return [
        repository / name
        for name, is_folder in _entries(repository, apart)
        if not is_folder and name not in files and PurePosixPath(name).parent.name == _BYTECODE
    ]


def update(
    repository: Path,
    texts: Mapping[str, str],
    added: tuple[str, Path] | None = None,
    removed: str = "",
) -> None:
    """Replace small files of an assembled repository, and add or remove a folder of it.

    Everything that stays is verified first, so that no other change is taken for good. Each step
    is one rename, and the repository verifies between any two: while files are being replaced the
    manifest accepts what they were, too, and a folder that comes or goes is not looked at. One that
    an interrupted update left half way stays so marked until it is gone.

    Args:
        repository: the assembled repository.
        texts: new content of listed files, by path in the repository.
        added: a folder's name in the repository, and where it lies complete, on the same file
            system; it is moved.
        removed: a folder that is deleted.

    Raises:
        ManifestError: as `verify`.
        OSError: a file cannot be written, a full disk for one; nothing has changed. Or the removed
            folder cannot be deleted; nothing of it is listed any more.
    """
    verify(repository, but=removed)
    before, _, apart = _load(repository)
    left = [name for name in apart if (repository / name).exists()]
    after = {name: digest for name, digest in before.items() if not _is_below(name, [removed])}
    for name, text in texts.items():
        after[name] = hashlib.sha256(text.encode()).hexdigest()
    # As they lie there, which after an interrupted update may be what that one was to replace.
    replaced = {name: sha256_file(repository / name) for name in texts}
    passing = [*left, *([added[0]] if added else []), *([removed] if removed else [])]
    meanwhile = _text(after, replaced, passing)
    if added:
        folder, source = added
        for path in sorted(source.rglob("*")):
            if path.is_file():
                name = f"{folder}/{path.relative_to(source).as_posix()}"
                after[name] = sha256_file(path)
    # All are written before the first is renamed: a disk is full before anything has changed.
    steps = [(NAME, meanwhile), *texts.items(), (NAME, _text(after, {}, left))]
    fresh: list[Path] = []
    try:
        for index, (name, text) in enumerate(steps):
            fresh.append(repository / f"{name}.{index}")
            fresh[-1].write_text(text)
        for index, ((name, _), file) in enumerate(zip(steps, fresh, strict=True)):
            if removed and index == len(steps) - 1:
                shutil.rmtree(repository / removed)
            file.replace(repository / name)
            if added and index == 0:
                added[1].rename(repository / added[0])
    finally:
        for file in fresh:
            file.unlink(missing_ok=True)


def _is_below(name: str, folders: list[str]) -> bool:
    return any(folder and name.startswith(folder + "/") for folder in folders)


def _refuse_unlisted(repository: Path, files: Mapping[str, str], passed: list[str]) -> None:
    """Refuse the first entry that nobody listed.

    Not looked at: the manifest, the folders in `passed`, and the new content of a listed file that
    an interrupted `update` has not put in its place. Of bytecode, what Python itself has left for
    a listed source: it lies there as long as a server runs. What a forged file holds is not seen
    here, so `python -m server` removes such files before it starts one (`unlisted_bytecode`).
    """
    folders = {parent.as_posix() for name in files for parent in PurePosixPath(name).parents}
    for name, is_folder in _entries(repository, passed):
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


def _entries(repository: Path, passed: list[str]) -> Iterator[tuple[str, bool]]:
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
        return path.name == _BYTECODE and path.parent.as_posix() in folders
    found = _BYTECODE_NAME.fullmatch(path.name)
    if path.parent.name != _BYTECODE or not found:
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


def _load(repository: Path) -> tuple[dict[str, str], dict[str, str], list[str]]:
    """The hashes of all files, those that files being replaced had, and folders on their way."""
    try:
        content = json.loads((repository / NAME).read_text())
        files: dict[str, str] = content["files"]
        replaced: dict[str, str] = content.get("replaced", {})
        apart: list[str] = content.get("apart", [])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ManifestError(
            f"{NAME} is missing or unreadable ({error}); copy it along with the models, or run "
            "python -m export repository again"
        ) from None
    return files, replaced, apart


def _text(
    files: Mapping[str, str],
    replaced: Mapping[str, str] | None = None,
    apart: list[str] | None = None,
) -> str:
    content: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "files": files}
    if replaced:
        content["replaced"] = replaced
    if apart:
        content["apart"] = apart
    return json.dumps(content, indent=2, sort_keys=True) + "\n"
