"""Does a certificate survive being chosen? Repeated plans over cascades of known risk.

The whole selection is repeated: predict on the fit split, shortlist, certify each at its share of
δ, choose the cheapest certified. `promise_kept` is the judge, as for a single cascade: it must
accept the real procedure and reject each broken one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calibration.certify import (
    CertifyError,
    Goal,
    allowed_errors,
    binomial_p_value,
    candidate_thresholds,
    certificate,
    certify,
    images_needed,
)
from calibration.fidelity import Fidelity
from planner import select
from tests.unit.test_calibration_validity import NOISE, RISING, WAVY, promise_kept

REPEATS = 1000
PLAYS = 40  # of a test; the planner has more, which makes a better choice and no other promise
FIT, CERTIFY = 200, 500
LOW_MS, HIGH_MS = 8.0, 40.0
GOAL = Goal(0.05, 0.9, "ltt")


@dataclass(frozen=True)
class Offer:
    """A cascade on offer: scores are uniform on 0..1, the risk of each threshold is known.

    `lost` and `high_lost` are P(loss | score) of the cheap and of the full answer (None: the full
    graph is the reference); `kept_risk(t)` is the true risk of threshold t. On a share `alike` of
    images all cascades say the same.
    """

    lost: Callable[[np.ndarray], np.ndarray]
    kept_risk: Callable[[float], float]
    low_ms: float = LOW_MS
    high_lost: Callable[[np.ndarray], np.ndarray] | None = None
    alike: float = 0.0

    def draw(self, rng, images):
        """Scores and losses; `images` (2, n) in 0..1 is what the cascades may have in common."""
        own = rng.uniform(size=images.shape)
        score, chance = np.where(rng.uniform(size=images.shape[1]) < self.alike, images, own)
        high = None
        if self.high_lost is not None:
            high = rng.uniform(size=len(score)) < self.high_lost(score)
        return score.astype(np.float32), chance < self.lost(score), high

    def risk(self, threshold):
        """None escalates every image."""
        return self.kept_risk(0.0 if threshold is None else min(max(threshold, 0.0), 1.0))


# Nothing tells them apart: what looks best on the certify split is luck.
ALIKE = (Offer(NOISE.lost, NOISE.kept_and_lost),) * 10
# Some cheaper, some safer; on half of the images all of them do the same.
DIFFERENT = tuple(
    Offer(population.lost, population.kept_and_lost, LOW_MS + more, alike=0.5)
    for population in (RISING, WAVY, NOISE)
    for more in (0.0, 0.5, 1.0)
)

# The full graph loses images too. Up to a score of 0.2 the cheap one loses more, and brings the
# risk from 3.2 % to 5.1 %; beyond, both lose as many, each others, and the risk stays there.
UNEVEN = Offer(
    lambda s: np.where(s < 0.2, 0.095, 0.04),
    lambda t: 0.032 + 0.095 * min(t, 0.2),
    high_lost=lambda s: np.where(s < 0.2, 0.0, 0.04),
)
OFFERS = {"alike": ALIKE, "different": DIFFERENT, "uneven": (UNEVEN,) * 6}


def shortlist(offers, draws, goal_of):
    """The planner's own shortlist from images of one split, as indices."""
    found = []
    allowed = [allowed_errors(CERTIFY, goal_of(k)) for k in range(1, select.MOST + 1)]
    n = len(draws[0][0])
    drawn = np.random.default_rng(0).multinomial(CERTIFY, np.full(n, 1 / n), PLAYS)
    for i, (some, (scores, loss, high)) in enumerate(zip(offers, draws, strict=True)):
        escalation = select.play(scores.astype(np.float64), loss, high, drawn, allowed)
        passed = np.isfinite(escalation)
        plays = np.where(passed, some.low_ms + np.where(passed, escalation, 0) * HIGH_MS, HIGH_MS)
        found.append(
            select.Candidate(str(i), "full", "", 0.0, plays[0].mean(), passed[0].mean(), plays)
        )
    found.sort(key=lambda candidate: candidate.ms_per_image)
    return [int(c.low) for c in select.shortlist(found, lambda pair: True)]


