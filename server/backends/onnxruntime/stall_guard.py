"""End a model process that stood still, before it can answer.

Triton's python backend gives a request up when the process that works on it has not moved for about
a second, and answers it with an error. If the process then goes on (SIGCONT, a debugger, a machine
without time for it), tritonserver 2.51 takes its late answer for that of the next request, which is
a wrong answer, or aborts. A process that ends instead costs errors, which a supervisor mends.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable

_TICK_S = 0.1
_STILL_S = 0.9  # a little less than Triton's patience


def _end_this_process() -> None:
    os.kill(os.getpid(), signal.SIGKILL)  # nothing of it may run any more, no handler either


class StallGuard:
    """Notices that this process stood still: a thread of it that should tick did not.

    Whichever thread runs first after a stall ends the process: the ticking one, or the one that
    is about to answer and calls `check`.
    """

    def __init__(
        self,
        end: Callable[[], None] = _end_this_process,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin to tick.

        Args:
            end: ends the process.
            clock: the time in seconds.
        """
        self._end = end
        self._clock = clock
        self._ticked = clock()
        threading.Thread(target=self._tick, name="stall-guard", daemon=True).start()

    def check(self) -> None:
        """End the process if it stood still; to be called before it answers."""
        if self._clock() - self._ticked > _STILL_S:
            self._end()

    def _tick(self) -> None:
        while True:
            time.sleep(_TICK_S)
            self.check()
            self._ticked = self._clock()
