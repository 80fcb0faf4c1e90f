"""What a cascade is worth beside its parts: measured in turn, and the sections of a summary.

`python -m perf run` and the demo measure by two functions: one request in flight, and saturated
with the same cores for every system.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from report.terminal import Bar

from .cpu import on_same_cores
from .figures import Spread
from .harness import ONE_BY_ONE, Answer, Asks, Load, Paired, believed, take_turns
from .systems import ADAPTIVE, ENSEMBLE, System
from .target import Target


@dataclass(frozen=True, eq=False)
class Measured:
    """What was measured, and why it cannot be believed where it cannot.

    Attributes:
        paired: the answers of every system, share by share.
        doubts: one clause each; none: it can be believed.
        cpu_counts: whether CPU time was held against the clock, see `Paired.doubts`.
        cores: that the server had.
    """

    paired: Paired
    doubts: Sequence[str]
    cpu_counts: bool = True
    cores: int = 0


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
    return Measured(paired, doubts, cpu_counts, len(os.sched_getaffinity(0)))


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
    return Measured(paired, doubts, threads is not None, cores)


def answers_section(
    paired: Paired,
    systems: Sequence[System],
    disagrees: Callable[[Answer, Answer], bool],
    labels: Sequence[int] | None,
) -> dict[str, Any]:
    """Each system's agreement, escalation, accuracy and cost on exactly the same images.

    Args:
        paired: what was measured.
        systems: what was asked.
        disagrees: whether an answer is not acceptable in place of static high's.
        labels: class index of each answered image in the order of `paired`, or None.
    """
    return {
        system.name: {
            "title": system.title,
            "recipe": system.recipe,
            "agreement_with_high": paired.agreement(system.name, disagrees),
            "escalation_rate": paired.escalation_rate(system.name),
            "accuracy": _accuracy(paired, system.name, labels),
            "cost_ms": paired.cost(system.name).to_dict(),
            "cpu_ms": _or_none(paired.cpu_cost(system.name)),
            "cost_ratio": paired.cost_ratio(system.name).to_dict(),
        }
        for system in systems
    }


def _or_none(spread: Spread | None) -> dict[str, Any] | None:
    return None if spread is None else spread.to_dict()


def _accuracy(paired: Paired, system: str, labels: Sequence[int] | None) -> float | None:
    if labels is None:
        return None
    answers = [answer for share in paired.shares for answer in share[system]]
    right = [
        int(answer.logits.argmax()) == label
        for answer, label in zip(answers, labels, strict=True)
        if answer.logits is not None
    ]
    return sum(right) / len(right) if right else None


def figures_section(paired: Paired, load: str) -> dict[str, Any]:
    """The figures of a cascade under a load, `c1` or `saturated`, one value for each share."""
    found = {
        f"speedup_{load}": paired.speedup(),
        f"bound_{load}": paired.bound(),
        f"cascade_efficiency_{load}": paired.efficiency(),
    }
    cpu = paired.cpu_speedup()
    if cpu is not None:
        found[f"cpu_speedup_{load}"] = cpu
    if load == "c1":
        found["router_overhead_c1"] = paired.router_overhead()
        if ENSEMBLE in paired.shares[0]:
            found["ensemble_over_router"] = paired.cost_ratio(ENSEMBLE, to=ADAPTIVE)
    return {name: spread.to_dict() for name, spread in found.items()}


def saturated_section(measured: Measured, in_flight: int) -> dict[str, Any]:
    """Of each system what it cost saturated, and with how many requests and cores."""
    paired = measured.paired
    systems = {
        name: {
            "cost_ms": paired.cost(name).to_dict(),
            "cpu_ms": _or_none(paired.cpu_cost(name)),
            "escalation_rate": paired.escalation_rate(name),
        }
        for name in paired.shares[0]
    }
    return {"cores": measured.cores, "in_flight": in_flight, "systems": systems}
