import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from calibration.metrics import (
    Bootstrap,
    auroc,
    mean,
    needed_escalation,
    risk_curve,
    spearman,
    value,
)

samples = st.integers(2, 60).flatmap(
    lambda n: st.tuples(
        st.lists(st.integers(0, 9), min_size=n, max_size=n),  # few values: many ties
        st.lists(st.integers(0, 9), min_size=n, max_size=n),
        st.lists(st.booleans(), min_size=n, max_size=n),
        st.lists(st.integers(0, 3), min_size=n, max_size=n),
    )
)


@given(samples)
def test_weighted_figures_are_those_of_repeated_images(sample):
    first, second, loss, counts = (np.array(column) for column in sample)
    weights = counts[None].astype(float)
    x, y, lost = (np.repeat(column, counts) for column in (first, second, loss))
    if 0 < lost.sum() < len(lost):
        np.testing.assert_allclose(auroc(weights, first, loss), roc_auc_score(lost, x), rtol=1e-9)
    else:
        assert not np.isfinite(auroc(weights, first, loss)[0])
    if len(set(x)) > 1 and len(set(y)) > 1:
        expected = spearmanr(x, y).statistic
        np.testing.assert_allclose(spearman(weights, first, second), expected, atol=1e-9)
    if len(x):
        np.testing.assert_allclose(mean(weights, first), x.mean())


def test_figures_without_a_value_are_none():
    assert value(lambda w: auroc(w, np.arange(4.0), np.zeros(4, bool)), 4) is None
    assert value(lambda w: spearman(w, np.ones(4), np.arange(4.0)), 4) is None


def test_the_interval_of_a_mean_is_the_textbook_one():
    rng = np.random.default_rng(0)
    sample = rng.normal(size=400)
    low, high = Bootstrap(np.arange(400), 0).interval(lambda w: mean(w, sample))
    half = 1.96 * sample.std() / 20
    assert low == pytest.approx(sample.mean() - half, abs=0.02)
    assert high == pytest.approx(sample.mean() + half, abs=0.02)


def test_groups_are_resampled_whole():
    sample = np.repeat(np.random.default_rng(0).normal(size=40), 10)
    width = {}
    for name, groups in (("images", np.arange(400)), ("groups", np.repeat(np.arange(40), 10))):
        low, high = Bootstrap(groups, 0).interval(lambda w: mean(w, sample))
        width[name] = high - low
    # Ten copies of each image hold no more information than one: the interval must show it.
    assert width["groups"] / width["images"] == pytest.approx(10**0.5, rel=0.15)


def test_an_interval_of_nothing_defined_is_none():
    nothing = np.zeros(10, bool)
    interval = Bootstrap(np.arange(10), 0).interval(lambda w: auroc(w, np.arange(10.0), nothing))
    assert interval is None


def test_the_risk_curve_by_hand():
    values = np.array([4.0, 3.0, 2.0, 1.0])
    rates, risks = risk_curve(values, np.array([True, False, True, False]))
    np.testing.assert_allclose(rates, [0, 0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(risks, [0.5, 0.25, 0.25, 0, 0])


def test_images_of_equal_value_escalate_together():
    rates, risks = risk_curve(np.array([1.0, 1.0, 0.0]), np.array([True, False, False]))
    np.testing.assert_allclose(rates, [0, 2 / 3, 1])
    np.testing.assert_allclose(risks, [1 / 3, 0, 0])
    assert needed_escalation(np.array([1.0, 1.0, 0.0]), np.array([True, False, False]), 0.1) == (
        pytest.approx(2 / 3)
    )


@given(
    st.lists(st.tuples(st.integers(0, 20), st.booleans()), min_size=1, max_size=50),
    st.floats(0, 0.5),
)
def test_needed_escalation_is_the_least_that_meets_the_risk(pairs, max_risk):
    values, loss = (np.array(column) for column in zip(*pairs, strict=True))
    needed = needed_escalation(values, loss, max_risk)
    possible = [-1, *sorted(set(values))]
    rates = {float((values > t).mean()): float(((values <= t) & loss).mean()) for t in possible}
    assert rates[needed] <= max_risk + 1e-12
    assert all(risk > max_risk for rate, risk in rates.items() if rate < needed)


@given(
    st.lists(st.tuples(st.integers(0, 20), st.booleans(), st.booleans()), min_size=1, max_size=50),
    st.floats(0, 0.5),
)
def test_where_escalated_images_are_lost_too_every_higher_rate_must_meet_the_risk(rows, max_risk):
    values, loss, high_loss = (np.array(column) for column in zip(*rows, strict=True))
    needed = needed_escalation(values, loss, max_risk, high_loss)
    possible = [-1, *sorted(set(values))]
    risks = {
        float((values > t).mean()): float(np.where(values > t, high_loss, loss).mean())
        for t in possible
    }
    above = [rate for rate, risk in risks.items() if risk > max_risk + 1e-12]
    if risks[1.0] > max_risk + 1e-12:
        assert needed == np.inf
    else:
        assert needed in risks
        assert not above or needed > max(above)
        assert all(rate >= needed for rate in risks if not above or rate > max(above))


def test_the_risk_curve_of_a_full_rung_that_loses_too_by_hand():
    values = np.array([4.0, 3.0, 2.0, 1.0])
    loss, high_loss = (np.array(row, bool) for row in ([1, 0, 1, 0], [0, 1, 0, 0]))
    rates, risks = risk_curve(values, loss, high_loss)
    np.testing.assert_allclose(rates, [0, 0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(risks, [0.5, 0.25, 0.5, 0.25, 0.25])
    # At a rate of 0.25 the risk is met, but not from there on upwards.
    assert needed_escalation(values, loss, 0.25, high_loss) == 0.75
    assert needed_escalation(values, loss, 0.2, high_loss) == np.inf
    assert needed_escalation(values, loss, 0.5, high_loss) == 0


def test_a_full_rung_that_loses_nothing_is_as_good_as_the_reference():
    rng = np.random.default_rng(0)
    values, loss = rng.normal(size=90), rng.uniform(size=90) < 0.3
    for got, expected in zip(
        risk_curve(values, loss, np.zeros(90, bool)), risk_curve(values, loss), strict=True
    ):
        np.testing.assert_array_equal(got, expected)
