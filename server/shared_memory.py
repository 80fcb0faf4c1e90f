"""Remove the shared-memory segments that crashed servers of ours left behind.

Triton's python backend keeps segments in /dev/shm for each model instance, and a server that is
killed leaves them there for good. Beside them lies a file that the server and its processes hold
locked from their start to their end: locked means alive, in whatever namespace it runs.
"""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from pathlib import Path

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
    path = _lock(server_id, directory)
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):
            if path.stat().st_ino == os.fstat(descriptor).st_ino:
                return descriptor
        os.close(descriptor)  # Somebody who cleared away had it before it was locked.


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
        try:
            if path.lstat().st_uid != os.geteuid():
                continue
            descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
        except OSError:  # Its own launcher was quicker.
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            removed += remove_segments(path.name.strip(".").removesuffix(".lock"), directory)
        except BlockingIOError:  # It lives.
            pass
        finally:
            os.close(descriptor)
    return sorted(removed)


def _lock(server_id: str, directory: Path) -> Path:
    return directory / f".{server_id}.lock"
