"""Paths that everybody reads alike, by links of plain names where they are not plain themselves.

Triton's python backend starts each model by `bash -c "exec STUB MODEL.py ... BACKENDS INSTANCE"`
and quotes nothing: a space makes it wait for ever, and `$(...)` would be run. (Seen on 2.51.0; what
enters there are the model repository, the backend directory, a model's name, its EXECUTION_ENV and
its default_model_filename.) PATH and LD_LIBRARY_PATH have signs of their own, `:`, `;` and `$LIB`,
and the stub takes a path that is not ASCII for an error where the locale is plain C.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from bundle import config

from .errors import ServerUsageError

_PLAIN = re.compile(r"[A-Za-z0-9_./+=@%,-]+")
_LONGEST_PLAIN_BYTES = 1000
# What lies in a repository or a virtual environment has to be reached, too.
_LONGEST_BYTES = 4096 - 512  # of PATH_MAX
# Triton's own word for where the model is.
_MODEL_DIRECTORY = "$$TRITON_MODEL_DIRECTORY"


def is_plain(path: Path | str) -> bool:
    """Whether a shell, a list of paths and every locale take a path for itself."""
    text = str(path)
    return _PLAIN.fullmatch(text) is not None and len(text) <= _LONGEST_PLAIN_BYTES


def plain(path: Path, folder: Path, name: str) -> Path:
    """The path itself if it is plain, else a link to it.

    Args:
        path: an absolute path.
        folder: a folder with a plain path, where the link is made unless it is there.
        name: of the link.

    Raises:
        ServerUsageError: the path is so long that not all below it can be reached.
    """
    if len(os.fsencode(path)) > _LONGEST_BYTES:
        raise ServerUsageError(
            f"the path {str(path)[:40]}... has {len(os.fsencode(path))} bytes, and Linux opens no "
            "file below it by a name longer than 4095; give it by a shorter one, such as a link"
        )
    if is_plain(path):
        return path
    link = folder / name
    if not link.is_symlink():
        link.symlink_to(path)
    return link


def check_names(repository: Path, models: list[str]) -> None:
    """Refuse models whose names, or paths in their configurations, are read by a shell as more.

    Raises:
        ServerUsageError: naming the model and what to change.
    """
    for model in models:
        if not is_plain(model):
            raise ServerUsageError(
                f"the model {model!r} in {repository} has a name that Triton hands to a shell; "
                "rename its folder to letters, digits and _.-"
            )
        try:
            read = config.read(repository / model / "config.pbtxt")
        except config.ConfigError:  # Triton says what is wrong with it, or makes one.
            continue
        environment = read.parameters["EXECUTION_ENV"].string_value
        for value in (read.default_model_filename, environment.replace(_MODEL_DIRECTORY, "")):
            if value and not is_plain(value):
                raise ServerUsageError(
                    f"the config.pbtxt of {model} names the path {value!r}, which Triton hands to "
                    "a shell; rename it to letters, digits and /_.-"
                )
