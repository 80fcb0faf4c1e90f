"""What a start needs of the machine, looked at before anything takes long, with the way out."""

from __future__ import annotations

import os
import resource
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bundle import config

from .errors import ServerUsageError
from .paths import is_plain
from .shared_memory import SHM_DIRECTORY

_PROC = Path("/proc/self/stat")
# With 64 Triton 2.51.0 does not come up, with 96 it does; each connection takes one more.
_LEAST_FILES = 256
# The python backend, its stub and a first MiB of log take 5 MiB.
_LEAST_TEMPORARY_MIB = 32
# Where our files lie if the path of the folder for temporary ones is not plain.
_PLAIN_FOLDERS = (Path("/tmp"), Path("/var/tmp"), SHM_DIRECTORY)


def check_machine() -> None:
    """Look at what every start needs.

    Raises:
        ServerUsageError: naming what is missing and the way out.
    """
    if not _PROC.is_file():
        raise ServerUsageError(
            "there is no /proc here, where the server's processes are looked up; mount it "
            "(mount -t proc proc /proc)"
        )
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files != resource.RLIM_INFINITY and files < _LEAST_FILES:
        raise ServerUsageError(
            f"only {files} files may be open at a time, too few for Triton and its connections; "
            "run `ulimit -n 1024` first (under systemd LimitNOFILE=)"
        )
    _usable(SHM_DIRECTORY, "Triton keeps tensors there; mount a tmpfs on it")


def check_shared_memory(
    repository: Path, models: Sequence[str], backends: Path, bytes_each: int
) -> None:
    """See that the segments of all model processes fit into shared memory when they start.

    Args:
        repository: the model repository.
        models: those of it that are served.
        backends: the server's backend directory; a backend with a `model.py` runs in processes.
        bytes_each: what one model process begins with.

    Raises:
        ServerUsageError: there is too little.
    """
    processes = 0
    for model in models:
        try:
            found = config.read(repository / model / "config.pbtxt")
        except config.ConfigError:  # Triton says what is wrong with it, or makes one.
            continue
        if found.backend == "python" or (backends / found.backend / "model.py").is_file():
            processes += sum(group.count or 1 for group in found.instance_group) or 1
    need_mib, free_mib = processes * bytes_each / 2**20, _free_mib(SHM_DIRECTORY)
    if free_mib < need_mib:
        raise ServerUsageError(
            f"{SHM_DIRECTORY} has {free_mib:.0f} MiB left, and {processes} model processes begin "
            f"with {need_mib:.0f} MiB; make it larger (docker run --shm-size=1g, or "
            f"mount -o remount,size=1g {SHM_DIRECTORY})"
        )


def temporary_folder() -> Path:
    """Where the server's own files lie meanwhile: a folder with a plain path.

    Raises:
        ServerUsageError: there is none that is plain, writable and large enough.
    """
    way_out = "set TMPDIR to a folder of yours"
    try:
        asked = Path(tempfile.gettempdir()).absolute()
    except OSError as error:
        raise ServerUsageError(
            f"there is no folder for temporary files ({error.strerror}); {way_out}"
        ) from None
    places = [asked] if is_plain(asked) else [p for p in _PLAIN_FOLDERS if is_plain(p)]
    refusals = []
    for place in places:
        try:
            _usable(place, way_out)
            if place is not asked:  # Else it is asked for, and may have to run nothing.
                check_runs_programs(place)
            if _free_mib(place) < _LEAST_TEMPORARY_MIB:
                raise ServerUsageError(
                    f"{place} has {_free_mib(place):.0f} MiB left, and the server's own files "
                    f"take up to {_LEAST_TEMPORARY_MIB}; make room, or {way_out}"
                )
            return place
        except ServerUsageError as error:
            refusals.append(str(error))
    if is_plain(asked):
        raise ServerUsageError(refusals[0])
    raise ServerUsageError(
        f"the folder for temporary files, {str(asked)!r}, has a path that Triton's shell would "
        f"misread, and no other serves ({'; '.join(refusals)}); set TMPDIR to a folder whose path "
        "has only letters, digits and /_.-"
    )


def check_runs_programs(folder: Path) -> None:
    """See that programs may run in a folder for temporary files.

    Raises:
        ServerUsageError: it is mounted otherwise.
    """
    if os.statvfs(folder).f_flag & os.ST_NOEXEC:
        raise ServerUsageError(
            f"{folder} is mounted noexec, and Triton's python backend is run from the folder for "
            "temporary files; set TMPDIR to a folder where programs may run"
        )


def _usable(folder: Path, way_out: str) -> None:
    if not folder.is_dir():
        raise ServerUsageError(f"there is no folder {folder}; {way_out}")
    if not os.access(folder, os.W_OK | os.X_OK):  # False on a read-only file system, too.
        raise ServerUsageError(f"{folder} cannot be written; {way_out}")


def _free_mib(folder: Path) -> float:
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize / 2**20
