"""End a server before one of its model processes, which stood still, answers late.

Triton's python backend gives a request up when the process that works on it has not moved for about
a second, and answers it with an error. If the process then goes on (SIGCONT, a debugger, a machine
without time for it), tritonserver 2.51 takes its late answer for that of the next request, which is
a wrong answer, or aborts. A server that ends instead costs errors, and whoever runs it sees that.

Where the whole server stood still, as in a frozen container or a suspended machine, nothing was
given up but perhaps what was being answered at that moment.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

_TICK_S = 0.1
_STILL_S = 0.9  # a little less than Triton's patience
# Models load at different times, most of them in the first minute.
_FIRST_SEARCH_S, _LONGEST_SEARCH_S = 0.5, 60.0
_LOADING_S, _LONGEST_WHILE_LOADING_S = 60.0, 2.0
_THREAD = "stall-guard"  # at most 15 characters, as Linux keeps them
_PROC = Path("/proc")


class Sibling:
    """Another model process of the same server that has a guard, too, whose ticks can be counted.

    Args:
        server: process id of the server.
    """

    def __init__(self, server: int) -> None:
        self._server = server
        self._status: Path | None = None
        self._began, self._search_at, self._wait_s = time.monotonic(), 0.0, _FIRST_SEARCH_S

    def ticks(self) -> int | None:
        """How often its guard has gone to sleep so far; None where there is no other."""
        if self._status is None and (now := time.monotonic()) >= self._search_at:
            self._search_at = now + self._wait_s
            loads = now - self._began < _LOADING_S
            longest_s = _LONGEST_WHILE_LOADING_S if loads else _LONGEST_SEARCH_S
            self._wait_s = min(2 * self._wait_s, longest_s)
            self._status = self._search()
        if self._status is not None:
            with suppress(OSError, ValueError, IndexError):  # it has ended
                said = self._status.read_text().split("\nvoluntary_ctxt_switches:")[1]
                return int(said.split()[0])
            self._status = None
        return None

    def _search(self) -> Path | None:
        for stat in _PROC.glob("[0-9]*/stat"):
            with suppress(OSError, ValueError, IndexError):
                # The name before it, in parentheses, may hold anything.
                parent = int(stat.read_text().rpartition(")")[2].split()[1])
                if parent == self._server and stat.parent.name != str(os.getpid()):
                    for name in stat.parent.glob("task/*/comm"):
                        if name.read_text().strip() == _THREAD:
                            return name.with_name("status")
        return None


class StallGuard:
    """Notices that this process stood still: a thread of it that should tick did not.

    Whichever thread runs first after a stall judges it: the ticking one, or the one that begins or
    ends an answer. Alone to stand still, or in the middle of an answer, ends the server.
    """

    def __init__(
        self,
        end: Callable[[str], None] | None = None,
        clock: Callable[[], float] = lambda: time.clock_gettime(time.CLOCK_BOOTTIME),
        sibling: Callable[[], int | None] | None = None,
    ) -> None:
        """Begin to tick.

        Args:
            end: ends the server; told why.
            clock: the time in seconds; that of a suspended machine goes on, as Triton's does.
            sibling: how often another process of the server has ticked; None: there is no other.
        """
        server = os.getppid()
        self._end = end or (lambda why: _end_server(server, why))
        self._clock = clock
        self._sibling = sibling or Sibling(server).ticks
        self._lock = threading.Lock()
        self._answering = False
        self._note()
        threading.Thread(target=self._tick, name=_THREAD, daemon=True).start()

    def begin(self) -> None:
        """To be called before it works on an answer."""
        self._look()
        self._answering = True

    def check(self) -> None:
        """To be called before it answers."""
        self._look()
        self._answering = False

    def _look(self) -> None:
        with self._lock:
            still_s = self._clock() - self._ticked
            if still_s > _STILL_S:
                self._judge(still_s)
                self._note()

    def _judge(self, still_s: float) -> None:
        before, now = self._sibling_ticks, self._sibling()
        # Being stopped and continued counts as two or three ticks.
        alone = before is None or now is None or (now - before) * _TICK_S > still_s / 2
        if alone or self._answering:
            what = "while it answered" if self._answering else "while the server went on"
            self._end(
                f"a model process stood still for {still_s:.1f} s {what}: Triton may take a late "
                "answer of its for another's, so the server ends"
            )

    def _note(self) -> None:
        # In this order: to look for the other takes long on a busy machine, and is no stall.
        self._sibling_ticks = self._sibling()
        self._ticked = self._clock()

    def _tick(self) -> None:
        with suppress(OSError):  # A system without: no other finds this one.
            (_PROC / f"self/task/{threading.get_native_id()}/comm").write_text(_THREAD)
        while True:
            time.sleep(_TICK_S)
            self._look()
            with self._lock:
                self._note()


def _end_server(server: int, why: str) -> None:
    with suppress(OSError):
        sys.stderr.write(f"error: {why}\n")
        sys.stderr.flush()
    if os.getppid() == server:
        # SIGKILL does nothing to a container's first process.
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(OSError):
                os.kill(server, number)
    os.kill(os.getpid(), signal.SIGKILL)  # nothing of it may run any more, no handler either
