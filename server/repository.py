"""A model repository as the server sees it: the models in it, and what Python leaves there."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

from bundle import manifest
from bundle import versions as router_versions
from bundle.versions import VersionError, Versions
from routing import ManifestError

from .errors import ServerUsageError


def models_in(repository: Path) -> list[str]:
    """Names of the models: every folder is one, Triton accepts no other.

    Raises:
        ServerUsageError: the repository does not exist or holds no model.
    """
    if not repository.is_dir():
        raise ServerUsageError(
            f"no model repository at {repository}; build it with `python -m export repository`, "
            "or give another --repository"
        )
    names = sorted(path.name for path in repository.iterdir() if path.is_dir())
    if not names:
        raise ServerUsageError(
            f"the model repository {repository} holds no model; build it with "
            "`python -m export repository`"
        )
    return names


def require_as_assembled(repository: Path) -> None:
    """Refuse a repository with more in it than was assembled; one without a manifest passes.

    Its router compares every file with its hash when it starts; but Triton then has already loaded
    what else there is. Python's bytecode is removed, so that the listed sources are run: Python
    takes it for that of a source whose time and size it names.

    Raises:
        ServerUsageError: naming the first file, folder or link that is not listed, or bytecode that
            cannot be removed.
    """
    if not (repository / manifest.NAME).is_file():
        return
    try:
        manifest.refuse_unlisted(repository)
        for file in manifest.unlisted_bytecode(repository):
            file.unlink(missing_ok=True)
            with suppress(OSError):  # Something listed lies beside it.
                file.parent.rmdir()
    except ManifestError as error:
        raise ServerUsageError(f"{repository}: {error}") from error
    except OSError as error:
        raise ServerUsageError(
            f"{error.filename} cannot be removed ({error.strerror}), and Python may run it in "
            "place of its source; remove it, and start again"
        ) from error


def refuse_higher_versions(repository: Path) -> None:
    """Refuse a repository that loads a version of the router above the one that answers.

    Raises:
        ServerUsageError: it would answer requests that pin no version, which nobody let it.
    """
    try:
        found = Versions.load(repository)
    except VersionError:  # Not one of ours.
        return
    if found.fault:
        raise ServerUsageError(
            f"{repository}: {found.fault}; run python -m export versions --repository {repository} "
            f"--live {found.live}, and start again"
        )


def refuses_other_answers(repository: Path) -> bool:
    """Whether its router answers nobody before its answers have been found to be as calibrated."""
    try:
        return router_versions.refuses_other_answers(repository)
    except VersionError:  # Not one of ours, or of a release before there was such a router.
        return False


def bytecode_folders(repository: Path) -> set[Path]:
    """The `__pycache__` folders below a repository."""
    return set(repository.rglob("__pycache__"))


def remove_new_bytecode(repository: Path, before: set[Path]) -> None:
    """Remove `__pycache__` folders that were not there before the server ran.

    Triton's stub for Python 3.11 and later ignores PYTHONDONTWRITEBYTECODE, and a repository with
    a manifest should be the same after serving as before it.
    """
    for folder in bytecode_folders(repository) - before:
        shutil.rmtree(folder, ignore_errors=True)
