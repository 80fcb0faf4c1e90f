"""What the calibration's page is given: decisions, their numbers, and which case they are."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calibration.decisions import Decisions, curve_case, risk_case
from calibration.record import Fit
from tests.unit.fakes import make_calibration
from tests.unit.fitted import data_of, decide, make_metrics
from tests.unit.pages import make_outputs

FULL_LOSES = np.array([0, 0, 0, 1], np.bool_)


def test_the_risk_at_the_same_escalation_is_exact_by_hand():
    decisions = decide([4, 3, 2, 1], [1, 0, 1, 0], 2.5)
    assert (decisions.base_risk, decisions.escalation, decisions.risk) == (0.5, 0.5, 0.25)
    assert decisions.random_risk() == 0.25
    assert decisions.risk_when_ranked_by(decisions.loss.astype(float)) == 0.0
    assert decisions.risk_when_ranked_by(np.array([0.0, 1, 0, 1])) == 0.5


def test_among_ties_chance_chooses():
    decisions = decide([4, 3, 2, 1], [1, 1, 0, 0], 3.5)
    assert decisions.risk_when_ranked_by(np.zeros(4)) == pytest.approx(decisions.random_risk())
    # One of the three tied images escalates; two of the three have a loss.
    assert decisions.risk_when_ranked_by(np.array([5.0, 5, 5, 0])) == pytest.approx((2 - 2 / 3) / 4)


@given(st.data())
def test_ranking_by_the_scores_gives_the_risk_of_the_decision(data):
    n = data.draw(st.integers(1, 30))
    scores = data.draw(st.lists(st.integers(0, 6), min_size=n, max_size=n))
    loss = data.draw(st.lists(st.booleans(), min_size=n, max_size=n))
    threshold = data.draw(st.one_of(st.none(), st.integers(-1, 6)))
    decisions = decide(scores, loss, threshold)
    assert decisions.risk_when_ranked_by(decisions.scores) == pytest.approx(decisions.risk)
    cells = decisions.cells()
    assert sorted(np.concatenate(list(cells.values()))) == list(range(n))
    assert len(cells["kept_wrong"]) / n == pytest.approx(decisions.risk)


def test_the_chosen_signal_is_ranked_by_the_scores_that_decide(tmp_path):
    outputs = make_outputs([1, 2, 3], [0, 0, 1])
    values = {"cls_path": np.array([9.0, 8, 7]), "margin": np.array([0.1, 0.2, 0.3])}
    scores, loss = np.array([5, 6, 7], np.float32), np.array([0, 0, 1], bool)
    fitted = Fit(make_calibration(threshold=5.5), {}, values, scores, loss)
    decisions = Decisions.of(fitted, outputs, np.array([2, 0]))
    assert decisions.values["cls_path"].tolist() == [7, 5]
    assert decisions.values["margin"].tolist() == [0.3, 0.1]
    assert decisions.escalated.tolist() == [True, False]
    np.testing.assert_allclose(decisions.oracle, [3, 1], rtol=1e-5)


@pytest.mark.parametrize(
    ("threshold", "interval", "epsilon", "grouped", "case"),
    [
        (None, [0, 0], 0.05, False, "by_construction"),
        (0.5, [0, 0.31], 0.05, False, "none_lost"),
        (1.5, [0.0, 0.3], None, False, "no_limit"),
        (1.5, [0.0, 0.3], 0.3, True, "grouped"),
        (1.5, None, 0.3, False, "grouped"),
        (1.5, [0.0, 0.3], 0.3, False, "within"),
        (1.5, [0.0, 0.3], 0.2, False, "reaches_beyond"),
        (1.5, [0.0, 0.3], 0.05, False, "reaches_down"),
        (1.5, [0.06, 0.3], 0.05, False, "contradicts"),
    ],
)
def test_the_measured_risk_is_held_against_its_limit(threshold, interval, epsilon, grouped, case):
    decisions = decide(np.arange(10), np.arange(10) == 1, threshold)
    assert risk_case(decisions, interval, epsilon, grouped) == case


@pytest.mark.parametrize(
    ("loss", "threshold", "case"),
    [
        ([0, 0, 0, 0], 1.5, "no_loss"),
        ([0, 1, 0, 0], None, "all"),
        ([0, 1, 0, 0], 9.0, "none"),
        ([0, 0, 1, 1], 2.5, "some"),
    ],
)
def test_the_curve_is_read_at_the_chosen_point(loss, threshold, case):
    assert curve_case(decide([0, 1, 2, 3], loss, threshold)) == case


def test_the_risk_of_a_full_rung_that_loses_too_is_read_as_such():
    decisions = replace(decide([0, 1, 2, 3], [0, 1, 1, 1], 1.5), high_loss=FULL_LOSES)
    assert decisions.lost.tolist() == [False, True, False, True]
    assert (decisions.risk, decisions.random_risk()) == (0.5, 0.5 * 0.75 + 0.5 * 0.25)
    assert decisions.best_risk() == 0.25  # escalate the second and the third


def test_escalating_every_image_to_a_full_rung_that_loses_is_not_called_riskless():
    decisions = replace(decide([0, 1, 2, 3], [0, 1, 0, 0], None), high_loss=FULL_LOSES)
    assert risk_case(decisions, [0.1, 0.9], 0.5, grouped=False) == "reaches_beyond"
    assert curve_case(decisions) == "all"


def test_the_numbers_are_those_of_the_test_split():
    # Test rows 120..239; scores are rows, the oracle one more; escalated from 233 on.
    fit = data_of(loss=[1, 125, 126, 235], threshold=232.5)[0]
    assert (fit["split"], fit["cells"]["splits"], fit["cells"]["measured"]) == (
        "test",
        ["test"],
        120,
    )
    test = fit["measured"]
    counts = {"images": 120, "losses": 3, "lost": 2, "escalated": 7, "both": 1}
    assert {key: test[key] for key in counts} == counts
    assert test["base_risk"] == 3 / 120 and test["risk"] == 2 / 120
    assert test["escalation_rate"] == 7 / 120 and test["random_risk"] == 3 / 120 * 113 / 120
    assert test["oracle_risk"] == 2 / 120 and test["perfect_risk"] == 0
    assert test["median_with_loss"] == pytest.approx(127, rel=1e-5)
    assert test["median_without"] == pytest.approx(np.median([*range(121, 241)]), abs=1)
    assert data_of(loss=[])[0]["measured"]["median_with_loss"] is None


def test_without_a_test_split_they_are_those_of_the_fit_split():
    # Fit rows 0, 2, ..., 238; the threshold lies below 7 of them.
    fit = data_of(test=None, loss=[1, 2, 3, 230], threshold=225.5)[0]
    assert (fit["split"], fit["cells"]["splits"]) == ("fit", ["fit"])
    counts = {"images": 120, "losses": 2, "lost": 1, "escalated": 7, "both": 1}
    assert {key: fit["measured"][key] for key in counts} == counts
    assert len(fit["scatter"]["score"]) == 120
    few = data_of(test=None, n=180)[0]["cells"]
    assert (few["splits"], few["measured"], few["images"]) == (["certify", "fit"], 90, 180)


def test_curves_end_at_what_their_ranking_gives():
    curves = data_of()[0]["curves"]
    assert [curve["kind"] for curve in curves[-4:]] == ["chosen", "random", "oracle", "perfect"]
    for curve in curves:
        assert curve["rates"][0] == 0 and curve["rates"][-1] == 1
        assert curve["risks"][0] == pytest.approx(20 / 120) and curve["risks"][-1] == 0


@pytest.mark.parametrize(
    ("auroc", "interval", "words"),
    [
        (0.8, (0.7, 0.9), None),
        (0.8, (0.45, 0.8), "is not shown to be better than random"),
        (None, None, "It is unknown whether cls_path"),
    ],
)
def test_a_signal_that_may_be_random_is_called_so_and_no_other(auroc, interval, words):
    names = ("cls_path", "cls_regression", "entropy", "margin")
    warnings = data_of(metrics=make_metrics(names, auroc, interval))[0]["warnings"]
    assert (len(warnings) == 1 and words in warnings[0]) if words else not warnings


def test_signals_come_best_first_and_the_references_last():
    metrics = make_metrics(("cls_path", "margin", "entropy", "cls_regression"))
    for name, auroc in (("margin", 0.95), ("entropy", 0.6)):
        metrics["signals"][name]["auroc"] = auroc
    names = list(data_of(metrics=metrics)[0]["signals"])
    assert names[0] == "margin" and names[-3:] == ["entropy", "random", "oracle"]
