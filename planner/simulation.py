"""Plans for more images than there are: how should δ be shared, and how large should fit be?

A population is made of what graphs answered for a few hundred pictures: every cascade's score, out
of fold, and loss for each. A plan's images are drawn from it with replacement, so that the true
risk and cost of whatever the plan chooses are known. What more images would teach an alignment, a
signal or ranges of int8 is not in it: those are as these pictures taught them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from calibration.certify import FloatVector, Goal, allowed_errors, candidate_thresholds, certify
from calibration.splits import FIT_SHARE
from report.terminal import Bars

from .select import MOST, Offer, cheapest_together, offers, play, plays_ms
from .study import Study, to_no_alignment

IMAGES = (100, 300, 1_000, 3_000, 10_000)
PLAYS = 100
ABOVE = ": above the risk"
EQUAL, SEQUENCE = "equal shares", "fixed sequence"
# The share of δ of each of K cascades that are tested, by K; K is what the plays say is best.
RULES: Mapping[str, Sequence[Sequence[float]]] = {
    EQUAL: [[1 / k] * k for k in range(1, MOST + 1)],
    "half for the best": [[1.0], *([0.5, *[0.5 / k] * k] for k in range(1, MOST))],
    "one cascade": [[1.0]],
    "four, equal shares": [[1 / MOST] * MOST],
    SEQUENCE: [[1.0] * MOST],
}


@dataclass(frozen=True)
class Way:
    """How a simulated plan divides images, and δ.

    Attributes:
        name: in words.
        fit: share of the images.
        rule: key of `RULES`.
    """

    name: str
    fit: float = FIT_SHARE
    rule: str = EQUAL


WAYS = (
    *(Way(f"{share:.0%} fit", share) for share in (0.2, FIT_SHARE, 0.5)),
    *(Way(rule, rule=rule) for rule in RULES if rule != EQUAL),
)


@dataclass(frozen=True, eq=False)
class Population:
    """What is known of the pictures that images are drawn from.

    Attributes:
        cascades: every one with its scores and losses.
        ms: of an image, by graph.
        full_ms: of the full model.
    """

    cascades: Sequence[Offer]
    ms: Mapping[str, float]
    full_ms: float

    @classmethod
    def of(cls, study: Study, seed: int) -> Population:
        """The cascades of a study, aligned where that helps; all pictures teach them, cross-fitted.

        Args:
            study: what graphs answered.
            seed: of the folds.
        """
        pairs = study.aligned(to_no_alignment, np.arange(len(study.groups)), seed)
        cascades = list(offers(pairs, study.groups, study.fidelity, seed))
        return cls(cascades, study.ms, study.ms[study.full])

    def plan(self, way: Way, images: int, goal: Goal, seed: int) -> tuple[float, float]:
        """The true speed-up over the full model, and the true risk, of what one plan chooses.

        Args:
            way: how it divides images, and δ.
            images: that it has.
            goal: what is to be certified.
            seed: of the images and the plays.

        Returns:
            1 and 0 where it chooses the full model.
        """
        rng = np.random.default_rng(seed)
        pictures = len(self.cascades[0].loss)
        n = images - round(way.fit * images)
        fit = rng.integers(pictures, size=images - n)
        tested = rng.integers(pictures, size=n)
        counts = np.bincount(fit, minlength=pictures)
        drawn = rng.multinomial(n, counts / counts.sum(), PLAYS)
        listed, shares = self._listed(RULES[way.rule], drawn, n, goal)
        goals = [replace(goal, confidence=1 - share * (1 - goal.confidence)) for share in shares]
        walk = self._in_sequence if way.rule == SEQUENCE else self._each
        found = walk(listed, goals, fit, tested)
        costs = [self._ms(some, threshold, tested) for some, threshold in found]
        if not costs or min(costs) >= self.full_ms:
            return 1.0, 0.0
        some, threshold = found[int(np.argmin(costs))]
        everyone = np.arange(pictures)
        return self.full_ms / self._ms(some, threshold, everyone), _risk(some, threshold, everyone)

    def _listed(
        self, rules: Sequence[Sequence[float]], drawn: NDArray[np.int64], n: int, goal: Goal
    ) -> tuple[list[Offer], Sequence[float]]:
        """The cascades to test, and the share of δ of each, as `select.shortlist` finds them."""
        levels = sorted({share for shares in rules for share in shares})
        allowed = [
            allowed_errors(n, replace(goal, confidence=1 - share * (1 - goal.confidence)))
            for share in levels
        ]
        plays = [
            plays_ms(
                play(some.ranked, some.loss, some.high_loss, drawn, allowed),
                self.ms[some.low],
                self.ms[some.high],
                self.full_ms,
            )
            for some in self.cascades
        ]
        pairs = [(some.low, some.high) for some in self.cascades]
        best: tuple[float, list[Offer], Sequence[float]] = (np.inf, [], [])
        for shares in rules:
            at = map(levels.index, shares)
            listed, cost = cheapest_together(pairs, [[p[level] for p in plays] for level in at])
            if cost < best[0]:
                best = (cost, [self.cascades[i] for i in listed], shares[: len(listed)])
        return best[1], best[2]

    def _each(
        self,
        listed: Sequence[Offer],
        goals: Sequence[Goal],
        fit: NDArray[np.intp],
        tested: NDArray[np.intp],
    ) -> list[tuple[Offer, float]]:
        """Every certified cascade with its threshold, each tested at its share of δ."""
        found = []
        for some, goal in zip(listed, goals, strict=True):
            thresholds = candidate_thresholds(some.ranked[fit])
            high_loss = None if some.high_loss is None else some.high_loss[tested]
            verdict = certify(some.ranked[tested], some.loss[tested], thresholds, goal, high_loss)
            if verdict.threshold is not None:
                found.append((some, verdict.threshold))
        return found

    def _in_sequence(
        self,
        listed: Sequence[Offer],
        goals: Sequence[Goal],
        fit: NDArray[np.intp],
        tested: NDArray[np.intp],
    ) -> list[tuple[Offer, float]]:
        """All thresholds of all cascades as one sequence, each at all of δ, to the first failure.

        Those that lose least on the fit images come first.
        """
        steps = [
            (_risk(some, threshold, fit), place, threshold)
            for place, some in enumerate(listed)
            for threshold in _thinned(candidate_thresholds(some.ranked[fit]))
        ]
        found: dict[int, float] = {}
        for _, place, threshold in sorted(steps):
            risk = _risk(listed[place], threshold, tested)
            if round(risk * len(tested)) > allowed_errors(len(tested), goals[place]):
                break
            found[place] = threshold
        return [(listed[place], threshold) for place, threshold in found.items()]

    def _ms(self, some: Offer, threshold: float, rows: NDArray[np.intp]) -> float:
        escalation = float((some.ranked[rows] > threshold).mean())
        return self.ms[some.low] + escalation * self.ms[some.high]


def _risk(some: Offer, threshold: float, rows: NDArray[np.intp]) -> float:
    kept = some.ranked[rows] <= threshold
    high_loss = False if some.high_loss is None else some.high_loss[rows]
    return float(np.where(kept, some.loss[rows], high_loss).mean())


def _thinned(thresholds: FloatVector) -> FloatVector:
    """At most a hundred of them: a sequence of four cascades' is walked one by one."""
    return thresholds[:: -(-len(thresholds) // 100)]


def simulated(
    study: Study, goals: Sequence[Goal], seeds: Sequence[int], bars: Bars
) -> dict[str, dict[str, list[float]]]:
    """True speed-ups of plans in every way, for every number of images.

    Args:
        study: what graphs answered.
        goals: what is to be certified.
        seeds: one for each plan.
        bars: where to show progress.

    Returns:
        By number of images and way, then by risk: a speed-up for each seed; and after each, with
        `ABOVE` behind its name, the share of the plans whose true risk is above what was certified.
    """
    population = Population.of(study, seeds[0])
    found: dict[str, dict[str, list[float]]] = {}
    with bars.stage("draw, plan and certify", len(IMAGES) * len(WAYS) * len(goals)) as bar:
        for images in IMAGES:
            for way in WAYS:
                name = f"{images:,} images, {way.name}"
                for goal in goals:
                    plans = [population.plan(way, images, goal, seed) for seed in seeds]
                    above = float(np.mean([risk > goal.max_risk for _, risk in plans]))
                    by_risk = found.setdefault(name, {})
                    by_risk[str(goal.max_risk)] = [speedup for speedup, _ in plans]
                    found.setdefault(name + ABOVE, {})[str(goal.max_risk)] = [above]
                    bar.advance()
    return found
