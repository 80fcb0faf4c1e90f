"""Prepare the directory of backends that a server runs with.

A server that has the C++ onnxruntime backend and a complete python backend, as in NVIDIA's images,
runs with its own directory, untouched. Any other gets a private one: its own backends linked, the
python backend and its stub out of the wheel where it has none, and the stand-in for onnxruntime.
"""

from __future__ import annotations

import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from .errors import ServerUsageError
from .finding import Tritonserver, Wheel

STAND_IN = Path(__file__).parent / "backends" / "onnxruntime"
STUB_NAME = "triton_python_backend_stub"
RUNNING_PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


@dataclass(frozen=True)
class BackendDirectory:
    """The backends that a server will run with.

    Attributes:
        path: value of Triton's `--backend-directory`.
        library_directories: directories its backends need on LD_LIBRARY_PATH.
        stub_python: the Python version that the python backend's stub embeds, such as `3.11`; None
            where that cannot be told.
    """

    path: Path
    library_directories: tuple[Path, ...]
    stub_python: str | None


def prepare_backend_directory(
    server: Tritonserver,
    destination: Path,
    wheel: Wheel | None,
    python_version: str = RUNNING_PYTHON,
) -> BackendDirectory:
    """Give the server's own backend directory if it is complete, else build one.

    Args:
        server: the server that was found.
        destination: a directory to build in; left alone if the server's own is complete.
        wheel: where the python backend comes from if the server has none.
        python_version: the Python to run models with if the python backend is the wheel's.

    Raises:
        ServerUsageError: no python backend to be had, or no stub for this Python.
    """
    own = server.backend_directory
    own_python = own / "python" if own is not None and _has_python(own) else None
    own_onnxruntime = own is not None and _has_onnxruntime(own)
    if own is not None and own_python is not None and own_onnxruntime:
        return BackendDirectory(own, (), _embedded_python(own_python / STUB_NAME))

    destination.mkdir(parents=True, exist_ok=True)
    for entry in sorted(own.iterdir()) if own is not None else ():
        if entry.name == "python" or (entry.name == "onnxruntime" and not own_onnxruntime):
            continue
        (destination / entry.name).symlink_to(entry.absolute())
    libraries: tuple[Path, ...] = ()
    target = destination / "python"
    if own_python is not None:
        _copy_python_backend(own_python, own_python / STUB_NAME, target)
    else:
        wheel_python, stub = _wheel_python(server, wheel, python_version)
        _copy_python_backend(wheel_python, stub, target)
        libraries = (wheel.libraries,) if wheel is not None else ()
    if not own_onnxruntime:
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(STAND_IN, destination / "onnxruntime", ignore=ignore)
    return BackendDirectory(destination, libraries, _embedded_python(target / STUB_NAME))


def _has_python(backends: Path) -> bool:
    # The wheel's own backend directory has the library but no stub: not complete.
    python = backends / "python"
    return (python / "libtriton_python.so").is_file() and (python / STUB_NAME).is_file()


def _has_onnxruntime(backends: Path) -> bool:
    return (backends / "onnxruntime" / "libtriton_onnxruntime.so").is_file()


def _wheel_python(
    server: Tritonserver, wheel: Wheel | None, python_version: str
) -> tuple[Path, Path]:
    if wheel is None:
        raise ServerUsageError(
            f"{server.binary} has no python backend beside it; give --backend-directory, or "
            "pip install --no-deps nvidia-pytriton==0.7.0"
        )
    stub = wheel.stub(python_version)
    if not stub.is_file():
        raise ServerUsageError(
            f"nvidia-pytriton has no python backend for Python {python_version}, only for "
            f"{', '.join(wheel.python_versions)}; make the virtual environment with one of those"
        )
    return wheel.root / "backends" / "python", stub


def _copy_python_backend(backend: Path, stub: Path, target: Path) -> None:
    # Copies, not links: Triton refuses a python-based backend whose libtriton_python.so resolves to
    # somewhere outside the backend directory.
    shutil.copytree(backend, target, ignore=shutil.ignore_patterns("__pycache__", STUB_NAME))
    shutil.copy2(stub, target / STUB_NAME)
    (target / STUB_NAME).chmod(0o755)


def _embedded_python(stub: Path) -> str | None:
    """Read from a stub which Python library it is linked against."""
    match = re.search(rb"libpython(3\.\d+)", stub.read_bytes())
    return match.group(1).decode() if match else None
