"""Every system on the same images, image by image: costs that compare, and agreement.

Passes of seconds drift by more than a router costs. Here the systems take turns on each image, in
an order drawn anew, so that what a shared machine does to one it does to all. Saturated they take
turns on spans of images, on the same cores each. The CPU time of the server's processes stands
beside the clock, and figures that cannot be true are measured once more (`believed`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from statistics import mean, median
from typing import Any

import numpy as np

from routing import RungOutputs, fidelity_loss

from .. import figures
from ..figures import Spread
from .asking import Answer, Asker
from .systems import ADAPTIVE, ENSEMBLE, ESCALATION, HIGH, LOW, System

# Asked right after one another, in either order: their ratio is what the second one adds.
PAIRS = {"adaptive-0": LOW, ENSEMBLE: ADAPTIVE}
ATTEMPTS = 2  # at figures that can be true


@dataclass(frozen=True, eq=False)
class Paired:
    """What was measured.

    Attributes:
        shares: for each share of the images, measured once or more often, the answers of each
            system in the order of the share's images.
    """

    shares: Sequence[dict[str, list[Answer]]]

    def costs_ms(self, system: str) -> list[float]:
        """Mean latency of each share, milliseconds."""
        return [mean(a.latency_ms for a in share[system]) for share in self.shares]

    def cpu_costs_ms(self, system: str) -> list[float] | None:
        """Mean CPU time of the server of each share, milliseconds; None where not measured."""
        taken = [[a.cpu_ms for a in share[system]] for share in self.shares]
        if any(cpu_ms is None for share in taken for cpu_ms in share):
            return None
        return [mean(cpu_ms for cpu_ms in share if cpu_ms is not None) for share in taken]

    def cpu_cost(self, system: str) -> Spread | None:
        """Mean CPU time of the server, one value per share; None where it was not measured."""
        costs = self.cpu_costs_ms(system)
        return None if costs is None else Spread.of(costs)

    def cost(self, system: str) -> Spread:
        """Mean latency, one value per share."""
        return Spread.of(self.costs_ms(system))

    def cost_ratio(self, system: str, to: str = HIGH) -> Spread:
        """Mean latency / that of another system on the same share."""
        both = zip(self.costs_ms(system), self.costs_ms(to), strict=True)
        return Spread.of([cost / other for cost, other in both])

    def disturbed(self, system: str, to: str, cpu_counts: bool) -> bool:
        """Whether clock and CPU time tell different stories of `cost_ratio`.

        Args:
            system: whose cost.
            to: the system it is held against.
            cpu_counts: see `doubts`.
        """
        costs, others = self.cpu_costs_ms(system), self.cpu_costs_ms(to)
        if not cpu_counts or costs is None or others is None:
            return False
        if min(*costs, *others) <= 0:
            return True
        by_cpu = median(cost / other for cost, other in zip(costs, others, strict=True))
        return figures.apart(self.cost_ratio(system, to).median, by_cpu) > figures.MOST_APART

    def escalation_rate(self, system: str) -> float:
        """Share of all images that the full rung answered, 0..1."""
        return mean(a.escalated for share in self.shares for a in share[system])

    def agreement(self, system: str, disagrees: Callable[[Answer, Answer], bool]) -> float:
        """Share of all images answered as static high answers them, 0..1."""
        return mean(
            not disagrees(mine, full)
            for share in self.shares
            for mine, full in zip(share[system], share[HIGH], strict=True)
        )

    def router_overhead(self) -> Spread:
        """Of each share the median over its images of adaptive-0 / static low, side by side."""
        ratios = [
            median(
                never.latency_ms / low.latency_ms
                for never, low in zip(share["adaptive-0"], share[LOW], strict=True)
            )
            for share in self.shares
        ]
        return Spread.of(ratios)

    def speedup(self) -> Spread:
        """Of the calibrated cascade, one value per share."""
        both = zip(self.costs_ms(ADAPTIVE), self.costs_ms(HIGH), strict=True)
        return Spread.of([figures.speedup(cost, high) for cost, high in both])

    def cpu_speedup(self) -> Spread | None:
        """The same by CPU time; None where that was not measured, or took none."""
        own, high = self.cpu_costs_ms(ADAPTIVE), self.cpu_costs_ms(HIGH)
        if own is None or high is None or min(*own, *high) <= 0:
            return None
        return Spread.of([figures.speedup(*both) for both in zip(own, high, strict=True)])

    def doubts(self, cpu_counts: bool) -> list[str]:
        """Why the figures cannot be believed, see `figures.doubts`.

        Args:
            cpu_counts: whether CPU time grows as the time by the clock does: no GPU, and requests
                of one thread, or saturated cores.
        """
        over_low = self.cost_ratio(ADAPTIVE, to=LOW).median
        if "adaptive-0" in self.shares[0]:
            over_low = min(over_low, self.router_overhead().median)
        cpu = self.cpu_speedup() if cpu_counts else None
        speedup = self.speedup().median
        # People divide the two medians that they are shown, which is another figure.
        efficiency = max(self.efficiency().median, speedup / self.bound().median)
        found = figures.doubts(speedup, efficiency, over_low, None if cpu is None else cpu.median)
        if cpu_counts and cpu is None and self.cpu_costs_ms(ADAPTIVE) is not None:
            found.append(
                "some images took no CPU time, less what the server was seen to take while idle"
            )
        return found

    def bound(self) -> Spread:
        """The cascade bound at each share's own escalation rate."""
        return Spread.of([figures.cascade_bound(*costs) for _, *costs in self._cascade])

    def efficiency(self) -> Spread:
        """The cascade efficiency, one value per share."""
        return Spread.of([figures.cascade_efficiency(*costs) for costs in self._cascade])

    @property
    def _cascade(self) -> list[tuple[float, float, float, float, float]]:
        """Of each share: costs of adaptive, low and high, escalation, cost of an escalation."""
        rates = [mean(a.escalated for a in share[ADAPTIVE]) for share in self.shares]
        adaptive, low, high = (self.costs_ms(system) for system in (ADAPTIVE, LOW, HIGH))
        # Where nothing is certified no image is scored, and the cheap rung is no part of its cost.
        scored = [mean(not np.isnan(a.score) for a in share[ADAPTIVE]) for share in self.shares]
        low = [cost * share for cost, share in zip(low, scored, strict=True)]
        escalated = self.costs_ms(ESCALATION if ESCALATION in self.shares[0] else HIGH)
        return list(zip(adaptive, low, high, rates, escalated, strict=True))


