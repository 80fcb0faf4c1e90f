"""Find a tritonserver, its backends, and the environment and command it starts with.

A server is the one that was named, the one on PATH, or the one inside the nvidia-pytriton wheel. If
it has the C++ onnxruntime backend and a complete python backend, as in NVIDIA's images, it runs
with its own backends, untouched. Any other gets a directory of its own: its backends linked, the
python backend and its stub out of the wheel where it has none, and the stand-in for onnxruntime.
"""

from __future__ import annotations

import ctypes.util
import importlib.util
import os
import re
import shutil
import sys
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .errors import ServerUsageError
from .paths import plain
from .ports import Addresses, Ports
from .preconditions import check_runs_programs

# Triton's own default, used by NVIDIA's images.
IMAGE_BACKEND_DIRECTORY = Path("/opt/tritonserver/backends")
STAND_IN = Path(__file__).parent / "backends" / "onnxruntime"
STUB_NAME = "triton_python_backend_stub"
RUNNING_PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
_INSTALL_WHEEL = "pip install --no-deps nvidia-pytriton==0.7.0"

# Per Python model instance. Holds a batch of 8 images of 3x224x224 FP32 (4.6 MiB) without growing.
# An adaptive ViT on the stand-in backend has six; they start with 48 of the 64 MiB of /dev/shm that
# a container gets by default; larger batches grow beyond that (deploy/compose.yaml gives 1 GiB).
SHM_BYTES = 8 * 2**20

# Told to stop, Triton waits this long for open HTTP connections, idle ones included; its default
# is 30 s, which looks like a hang.
_EXIT_TIMEOUT_S = 10


@dataclass(frozen=True)
class Wheel:
    """What the nvidia-pytriton wheel holds of Triton, and the libraries that it bundles for it."""

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
        return self.root / "python_backend_stubs" / python_version / STUB_NAME


@dataclass(frozen=True)
class Installation:
    """A tritonserver that can be started.

    Attributes:
        binary: the executable, or a wrapper of it.
        backends: value of Triton's `--backend-directory`.
        libraries: directories that it needs on LD_LIBRARY_PATH.
        stub_python: the Python version that the python backend's stub embeds, such as `3.11`; None
            where that cannot be told.
    """

    binary: Path
    backends: Path
    libraries: tuple[Path, ...]
    stub_python: str | None

    @property
    def has_stand_in(self) -> bool:
        """Whether our stand-in runs the rungs, each in a process, and not the C++ onnxruntime."""
        return not (self.backends / "onnxruntime" / "libtriton_onnxruntime.so").is_file()

    def environment(self, links: Path) -> dict[str, str]:
        """The environment that it and its Python models start with, made of this process's own.

        Args:
            links: a folder for links in place of folders whose paths are not plain.

        Raises:
            ServerUsageError: there is no bash, or this Python has no shared library, which Triton's
                stub is started with and loads.
        """
        # Where programs are looked for that a PATH does not name.
        environment = {**os.environ, "PATH": os.environ.get("PATH") or os.defpath}
        if shutil.which("bash", path=environment["PATH"]) is None:
            raise ServerUsageError(
                "there is no bash on PATH, with which Triton's python backend starts each model; "
                "install it, or give PATH the folder where it is"
            )
        libraries = list(self.libraries)
        if self.stub_python == RUNNING_PYTHON:
            # The stub takes its interpreter, hence its packages, from the first python on PATH.
            # Where it embeds another Python, as an image may, its own packages are the right ones.
            # As a whole, because a virtual environment is known by the file above its programs.
            programs = Path(sys.executable).absolute().parent
            python = plain(programs.parent, links, "python")
            _prepend(environment, "PATH", [python / programs.name])
            libraries += _libpython_directory()
        libraries = [plain(path, links, f"libraries-{n}") for n, path in enumerate(libraries)]
        _prepend(environment, "LD_LIBRARY_PATH", libraries)
        # Each Python model has a process of its own: numpy's thread pools, one per process and as
        # wide as the machine, would fight the rungs for its cores.
        own = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        return {**own, **environment, "PYTHONDONTWRITEBYTECODE": "1"}

    def command(
        self,
        server_id: str,
        repository: Path,
        addresses: Addresses,
        ports: Ports,
        extra_args: Sequence[str] = (),
    ) -> list[str]:
        """The command that it is started with; `extra_args` come last and so win.

        Triton's own strictness stays on: a model that does not load ends the server. `server_id` is
        the name that it reports, and begins its shared-memory segments with.
        """
        arguments = [f"--id={server_id}", f"--model-repository={repository}"]
        arguments += [f"--backend-directory={self.backends}"]
        for name in ("http", "grpc", "metrics"):
            arguments += [f"--{name}-address={getattr(addresses, name)}"]
            arguments += [f"--{name}-port={getattr(ports, name)}"]
        arguments += [f"--exit-timeout-secs={_EXIT_TIMEOUT_S}"]
        for setting in (
            f"shm-region-prefix-name={server_id}_",
            f"shm-default-byte-size={SHM_BYTES}",
            f"shm-growth-byte-size={SHM_BYTES}",
        ):
            arguments += [f"--backend-config=python,{setting}"]
        return [str(self.binary), *arguments, *extra_args]


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


