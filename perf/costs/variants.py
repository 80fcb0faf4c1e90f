"""Variants of a model repository, served side by side and asked in turn: what a change costs.

Two runs of the same repository minutes apart differ by more than most changes do. Here every image
goes to all variants, in an order drawn anew, and what is compared is the difference between two
systems on the same image.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np

from server import TritonServer

from ..figures import LEAST_OVER_LOW
from ..harness import Asker
from ..measure.deployment import undisturbed
from ..measure.sets import Pool
from ..measure.systems import ENSEMBLE, LOW, NEVER, System
from ..measure.target import Target

WARMUP = 4
NEVER_ESCALATING = {"threshold": NEVER}
SYSTEMS = (
    System(LOW, "cheap rung", "vit_low"),
    System("adaptive-0", "router, never escalating", "router", NEVER_ESCALATING),
    System(ENSEMBLE, "ensemble, never escalating", "adaptive_vit", NEVER_ESCALATING, True),
)


@dataclass(frozen=True)
class Variant:
    """What one repository's requests took, milliseconds, each list in the order of the images.

    Attributes:
        low: of the cheap rung.
        router: of the router that never escalates.
        ensemble: of the ensemble that never escalates.
    """

    low: list[float]
    router: list[float]
    ensemble: list[float]

    @property
    def low_ms(self) -> float:
        """Median of the cheap rung alone."""
        return median(self.low)

    @property
    def router_adds_ms(self) -> float:
        """Median over the images of what the router adds to the cheap rung."""
        return median(a - b for a, b in zip(self.router, self.low, strict=True))

    @property
    def router_overhead(self) -> float:
        """Median over the images of router / cheap rung."""
        return median(a / b for a, b in zip(self.router, self.low, strict=True))

    @property
    def ensemble_adds_ms(self) -> float:
        """Median over the images of what the ensemble adds to the router."""
        return median(a - b for a, b in zip(self.ensemble, self.router, strict=True))

    @property
    def ensemble_over_router(self) -> float:
        """Mean latency of the ensemble / the router's."""
        return sum(self.ensemble) / sum(self.router)

    @property
    def disturbed(self) -> bool:
        """Whether a part seems to take more than the whole, so that no ratio can be true."""
        return min(self.router_overhead, self.ensemble_over_router) < LEAST_OVER_LOW


def measure(
    repositories: Sequence[Path], pool: Pool, rounds: int, on_image: Callable[[], None]
) -> list[Variant]:
    """Ask all variants about every image.

    Args:
        repositories: assembled ones, of the same backbone.
        pool: the images.
        rounds: how often each image is sent.
        on_image: called after each image of each round.

    Raises:
        ServerError: a server does not start.
        ClientError: one does not answer.
    """
    taken = [{system.name: [] for system in SYSTEMS} for _ in repositories]
    rng = np.random.default_rng(0)
    turns = [(variant, system) for variant in range(len(repositories)) for system in SYSTEMS]
    with _serving(repositories, pool) as askers:
        for asker in askers:
            for row in range(min(WARMUP, len(pool))):
                for system in SYSTEMS:
                    asker.ask(system, [row])
        for row in [*range(len(pool))] * rounds:
            for index in rng.permutation(len(turns)):
                variant, system = turns[index]
                (answer,) = askers[variant].ask(system, [row])
                taken[variant][system.name].append(answer.latency_ms)
            on_image()
    return [Variant(t[LOW], t["adaptive-0"], t[ENSEMBLE]) for t in taken]


@contextlib.contextmanager
def _serving(repositories: Sequence[Path], pool: Pool) -> Iterator[list[Asker]]:
    with contextlib.ExitStack() as stack:
        askers = []
        for repository in repositories:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="perf-variants-"))
            served = undisturbed(repository, Path(folder) / "model_repository")
            server = stack.enter_context(TritonServer(served, free_ports=True))
            target = stack.enter_context(Target(server.grpc_url, server.http_url, server))
            # No logits: models with and without a head are asked alike.
            askers.append(Asker(target, pool, has_head=False))
        yield askers
