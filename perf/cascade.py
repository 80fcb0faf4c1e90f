"""What a cascade is worth beside its parts: measured in turn, and the sections of a summary.

`python -m perf run` and the demo measure by two functions: one request in flight, and saturated
with the same cores for every system.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean, median
from typing import Any

from report.terminal import Bar

from .cpu import on_same_cores
from .harness import ONE_BY_ONE, Answer, Asks, Load, Paired, believed, take_turns
from .systems import ADAPTIVE, ENSEMBLE, HIGH, System
from .target import Target


@dataclass(frozen=True, eq=False)
class Measured:
    """What was measured under a load, and why it cannot be believed where it cannot.

    Attributes:
        paired: the answers of every system, share by share.
        doubts: one clause each; none: it can be believed.
        load: `c1`, one request in flight, or `saturated`.
        in_flight: requests that were always unanswered.
        cpu_counts: whether CPU time was held against the clock, see `Paired.doubts`.
        cores: that the server had.
    """

    paired: Paired
    doubts: Sequence[str]
    load: str = "c1"
    in_flight: int = 1
    cpu_counts: bool = True
    cores: int = 0

    def sections(
        self,
        systems: Sequence[System],
        disagrees: Callable[[Answer, Answer], bool],
        labels: Sequence[int] | None,
    ) -> dict[str, Any]:
        """The sections of a summary: each system's answers and costs, and the cascade's figures.

        Args:
            systems: that were asked.
            disagrees: whether an answer is not acceptable in place of static high's.
            labels: class index of each answered image in the order of `paired`, or None.
        """
        paired = self.paired
        answers = {
            system.name: {
                "title": system.title,
                "recipe": system.recipe,
                "agreement_with_high": paired.agreement(system.name, disagrees),
                "escalation_rate": paired.escalation_rate(system.name),
                "accuracy": _accuracy(paired.answers(system.name), labels),
                "p50_ms": median(a.latency_ms for a in paired.answers(system.name)),
                "cost_ms": paired.cost(system.name).to_dict(),
                "cpu_ms": None if (cpu := paired.cpu_cost(system.name)) is None else cpu.to_dict(),
                "cost_ratio": paired.cost_ratio(system.name).to_dict(),
                "disturbed": paired.disturbed(system.name, HIGH, self.cpu_counts),
            }
            for system in systems
        }
        figures = {
            f"speedup_{self.load}": paired.speedup(),
            f"bound_{self.load}": paired.bound(),
            f"cascade_efficiency_{self.load}": paired.efficiency(),
            f"cpu_speedup_{self.load}": paired.cpu_speedup(),
        }
        section: dict[str, Any]
        if self.load == "c1":
            section = {"answers": answers}
            figures["router_overhead_c1"] = paired.router_overhead()
            if ENSEMBLE in answers:
                figures["ensemble_over_router"] = paired.cost_ratio(ENSEMBLE, to=ADAPTIVE)
        else:
            how = {"cores": self.cores, "in_flight": self.in_flight}
            section = {"saturated": {**how, "systems": answers}}
        measured = {name: spread.to_dict() for name, spread in figures.items() if spread}
        return section | measured


def _accuracy(answers: Sequence[Answer], labels: Sequence[int] | None) -> float | None:
    if labels is None or any(answer.logits is None for answer in answers):
        return None
    return mean(answer.top1 == label for answer, label in zip(answers, labels, strict=True))


def one_in_flight(
    target: Target,
    asker: Asks,
    systems: Sequence[System],
    shares: Sequence[Sequence[int]],
    bar: Bar,
    warm_up: int = 0,
) -> Measured:
    """Ask the systems in turn, image by image, once more where the figures cannot be true.

    Args:
        target: the server, asked by nobody else.
        asker: sends it the requests.
        systems: static low, static high and adaptive among them.
        shares: images, a value of each figure for each share of them.
        bar: of as many steps as there are systems times images.
        warm_up: images that each system is asked about before, for nothing.
    """
    cpu_counts = target.cpu_threads() == 1

    def measure() -> Paired:
        return take_turns(asker, systems, shares, ONE_BY_ONE, bar.advance, warm_up)

    paired, doubts = believed(measure, cpu_counts, bar.begin_again)
    return Measured(paired, doubts, "c1", 1, cpu_counts, len(os.sched_getaffinity(0)))


def saturated(
    target: Target,
    asker: Asks,
    systems: Sequence[System],
    spans: Sequence[Sequence[int]],
    in_flight: int,
    bar: Bar,
) -> Measured:
    """Ask the systems in turn about spans of images, on the same cores, many requests in flight.

    Args:
        target: the server, on this machine and asked by nobody else.
        asker: sends it the requests.
        systems: static low, static high and adaptive among them.
        spans: the images of each turn, in which every system is sent all of them.
        in_flight: requests that are always unanswered.
        bar: of as many steps as there are systems times spans.
    """
    assert target.server is not None
    threads, load = target.cpu_threads(), Load(in_flight, block=None)
    # A GPU is the same for every system as it is.
    wanted = threads or len(os.sched_getaffinity(0))
    with on_same_cores(target.server.process_ids(), wanted) as cores:

        def measure() -> Paired:
            return take_turns(asker, systems, spans, load, bar.advance, warm_up=2 * in_flight)

        paired, doubts = believed(measure, threads is not None, bar.begin_again)
    return Measured(paired, doubts, "saturated", in_flight, threads is not None, cores)
