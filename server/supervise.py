"""Keep a server answering: look at it, replace it when it fails, give up when that does not help.

Triton neither restarts a model instance that died nor says so in its readiness, so a failure ends
the whole server, and a new one takes its ports.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from .errors import ServerError, ServerStartError
from .launcher import TritonServer
from .ports import Ports
from .probe import Finding, Memory

_POLL_S = 0.25
_INTERVAL_S = 2.0  # Between the end of one look and the next.
# A server that failed has little to finish: what still runs there gets a moment, no more.
_STOP_PATIENCE_S = 1.0
# The first restart follows at once, the second after so long, each further one after twice as long.
_FIRST_DELAY_S = 1.0
_LONGEST_DELAY_S = 30.0
_HEALTHY_S = 60.0  # A server that answered for so long was healthy: the count begins anew.
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

    def run(self) -> None:
        """Look after the server, which answers, and restart it until interrupted.

        Raises:
            ServerStartError: too many restarts in a row; nothing is left running.
        """
        self._answering_since = self._clock()
        while True:
            self._recover(self._wait_for_failure())

    def stop(self) -> None:
        """Stop the server; does nothing if none runs."""
        self.server.stop()

    def _wait_for_failure(self) -> str:
        memory = Memory()
        while True:
            process_ids = set(self.server.process_ids())
            finding = self._look(self.server, memory)
            for warning in finding.warnings:
                self._say(warning)
            if finding.failure:
                return finding.failure
            next_at = self._clock() + _INTERVAL_S
            # Sooner where a process has ended: the server's own, or one of a model.
            while self._clock() < next_at and process_ids <= set(self.server.process_ids()):
                self._sleep(_POLL_S)

    def _recover(self, failure: str) -> None:
        failed_at = self._clock()
        log_tail = ""
        while True:
            self._say(f"failure: {failure}")
            self._stop_failed()
            delay_s = self._next_delay(failed_at, failure, log_tail)
            number = f"restart {self._restarts} of {self._max_restarts}"
            self._say(f"{number} {f'in {delay_s:g} s' if delay_s else 'now'}")
            self._sleep(delay_s)
            try:
                self.server = self._make_server(self.server.ports)
                self.server.start()
            except (ServerError, OSError) as error:  # The disk is full, for a moment or for good.
                failure = f"{number} did not come up: {error}"
                log_tail = getattr(error, "log_tail", "")
                continue
            self._answering_since = self._clock()
            took_s = self._answering_since - failed_at
            self._say(f"answering again after {took_s:.1f} s, process {self.server.pid}")
            return

    def _stop_failed(self) -> None:
        began = self._clock()
        try:
            self.server.stop(_STOP_PATIENCE_S)
        except (ServerError, OSError) as error:  # Its ports tell whether another can start.
            self._say(f"not all of it could be stopped: {error}")
            return
        self._say(f"stopped what was left of it in {self._clock() - began:.1f} s")

    def _next_delay(self, failed_at: float, failure: str, log_tail: str) -> float:
        """Count one more restart and say how long to wait before it."""
        since = self._answering_since
        if since is not None and failed_at - since >= _HEALTHY_S:
            self._restarts = 0
        self._answering_since = None
        if self._restarts >= self._max_restarts:
            raise ServerStartError(
                f"gave up after {self._restarts} restarts without {_HEALTHY_S:g} s of "
                f"health between them, and nothing runs now; the last failure: {failure}",
                log_tail=log_tail,
            )
        self._restarts += 1
        if self._restarts == 1:
            return 0.0
        return min(_LONGEST_DELAY_S, _FIRST_DELAY_S * 2.0 ** (self._restarts - 2))
