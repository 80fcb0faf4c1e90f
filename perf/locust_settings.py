"""What a Locust run is to do: options, images, when requests are due, and what makes it valid.

Nothing here imports Locust, which replaces Python's own threads and sockets by gevent's.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import cache
from random import Random

import gevent

from calibration.images import open_images

from .figures import PerfError
from .images import readable

SAMPLE_SEED = 21  # crops that calibration's default seeds do not give
_HELP = {
    "images": "Images to send: a folder, sample or sample:SEED. Each is sent equally often.",
    "image_limit": "Take at most this many images.",
    "rate": "Requests per second of each open user.",
    "slo_p95_ms": "Exit with code 1 when the 95th percentile of all requests is above; 0: no "
    "limit.",
    "slo_failures": "Exit with code 1 when a larger share of all requests failed, 0 to 1.",
}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """What the options say, see `_HELP`, and whether a run kept to them.

    Each has a default of its own type, by which Locust reads what is typed into its web page.
    """

    images: str = "sample"
    image_limit: int = 200
    rate: float = 1.0
    slo_p95_ms: float = 0.0
    slo_failures: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what nothing can be measured with.

        Raises:
            PerfError: naming the option.
        """
        if self.image_limit < 1:
            raise PerfError(f"--image-limit {self.image_limit} leaves no image; give at least 1")
        if not (self.rate > 0 and math.isfinite(self.rate)):
            raise PerfError(f"--rate {self.rate:g}: give requests per second, above 0")
        if not self.slo_p95_ms >= 0:
            raise PerfError(f"--slo-p95-ms {self.slo_p95_ms:g}: give milliseconds, or 0")
        if not 0 <= self.slo_failures <= 1:
            raise PerfError(f"--slo-failures {self.slo_failures:g}: give a share, 0 to 1")

    @classmethod
    def of(cls, options: Namespace) -> Settings:
        """Read them off Locust's options.

        Raises:
            PerfError: a value makes no sense.
        """
        return cls(**{field.name: getattr(options, field.name) for field in fields(cls)})

    def missed(self, requests: int, failures: int, p95_ms: float) -> str | None:
        """Judge a run.

        Args:
            requests: all of them, the failed ones too.
            failures: how many of them failed.
            p95_ms: their 95th percentile.

        Returns:
            One line that says what is above its limit; None where the objective was met.
        """
        if not requests:
            return "not a single request was sent; allow more time, or more users"
        reasons = []
        if failures > self.slo_failures * requests:
            reasons.append(
                f"{failures} of {requests} requests failed ({failures / requests:.2%}), "
                f"{self.slo_failures:.2%} allowed"
            )
        if 0 < self.slo_p95_ms < p95_ms:
            reasons.append(f"p95 is {p95_ms:g} ms, {self.slo_p95_ms:g} ms allowed")
        return f"SLO missed: {'; '.join(reasons)}" if reasons else None


def add_options(parser: ArgumentParser) -> None:
    """Add the settings to Locust's parser."""
    for name, default in vars(Settings()).items():
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=type(default), default=default, help=_HELP[name])


def arrivals(rate: float, generator: Random) -> Iterator[float]:
    """A Poisson process: independent exponential gaps of mean 1 / `rate`.

    Args:
        rate: arrivals per second.
        generator: where the gaps come from.

    Yields:
        Seconds from the start, rising, without end.
    """
    return itertools.accumulate(generator.expovariate(rate) for _ in itertools.count())


@cache
def image_round(spec: str, limit: int) -> Iterator[bytes]:
    """The images' encoded bytes, round and round.

    All users of a process take from one round, so that each image is sent equally often and the
    escalation rate is that of the images.

    Args:
        spec: a folder, `sample` or `sample:SEED`.
        limit: at most this many images. One that cannot be read is left out, which is logged.

    Raises:
        ImagesError: no such folder, or no image in it.
        PerfError: not one image can be read.
    """
    source = open_images(f"sample:{SAMPLE_SEED}" if spec == "sample" else spec, limit)
    if source.note:
        logger.warning("%s", source.note)
    unreadable: list[str] = []
    images = [image.data for image, _ in filter(None, readable(source, unreadable))]
    if unreadable:
        logger.warning(
            "left out %d of %d images; first: %s", len(unreadable), len(source), unreadable[0]
        )
    logger.info("sending %d images: %s", len(images), source.title)
    return itertools.cycle(images)


# --- does a request leave gevent's other greenlets running? ---------------------------------------
#
# gRPC waits outside Python. Unless `grpc.experimental.gevent.init_gevent()` was called before the
# first channel, it stops the whole process meanwhile: all users share one request in flight, and
# their latencies look normal. So it is measured, not assumed.

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
    return max(after - before for before, after in itertools.pairwise(edges)) / (end - start)
