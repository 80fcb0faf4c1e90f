"""When a thread of the router's own may call a rung: while Triton holds the model.

Triton tells a Python model that it is being unloaded only by `finalize`, and takes the first
message that its process sends meanwhile for the end of that. A call of a rung sent then ends the
whole server with a segmentation fault (Triton 2.51: at every rollout under load, by an audit or a
comparison of reference answers). A model whose request is being answered is not unloaded, and from
the last answer on Triton waits for a second before it does anything. So calls off the request path
are sent while a request is being answered, or shortly after. One that has been sent may take its
time: Triton waits for it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from .routing import RungError

Answer = TypeVar("Answer")

_AFTERWARDS_S = 0.5  # of the second; the rest is for a thread that is slow to send


class Hold:
    """What is known of it in one instance, whose requests come one batch after the other."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._answering = False
        self._until_s = time.monotonic() + _AFTERWARDS_S
        self._stopped = False

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Around everything that is done about a batch of requests."""
        with self._changed:
            self._answering = True
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._answering = False
                self._until_s = time.monotonic() + _AFTERWARDS_S

    def stop(self) -> None:
        """No call any more: the model is being unloaded."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def keeping(self, call: Callable[..., Answer]) -> Callable[..., Answer]:
        """A call that waits until it may be sent.

        Returns:
            What `call` returns, and raises what it raises; RungError once the model is unloaded.
        """

        def held(*arguments: object) -> Answer:
            with self._changed:
                self._changed.wait_for(self._may_send)
                if self._stopped:
                    raise RungError("the router is being unloaded", is_outage=True)
            return call(*arguments)

        return held

    def _may_send(self) -> bool:
        return self._stopped or self._answering or time.monotonic() < self._until_s
