"""The arithmetic of a certificate that holds at every moment; `ville` is the oracle."""

import math
from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ville import BernoulliCS, BernoulliTest, BettingTest

from calibration.anytime import (
    BETS,
    AnytimeTest,
    confidence_sequence,
    images_needed,
    log_wealth,
    share_of_delta,
)
from routing import Overrides
from routing.policy import escalation_mask

GOALS = [(0.05, 0.05), (0.1, 0.05), (0.02, 0.1)]  # epsilon, delta


def streams(risk, images=3000, repeats=40):
    """Streams of losses, BOOL (repeats, images)."""
    return np.random.default_rng(0).uniform(size=(repeats, images)) < risk


# --- confidence sequences ------------------------------------------------------------------------


@pytest.mark.parametrize("level", [0.5, 0.9, 0.95, 0.999])
@pytest.mark.parametrize("risk", [0, 0.02, 0.3, 1])
def test_the_interval_is_that_of_the_library_at_every_moment(level, risk):
    oracle = BernoulliCS(alpha=1 - level, intersect=False)
    (lost,) = streams(risk, 120, repeats=1)
    for images, is_lost in enumerate(lost, start=1):
        oracle.update([float(is_lost)])
        found = confidence_sequence(int(lost[:images].sum()), images, level)
        assert found == pytest.approx(oracle.interval(), abs=1e-9)


def test_without_images_every_risk_is_possible():
    assert confidence_sequence(0, 0) == (0.0, 1.0)


def test_intervals_cover_the_risk_at_all_moments_together():
    lost = streams(0.05, 1000, repeats=400)
    moments = np.unique(np.geomspace(1, 1000, 60).astype(int))
    interval, missed = cache(confidence_sequence), 0
    for stream in lost:
        counts = np.cumsum(stream)
        intervals = (interval(int(counts[n - 1]), int(n), 0.8) for n in moments)
        missed += any(not low <= 0.05 <= high for low, high in intervals)
    assert 0 < missed < 0.2 * len(lost)


# --- wealth --------------------------------------------------------------------------------------


def wealth_of(lost, epsilon):
    """By the definition: image for image, the mean over the bets."""
    wealths = [1.0] * len(BETS)
    for is_lost in lost:
        bets = [share / (1 - epsilon) for share in BETS]
        wealths = [w * (1 + b * (epsilon - is_lost)) for w, b in zip(wealths, bets, strict=True)]
    return math.fsum(wealths) / len(BETS)


@given(
    lost=st.lists(st.booleans(), max_size=60),
    epsilon=st.floats(0.01, 0.9),
    order=st.randoms(use_true_random=False),
)
def test_wealth_is_what_betting_image_by_image_gives_in_any_order(lost, epsilon, order):
    found = math.exp(log_wealth(len(lost), np.array([sum(lost)]), epsilon)[0])
    assert found == pytest.approx(wealth_of(lost, epsilon), rel=1e-9)
    order.shuffle(lost)
    assert found == pytest.approx(wealth_of(lost, epsilon), rel=1e-9)


@pytest.mark.parametrize("epsilon", [0.01, 0.05, 0.3, 0.9])
def test_no_bet_gains_on_average_at_the_boundary_and_all_lose_above_it(epsilon):
    for risk in (epsilon, (1 + epsilon) / 2):
        mean = risk * wealth_of([True], epsilon) + (1 - risk) * wealth_of([False], epsilon)
        assert mean == pytest.approx(1) if risk == epsilon else mean < 0.99
    assert all(wealth_of([True] * n, epsilon) > 0 for n in range(5))  # none can ruin


def reached(lost, epsilon, delta):
    """At which image the wealth of each stream reaches 1/delta; inf: at none."""
    images = np.tile(np.arange(1, lost.shape[1] + 1), len(lost))
    wealth = log_wealth(images, np.cumsum(lost, axis=1).ravel(), epsilon)
    return first(wealth.reshape(lost.shape) >= -math.log(delta))


def first(hits):
    return np.where(hits.any(axis=1), hits.argmax(axis=1) + 1.0, np.inf)


@pytest.mark.parametrize(("epsilon", "delta"), GOALS)
@pytest.mark.parametrize("share", [0, 0.2, 0.5])
def test_risks_below_epsilon_are_proved_about_as_soon_as_by_the_librarys_tests(
    epsilon, delta, share
):
    """Compared is the median image at which each says so.

    `BettingTest` is the other one-sided betting test, with one bet that adapts; `BernoulliTest` is
    a mixture over all risks that tests against both sides, and so is later.
    """
    lost = streams(share * epsilon)
    ours = np.median(reached(lost, epsilon, delta))
    betting, mixture = [], []
    for stream in lost.astype(float):
        test = BettingTest(epsilon, alternative="less", alpha=delta).fit(stream)
        betting.append(test.stopping_time() or np.inf)
        both = BernoulliTest(epsilon, alpha=delta).fit(stream)
        shares = np.cumsum(stream) / np.arange(1, len(stream) + 1)
        below = (both.log_e_values_ >= -math.log(delta)) & (shares < epsilon)
        mixture.append(first(below[np.newaxis])[0])
    assert 0.7 < ours / np.median(betting) < 1.4
    assert ours < np.median(mixture) < 5 * ours


