"""Find perf_analyzer, or install it into a folder of its own.

No package index has one perf_analyzer for every Linux: PyPI's `perf-analyzer` is built against
glibc 2.38, and below that its name resolves to an empty placeholder. `tritonclient` 2.50.0 was
the last to carry one for older systems. It is never imported: the clients use their own version.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from client.proxies import is_here

from .figures import PerfError

NEW_GLIBC = (2, 38)
NEW_REQUIREMENT = "perf-analyzer==2.60.0"
OLD_REQUIREMENT = "tritonclient==2.50.0"
# What the old binary links to, and the pattern of the copy that nvidia-pytriton carries.
LIBRARIES = {"libb64.so.0d": "libb64-*.so.0d", "libcudart.so.12": "libcudart-*.so.12*"}


FOLDER = (
    Path(sys.prefix) / "perf_analyzer"
)  # inside the virtual environment, away from its packages


class PerfAnalyzerError(PerfError):
    """perf_analyzer is missing or failed. The message is one line."""


@dataclass(frozen=True)
class Analyzer:
    """A perf_analyzer that can be started.

    Attributes:
        path: the binary.
        libraries: folder of the shared libraries it needs besides the system's, if any.
    """

    path: Path
    libraries: Path | None = field(default=None)

    def environment(self, url: str = "") -> dict[str, str]:
        """Environment variables to start it with.

        Args:
            url: whom it is to ask, HOST:PORT.
        """
        environment = dict(os.environ)
        if is_here(url):  # Nothing that it asks is behind a proxy.
            environment = {k: v for k, v in environment.items() if not k.lower().endswith("_proxy")}
        if self.libraries is not None:
            others = environment.get("LD_LIBRARY_PATH")
            environment["LD_LIBRARY_PATH"] = os.pathsep.join(
                [str(self.libraries), *([others] if others else [])]
            )
        return environment

    def version(self) -> str:
        """The version of the release it came with, such as `2.50.0`; empty where nobody says."""
        # The program itself says "commit unknown" in some releases.
        for folder in list(self.path.parents)[1:3]:
            for wheel in ("perf_analyzer", "tritonclient"):
                for found in folder.glob(f"{wheel}-*.dist-info"):
                    return found.name.removesuffix(".dist-info").rpartition("-")[2]
        return ""


def glibc_version() -> tuple[int, ...]:
    """The C library's version, such as (2, 36); () where it is not glibc."""
    name, version = platform.libc_ver()
    return tuple(int(part) for part in version.split(".")) if name == "glibc" else ()


def _in_folder(folder: Path) -> Analyzer | None:
    for path in (folder / "bin" / "perf_analyzer", folder / "perf_analyzer/bin/perf_analyzer"):
        # The new wheel has both: a Python launcher in bin/ that needs the folder on its path, and
        # the program, which is told apart by what every Linux program starts with.
        if path.is_file() and path.open("rb").read(4) == b"\x7fELF":
            libraries = folder / "lib"
            return Analyzer(path, libraries if libraries.is_dir() else None)
    return None


def _why_not(analyzer: Analyzer) -> str | None:
    """Why it does not start; None if it does."""
    try:
        ran = subprocess.run(
            [str(analyzer.path), "--version"],
            env=analyzer.environment(),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return " ".join(str(error).split())
    if ran.returncode == 0:
        return None
    lines = (ran.stderr + ran.stdout).strip().splitlines()
    return lines[0] if lines else f"exit code {ran.returncode}"


def find_analyzer(folder: Path | None = None) -> Analyzer:
    """The perf_analyzer to use: the one on PATH, else the installed one, whichever starts.

    Args:
        folder: where it was installed; `FOLDER` if not given.

    Raises:
        PerfAnalyzerError: there is none, or none that starts.
    """
    on_path = shutil.which("perf_analyzer")
    broken = []
    for analyzer in (Analyzer(Path(on_path)) if on_path else None, _in_folder(folder or FOLDER)):
        if analyzer is None:
            continue
        reason = _why_not(analyzer)
        if reason is None:
            return analyzer
        broken.append(f"{analyzer.path} does not start ({reason})")
    problem = "; ".join(broken) or "perf_analyzer is not installed"
    raise PerfAnalyzerError(f"{problem}; run python -m perf install")


def install(folder: Path | None = None) -> Analyzer:
    """Install perf_analyzer unless one that starts is there already.

    Args:
        folder: where to; `FOLDER` if not given. Replaced as a whole.

    Returns:
        A perf_analyzer that has been started once.

    Raises:
        PerfAnalyzerError: it could not be downloaded, or does not start here.
    """
    folder = folder or FOLDER
    with suppress(PerfAnalyzerError):
        return find_analyzer(folder)

    # Built beside its place and moved there, so that an interrupted install leaves nothing behind
    # that looks like an installation.
    building = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(building, ignore_errors=True)
    if glibc_version() >= NEW_GLIBC:
        _pip_install(NEW_REQUIREMENT, building)
    else:
        _pip_install(OLD_REQUIREMENT, building)
        _link_libraries(building / "lib")
    shutil.rmtree(folder, ignore_errors=True)
    building.rename(folder)
    if _in_folder(folder) is None:
        raise PerfAnalyzerError("the wheel holds no perf_analyzer for this system")
    return find_analyzer(folder)


def _pip_install(requirement: str, target: Path) -> None:
    options = ["--no-deps", "--quiet", "--disable-pip-version-check", "--target", str(target)]
    command = [sys.executable, "-m", "pip", "install", *options, requirement]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode != 0:
        lines = [line for line in ran.stderr.splitlines() if line.startswith("ERROR")]
        reason = lines[-1] if lines else f"pip exited with {ran.returncode}"
        raise PerfAnalyzerError(f"could not install {requirement}: {reason}")


def _carried_libraries() -> Path:
    spec = importlib.util.find_spec("pytriton")
    if spec is None or spec.origin is None:
        raise PerfAnalyzerError(
            "perf_analyzer needs libraries from the nvidia-pytriton wheel; "
            "pip install --no-deps nvidia-pytriton==0.7.0 first"
        )
    return Path(spec.origin).parent.parent / "nvidia_pytriton.libs"


def _link_libraries(target: Path) -> None:
    carried = _carried_libraries()
    target.mkdir()
    for name, pattern in LIBRARIES.items():
        copies = sorted(carried.glob(pattern))
        if not copies:
            raise PerfAnalyzerError(f"the nvidia-pytriton wheel carries no {pattern}")
        # Relative, so that the virtual environment may be moved; resolves from the final place,
        # which has the same depth.
        (target / name).symlink_to(os.path.relpath(copies[-1], target))
