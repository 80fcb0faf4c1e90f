"""Watch a tritonserver that has just been started until it serves, or say why it does not."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from . import triton_log
from .channel import Channel
from .comparing import ANSWERS, WAY_OUT, is_comparing, is_other
from .errors import ServerStartError
from .failures import start_error
from .ports import Ports
from .process import ProcessGroup
from .readiness import ENTRY_MODEL, Canary, adaptive_vit_canary, server_version, wait_until_ready

_POLL_S = 0.05


@dataclass(frozen=True)
class Startup:
    """A server between its start and its first answer.

    Attributes:
        process: its processes.
        server_id: the `--id` that it was started with.
        models: models that must be ready.
        grpc_url: `host:port`.
        channel: how to connect there.
        log_path: Triton's log.
        on_progress: called with a line for people whenever something has changed.
    """

    process: ProcessGroup
    server_id: str
    models: Sequence[str]
    grpc_url: str
    channel: Channel
    log_path: Path
    on_progress: Callable[[str], None]

    def wait(self, ports: Ports, timeout_s: float) -> str:
        """Wait until every model is ready and every port is open.

        Returns:
            The version that the server reports.

        Raises:
            ServerStartError: the server ended, or the time ran out.
        """
        self.on_progress(f"starting tritonserver, {len(self.models)} models to load")
        shown: set[str] = set()

        def watch() -> None:
            loaded = triton_log.loaded_models(self._log_while_running()) & set(self.models)
            if len(loaded) > len(shown):
                shown.update(loaded)
                self.on_progress(f"{len(shown)} of {len(self.models)} models loaded")

        deadline = time.monotonic() + timeout_s
        missing = wait_until_ready(
            self.grpc_url, self.server_id, self.models, timeout_s, watch, self.channel
        )
        if missing:
            raise self._failure(f"not ready after {timeout_s:g} s", missing)
        version = server_version(self.grpc_url, self.channel)
        # Metrics come up last: gRPC answers for a moment even if their port is taken.
        while not self.process.listens_on(ports.all):
            self._log_while_running()
            if time.monotonic() > deadline:
                raise self._failure(f"not listening on all ports after {timeout_s:g} s")
            time.sleep(_POLL_S)
        return version

    def ask(self, canary: Canary | None, timeout_s: float, compares: bool) -> None:
        """Send a first request.

        Args:
            canary: called with the gRPC URL, raises if the answer is not as it should be; None
                sends an image to `adaptive_vit` if that is one of the models.
            timeout_s: seconds that a router which refuses other answers may take to compare them.
            compares: whether it is one.

        Raises:
            ServerStartError: the canary raised.
        """
        if canary is None:
            if ENTRY_MODEL not in self.models:
                return
            canary = partial(
                adaptive_vit_canary,
                channel=self.channel,
                answers=ANSWERS if compares else 1,
                timeout_s=timeout_s,
            )
        self.on_progress("waiting for the answer to a first request")
        try:
            canary(self.grpc_url)
        except Exception as error:
            reason = triton_log.first_line(str(error))
            if is_comparing(reason):
                reason = f"{reason} (after {timeout_s:g} s; --timeout-s gives it longer)"
            elif is_other(reason):
                reason = f"{reason}; {WAY_OUT}"
            raise self._failure(
                f"every model is ready, but the first request failed: {reason}"
            ) from error

    def _log_while_running(self) -> str:
        code = self.process.exit_code  # Before the log, which is complete if it has ended.
        log = self.log_path.read_text(errors="replace")
        if code is not None:
            loaded = triton_log.loaded_models(log)
            missing = [model for model in self.models if model not in loaded]
            raise self._failure(f"tritonserver ended while starting (exit code {code})", missing)
        return log

    def _failure(self, what: str, missing: Sequence[str] = ()) -> ServerStartError:
        return start_error(what, self.log_path, missing)
