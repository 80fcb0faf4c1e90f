"""Write and change `MANIFEST.json`; `routing.manifest` reads it, for the router as well.

Callers outside of the router import both halves from here.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from routing.manifest import BYTECODE, SCHEMA_VERSION, entries, is_below
from routing.manifest import NAME as NAME
from routing.manifest import Manifest as Manifest
from routing.manifest import ManifestError as ManifestError
from routing.manifest import listed as listed
from routing.manifest import refuse_unlisted as refuse_unlisted
from routing.manifest import sha256_file as sha256_file
from routing.manifest import verify as verify


def write(repository: Path, live: int | None = None) -> None:
    """Write `MANIFEST.json` over everything below a freshly assembled repository.

    `live` is the version of the router that answers.
    """
    files = {
        path.relative_to(repository).as_posix(): sha256_file(path)
        for path in sorted(repository.rglob("*"))
        if path.is_file() and path != repository / NAME
    }
    (repository / NAME).write_text(_text(Manifest(files, live)))


def remove_unlisted_bytecode(repository: Path) -> None:
    """Remove the files in folders of bytecode that are not listed, and folders left empty.

    Raises:
        ManifestError: no readable manifest, a folder that cannot be looked at, or a file that
            cannot be removed.
    """
    found = Manifest.read(repository)
    for name, is_folder in entries(repository, found.apart):
        is_bytecode = PurePosixPath(name).parent.name == BYTECODE
        if is_folder or not is_bytecode or name in found.files:
            continue
        file = repository / name
        try:
            file.unlink(missing_ok=True)
        except OSError as error:
            raise ManifestError(
                f"{name} cannot be removed ({error.strerror}), and Python may run it in place of "
                "its source; remove it"
            ) from error
        with suppress(OSError):  # Something listed lies beside it.
            file.parent.rmdir()


def update(
    repository: Path,
    texts: Mapping[str, str],
    added: tuple[str, Path] | None = None,
    removed: str = "",
    live: int | None = None,
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
        live: the version of the router that answers from now on; None: the same as before.

    Raises:
        ManifestError: as `verify`.
        OSError: a file cannot be written, a full disk for one; nothing has changed. Or the removed
            folder cannot be deleted; nothing of it is listed any more.
    """
    verify(repository, but=removed)
    before = Manifest.read(repository)
    left = [name for name in before.apart if (repository / name).exists()]
    after = {name: sha for name, sha in before.files.items() if not is_below(name, [removed])}
    for name, text in texts.items():
        after[name] = hashlib.sha256(text.encode()).hexdigest()
    live = before.live if live is None else live
    # As they lie there, which after an interrupted update may be what that one was to replace.
    replaced = {name: sha256_file(repository / name) for name in texts}
    passing = [*left, *([added[0]] if added else []), *([removed] if removed else [])]
    meanwhile = _text(Manifest(after, live, replaced, passing))
    if added:
        folder, source = added
        for path in sorted(source.rglob("*")):
            if path.is_file():
                name = f"{folder}/{path.relative_to(source).as_posix()}"
                after[name] = sha256_file(path)
    # All are written before the first is renamed: a disk is full before anything has changed.
    steps = [(NAME, meanwhile), *texts.items(), (NAME, _text(Manifest(after, live, {}, left)))]
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


def _text(manifest: Manifest) -> str:
    content: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "files": manifest.files}
    if manifest.live is not None:
        content["live"] = manifest.live
    if manifest.replaced:
        content["replaced"] = manifest.replaced
    if manifest.apart:
        content["apart"] = manifest.apart
    return json.dumps(content, indent=2, sort_keys=True) + "\n"