@pytest.mark.parametrize(("epsilon", "delta"), GOALS)
def test_as_few_images_as_prove_it_where_none_is_lost(epsilon, delta):
    needed = images_needed(epsilon, delta)
    reach = reached(np.zeros((1, 2 * needed), np.bool_), epsilon, delta)
    assert reach[0] == needed
    # By any test at least these; and not many more.
    least = math.log(delta) / math.log(1 - epsilon)
    assert least <= needed < 1.6 * least + 1


def test_a_goal_that_one_image_proves_is_proved_by_one():
    assert images_needed(0.9, 0.9) == 1


def test_the_shares_of_all_tests_are_delta():
    shares = [share_of_delta(number) for number in range(1, 60)]
    assert shares[:3] == [0.5, 0.25, 0.125] and sum(shares) == pytest.approx(1)


# --- thresholds ----------------------------------------------------------------------------------

THRESHOLDS = np.array([-0.5, 0.1, np.float32(0.3), 0.55, 0.8])
SCORES = st.one_of(
    st.none(), st.sampled_from([*THRESHOLDS.tolist(), -1.0]), st.floats(-1, 1, width=32)
)


def kept_by(score, threshold):
    """As the router decides."""
    scores = np.array([np.nan if score is None else score], np.float32)
    return not escalation_mask(scores, threshold, Overrides())[0]


@given(records=st.lists(st.tuples(SCORES, st.booleans()), max_size=80))
def test_what_is_counted_and_certified_is_what_each_threshold_would_have_done(records):
    """Brute force: every threshold decides about every image again."""
    epsilon, delta = 0.3, 0.4
    test = AnytimeTest(epsilon, delta, THRESHOLDS)
    certified = 0
    for number in range(1, len(records) + 1):
        score, lost = records[number - 1]
        if score is not None:
            score = float(np.float32(score))
            records[number - 1] = (score, lost)
        test.observe(score, lost)
        kept = [[is_lost for s, is_lost in records[:number] if kept_by(s, t)] for t in THRESHOLDS]
        assert test.images == number
        assert test.kept.tolist() == [len(each) for each in kept]
        assert test.lost.tolist() == [sum(each) for each in kept]
        while certified < len(THRESHOLDS):
            losses = sum(kept[certified])
            if wealth_of([True] * losses + [False] * (number - losses), epsilon) < 1 / delta:
                break
            certified += 1
        assert test.certified == certified
        assert test.threshold == (THRESHOLDS[certified - 1] if certified else None)
    assert test.escalation() == pytest.approx(1 - test.kept / max(1, len(records)))
    for row, threshold in enumerate(THRESHOLDS):
        assert test.counts(float(threshold)) == (test.kept[row], test.lost[row])
    assert test.counts(None) == test.counts(-2.0) == (0, 0)


def test_a_test_goes_on_from_its_counts_as_if_it_had_never_stopped():
    rng = np.random.default_rng(1)
    scores, lost = rng.uniform(size=400), rng.uniform(size=400) < 0.02
    whole = AnytimeTest(0.1, 0.1, THRESHOLDS)
    parts = AnytimeTest(0.1, 0.1, THRESHOLDS)
    for score, is_lost in zip(scores.tolist(), lost.tolist(), strict=True):
        whole.observe(score, is_lost)
        parts = AnytimeTest(
            0.1,
            0.1,
            THRESHOLDS,
            parts.images,
            parts.kept.copy(),
            parts.lost.copy(),
            parts.certified,
        )
        parts.observe(score, is_lost)
    assert whole.certified == parts.certified > 0
    assert (whole.images, whole.kept.tolist()) == (parts.images, parts.kept.tolist())


def test_a_careful_threshold_that_is_not_proved_holds_back_bolder_ones():
    """Losses at low scores: no threshold can be proved whose images a more careful one keeps."""
    test = AnytimeTest(0.1, 0.1, np.array([0.1, 0.9]))
    for number in range(300):
        test.observe(0.05 if number % 5 == 0 else 0.5, number % 5 == 0)
    assert test.certified == 0
    for _ in range(3000):
        test.observe(0.5, False)
    assert test.certified == 2


def test_what_is_certified_stays_so_whatever_comes():
    test = AnytimeTest(0.1, 0.1, THRESHOLDS)
    for _ in range(200):
        test.observe(0.0, False)
    before = test.certified
    for _ in range(200):
        test.observe(0.0, True)
    assert test.certified == before == len(THRESHOLDS)
    assert log_wealth(test.images, test.lost, 0.1)[-1] < 0
