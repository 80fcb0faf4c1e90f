"""The environment variables that tritonserver and its Python models start with."""

from __future__ import annotations

import ctypes.util
import os
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from pathlib import Path

from .backend_directory import RUNNING_PYTHON, BackendDirectory
from .errors import ServerUsageError
from .finding import Tritonserver


def server_environment(
    server: Tritonserver, backends: BackendDirectory, base: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Build the environment of a server.

    Args:
        server: the server that was found.
        backends: the backends it will run with.
        base: the environment to start from; this process's own if not given.

    Raises:
        ServerUsageError: this Python has no shared library for Triton's stub to load.
    """
    environment = dict(os.environ if base is None else base)
    libraries = [*server.library_directories, *backends.library_directories]
    if backends.stub_python == RUNNING_PYTHON:
        # The stub takes its interpreter, hence its packages, from the first python on PATH. Where
        # it embeds another Python version, as an image may, its own packages are the right ones.
        _prepend(environment, "PATH", [Path(sys.executable).parent])
        libpython = shared_libpython_directory()
        libraries += [libpython] if libpython is not None else []
    _prepend(environment, "LD_LIBRARY_PATH", libraries)
    # Each Python model has a process of its own: numpy's thread pools, one per process and as wide
    # as the machine, would fight the rungs for its cores.
    environment.setdefault("OMP_NUM_THREADS", "1")
    environment.setdefault("OPENBLAS_NUM_THREADS", "1")
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    return environment


def shared_libpython_directory() -> Path | None:
    """Directory of this Python's shared library; None where the system's loader finds it.

    Raises:
        ServerUsageError: there is no shared library.
    """
    name = sysconfig.get_config_var("INSTSONAME") or ""
    if ".so" not in name:  # Debian builds python3 statically, with the library as a package.
        name = f"libpython{RUNNING_PYTHON}.so.1.0"
    # LIBDIR is wrong in relocated builds (uv, conda), where base_prefix is right.
    for directory in (sysconfig.get_config_var("LIBDIR"), f"{sys.base_prefix}/lib"):
        if directory and (Path(directory) / name).is_file():
            return Path(directory)
    if ctypes.util.find_library(f"python{RUNNING_PYTHON}"):
        return None
    raise ServerUsageError(
        f"this Python has no {name}, which Triton's python backend loads; install the package "
        f"libpython{RUNNING_PYTHON}, or use a Python built with --enable-shared"
    )


def _prepend(environment: dict[str, str], variable: str, directories: Iterable[Path]) -> None:
    unique = dict.fromkeys(str(directory) for directory in directories)
    parts = [*unique, *([environment[variable]] if environment.get(variable) else [])]
    if parts:
        environment[variable] = os.pathsep.join(parts)
