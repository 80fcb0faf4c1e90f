"""What can go wrong with a server, as types. Every message is one line that says what to do."""

from __future__ import annotations


class ServerError(RuntimeError):
    """Something about the server. Its two kinds below tell whose move it is."""


class ServerUsageError(ServerError):
    """The caller's move: a missing repository, a port in use, no tritonserver to be found."""


class ServerStartError(ServerError):
    """The server did not come up, or stopped by itself.

    Attributes:
        not_ready: models that are not ready, with the reason out of Triton's log where it gives
            one, else an empty string.
        log_tail: the last lines of Triton's log.
    """

    def __init__(
        self,
        message: str,
        not_ready: dict[str, str] | None = None,
        log_tail: str = "",
    ) -> None:
        super().__init__(message)
        self.not_ready = not_ready or {}
        self.log_tail = log_tail
