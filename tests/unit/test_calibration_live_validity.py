"""Does a certificate from live traffic keep its promise at every moment? Streams of known risk.

Each image of a stream is audited, and somewhere a threshold has exactly the risk ε: certifying that
one, or a bolder one, is a violation. `promise_kept` is the judge: it must accept the real procedure
and reject each broken one.
"""

import logging
import math
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pytest
from scipy.stats import binom

from calibration.anytime import AnytimeTest, log_wealth, share_of_delta
from calibration.live_state import ALARM, Served, State
from routing import RiskTest
from routing.journal import Record
from tests.unit.test_calibration_validity import RISING, SURE, WAVY

EPSILON, DELTA = 0.05, 0.1
FIRST = DELTA * share_of_delta(1)  # what the first test may use
IMAGES, REPEATS = 1500, 400
LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Streams:
    """R streams of N audited images: scores, and whether each cheap answer is a loss, (R, N).

    Attributes:
        thresholds: (T,), ascending.
        bad: the first whose true risk is ε or more.
    """

    scores: np.ndarray
    lost: np.ndarray
    thresholds: np.ndarray
    bad: int

    def counts(self, row):
        """Losses that a threshold keeps, up to each image, (R, N)."""
        kept = self.scores <= self.thresholds[row]
        return np.cumsum(self.lost & kept, axis=1)

    def rows(self, mask):
        """Of each stream the images in the mask alone; losses fill it up, that certify nothing."""
        order = np.argsort(~mask, axis=1, kind="stable")
        scores = np.take_along_axis(np.where(mask, self.scores, 0.0), order, axis=1)
        lost = np.take_along_axis(self.lost | ~mask, order, axis=1)
        return replace(self, scores=scores, lost=lost)


