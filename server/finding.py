"""Find a tritonserver: told, on PATH, or inside the nvidia-pytriton wheel."""

from __future__ import annotations

import importlib.util
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from .errors import ServerUsageError

# Triton's own default, used by NVIDIA's images.
IMAGE_BACKEND_DIRECTORY = Path("/opt/tritonserver/backends")


@dataclass(frozen=True)
class Wheel:
    """What the nvidia-pytriton wheel holds of Triton.

    Attributes:
        root: `pytriton/tritonserver`, with `bin`, `backends` and `python_backend_stubs`.
        libraries: the shared libraries that the wheel bundles for them.
    """

    root: Path
    libraries: Path

    @property
    def binary(self) -> Path:
        """The server's executable."""
        return self.root / "bin" / "tritonserver"

    @property
    def python_versions(self) -> list[str]:
        """Python versions that have a stub, such as `3.11`, oldest first."""
        names = [path.name for path in (self.root / "python_backend_stubs").iterdir()]
        return sorted(names, key=lambda name: [int(part) for part in name.split(".")])

    def stub(self, python_version: str) -> Path:
        """The python backend's stub for a Python version; it need not exist."""
        return self.root / "python_backend_stubs" / python_version / "triton_python_backend_stub"


@dataclass(frozen=True)
class Tritonserver:
    """A tritonserver that was found.

    Attributes:
        binary: the executable, or a wrapper of it, as it will be started.
        backend_directory: its own backends, None where none were found beside it.
        library_directories: directories it needs on LD_LIBRARY_PATH.
    """

    binary: Path
    backend_directory: Path | None
    library_directories: tuple[Path, ...]


def find_wheel() -> Wheel | None:
    """Locate the nvidia-pytriton wheel without importing it; None if it is not installed."""
    # Importing pytriton would pull in its whole serving stack; only its files are wanted.
    spec = importlib.util.find_spec("pytriton")
    for location in (spec.submodule_search_locations or []) if spec else []:
        package = Path(location)
        wheel = Wheel(package / "tritonserver", package.parent / "nvidia_pytriton.libs")
        if wheel.binary.is_file():
            return wheel
    return None


def find_tritonserver(
    explicit: Path | None = None,
    backend_directory: Path | None = None,
    search_path: str | None = None,
    wheel: Wheel | None = None,
) -> Tritonserver:
    """Find the server to run.

    Args:
        explicit: a path to use, nothing else then.
        backend_directory: the server's backends, where they are not in their usual place.
        search_path: directories to search instead of the environment's PATH.
        wheel: the wheel to fall back to, None where it is not installed.

    Raises:
        ServerUsageError: there is none, or `explicit` or `backend_directory` is not usable.
    """
    if backend_directory is not None and not backend_directory.is_dir():
        raise ServerUsageError(
            f"no backend directory at {backend_directory}; give the one of your tritonserver"
        )
    if explicit is not None:
        if not (explicit.is_file() and os.access(explicit, os.X_OK)):
            raise ServerUsageError(
                f"{explicit} is not an executable file; give the path of a tritonserver binary"
            )
        return _described(explicit, backend_directory, wheel)
    on_path = shutil.which("tritonserver", path=search_path)
    if on_path is not None:
        return _described(Path(on_path), backend_directory, wheel)
    if wheel is not None:
        return _described(wheel.binary, backend_directory, wheel)
    raise ServerUsageError(
        "no tritonserver found on PATH or in this Python; pip install --no-deps "
        "nvidia-pytriton==0.7.0, or run inside NVIDIA's Triton image"
    )


def _described(binary: Path, backend_directory: Path | None, wheel: Wheel | None) -> Tritonserver:
    real = binary.resolve()
    beside = real.parent.parent / "backends"
    candidates = [backend_directory] if backend_directory else [beside, IMAGE_BACKEND_DIRECTORY]
    # The server runs in a working directory of its own, where a relative path leads elsewhere.
    found = next((path.absolute() for path in candidates if path.is_dir()), None)
    # A link to the wheel's binary needs the wheel's libraries as much as the binary itself.
    is_wheel = wheel is not None and real == wheel.binary.resolve()
    libraries = (wheel.libraries,) if wheel is not None and is_wheel else ()
    return Tritonserver(binary.absolute(), found, libraries)
