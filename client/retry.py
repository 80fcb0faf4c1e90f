"""When a request is sent again, and the one deadline over all its tries."""

from __future__ import annotations

import math
import random
import time
from dataclasses import dataclass

from .errors import ClientError, InvalidRequestError

_DOUBLINGS = 32  # more would overflow a float long after `max_backoff_s` has cut them


@dataclass(frozen=True)
class Retry:
    """How often a request is sent, and how long to wait in between.

    Only what may go better later is sent again (`ClientError.retryable`), before the request's
    deadline; asking about an image twice changes nothing. The waits are random ("full jitter"), so
    that clients that failed together come back apart. The defaults bridge a full queue or a dropped
    connection, in 0.15 s at most; to sit out a server's restart, allow about ten attempts.

    Attributes:
        attempts: at most, the first included.
        first_backoff_s: longest wait after the first failure, in seconds; it doubles each time.
        max_backoff_s: the most that it grows to, in seconds.

    Raises:
        InvalidRequestError: a value is out of range.
    """

    attempts: int = 3
    first_backoff_s: float = 0.05
    max_backoff_s: float = 1.0

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise InvalidRequestError(f"attempts must be at least 1; got {self.attempts}")
        for name in ("first_backoff_s", "max_backoff_s"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InvalidRequestError(
                    f"{name} must be a number of seconds, 0 or more; got {getattr(self, name)}"
                )

    def backoff_s(self, failures: int) -> float:
        """A random wait after so many failures (from 1), in seconds."""
        longest = self.first_backoff_s * 2 ** min(failures - 1, _DOUBLINGS)
        return random.uniform(0, min(longest, self.max_backoff_s))


DEFAULT_RETRY = Retry()


class Tries:
    """The tries of one request.

    Args:
        retry: how often and when; None for a single try.
        timeout_s: for all tries together, in seconds; None waits for ever.

    Raises:
        InvalidRequestError: `timeout_s` is no positive number.
    """

    def __init__(self, retry: Retry | None, timeout_s: float | None) -> None:
        if timeout_s is not None and not 0 < timeout_s < math.inf:
            raise InvalidRequestError(
                f"timeout_s must be a positive number of seconds, or None; got {timeout_s}"
            )
        self._retry = retry
        self._failures = 0
        self._deadline = math.inf if timeout_s is None else time.monotonic() + timeout_s

    def left_s(self) -> float | None:
        """Seconds until the deadline, None where there is none; TimeoutError after it."""
        if self._deadline == math.inf:
            return None
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left

    def pause_s(self, error: ClientError) -> float | None:
        """Seconds to wait after this failure before the next try; None where there is none."""
        self._failures += 1
        if self._retry is None or not error.retryable or self._failures >= self._retry.attempts:
            return None
        pause = self._retry.backoff_s(self._failures)
        return pause if time.monotonic() + pause < self._deadline else None
