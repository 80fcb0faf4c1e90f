"""The load test's own options, on Locust's command line and in its web page."""

from __future__ import annotations

import math
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass, fields

from ..figures import PerfError


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
