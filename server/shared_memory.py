"""Remove the shared-memory segments that crashed servers of ours left behind.

Triton's python backend keeps segments in /dev/shm for each model instance, and a server that is
killed leaves them there for good. Beside them lies a file that the server and its processes hold
locked from their start to their end (`bundle.placing`): locked means alive, in whatever namespace
it runs.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from bundle.placing import abandoned, claim

SHM_DIRECTORY = Path("/dev/shm")
SERVER_PREFIX = "triton_"


def hold(server_id: str, directory: Path = SHM_DIRECTORY) -> int:
    """Make and lock the file that says that a server lives.

    Args:
        server_id: what the names of its segments begin with.
        directory: where segments are.

    Returns:
        The file's descriptor, for the server to inherit and the caller to close.
    """
    return claim(_lock(server_id, directory))


def remove_segments(server_id: str, directory: Path = SHM_DIRECTORY) -> list[str]:
    """Delete the segments of a server that has ended, and its file; returns their names, sorted."""
    removed = []
    for path in (*directory.glob(f"{server_id}_*"), _lock(server_id, directory)):
        with suppress(FileNotFoundError):
            path.unlink()
            removed.append(path.name)
    return sorted(removed)


def remove_dead_segments(directory: Path = SHM_DIRECTORY) -> list[str]:
    """Delete the segments of this user's servers that have ended; returns their names, sorted."""
    removed = []
    for path in directory.glob(f".{SERVER_PREFIX}*.lock"):
        with abandoned(path) as is_dead:
            if is_dead:
                name = path.name.strip(".").removesuffix(".lock")
                removed += remove_segments(name, directory)
    return sorted(removed)


def _lock(server_id: str, directory: Path) -> Path:
    return directory / f".{server_id}.lock"
