"""Take secrets out of a running process's arguments.

tritonserver has one way to learn the key of its restricted APIs: its command line, which every
user of the machine may read (`ps`, /proc/PID/cmdline). By the time it serves it has copied what it
needs, so the bytes there can be overwritten, as programs do that take a password so. What is left
is the time from the start until then.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from contextlib import suppress
from pathlib import Path

_PROC = Path("/proc")
# Counted from behind the name in brackets, which may hold blanks: field 48 of proc(5)'s `stat`.
_ARGUMENTS_START = 45
_PROGRAM = "tritonserver"


def overwrite_arguments(process_ids: Iterable[int], secrets: Collection[str]) -> None:
    """Replace every occurrence of the secrets in tritonserver's arguments by asterisks.

    It must have read them already. Does nothing where the kernel does not let us, nor to another
    program, such as a wrapper script that may start the server once more: `shows_any` tells.

    Args:
        process_ids: processes of this user, started by this program.
        secrets: the texts to replace.
    """
    for folder in (_PROC / str(process_id) for process_id in process_ids):
        with suppress(OSError, ValueError, IndexError):
            if (folder / "exe").readlink().name == _PROGRAM:
                _overwrite(folder, secrets)


def shows_any(process_ids: Iterable[int], secrets: Collection[str]) -> bool:
    """Whether one of the secrets stands in the arguments of one of the processes."""
    for process_id in process_ids:
        with suppress(OSError):  # It has ended.
            arguments = (_PROC / str(process_id) / "cmdline").read_bytes()
            if any(secret.encode() in arguments for secret in secrets):
                return True
    return False


def _overwrite(folder: Path, secrets: Collection[str]) -> None:
    arguments = (folder / "cmdline").read_bytes()
    fields = (folder / "stat").read_text().rpartition(")")[2].split()
    start = int(fields[_ARGUMENTS_START])
    with (folder / "mem").open("r+b", buffering=0) as memory:
        for secret in (text.encode() for text in secrets):
            at = arguments.find(secret)
            while at >= 0:
                memory.seek(start + at)
                memory.write(b"*" * len(secret))
                at = arguments.find(secret, at + len(secret))
