"""The processes that Triton's python backend runs model instances in, told by their arguments.

Triton neither restarts one that ends nor reports it: its model stays ready and fails every request
that meets the missing instance. So the processes are counted here.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from .backend_directory import STUB_NAME


@dataclass(frozen=True)
class Stub:
    """One model instance's process.

    Attributes:
        pid: its process id.
        model: the model's name.
        version: the model's version.
    """

    pid: int
    model: str
    version: str


def find_stubs(process_ids: Iterable[int]) -> list[Stub]:
    """Pick the model instances out of a server's processes.

    Args:
        process_ids: the server's processes.
    """
    stubs = []
    for pid in process_ids:
        with suppress(psutil.Error):  # It has just ended.
            stub = _parse(pid, psutil.Process(pid).cmdline())
            if stub is not None:
                stubs.append(stub)
    return stubs


def cpu_s(stubs: Collection[Stub]) -> float:
    """CPU seconds that these processes have taken so far."""
    total = 0.0
    for stub in stubs:
        with suppress(psutil.Error):
            times = psutil.Process(stub.pid).cpu_times()
            total += times.user + times.system
    return total


def _parse(pid: int, arguments: list[str]) -> Stub | None:
    # STUB MODEL/VERSION/FILE SHARED_MEMORY_NAME ...
    if len(arguments) < 2 or Path(arguments[0]).name != STUB_NAME:
        return None
    parts = Path(arguments[1]).parts
    return Stub(pid, parts[-3], parts[-2]) if len(parts) >= 3 else None
