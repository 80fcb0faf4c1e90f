"""Does the certificate keep its promise? Repeated calibrations on populations of known risk.

`promise_kept` is the judge: it must accept the real procedure and reject each broken one.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
from scipy.stats import binom, norm

from calibration.certify import Goal, candidate_thresholds, certify, one_per_group

REPEATS = 2000
# Enough to catch a broken one: its risks are far off.
CAUGHT_WITHIN = 500
SURE = 0.999  # a valid procedure fails one of these tests with a probability of 0.001, once: seeded
FIT, CERTIFY = 300, 1000
LTT = Goal(0.05, 0.9, "ltt")
CRC = Goal(0.05, 0.9, "crc")


@dataclass(frozen=True)
class Population:
    """Scores are uniform on 0..1, perhaps rounded up to levels; `lost` is P(loss | score).

    `kept_and_lost(t)` is its integral up to t: the true risk of threshold t.
    """

    lost: Callable[[np.ndarray], np.ndarray]
    kept_and_lost: Callable[[float], float]
    levels: int | None = None

    def draw(self, rng, n):
        scores = rng.uniform(size=n)
        if self.levels:
            scores = np.ceil(scores * self.levels) / self.levels
        return scores.astype(np.float32), rng.uniform(size=n) < self.lost(scores)

    def risk(self, threshold):
        if threshold is None:
            return 0.0  # always-high
        kept = min(max(threshold, 0.0), 1.0)
        if self.levels:
            kept = math.floor(kept * self.levels + 1e-6) / self.levels
        return self.kept_and_lost(kept)


def levels_risk(kept):
    level = round(kept * 20)
    return LEVEL_SLOPE * level * (level + 1) / 40


# A harder image has a higher score.
RISING = Population(lambda s: 0.9 * s**2, lambda t: 0.3 * t**3)
# The score misleads: many of the images it calls easiest are lost.
WAVY = Population(
    lambda s: 0.15 * (1 + np.cos(4 * np.pi * s)),
    lambda t: 0.15 * (t + math.sin(4 * math.pi * t) / (4 * math.pi)),
)
# Twenty values only; keeping ten of them has a risk of 0.0505, just above the goal.
LEVEL_SLOPE = 0.0505 * 40 / (10 * 11)
COARSE = Population(lambda s: LEVEL_SLOPE * 20 * s, levels_risk, levels=20)
# Nothing to learn: every fifth image is lost, whatever the score.
NOISE = Population(lambda s: np.full(s.shape, 0.2), lambda t: 0.2 * t)
POPULATIONS = {"rising": RISING, "wavy": WAVY, "coarse": COARSE, "noise": NOISE}


def promise_kept(risks, goal):
    """Whether true risks of repeated calibrations are what the certificate promises.

    Slack: `ltt` may violate as often as the 99.9 % quantile of Bin(repeats, δ), at 2,000 repeats
    12.15 % for δ = 10 %; the mean risk of `crc` may exceed ε by 3.1 standard errors. What it finds
    is logged (`pytest --log-cli-level=INFO`): docs/performance.md quotes it.
    """
    risks = np.asarray(risks)
    above = (risks > goal.max_risk).mean()
    line = f"{goal.method}: mean risk {risks.mean():.2%}, above ε {above:.1%} of {len(risks)}"
    logging.getLogger(__name__).info(line)
    if goal.method == "crc":
        error = risks.std(ddof=1) / math.sqrt(len(risks))
        return risks.mean() <= goal.max_risk + norm.ppf(SURE) * error
    violations = (risks > goal.max_risk).sum()
    return violations <= binom.ppf(SURE, len(risks), 1 - goal.confidence)


def calibrations(population, procedure, goal, n=CERTIFY, repeats=REPEATS, seed=0):
    """The thresholds of repeated calibrations, each on its own fit and certify images."""
    rng = np.random.default_rng(seed)
    thresholds = []
    for _ in range(repeats):
        candidates = candidate_thresholds(population.draw(rng, FIT)[0])
        thresholds.append(procedure(*population.draw(rng, n), candidates, goal))
    return thresholds


def risks_of(population, thresholds):
    return np.array([population.risk(threshold) for threshold in thresholds])


def certified(scores, loss, candidates, goal):
    return certify(scores, loss, candidates, goal).threshold


def failing_threshold(scores, loss, candidates, goal):
    """Broken: what was tried last, though it failed."""
    return certify(scores, loss, candidates, goal).path[-1].threshold


def tuned(scores, loss, candidates, goal):
    """Broken: the largest threshold whose risk on these very images is at most ε."""
    lost = np.sort(scores[loss].astype(np.float64))
    errors = np.searchsorted(lost, candidates, side="right")
    meets = candidates[errors <= goal.max_risk * len(scores)]
    return meets[-1] if len(meets) else None


@pytest.mark.parametrize("name", POPULATIONS)
def test_the_certificate_keeps_its_confidence(name):
    population = POPULATIONS[name]
    risks = risks_of(population, calibrations(population, certified, LTT))
    assert promise_kept(risks, LTT)
    # Not by being timid: violations happen, about as often as the discrete test allows.
    assert (risks > LTT.max_risk).mean() > 0.05


@pytest.mark.parametrize(("name", "best"), [("rising", 1 - (1 / 6) ** (1 / 3)), ("noise", 0.75)])
def test_the_certificate_escalates_little_more_than_it_must(name, best):
    population = POPULATIONS[name]
    assert population.risk(1 - best) == pytest.approx(LTT.max_risk)
    thresholds = calibrations(population, certified, LTT, repeats=500)
    escalation = np.mean([1.0 if t is None else 1 - min(t, 1) for t in thresholds])
    assert best < escalation < best + 0.06
    more = calibrations(population, certified, LTT, n=10 * CERTIFY, repeats=200)
    assert best < np.mean([1 - min(t, 1) for t in more]) < best + 0.02


def test_on_average_conformal_risk_control_meets_the_risk():
    # Few images: then the correction that makes it valid is visible.
    risks = risks_of(RISING, calibrations(RISING, certified, CRC, n=100))
    assert promise_kept(risks, CRC)
    assert risks.mean() > 0.9 * CRC.max_risk
    wavy = risks_of(WAVY, calibrations(WAVY, certified, CRC, n=100))
    assert promise_kept(wavy, CRC)


def test_returning_the_failing_threshold_is_caught():
    thresholds = calibrations(COARSE, failing_threshold, LTT, repeats=CAUGHT_WITHIN)
    assert not promise_kept(risks_of(COARSE, thresholds), LTT)


def test_tuning_the_empirical_risk_is_caught():
    thresholds = calibrations(RISING, tuned, LTT, repeats=CAUGHT_WITHIN)
    assert not promise_kept(risks_of(RISING, thresholds), LTT)
    thresholds = calibrations(RISING, tuned, CRC, n=100, repeats=CAUGHT_WITHIN)
    assert not promise_kept(risks_of(RISING, thresholds), CRC)


def thresholds_among_noise_signals(choose, signals=10, repeats=500):
    """Many worthless signals for the same images; `choose` gives the threshold of one of them."""
    rng = np.random.default_rng(1)
    thresholds = []
    for _ in range(repeats):
        _, loss = NOISE.draw(rng, CERTIFY)
        fit = rng.uniform(size=(signals, FIT // 3)).astype(np.float32)
        scores = rng.uniform(size=(signals, CERTIFY)).astype(np.float32)
        thresholds.append(choose(fit, scores, loss))
    return thresholds


def least_escalation_on_the_certify_split(fit, scores, loss):
    """Broken: every signal is certified, and the one that escalates least is kept."""
    chosen, most_kept = None, 0
    for fit_row, row in zip(fit, scores, strict=True):
        threshold = certified(row, loss, candidate_thresholds(fit_row), LTT)
        kept = 0 if threshold is None else int((row <= threshold).sum())
        if kept > most_kept:
            chosen, most_kept = threshold, kept
    return chosen


def largest_spread_on_the_fit_split(fit, scores, loss):
    chosen = int(np.argmax(fit.std(axis=1)))
    return certified(scores[chosen], loss, candidate_thresholds(fit[chosen]), LTT)


def test_choosing_the_signal_on_the_certify_split_is_caught():
    thresholds = thresholds_among_noise_signals(least_escalation_on_the_certify_split)
    assert not promise_kept(risks_of(NOISE, thresholds), LTT)


def test_choosing_the_signal_on_the_fit_split_is_harmless():
    thresholds = thresholds_among_noise_signals(largest_spread_on_the_fit_split)
    assert promise_kept(risks_of(NOISE, thresholds), LTT)


CLUSTERS, MEMBERS = 100, 10
CLUSTER_GOAL = Goal(0.1, 0.9, "ltt")


def thresholds_on_clusters(choose_rows, repeats=1000):
    """Certify on clusters whose images mostly repeat each other; each alone is a fair draw."""
    rng = np.random.default_rng(2)
    groups = np.repeat([f"scene {i}" for i in range(CLUSTERS)], MEMBERS)
    rows = np.arange(len(groups))
    thresholds = []
    for repeat in range(repeats):
        shared, own = RISING.draw(rng, CLUSTERS), RISING.draw(rng, len(groups))
        repeats_its_scene = rng.uniform(size=len(groups)) < 0.9
        scores, loss = (
            np.where(repeats_its_scene, np.repeat(common, MEMBERS), single)
            for common, single in zip(shared, own, strict=True)
        )
        candidates = candidate_thresholds(RISING.draw(rng, FIT)[0])
        chosen = choose_rows(groups, rows, repeat)
        thresholds.append(certified(scores[chosen], loss[chosen], candidates, CLUSTER_GOAL))
    return thresholds


def test_taking_a_clusters_images_for_independent_is_caught():
    thresholds = thresholds_on_clusters(lambda groups, rows, seed: rows, CAUGHT_WITHIN)
    assert not promise_kept(risks_of(RISING, thresholds), CLUSTER_GOAL)


def test_one_image_of_each_cluster_keeps_the_promise():
    thresholds = thresholds_on_clusters(one_per_group)
    assert promise_kept(risks_of(RISING, thresholds), CLUSTER_GOAL)
    assert sum(threshold is not None for threshold in thresholds) > 900


@pytest.mark.parametrize("name", POPULATIONS)
def test_the_populations_have_the_risk_they_claim(name):
    population = POPULATIONS[name]
    scores, loss = population.draw(np.random.default_rng(3), 400_000)
    for threshold in (0.125, 0.375, 0.625, 0.875, 1.5):
        measured = (loss & (scores.astype(np.float64) <= threshold)).mean()
        assert measured == pytest.approx(population.risk(threshold), abs=0.002)