def find_installation(
    destination: Path,
    explicit: Path | None = None,
    backend_directory: Path | None = None,
    *,
    wheel: Wheel | None = None,
) -> Installation:
    """Find the server to run, and prepare its backends.

    Args:
        destination: a directory for the backends; left alone if the server's own are complete.
        explicit: the binary to use, nothing else then.
        backend_directory: the server's backends, where they are not in their usual place.
        wheel: the wheel to fall back to, None where it is not installed.

    Raises:
        ServerUsageError: there is none, or it cannot be used.
    """
    if backend_directory is not None and not backend_directory.is_dir():
        raise ServerUsageError(
            f"no backend directory at {backend_directory}; give the one of your tritonserver"
        )
    binary = _find_binary(explicit, wheel)
    beside = binary.resolve().parent.parent / "backends"
    candidates = [backend_directory] if backend_directory else [beside, IMAGE_BACKEND_DIRECTORY]
    # The server runs in a working directory of its own, where a relative path leads elsewhere.
    own = next((path.absolute() for path in candidates if path.is_dir()), None)
    # A link to the wheel's binary needs the wheel's libraries as much as the binary itself.
    is_wheels = wheel is not None and binary.resolve() == wheel.binary.resolve()
    libraries = (wheel.libraries,) if wheel is not None and is_wheels else ()
    # The wheel's own backend directory has the library but no stub: not complete.
    python = _has(own, "python", "libtriton_python.so", STUB_NAME)
    onnxruntime = _has(own, "onnxruntime", "libtriton_onnxruntime.so")
    if own is not None and python is not None and onnxruntime is not None:
        stub_python = _embedded_python(python / STUB_NAME)
        own = plain(own, destination.parent, "own-backends")
        return Installation(binary, own, libraries, stub_python)

    destination.mkdir(parents=True, exist_ok=True)
    for entry in sorted(own.iterdir()) if own is not None else ():
        if entry.name != "python" and (entry.name != "onnxruntime" or onnxruntime is not None):
            (destination / entry.name).symlink_to(entry.absolute())
    if python is not None:
        stub = python / STUB_NAME
    else:
        python, stub = _wheels_python(binary, wheel)
        libraries = (wheel.libraries,) if wheel is not None else ()
    check_runs_programs(destination)
    # Copies, not links: Triton refuses a python-based backend whose libtriton_python.so resolves to
    # somewhere outside the backend directory.
    target = destination / "python"
    shutil.copytree(python, target, ignore=shutil.ignore_patterns("__pycache__", STUB_NAME))
    shutil.copy2(stub, target / STUB_NAME)
    (target / STUB_NAME).chmod(0o755)
    if onnxruntime is None:
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(STAND_IN, destination / "onnxruntime", ignore=ignore)
    return Installation(binary, destination, libraries, _embedded_python(stub))


def _find_binary(explicit: Path | None, wheel: Wheel | None) -> Path:
    if explicit is not None:
        if not (explicit.is_file() and os.access(explicit, os.X_OK)):
            raise ServerUsageError(
                f"{explicit} is not an executable file; give the path of a tritonserver binary"
            )
        return explicit.absolute()
    on_path = shutil.which("tritonserver")
    if on_path is not None:
        return Path(on_path).absolute()
    if wheel is None:
        raise ServerUsageError(
            f"no tritonserver found on PATH or in this Python; {_INSTALL_WHEEL}, or run inside "
            "NVIDIA's Triton image"
        )
    return wheel.binary.absolute()


def _has(backends: Path | None, name: str, *files: str) -> Path | None:
    """The folder of a backend; None where it is not complete."""
    if backends is None or not all((backends / name / file).is_file() for file in files):
        return None
    return backends / name


def _wheels_python(binary: Path, wheel: Wheel | None) -> tuple[Path, Path]:
    """The wheel's python backend, and its stub."""
    if wheel is None:
        raise ServerUsageError(
            f"{binary} has no python backend beside it; give --backend-directory, or "
            f"{_INSTALL_WHEEL}"
        )
    stub = wheel.stub(RUNNING_PYTHON)
    if not stub.is_file():
        raise ServerUsageError(
            f"nvidia-pytriton has no python backend for Python {RUNNING_PYTHON}, only for "
            f"{', '.join(wheel.python_versions)}; make the virtual environment with one of those"
        )
    return wheel.root / "backends" / "python", stub


def _embedded_python(stub: Path) -> str | None:
    """Read from a stub which Python library it is linked against."""
    match = re.search(rb"libpython(3\.\d+)", stub.read_bytes())
    return match.group(1).decode() if match else None


def _libpython_directory() -> list[Path]:
    """Directory of this Python's shared library; empty where the system's loader finds it."""
    name = sysconfig.get_config_var("INSTSONAME") or ""
    if ".so" not in name:  # Debian builds python3 statically, with the library as a package.
        name = f"libpython{RUNNING_PYTHON}.so.1.0"
    # LIBDIR is wrong in relocated builds (uv, conda), where base_prefix is right.
    for directory in (sysconfig.get_config_var("LIBDIR"), f"{sys.base_prefix}/lib"):
        if directory and (Path(directory) / name).is_file():
            return [Path(directory)]
    if ctypes.util.find_library(f"python{RUNNING_PYTHON}"):
        return []
    raise ServerUsageError(
        f"this Python has no {name}, which Triton's python backend loads; install the package "
        f"libpython{RUNNING_PYTHON}, or use a Python built with --enable-shared"
    )


def _prepend(environment: dict[str, str], variable: str, directories: Iterable[Path]) -> None:
    unique = dict.fromkeys(str(directory) for directory in directories)
    parts = [*unique, *([environment[variable]] if environment.get(variable) else [])]
    if parts:
        environment[variable] = os.pathsep.join(parts)
