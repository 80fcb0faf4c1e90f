"""When the requests of an open user are due."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random


def arrivals(rate: float, generator: Random) -> Iterator[float]:
    """A Poisson process: independent exponential gaps of mean 1 / `rate`.

    Args:
        rate: arrivals per second.
        generator: where the gaps come from.

    Yields:
        Seconds from the start, rising, without end.
    """
    time_s = 0.0
    while True:
        time_s += generator.expovariate(rate)
        yield time_s