def measure_paired(
    asker: Asker,
    systems: Sequence[System],
    rows: Sequence[int],
    shares: int,
    repeats: int,
    on_image: Callable[[], None],
) -> Paired:
    """Ask every system about every image.

    Args:
        asker: sends the requests.
        systems: static low, static high and the adaptive ones among them.
        rows: the images; neighbours in it come into the same share.
        shares: into how many parts the images are cut.
        repeats: how often each part is measured.
        on_image: called after each image.
    """
    rng = np.random.default_rng(0)
    by_name = {system.name: system for system in systems}
    measured = []
    for _ in range(repeats):
        for share in np.array_split(np.asarray(rows), shares):
            answers: dict[str, list[Answer]] = {name: [] for name in by_name}
            for row in share.tolist():
                for name in _order(list(by_name), rng):
                    answers[name].append(asker.ask(by_name[name], row))
                on_image()
            measured.append(answers)
    return Paired(measured)


def measure_spans(
    asker: Asker,
    systems: Sequence[System],
    spans: Sequence[Sequence[int]],
    in_flight: int,
    on_span: Callable[[], None],
) -> Paired:
    """Ask every system about spans of images, many requests in flight.

    Args:
        asker: sends the requests.
        systems: static low, static high and the adaptive one among them.
        spans: the images of each turn, in which every system is sent all of them.
        in_flight: requests that are always unanswered.
        on_span: called after each span.

    Returns:
        One share for each turn.
    """
    rng = np.random.default_rng(0)
    measured = []
    with ThreadPoolExecutor(in_flight) as threads:
        for system in systems:  # what a size of batch costs when it is met first
            asker.ask_span(system, spans[0][: 2 * in_flight], threads)
        for span in spans:
            answers = {}
            for index in rng.permutation(len(systems)):
                answers[systems[index].name] = asker.ask_span(systems[index], span, threads)
                on_span()
            measured.append(answers)
    return Paired(measured)


def believed(
    measure: Callable[[], Paired], cpu_counts: bool, again: Callable[[str], None]
) -> tuple[Paired, list[str]]:
    """Measure, and once more where the figures cannot be true.

    Args:
        measure: measures everything.
        cpu_counts: see `Paired.doubts`.
        again: called with words for a bar before everything is measured once more.

    Returns:
        The first measurement without doubts, else the last, and its doubts.
    """
    paired = measure()
    doubts = paired.doubts(cpu_counts)
    for _ in range(ATTEMPTS - 1):
        if not doubts:
            break
        again("disturbed, once more")
        paired = measure()
        doubts = paired.doubts(cpu_counts)
    return paired, doubts


def _order(names: list[str], rng: np.random.Generator) -> list[str]:
    """A random order in which the pairs stand side by side, either one first."""
    seconds = {name for name, first in PAIRS.items() if name in names and first in names}
    firsts = {PAIRS[name]: name for name in seconds}
    order: list[str] = []
    for index in rng.permutation(len(names)):
        name = names[index]
        if name in seconds:
            continue
        pair = [name, firsts[name]] if name in firsts else [name]
        order += pair if rng.random() < 0.5 else pair[::-1]
    return order


def is_a_loss(chosen_by: Mapping[str, Any]) -> Callable[[Answer, Answer], bool]:
    """Whether an answer is not acceptable in place of another, by the loss of a calibration.

    Args:
        chosen_by: of the calibration.
    """

    def lost(mine: Answer, full: Answer) -> bool:
        return bool(fidelity_loss(chosen_by, _as_batch(mine), _as_batch(full))[0])

    return lost


def _as_batch(answer: Answer) -> RungOutputs:
    logits = answer.logits
    return RungOutputs(answer.embedding[None], None, None if logits is None else logits[None])