def shares_delta(tests):
    return replace(GOAL, choices=tests)


def ignores_the_others(tests):
    """Broken: each cascade is tested as if it were the only one, so that more cost nothing."""
    return GOAL


def plan(offers, rng, listed_on="fit", goal_of=shares_delta):
    """Plan once; the true risk of what is chosen.

    Args:
        offers: cascades on offer.
        rng: of the images.
        listed_on: split that makes the shortlist; anything but "fit" is broken.
        goal_of: the goal of each test, by the number of tests.
    """
    splits = {}
    for split, n in (("fit", FIT), ("certify", CERTIFY)):
        images = rng.uniform(size=(2, n))
        splits[split] = [some.draw(rng, images) for some in offers]
    listed = shortlist(offers, splits[listed_on], goal_of)
    tested = []
    for i in listed:
        scores, loss, high = splits["certify"][i]
        candidates = candidate_thresholds(splits["fit"][i][0])
        verdict = certify(scores, loss, candidates, goal_of(len(listed)), high)
        certified = verdict.threshold is not None
        escalation = float((scores > verdict.threshold).mean()) if certified else 1.0
        cost = select.cascade_ms(offers[i].low_ms, HIGH_MS, escalation)
        # In the place of the artifact, which no choice looks at: the true risk.
        risk = offers[i].risk(verdict.threshold)
        tested.append(select.Tested(None, None, risk, certified, escalation, cost))
    chosen = select.choose(tested)
    return 0.0 if chosen is None else chosen.fit


def risks(offers, repeats=REPEATS, **broken):
    rng = np.random.default_rng(4)
    return np.array([plan(offers, rng, **broken) for _ in range(repeats)])


@pytest.mark.parametrize("name", OFFERS)
def test_the_certificate_of_the_chosen_cascade_keeps_its_confidence(name):
    found = risks(OFFERS[name])
    assert promise_kept(found, GOAL)
    assert (found > 0).mean() > 0.5  # not by choosing nothing


def test_ignoring_how_many_were_tested_is_caught():
    assert not promise_kept(risks(ALIKE, 500, goal_of=ignores_the_others), GOAL)


def test_making_the_shortlist_on_the_certify_split_is_caught():
    assert not promise_kept(risks(ALIKE * 2, 500, listed_on="certify"), GOAL)


def risks_where_the_full_graph_loses(procedure, repeats=REPEATS):
    """True risks of repeated calibrations on `UNEVEN`, without a choice among cascades."""
    rng = np.random.default_rng(5)
    found = []
    for _ in range(repeats):
        candidates = candidate_thresholds(UNEVEN.draw(rng, rng.uniform(size=(2, FIT)))[0])
        images = rng.uniform(size=(2, CERTIFY))
        threshold = procedure(*UNEVEN.draw(rng, images), candidates)
        found.append(0.0 if threshold is None else UNEVEN.risk(threshold))
    return np.array(found)


def fixed_sequence(scores, loss, high, candidates):
    return certify(scores, loss, candidates, GOAL, high).threshold


def largest_that_passes(scores, loss, high, candidates):
    """Broken: every threshold is tested, and failures on the way there are forgotten."""
    kept = scores[:, np.newaxis] <= candidates
    errors = np.where(kept, loss[:, np.newaxis], high[:, np.newaxis]).sum(axis=0)
    passing = candidates[errors <= allowed_errors(len(scores), GOAL)]
    return passing[-1] if len(passing) else None


def test_stopping_at_the_first_failure_is_valid_where_the_risk_is_not_monotone():
    found = risks_where_the_full_graph_loses(fixed_sequence)
    assert promise_kept(found, GOAL)
    assert (found > 0).mean() > 0.5


def test_going_on_after_a_failure_is_caught_where_the_risk_is_not_monotone():
    assert not promise_kept(risks_where_the_full_graph_loses(largest_that_passes, 500), GOAL)


