"""What a Locust run is to do: options, images, when requests are due, and its objective.

Nothing here imports Locust, which replaces Python's own threads and sockets by gevent's.
"""

from __future__ import annotations

import itertools
import logging
import math
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cache
from random import Random

from calibration.images import open_images

from ..figures import PerfError
from ..images import readable

SAMPLE_SEED = 21  # crops that calibration's default seeds do not give

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """What the options say.

    Attributes:
        images: a folder, `sample` or `sample:SEED`.
        image_limit: at most this many images.
        rate: planned requests per second of each open user.
        slo_p95_ms: the run fails when the 95th percentile is above; 0 for no limit.
        slo_failures: the run fails when a larger share of requests failed, 0..1.
    """

    images: str
    image_limit: int
    rate: float
    slo_p95_ms: float
    slo_failures: float

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


def add_options(parser: ArgumentParser) -> None:
    """Add them to Locust's parser.

    Each has a default of its own type, by which Locust reads what is typed into its web page.
    """
    parser.add_argument(
        "--images",
        default="sample",
        help="Images to send: a folder, sample or sample:SEED. Each is sent equally often.",
    )
    parser.add_argument(
        "--image-limit", type=int, default=200, help="Take at most this many images."
    )
    parser.add_argument(
        "--rate", type=float, default=1.0, help="Requests per second of each open user."
    )
    parser.add_argument(
        "--slo-p95-ms",
        type=float,
        default=0.0,
        help="Exit with code 1 when the 95th percentile of all requests is above; 0: no limit.",
    )
    parser.add_argument(
        "--slo-failures",
        type=float,
        default=0.0,
        help="Exit with code 1 when a larger share of all requests failed, 0 to 1.",
    )


@dataclass(frozen=True)
class Slo:
    """Limits over all requests of a run.

    Attributes:
        p95_ms: the 95th percentile may not be above; 0 for no limit.
        failures: no larger share of the requests may fail, 0..1.
    """

    p95_ms: float
    failures: float = 0.0

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
        if failures > self.failures * requests:
            reasons.append(
                f"{failures} of {requests} requests failed ({failures / requests:.2%}), "
                f"{self.failures:.2%} allowed"
            )
        if 0 < self.p95_ms < p95_ms:
            reasons.append(f"p95 is {p95_ms:g} ms, {self.p95_ms:g} ms allowed")
        return f"SLO missed: {'; '.join(reasons)}" if reasons else None


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
    unreadable: list[str] = []
    images = [image.data for image, _ in filter(None, readable(source, unreadable))]
    if unreadable:
        logger.warning(
            "left out %d of %d images; first: %s", len(unreadable), len(source), unreadable[0]
        )
    logger.info("sending %d images: %s", len(images), source.title)
    return itertools.cycle(images)
