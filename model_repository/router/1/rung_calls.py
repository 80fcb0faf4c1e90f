"""Calls of the rungs: by Triton's business logic scripting, the full one within a time budget."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

import triton_python_backend_utils as pb_utils

from .routing import RungError, RungOutputs, is_outage

Answer = TypeVar("Answer")

# A rung that is away but takes its time to say so (a stopped process: one second in tritonserver
# 2.51) would hold an instance of the router for that time at every call.
_SLOW_OUTAGE_S = 0.25
_PAUSE_S = 2.0
# Every rung has this version and no other; a call without one would get the highest that is there.
_VERSION = 1


def call_rung(
    model: str, image: Any, output_names: Sequence[str], timeout_s: float | None = None
) -> RungOutputs:
    """Ask a rung.

    Args:
        model: its name.
        image: the tensor `image`, FP32 [B, 3, H, W].
        output_names: outputs to ask for.
        timeout_s: seconds that the call may wait in the rung's queue; None: any time.

    Raises:
        RungError: it did not answer.
    """
    response = pb_utils.InferenceRequest(
        model_name=model,
        model_version=_VERSION,
        requested_output_names=list(output_names),
        inputs=[image],
        preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU),
        timeout=0 if timeout_s is None else int(timeout_s * 1e6),
    ).exec()
    if response.has_error():
        message = response.error().message()
        raise RungError(f"{model} failed: {message}", is_outage(message))
    arrays = {tensor.name(): tensor.as_numpy() for tensor in response.output_tensors()}
    return RungOutputs(arrays["embedding"], arrays.get("cls_layers"), arrays.get("logits"))


class LateError(RungError):
    """A rung that is over its time budget.

    Attributes:
        reason: `timeout`: this call took too long; `open`: an earlier one still does, so this one
            was not made.
    """

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message, is_outage=True)
        self.reason = reason


class Budgeted(Generic[Answer]):
    """A call that is given up after a time budget, one at a time.

    A call cannot be ended from here. While one that was given up is still out, further ones are
    refused at once: a hung rung costs each instance of the router one budget, not one per request.
    The first answer, or error, of that call opens the way again. After an outage that took long to
    show, calls are refused for two seconds.
    """

    def __init__(self, name: str, call: Callable[..., Answer], budget_s: float) -> None:
        self._name = name
        self._call = call
        self._budget_s = budget_s
        self._last: Future[Answer] | None = None
        self._paused_until_s = 0.0
        self._jobs: SimpleQueue[tuple[Future[Answer], tuple[Any, ...]]] = SimpleQueue()
        # A daemon: a call that never returns must not keep the process from ending.
        threading.Thread(target=self._work, name=f"{name}-calls", daemon=True).start()

    def __call__(self, *arguments: Any) -> Answer:
        """Make the call.

        Raises:
            LateError: it is over its budget, or an earlier one is.
            RungError: what the call raised.
        """
        if self._last is not None and not self._last.done():
            raise LateError(f"{self._name} failed: it has not answered an earlier call yet", "open")
        started = time.monotonic()
        if started < self._paused_until_s:
            raise LateError(f"{self._name} failed: it was not there a moment ago", "open")
        self._last = Future()
        self._jobs.put((self._last, arguments))
        try:
            return self._last.result(self._budget_s)
        except FutureTimeoutError:
            raise LateError(
                f"{self._name} failed: no answer within {self._budget_s:g} s", "timeout"
            ) from None
        except RungError as error:
            ended = time.monotonic()
            if error.is_outage and ended - started > _SLOW_OUTAGE_S:
                self._paused_until_s = ended + _PAUSE_S
            raise

    def _work(self) -> None:
        while True:
            future, arguments = self._jobs.get()
            try:
                future.set_result(self._call(*arguments))
            except BaseException as error:
                future.set_exception(error)