def at_the_boundary(population, seed=0, images=IMAGES, repeats=REPEATS, thresholds=33):
    """Streams of a population, with a threshold at which its risk is exactly ε."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if population.risk(middle) < EPSILON else (low, middle)
    grid = np.unique([*np.linspace(0.02, 1, thresholds), high])
    rng = np.random.default_rng(seed)
    scores, lost = population.draw(rng, (repeats, images))
    return Streams(scores.astype(np.float64), lost, grid, int(np.searchsorted(grid, high)))


def one_threshold(seed=0, images=IMAGES, repeats=REPEATS, risk=EPSILON):
    """Every image is kept, and the risk of that is ε: there is nothing to certify."""
    lost = np.random.default_rng(seed).uniform(size=(repeats, images)) < risk
    return Streams(np.zeros(lost.shape), lost, np.array([0.5]), 0)


@cache
def allowed(delta, images=IMAGES, epsilon=EPSILON):
    """The most losses with which the wealth after 1, 2, ... images is 1/δ; -1: with none, (N,)."""
    numbers = np.arange(1, images + 1)
    most = np.full(images, -1)
    for losses in range(images):
        enough = log_wealth(numbers, np.full(images, losses), epsilon) >= -math.log(delta)
        enough &= losses <= numbers
        if not enough.any():
            return most
        most[enough] = losses
    return most


def when_certified(streams, delta=FIRST, limits=None):
    """The image at which each threshold is certified, from 0; N: never. (R, T)."""
    limits = allowed(delta, streams.lost.shape[1]) if limits is None else limits
    images = streams.lost.shape[1]
    since, found = np.zeros(len(streams.lost), int), []
    for row in range(len(streams.thresholds)):
        reached = streams.counts(row) <= limits
        reached &= np.arange(images) >= since[:, np.newaxis]
        since = np.where(reached.any(axis=1), reached.argmax(axis=1), images)
        found.append(since)
    return np.array(found).T


def violations(streams, **how):
    return when_certified(streams, **how)[:, streams.bad] < streams.lost.shape[1]


def promise_kept(violated, delta, name=""):
    """Whether so many are compatible with a probability of at most δ."""
    LOG.info("%s: violated in %.1f %% of %d", name, 100 * np.mean(violated), len(violated))
    return np.sum(violated) <= binom.ppf(SURE, len(violated), delta)


@pytest.mark.parametrize("population", [RISING, WAVY])
def test_streams_are_counted_here_as_the_product_counts_them(population):
    streams = at_the_boundary(population, repeats=4, images=600, thresholds=9)
    found = when_certified(streams)
    for stream in range(4):
        test = AnytimeTest(EPSILON, FIRST, streams.thresholds)
        for image in range(600):
            test.observe(float(streams.scores[stream, image]), bool(streams.lost[stream, image]))
            assert test.certified == (found[stream] <= image).sum()
    assert (found < 600).any()


# --- the procedure -------------------------------------------------------------------------------


@pytest.mark.parametrize("population", [RISING, WAVY])
def test_no_threshold_of_the_risk_or_more_is_certified_more_often_than_promised(population):
    streams = at_the_boundary(population)
    certified = when_certified(streams)
    assert promise_kept(certified[:, streams.bad] < IMAGES, FIRST, "one test")
    # Not by being timid: most of the sound thresholds are certified, and some others are.
    assert (certified[:, : streams.bad] < IMAGES).mean() > 0.5
    assert (certified[:, streams.bad] < IMAGES).any()


def test_a_threshold_that_keeps_everything_at_the_boundary_is_as_hard_as_it_gets():
    violated = violations(one_threshold(repeats=1500))
    assert promise_kept(violated, FIRST, "one threshold") and violated.mean() > 0.2 * FIRST


def test_a_coin_that_knows_nothing_leaves_the_promise_as_it_is():
    """The share may change with time, and with what was seen before."""
    streams = at_the_boundary(RISING)
    rng = np.random.default_rng(2)
    share = np.linspace(1, 0.2, IMAGES)
    before = np.cumsum(streams.lost, axis=1) - streams.lost
    share = np.where(before % 2 == 0, share, 0.5 * share)
    drawn = streams.rows(rng.uniform(size=share.shape) < share)
    assert promise_kept(violations(drawn), FIRST, "a coin")
    assert (when_certified(drawn)[:, : streams.bad] < IMAGES).mean() > 0.3


def restarted(lost, delta_of, patience=60):
    """Whether any test of a stream certifies; one whose images look bad gives way to the next.

    That is the worst a restart can do: each looks at other images, whenever it is wanted.
    """
    start, number = 0, 1
    while start < len(lost):
        counts = np.cumsum(lost[start:])
        images = np.arange(1, len(counts) + 1)
        proved = counts <= allowed(delta_of(number), IMAGES)[: len(counts)]
        hopeless = (images >= patience) & (counts > EPSILON * images)
        if proved.any() and not hopeless[: proved.argmax()].any():
            return True
        if not hopeless.any():
            return False
        start, number = start + int(hopeless.argmax()) + 1, number + 1
    return False


def test_all_tests_together_keep_the_promise_however_often_one_begins_anew():
    streams = one_threshold()
    violated = [restarted(lost, lambda n: DELTA * share_of_delta(n)) for lost in streams.lost]
    assert promise_kept(violated, DELTA, "restarts") and any(violated)


# --- going back ----------------------------------------------------------------------------------


def contradicted_at(test, lost):
    """The number of images after which a stream contradicts "the risk is at most ε"; None: never.

    Only an image with a loss can be the one.
    """
    for number, is_lost in enumerate(lost.tolist(), start=1):
        test.observe(is_lost)
        if is_lost and test.is_contradicted:
            return number
    return None


@pytest.mark.parametrize("images", [0, 15, 16, 100, 2000])
def test_an_image_at_the_boundary_adds_no_evidence_on_average_whatever_came_before(images):
    rng = np.random.default_rng(images)
    for risk in (0.01, EPSILON, 0.3):
        test = RiskTest(EPSILON)
        contradicted_at(test, rng.uniform(size=images) < risk)
        after = []
        for lost in (True, False):
            next_one = replace(test, moments=list(test.moments))
            next_one.observe(lost)
            after.append(next_one.log_evidence - test.log_evidence)
        gain = EPSILON * math.exp(after[0]) + (1 - EPSILON) * math.exp(after[1])
        assert 0.9 < gain <= 1 + 1e-9 and after[1] <= 1e-9


def test_what_serves_at_the_boundary_seldom_goes_back_whatever_served_before():
    """Thresholds follow each other; the alarms of all of them share `ALARM`."""
    begins, alarmed = [0, 100, 300, IMAGES], []
    for stream in one_threshold(repeats=REPEATS).lost:
        found = False
        for ordinal, (begin, end) in enumerate(zip(begins, begins[1:], strict=False), start=1):
            test = RiskTest(EPSILON, Served(0.5, ordinal=ordinal).alarm)
            found |= contradicted_at(test, stream[begin:end]) is not None
        alarmed.append(found)
    assert promise_kept(alarmed, ALARM, "alarms")
    alarms = [Served(0.5, ordinal=ordinal).alarm for ordinal in range(1, 2000)]
    assert sum(alarms) == pytest.approx(ALARM, rel=1e-3) and sum(alarms) < ALARM


@pytest.mark.parametrize("before", [0, 200, 5000])
@pytest.mark.parametrize(("risk", "within"), [(0.15, 500), (0.3, 100), (1, 20)])
def test_a_risk_that_is_too_high_is_seen_soon_however_long_all_was_well(before, risk, within):
    rng, seen = np.random.default_rng(6), []
    for _ in range(10):
        test = RiskTest(EPSILON, Served(0.5, ordinal=2).alarm)
        assert contradicted_at(test, rng.uniform(size=before) < 0.03) is None
        seen.append(contradicted_at(test, rng.uniform(size=within) < risk) is not None)
    assert np.mean(seen) >= 0.9


# Of three thresholds the first has a tenth of ε, the second exactly ε, the third more.
STEPS = np.array([0.2, 0.5, 0.8])
CHANGE, LONG, WIDE = 100, 350, 0.2  # images, images, ε


def drifting(rng):
    """Records: from `CHANGE` on the first threshold has three times ε, and then exactly ε."""
    found = []
    for number in range(LONG):
        risks = WIDE * np.array([0.1, 1.0, 1.5])
        if number >= CHANGE:
            risks = WIDE * np.array([3.0, 3.2, 3.4] if number < 2 * CHANGE else [1.0, 1.2, 1.5])
        # A lost image is kept from the threshold on at which it adds to the risk.
        place = int(np.searchsorted(np.cumsum(np.diff([0, *risks])), rng.uniform(), side="right"))
        lost = place < len(STEPS)
        score = STEPS[place] if lost else rng.choice([0.1, 0.4, 0.7, 1.0])
        found.append(Record(float(score), lost, 0.0, 1.0, 0.0))
    return found


def test_through_a_change_of_traffic_a_retreat_and_a_restart_the_promise_holds():
    """With what the keeper itself calls: a threshold serves as soon as it is certified."""
    rng, violated, went_back = np.random.default_rng(5), [], 0
    for _ in range(100):
        state = State("", WIDE, 1 - DELTA, thresholds=STEPS.tolist())
        is_violated = False
        for record in drifting(rng):
            went_back += state.observe([record]) is not None
            threshold, share = state.wanted(0.02)
            state.serve(threshold, share)
            begun = state.audited - state.images
            # Whatever a test certifies that began after the change is too bold, or just so.
            is_violated |= state.certified > (0 if begun >= CHANGE else 1)
        violated.append(is_violated)
    assert went_back >= 80
    assert promise_kept(violated, DELTA, "drift")


# --- broken procedures are caught ----------------------------------------------------------------


def caught(violated, delta=FIRST, name=""):
    """Clearly: twice as often as promised, and not by chance."""
    return not promise_kept(violated, delta, name) and np.mean(violated) > 2 * delta


def test_audits_that_are_lost_by_outcome_are_caught():
    """As if calls failed for the images on which the rungs differ."""
    streams = one_threshold()
    arrives = np.random.default_rng(1).uniform(size=streams.lost.shape) > 0.4 * streams.lost
    assert caught(violations(streams.rows(arrives)), name="lost audits")


def test_records_that_are_counted_twice_are_caught():
    streams = one_threshold()
    twice = np.repeat(streams.lost, 2, axis=1)[:, :IMAGES]
    assert caught(violations(replace(streams, lost=twice)), name="counted twice")


def test_a_binomial_test_that_peeks_at_every_image_is_caught():
    images = np.arange(1, IMAGES + 1)
    most = binom.ppf(FIRST, images, EPSILON)
    most -= binom.cdf(most, images, EPSILON) > FIRST  # p at most δ, were this the only look
    assert caught(violations(one_threshold(), limits=most), name="peeking")


def test_a_grid_that_is_chosen_from_the_evidence_is_caught():
    """Twenty scores that say nothing; thresholds at quantiles of whichever looks best."""
    rng, violated = np.random.default_rng(3), []
    risk, images = 0.2, 400
    for _ in range(150):
        lost = rng.uniform(size=images) < risk
        scores = rng.uniform(size=(20, images))
        kept = scores <= EPSILON / risk  # of each so many that its true risk is ε
        looks = (kept & lost).sum(axis=1)
        best = scores[[looks.argmin()]]
        streams = Streams(best, lost[np.newaxis], np.array([EPSILON / risk]), 0)
        violated.append(violations(streams)[0])
    assert caught(violated, name="a chosen grid")


def test_a_restart_that_keeps_its_delta_is_caught():
    streams = one_threshold()
    assert caught([restarted(lost, lambda _: DELTA) for lost in streams.lost], DELTA, "its delta")


def test_a_coin_that_is_drawn_after_a_look_at_the_score_is_caught():
    """Images that escalate anyway cost nothing more to audit; so more of them are."""
    streams = at_the_boundary(RISING)
    share = np.where(streams.scores > streams.thresholds[streams.bad], 1.0, 0.5)
    drawn = streams.rows(np.random.default_rng(4).uniform(size=share.shape) < share)
    assert caught(violations(drawn), name="a coin that knows the score")
