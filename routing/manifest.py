"""SHA-256 of every file of an assembled model repository, so that a mixed one cannot start."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

NAME = "MANIFEST.json"
SCHEMA_VERSION = 1


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
        if path.is_file() and path.name != NAME
    }
    (repository / NAME).write_text(_text(files, {}))


def listed(repository: Path) -> dict[str, str]:
    """The SHA-256 of every listed file, by its path in the repository.

    Raises:
        ManifestError: no readable manifest.
    """
    return _load(repository)[0]


def verify(repository: Path, but: str = "") -> None:
    """Compare every listed file with its hash. Files that are not listed are not looked at.

    Args:
        repository: the assembled repository.
        but: a folder of it that does not matter.

    Raises:
        ManifestError: no readable manifest, or a file that is missing or differs, by name.
    """
    files, replaced = _load(repository)
    for name, expected in files.items():
        if _is_below(name, but):
            continue
        path = repository / name
        if not path.is_file():
            raise ManifestError(f"{name} is listed in {NAME} but missing; assemble again")
        if sha256_file(path) not in (expected, replaced.get(name)):
            raise ManifestError(f"{name} differs from its SHA-256 in {NAME}; assemble again")


def update(repository: Path, texts: Mapping[str, str], added: str = "", removed: str = "") -> None:
    """Replace small files of an assembled repository, and list or unlist a folder of it.

    Everything that stays is verified first, so that no other change is taken for good. Each step
    is one rename, and the repository verifies between any two: while files are being replaced the
    manifest accepts what they were, too.

    Args:
        repository: the assembled repository.
        texts: new content of listed files, by path in the repository.
        added: a folder that lies there complete and is not listed yet.
        removed: a folder whose files are no longer listed; it is left where it is.

    Raises:
        ManifestError: as `verify`.
        OSError: a file cannot be written, a full disk for one; nothing has changed.
    """
    verify(repository, but=removed)
    before, _ = _load(repository)
    after = {name: digest for name, digest in before.items() if not _is_below(name, removed)}
    if added:
        for path in sorted((repository / added).rglob("*")):
            if path.is_file():
                after[path.relative_to(repository).as_posix()] = sha256_file(path)
    for name, text in texts.items():
        after[name] = hashlib.sha256(text.encode()).hexdigest()
    # As they lie there, which after an interrupted update may be what that one was to replace.
    replaced = {name: sha256_file(repository / name) for name in texts}
    # All are written before the first is renamed: a disk is full before anything has changed.
    steps = [(NAME, _text(after, replaced)), *texts.items(), (NAME, _text(after, {}))]
    fresh: list[Path] = []
    try:
        for index, (name, text) in enumerate(steps):
            fresh.append(repository / f"{name}.{index}")
            fresh[-1].write_text(text)
        for (name, _), file in zip(steps, fresh, strict=True):
            file.replace(repository / name)
    finally:
        for file in fresh:
            file.unlink(missing_ok=True)


def _is_below(name: str, folder: str) -> bool:
    return bool(folder) and name.startswith(folder + "/")


def _load(repository: Path) -> tuple[dict[str, str], dict[str, str]]:
    """The hashes of all files, and what files that are being replaced had before."""
    try:
        content = json.loads((repository / NAME).read_text())
        files: dict[str, str] = content["files"]
        replaced: dict[str, str] = content.get("replaced", {})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ManifestError(
            f"{NAME} is missing or unreadable ({error}); copy it along with the models, or run "
            "python -m export repository again"
        ) from None
    return files, replaced


def _text(files: Mapping[str, str], replaced: Mapping[str, str]) -> str:
    content: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "files": files}
    if replaced:
        content["replaced"] = replaced
    return json.dumps(content, indent=2, sort_keys=True) + "\n"