@pytest.mark.parametrize("name", OFFERS)
def test_the_offers_have_the_risk_they_claim(name):
    rng = np.random.default_rng(6)
    for some in set(OFFERS[name]):
        scores, loss, high = some.draw(rng, rng.uniform(size=(2, 400_000)))
        high = np.zeros_like(loss) if high is None else high
        for threshold in (0.125, 0.375, 0.625, 0.875, 1.0):
            measured = np.where(scores <= threshold, loss, high).mean()
            assert measured == pytest.approx(some.risk(threshold), abs=0.002)


images = st.lists(
    st.tuples(st.integers(0, 30).map(lambda i: i / 8), st.booleans(), st.booleans()),
    min_size=1,
    max_size=150,
)
goals = st.builds(
    Goal,
    st.sampled_from([0.02, 0.05, 0.2, 0.4]),
    st.sampled_from([0.5, 0.8, 0.9, 0.99]),
    st.just("ltt"),
    st.integers(1, 6),
)


@given(images, goals)
def test_certify_counts_the_full_graphs_losses_as_a_loop_would(rows, goal):
    scores, loss, high = (np.array(column) for column in zip(*rows, strict=True))
    candidates = candidate_thresholds(scores)
    expected, path = None, []
    for candidate in candidates:
        errors = sum(
            row_loss if score <= candidate else row_high for score, row_loss, row_high in rows
        )
        path.append((candidate, errors))
        if binomial_p_value(errors, len(rows), goal.max_risk) > goal.delta:
            break
        expected = candidate
    verdict = certify(scores, loss, candidates, goal, high)
    assert verdict.threshold == expected
    assert list(verdict.path) == path
    assert verdict.errors == dict(path).get(expected, path[0][1])


def test_a_promise_on_average_is_refused_where_it_would_be_void():
    average = Goal(0.05, 0.9, "crc")
    scores, loss = np.arange(100, dtype=np.float32), np.zeros(100, np.bool_)
    candidates = candidate_thresholds(scores)
    with pytest.raises(CertifyError, match="use ltt"):
        certify(scores, loss, candidates, average, loss)
    assert certify(scores, loss, candidates, average).threshold is not None
    with pytest.raises(CertifyError, match="--method crc"):
        Goal(0.05, 0.9, "crc", choices=2)


@pytest.mark.parametrize("confidence", ["0.5", "0.9", "0.99"])
@pytest.mark.parametrize("choices", [1, 3, 4, 7])
def test_each_of_several_tests_has_an_equal_share_of_delta(confidence, choices):
    goal = Goal(0.05, float(confidence), "ltt", choices)
    assert goal.delta == float((1 - Fraction(confidence)) / choices)
    n = images_needed(goal)
    assert binomial_p_value(0, n, 0.05) <= goal.delta < binomial_p_value(0, n - 1, 0.05)
    for n in (60, 500, 1000):
        k = allowed_errors(n, goal)
        assert k < 0 or binomial_p_value(k, n, 0.05) <= goal.delta
        assert binomial_p_value(k + 1, n, 0.05) > goal.delta


def test_what_a_choice_of_four_costs():
    one, four = (Goal(0.05, 0.9, "ltt", choices) for choices in (1, 4))
    assert allowed_errors(800, four) == allowed_errors(800, Goal(0.05, 0.975, "ltt"))
    assert (allowed_errors(800, one), allowed_errors(800, four)) == (31, 27)
    assert (images_needed(one), images_needed(four)) == (45, 72)


def test_the_certificate_says_among_how_many_it_was_chosen():
    goal = Goal(0.05, 0.9, "ltt", choices=4)
    scores, loss = np.arange(100, dtype=np.float32), np.zeros(100, np.bool_)
    verdict = certify(scores, loss, candidate_thresholds(scores), goal)
    record = certificate(verdict, goal, Fidelity("top1"), "margin")
    assert (record["choices"], record["confidence"], record["epsilon"]) == (4, 0.9, 0.05)
    assert "whichever of the 4 cascades that were tested is chosen" in record["statement"]
    assert "(each at 97.5 %)" in record["statement"]
    assert record["statement"].startswith("With confidence 90 %, at most 5 % of images")
