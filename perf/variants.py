"""Variants of a model repository, served side by side and asked in turn: what a change costs.

Two runs of the same repository minutes apart differ by more than most changes do. Here every image
goes to all variants, and what is compared is two systems of one variant on the same image.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from bundle.placing import working_folder
from server import TritonServer

from .figures import LEAST_OVER_LOW
from .harness import ONE_BY_ONE, Answer, Asker, Asks, Load, Paired, take_turns
from .images import Pool
from .repository import undisturbed
from .systems import ENSEMBLE, LOW, NEVER, System
from .target import Target

WARM_UP = 4
ROUTER = "adaptive-0"
SYSTEMS = (
    System(LOW, "cheap rung", "vit_low"),
    System(ROUTER, "router, never escalating", "router", {"threshold": NEVER}),
    System(ENSEMBLE, "ensemble, never escalating", "adaptive_vit", {"threshold": NEVER}, True),
)


@dataclass(frozen=True)
class Variant:
    """What one repository's requests took.

    Attributes:
        low_ms: median of the cheap rung alone, milliseconds.
        router_adds_ms: median over the images of what the router adds to that.
        router_overhead: median over the images of router / cheap rung.
        ensemble_adds_ms: median over the images of what the ensemble adds to the router.
        ensemble_over_router: mean latency of the ensemble / the router's.
    """

    low_ms: float
    router_adds_ms: float
    router_overhead: float
    ensemble_adds_ms: float
    ensemble_over_router: float

    @property
    def disturbed(self) -> bool:
        """Whether a part seems to take more than the whole, so that no ratio can be true."""
        return min(self.router_overhead, self.ensemble_over_router) < LEAST_OVER_LOW

    @classmethod
    def of(cls, paired: Paired) -> Variant:
        """The figures of `SYSTEMS`, all of them in one share."""
        (share,) = paired.shares
        low, router, ensemble = (
            [answer.latency_ms for answer in share[system.name]] for system in SYSTEMS
        )
        return cls(
            median(low),
            median(a - b for a, b in zip(router, low, strict=True)),
            paired.router_overhead().median,
            median(a - b for a, b in zip(ensemble, router, strict=True)),
            paired.cost_ratio(ENSEMBLE, to=ROUTER).median,
        )


@dataclass(frozen=True)
class SideBySide:
    """Asks one of several servers, which the number in front of a system's name tells."""

    askers: Sequence[Asks]

    def ask(self, system: System, rows: Sequence[int], load: Load = ONE_BY_ONE) -> list[Answer]:
        """Ask the system's own server."""
        return self.askers[int(system.name.split()[0])].ask(system, rows, load)


def measure(
    repositories: Sequence[Path], pool: Pool, rounds: int, on_turn: Callable[[], None]
) -> list[Variant]:
    """Ask all variants about every image.

    Args:
        repositories: assembled ones, of the same backbone.
        pool: the images, each of which is sent in every round.
        rounds: how many.
        on_turn: called after each request.

    Raises:
        ServerError: a server does not start.
        ClientError: one does not answer.
    """
    numbers = range(len(repositories))
    systems = [replace(s, name=f"{number} {s.name}") for number in numbers for s in SYSTEMS]
    rows = [*range(len(pool))] * rounds
    with _serving(repositories, pool) as askers:
        both = SideBySide(askers)
        found = take_turns(both, systems, [rows], ONE_BY_ONE, on_turn, warm_up=WARM_UP)
    (share,) = found.shares
    return [
        Variant.of(Paired([{s.name: share[f"{number} {s.name}"] for s in SYSTEMS}]))
        for number in numbers
    ]


@contextlib.contextmanager
def _serving(repositories: Sequence[Path], pool: Pool) -> Iterator[list[Asker]]:
    with contextlib.ExitStack() as stack:
        askers = []
        for repository in repositories:
            folder = stack.enter_context(working_folder("variants"))
            served = undisturbed(repository, folder / "model_repository")
            running = TritonServer(served, free_ports=True, stop_patience_s=0)
            server = stack.enter_context(running)
            target = stack.enter_context(Target(server.grpc_url, server.http_url, server))
            # No logits: models with and without a head are asked alike.
            askers.append(Asker(target, pool, has_head=False))
        yield askers
