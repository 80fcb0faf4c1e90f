"""The model repository that is served: its models, what does not belong there, its bytecode."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from bundle import manifest
from routing import ManifestError

from .errors import ServerUsageError
from .paths import check_names


def check_repository(repository: Path, models: Sequence[str] | None = None) -> list[str]:
    """See that a repository can be served; bytecode that would hide its sources goes.

    Args:
        repository: the model repository.
        models: those that must be ready; every one in it if not given.

    Returns:
        Those models.

    Raises:
        ServerUsageError: it is not there, cannot be read, or holds what was not assembled.
    """
    loaded = models_in(repository)  # all of them, whichever must be ready
    check_names(repository, loaded)
    if (repository / manifest.NAME).is_file():
        # Its router compares files with their hashes, but Triton has loaded by then what is not
        # listed. And Python takes bytecode for a listed source's whose time and size it names.
        try:
            manifest.refuse_unlisted(repository)
            manifest.remove_unlisted_bytecode(repository)
        except ManifestError as error:
            raise ServerUsageError(f"{repository}: {error}") from error
    return loaded if models is None else list(models)


def models_in(repository: Path) -> list[str]:
    """Names of the models: every folder is one, Triton accepts no other.

    Raises:
        ServerUsageError: the repository does not exist, cannot be read or holds no model.
    """
    if repository.is_dir() and not os.access(repository, os.R_OK | os.X_OK):
        raise ServerUsageError(f"{repository} cannot be read; give this user the right to")
    names = sorted(path.name for path in repository.glob("*") if path.is_dir())
    if not names:
        what = f"the model repository {repository} holds no model"
        if not repository.is_dir():
            what = f"no model repository at {repository}"
        raise ServerUsageError(
            f"{what}; build it with `python -m export repository`, or give another --repository"
        )
    return names


def bytecode(repository: Path) -> set[Path]:
    """The folders of bytecode in a repository."""
    return set(repository.rglob("__pycache__"))


def remove_bytecode(repository: Path, but: set[Path]) -> None:
    """Remove the bytecode that a server left.

    Triton's stub for Python 3.11 and later ignores PYTHONDONTWRITEBYTECODE.

    Args:
        repository: the model repository.
        but: folders that were there before.
    """
    for folder in bytecode(repository) - but:
        shutil.rmtree(folder, ignore_errors=True)
