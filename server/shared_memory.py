"""Remove shared-memory segments that dead servers left behind.

Triton's python backend keeps one segment in /dev/shm per model instance. A server that is killed
leaves its segments there for good.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

SHM_DIRECTORY = Path("/dev/shm")
# Both Triton's own default names and the ones our servers ask for begin so.
SEGMENT_PREFIX = "triton_"
# A segment is created a moment before it shows in /proc/*/maps; this is many times that moment.
_YOUNGEST_AGE_S = 30.0


def remove_dead_segments(
    own_prefix: str | None = None,
    directory: Path = SHM_DIRECTORY,
    proc: Path = Path("/proc"),
    youngest_age_s: float = _YOUNGEST_AGE_S,
) -> list[str]:
    """Delete Triton's segments that belong to this user and that no live process maps.

    Where a Triton of this user runs whose maps cannot be read, as from inside a user namespace,
    only those of `own_prefix` go. A process of another PID namespace that shares /dev/shm
    (`--ipc=host`) cannot be seen.

    Args:
        own_prefix: segments whose names begin so are removed at any age: their server is known to
            have ended.
        directory: where segments are.
        proc: the proc file system.
        youngest_age_s: other segments younger than this many seconds are left alone.

    Returns:
        Names of the removed segments, sorted.
    """
    if not directory.is_dir():
        return []
    # Listed before the maps are read: a segment created in between is not touched.
    candidates = [path for path in directory.iterdir() if path.name.startswith(SEGMENT_PREFIX)]
    if not candidates:
        return []
    mapped, is_complete = _mapped_names(directory, proc)
    removed = []
    for path in candidates:
        is_own = own_prefix is not None and path.name.startswith(own_prefix)
        try:
            status = path.stat()
            age_s = time.time() - max(status.st_mtime, status.st_ctime)
            is_dead = is_own or (is_complete and age_s >= youngest_age_s)
            if path.name not in mapped and status.st_uid == os.geteuid() and is_dead:
                path.unlink()
                removed.append(path.name)
        except FileNotFoundError:  # Its own server was quicker.
            continue
    return sorted(removed)


def _mapped_names(directory: Path, proc: Path) -> tuple[set[str], bool]:
    """Names that some process maps, and whether every Triton of this user could be asked."""
    names: set[str] = set()
    is_complete = True
    prefix = f"{directory}/"
    for process in proc.glob("[0-9]*"):
        try:
            lines = (process / "maps").read_text(errors="replace").splitlines()
        except (FileNotFoundError, ProcessLookupError):  # It has ended.
            continue
        except OSError:  # Another user's, whose segments are too, or of another namespace.
            is_complete = is_complete and not _is_our_triton(process)
            continue
        names.update(line.split(prefix, 1)[1].split(" ")[0] for line in lines if prefix in line)
    return names, is_complete


def _is_our_triton(process: Path) -> bool:
    try:
        arguments = (process / "cmdline").read_bytes()  # Everybody may read that.
        return process.stat().st_uid == os.geteuid() and b"triton" in arguments
    except OSError:  # It has ended.
        return False
