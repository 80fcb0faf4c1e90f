"""Does a request leave gevent's other greenlets running?

gRPC waits outside Python. Unless `grpc.experimental.gevent.init_gevent()` was called before the
first channel, it stops the whole process meanwhile: all users share one request in flight, and
their latencies look normal. So it is measured, not assumed.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import gevent

TICK_S = 0.0005  # far below the fastest request that is worth a load test
CALLS = 5
# Of a request's time. A request that blocks leaves no tick inside it, which is 1; one that does
# not leaves many, but a busy machine may pause all of them in any single request.
BLOCKED_SHARE = 0.8


def blocks_hub(call: Callable[[], object]) -> bool:
    """Whether no other greenlet runs while `call` waits.

    Args:
        call: one request on an open connection. It is made several times, and all of them have to
            block.
    """
    return all(longest_pause_share(call) > BLOCKED_SHARE for _ in range(CALLS))


def longest_pause_share(call: Callable[[], object]) -> float:
    """The longest time without a tick of another greenlet during `call`, over its whole time."""
    ticks = []

    def tick() -> None:
        while True:
            ticks.append(time.perf_counter())
            gevent.sleep(TICK_S)

    ticker = gevent.spawn(tick)
    gevent.sleep(TICK_S)
    start = time.perf_counter()
    try:
        call()
    finally:
        end = time.perf_counter()
        ticker.kill()
    edges = [start, *(moment for moment in ticks if start < moment < end), end]
    pauses = (after - before for before, after in zip(edges, edges[1:], strict=False))
    return max(pauses) / (end - start)
