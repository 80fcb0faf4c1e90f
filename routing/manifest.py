"""SHA-256 of every file of an assembled model repository, so that a mixed one cannot start."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

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
    content = {"schema_version": SCHEMA_VERSION, "files": files}
    (repository / NAME).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def verify(repository: Path) -> None:
    """Compare every listed file with its hash. Files that are not listed are not looked at.

    Raises:
        ManifestError: no readable manifest, or a file that is missing or differs, by name.
    """
    try:
        content = json.loads((repository / NAME).read_text())
        files: dict[str, str] = content["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ManifestError(
            f"{NAME} is missing or unreadable ({error}); copy it along with the models, or run "
            "python -m export repository again"
        ) from None
    for name, expected in files.items():
        path = repository / name
        if not path.is_file():
            raise ManifestError(f"{name} is listed in {NAME} but missing; assemble again")
        if sha256_file(path) != expected:
            raise ManifestError(f"{name} differs from its SHA-256 in {NAME}; assemble again")
