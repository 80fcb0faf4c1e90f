"""Keep a server answering: look at it, replace it when it fails, give up when that does not help.

Triton neither restarts a model instance that died nor says so in its readiness, so a failure ends
the whole server, and a new one takes its ports.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress

import psutil
from tritonclient.utils import InferenceServerException

from .access import STOOD_STILL_S
from .errors import ServerError, ServerStartError
from .launcher import TritonServer
from .ports import Ports
from .probe import Finding, Memory

_POLL_S = 0.25
_INTERVAL_S = 2.0  # Between the end of one look and the next.
# Nor sooner than so many times what the look took beyond that: where the server is slow, as under a small CPU
# quota, its canaries would take from the requests of others what these need.
_REST, _LONGEST_INTERVAL_S = 4.0, 30.0
# A server that failed has little to finish: what still runs there gets a moment, no more.
_STOP_PATIENCE_S = 1.0
# The first restart follows at once, the second after so long, each further one after twice as long.
_FIRST_DELAY_S = 1.0
_LONGEST_DELAY_S = 30.0
_HEALTHY_S = 60.0  # A server that answered for so long was healthy: the count begins anew.
_BLIND_LOOKS = 5  # Looks in a row that could not be taken, before that is a failure.
# A full disk, no more descriptors, threads or memory, a process that ends while it is looked at:
# for a moment or for good, and never a reason for the supervisor to end but as it says.
_TROUBLES = (OSError, RuntimeError, MemoryError, psutil.Error, InferenceServerException)
DEFAULT_MAX_RESTARTS = 5
DEFAULT_TIMEOUT_S = 5.0


class Supervisor:
    """Runs one server after another, never two, on the ports of the first.

    Attributes:
        server: the server that runs, or ran last.
    """

    def __init__(
        self,
        server: TritonServer,
        make_server: Callable[[Ports], TritonServer],
        look: Callable[[TritonServer, Memory], Finding],
        say: Callable[[str], None],
        *,
        max_restarts: int = DEFAULT_MAX_RESTARTS,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Say what to run; nothing starts yet.

        Args:
            server: the first server, whose start is the caller's: one that does not come up at
                all is no reason to try again.
            make_server: makes another one, not started, on these ports.
            look: looks at a server once (`probe.look`).
            say: called with one line per event.
            max_restarts: restarts without a healthy period between them before it gives up.
            sleep: waits for so many seconds.
            clock: the time in seconds.
        """
        self.server = server
        self._make_server = make_server
        self._look = look
        self._say = say
        self._max_restarts = max_restarts
        self._sleep = sleep
        self._clock = clock
        self._restarts = 0
        self._answering_since: float | None = None
        self._unstopped: set[TritonServer] = set()
        self._gave_up = False

    def run(self) -> None:
        """Look after the server, which answers, and restart it until interrupted.

        Raises:
            ServerStartError: too many restarts in a row; nothing is left running but what cannot
                be killed, which it then says.
        """
        self._answering_since = self._clock()
        while True:
            self._recover(self._wait_for_failure())

    def stop(self) -> None:
        """Stop the server; does nothing if none runs.

        Raises:
            ServerError: some of its processes cannot even be killed. Not where giving up said so.
        """
        trouble = self._try_to_stop()
        if trouble and not self._gave_up:
            raise ServerError(trouble)

    def _wait_for_failure(self) -> str:
        memory, blind = Memory(), 0
        while True:
            began = self._clock()
            try:
                process_ids = set(self.server.process_ids())
                finding = self._look(self.server, memory)
                blind = 0
            except _TROUBLES as error:  # Of this process, so far as is known.
                blind += 1
                what = f"it cannot be looked at: {_said(error)}"
                finding = Finding(what if blind == _BLIND_LOOKS else "", (f"warning: {what}",))
            for warning in finding.warnings:
                self._tell(warning)
            if finding.failure:
                return finding.failure
            ended = self._clock()
            rest_s = min(_LONGEST_INTERVAL_S, _REST * (ended - began - _INTERVAL_S))
            next_at = ended + max(_INTERVAL_S, rest_s)
            # Sooner where a process has ended: the server's own, or one of a model.
            while (now := self._clock()) < next_at and (blind or self._has_all(process_ids)):
                self._sleep(_POLL_S)
                if self._clock() - now > _POLL_S + STOOD_STILL_S:
                    memory.answered_at.clear()  # That time was nobody's silence.

    def _has_all(self, process_ids: set[int]) -> bool:
        with suppress(*_TROUBLES):
            return process_ids <= set(self.server.process_ids())
        return True

    def _recover(self, failure: str) -> None:
        failed_at = self._clock()
        log_tail = ""
        while True:
            self._tell(f"failure: {failure}")
            self._stop_failed()
            delay_s = self._next_delay(failed_at, failure, log_tail)
            number = f"restart {self._restarts} of {self._max_restarts}"
            self._tell(f"{number} {f'in {delay_s:g} s' if delay_s else 'now'}")
            self._sleep(delay_s)
            try:
                server = self._make_server(self.server.ports)
                self.server = server
                server.start()
                pid = server.pid
            except _TROUBLES as error:
                failure = f"{number} did not come up: {_said(error)}"
                log_tail = getattr(error, "log_tail", "")
                continue
            self._answering_since = self._clock()
            took_s = self._answering_since - failed_at
            self._tell(f"answering again after {took_s:.1f} s, process {pid}")
            return

    def _stop_failed(self) -> None:
        began = self._clock()
        trouble = self._try_to_stop(_STOP_PATIENCE_S)
        if trouble:  # Its ports tell whether another can start; it is told to stop again before.
            self._tell(f"not all of it could be stopped: {trouble}")
        else:
            self._tell(f"stopped what was left of it in {self._clock() - began:.1f} s")

    def _try_to_stop(self, patience_s: float | None = None) -> str:
        """Stop the server, and former ones that would not; returns why one still does not."""
        troubles = []
        for server in dict.fromkeys([*self._unstopped, self.server]):
            try:
                if patience_s is None:
                    server.stop()
                else:
                    server.stop(patience_s)
                self._unstopped.discard(server)
            except _TROUBLES as error:
                self._unstopped.add(server)
                troubles.append(_said(error))
        return "; ".join(dict.fromkeys(troubles))

    def _tell(self, line: str) -> None:
        with suppress(OSError, ValueError):  # The server is worth more than the line.
            self._say(line)

    def _next_delay(self, failed_at: float, failure: str, log_tail: str) -> float:
        """Count one more restart and say how long to wait before it."""
        since = self._answering_since
        if since is not None and failed_at - since >= _HEALTHY_S:
            self._restarts = 0
        self._answering_since = None
        if self._restarts >= self._max_restarts:
            self._gave_up = True
            left = self._try_to_stop(_STOP_PATIENCE_S) if self._unstopped else ""
            raise ServerStartError(
                f"gave up after {self._restarts} restarts without {_HEALTHY_S:g} s of "
                f"health between them, and {left or 'nothing runs now'}; the last failure: "
                f"{failure}",
                log_tail=log_tail,
            )
        self._restarts += 1
        if self._restarts == 1:
            return 0.0
        return min(_LONGEST_DELAY_S, _FIRST_DELAY_S * 2.0 ** (self._restarts - 2))


def _said(error: Exception) -> str:
    """An error in one line, with its kind where the words do not say what it is about."""
    words = " ".join(str(error).split())
    return words if isinstance(error, ServerError | OSError) else f"{type(error).__name__}: {words}"
