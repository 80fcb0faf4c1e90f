"""Load that knows every right answer: closed loops of workers, or Poisson arrivals.

It runs on an event loop in a thread of its own, so that a test can break things meanwhile.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from functools import cache
from types import TracebackType

import numpy as np

from tests.faults.asking import OUTCOMES, Asker, Question, Request, mixed_questions
from tests.faults.truth import Truth

WINDOW_S = 1.0  # success without a break for so long is recovery
PAUSE_S = 0.05  # after a failure, or a refusing server would be all that is measured
_POLL_S = 0.1


@cache
def event_loop() -> asyncio.AbstractEventLoop:
    """The event loop of all load, in a thread of its own: gRPC serves only one per process."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    return loop


class Load:
    """Requests to one server between `with` and its end.

    Args:
        server: anything with `grpc_url` and `http_url`.
        truth: the images and their answers.
        workers: per worker of a closed loop the questions that it asks in turn.
        rate: requests per second of an open loop, which takes the first worker's questions; it
            has no workers then.
        timeout_s: per request.
    """

    def __init__(
        self,
        server,
        truth: Truth,
        workers: Sequence[Sequence[Question]],
        *,
        rate: float | None = None,
        timeout_s: float = 15.0,
    ) -> None:
        self._urls = (server.grpc_url, server.http_url)
        self._truth = truth
        self._workers = workers
        self._rate = rate
        self._timeout_s = timeout_s
        self._stop = threading.Event()
        self._done: Future[None] | None = None
        self._open: dict[int, float] = {}  # requests on their way, and when they started
        self._numbers = itertools.count()
        self.requests: list[Request] = []

    def __enter__(self) -> Load:
        self._done = asyncio.run_coroutine_threadsafe(self._main(), event_loop())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        assert self._done is not None
        self._done.result()

    def recovered_s(self, since: float) -> float | None:
        """Seconds from `since` until success lasted for a second; None if it has not yet."""
        now = time.monotonic()
        late = [(start, now) for start in [*self._open.values()] if now - start > WINDOW_S]
        return recovery_s([*self.requests], since, now, late)

    def wait_for_recovery(self, since: float, timeout_s: float) -> float | None:
        """As `recovered_s`, after waiting for it."""
        while time.monotonic() < since + timeout_s:
            time.sleep(_POLL_S)
            found = self.recovered_s(since)
            if found is not None:
                return found
        return None

    async def _main(self) -> None:
        if self._rate is not None:
            await self._poisson(self._rate)
            return
        await asyncio.gather(*(self._closed(questions) for questions in self._workers))

    async def _closed(self, questions: Sequence[Question]) -> None:
        asker = Asker(*self._urls, self._truth, self._timeout_s)
        for asked in itertools.cycle(questions):
            if self._stop.is_set():
                break
            done = await self._ask(asker, asked)
            if done.outcome != "ok":
                await asyncio.sleep(PAUSE_S)
        await asker.close()

    async def _poisson(self, rate: float) -> None:
        asker = Asker(*self._urls, self._truth, self._timeout_s)
        draw = random.Random(0)
        running: set[asyncio.Task] = set()
        due = time.monotonic()
        for asked in itertools.cycle(self._workers[0]):
            due += draw.expovariate(rate)
            # Also when late: else this would starve the tasks that it made.
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            if self._stop.is_set():
                break
            task = asyncio.create_task(self._ask(asker, asked, due))
            running.add(task)
            task.add_done_callback(running.discard)
        await asyncio.gather(*running)
        await asker.close()

    async def _ask(self, asker: Asker, asked: Question, due: float | None = None) -> Request:
        number = next(self._numbers)
        self._open[number] = time.monotonic()
        try:
            done = await asker.ask(asked, due)
        finally:
            del self._open[number]
        self.requests.append(done)
        return done


def usual_workers(truth: Truth, sizes: Sequence[int] = (1, 2, 4)) -> list[list[Question]]:
    """Four workers: bytes and tensors, over gRPC and HTTP, so many images at a time in turn."""
    kinds = itertools.product(("grpc", "http"), ("adaptive_vit", "adaptive_tensor"))
    return [mixed_questions(truth, protocol, model, sizes) for protocol, model in kinds]


def recovery_s(
    requests: Sequence[Request],
    since: float,
    now: float,
    late: Sequence[tuple[float, float]] = (),
) -> float | None:
    """Seconds from `since` to the moment after which nothing failed any more, for at least 1 s.

    That is the start of the first request that was sent after the last failure, and answered
    within a second.

    Args:
        requests: what has been answered.
        since: when the fault was injected.
        now: the end of what has been seen.
        late: start and end of requests that are on their way for too long.
    """
    failures = [r.ended for r in requests if r.outcome != "ok" and r.ended >= since]
    last = max([since, *failures, *(end for _, end in late)])
    quick = [
        r.started
        for r in requests
        if r.outcome == "ok" and r.started >= last and r.seconds <= WINDOW_S
    ]
    if not quick or min(quick) + WINDOW_S > now:
        return None
    return min(quick) - since


def counts(requests: Sequence[Request]) -> dict[str, int]:
    """How many requests had which outcome."""
    found = Counter(request.outcome for request in requests)
    return {outcome: found[outcome] for outcome in OUTCOMES}


def percentile_ms(requests: Sequence[Request], percent: float) -> float:
    """Of their latencies, in milliseconds; NaN without requests."""
    if not requests:
        return float("nan")
    return float(np.percentile([request.seconds for request in requests], percent)) * 1e3
