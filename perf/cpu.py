"""CPU time of a server's whole process tree, fine enough for single requests, and its cores.

The kernel counts it in nanoseconds for each process with all its threads, ended ones too, and gives
it to whoever asks for the process's CPU clock (clock_getcpuclockid(3)). `/proc/PID/stat` holds the
same in ticks of 10 ms; it is read where a sandbox refuses the clock.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

_SCHEDULER_CLOCK = 2  # CPUCLOCK_SCHED: user and system time together
IDLE_S = 0.5


class CpuMeter:
    """Reads the CPU time of processes that were there when it was made.

    Attributes:
        idle_share: CPU time that they take per second while nobody asks them anything.
    """

    def __init__(self, process_ids: Sequence[int], idle_s: float = IDLE_S) -> None:
        """Find the clocks, and watch the processes idle.

        Args:
            process_ids: of tritonserver and the processes of its models.
            idle_s: how long to watch, in seconds.
        """
        self._readers = [_reader(pid) for pid in process_ids]
        before = self.read_s()
        start = time.perf_counter()
        time.sleep(idle_s)
        self.idle_share = (self.read_s() - before) / (time.perf_counter() - start)

    def read_s(self) -> float:
        """CPU seconds so far."""
        return sum(read() for read in self._readers)

    def used_s(self, before_s: float, seconds: float) -> float:
        """CPU seconds since a reading, without what idling for so long would have taken."""
        return max(0.0, self.read_s() - before_s - self.idle_share * seconds)


def _reader(pid: int) -> Callable[[], float]:
    clock = (~pid << 3) | _SCHEDULER_CLOCK

    def by_clock() -> float:
        return time.clock_gettime(clock)

    def by_ticks() -> float:
        times = psutil.Process(pid).cpu_times()
        return float(times.user + times.system)

    try:
        by_clock()
    except OSError:
        return by_ticks
    return by_clock


@contextlib.contextmanager
def on_same_cores(process_ids: Sequence[int], count: int) -> Iterator[int]:
    """Keep processes on so many cores, and this one off them.

    Every system then has the same cores, however many processes answer for it. Where there are no
    more cores than that, nothing is moved: all of them are everybody's.

    Args:
        process_ids: of the server.
        count: how many cores.

    Yields:
        The number of cores that the processes have.
    """
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) <= count:
        yield len(cores)
        return
    try:
        _move(process_ids, cores[:count])
        _move([os.getpid()], cores[count:])
        yield count
    finally:
        _move([*process_ids, os.getpid()], cores)


def _move(process_ids: Sequence[int], cores: Sequence[int]) -> None:
    """Keep every thread on these cores; a new thread starts on those of its maker."""
    for pid in process_ids:
        for task in Path(f"/proc/{pid}/task").glob("*"):
            with suppress(ProcessLookupError):  # It has just ended.
                os.sched_setaffinity(int(task.name), cores)
