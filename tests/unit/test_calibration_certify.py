import json
import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from calibration.certify import (
    MAX_CANDIDATES,
    METHODS,
    CertifyError,
    Goal,
    Step,
    Verdict,
    allowed_errors,
    binomial_p_value,
    candidate_thresholds,
    certificate,
    certify,
    images_needed,
    one_per_group,
    outlook,
    statement,
)
from calibration.fidelity import Fidelity
from routing import Overrides, escalation_mask

LTT = Goal(0.05, 0.9, "ltt")
CRC = Goal(0.05, 0.9, "crc")
TOP1 = Fidelity("top1")

# Below 50 %: there the tail can meet δ = 0.5 exactly, and rounding may then cost one error.
goals = st.builds(
    Goal,
    st.integers(1, 49).map(lambda percent: percent / 100),
    st.sampled_from([0.5, 0.8, 0.9, 0.95, 0.99]),
    st.sampled_from(METHODS),
)
images = st.lists(
    st.tuples(st.integers(0, 30).map(lambda i: i / 8), st.booleans()), min_size=1, max_size=150
)


def arrays(pairs):
    scores, loss = zip(*pairs, strict=True)
    return np.array(scores, np.float32), np.array(loss, np.bool_)


def height(verdict):
    return -math.inf if verdict.threshold is None else verdict.threshold


def exact_tail(k, n, epsilon):
    """P(Bin(n, ε) ≤ k) without rounding."""
    p = Fraction(str(epsilon))
    return sum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k + 1))


@pytest.mark.parametrize(
    ("flag", "values"),
    [
        ("--max-risk", (0.0, 0.9, "ltt")),
        ("--max-risk", (1.0, 0.9, "ltt")),
        ("--max-risk", (math.nan, 0.9, "ltt")),
        ("--confidence", (0.05, 0.49, "ltt")),
        ("--confidence", (0.05, 1.0, "ltt")),
        ("--confidence", (0.05, 90.0, "ltt")),
        ("--method", (0.05, 0.9, "bonferroni")),
        ("--method crc", (0.05, 0.9, "crc", 2)),
    ],
)
def test_a_goal_that_is_none_is_refused_in_one_line_that_names_the_flag(flag, values):
    with pytest.raises(CertifyError, match=flag) as error:
        Goal(*values)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("n", "max_risk", "ltt", "crc"),
    [
        (500, 0.01, 1, 4),
        (500, 0.02, 5, 9),
        (1000, 0.01, 5, 9),
        (1000, 0.02, 13, 19),
        (5000, 0.01, 40, 49),
        (5000, 0.02, 86, 99),
    ],
)
def test_the_published_table_of_allowed_errors(n, max_risk, ltt, crc):
    assert allowed_errors(n, Goal(max_risk, 0.9, "ltt")) == ltt
    assert allowed_errors(n, Goal(max_risk, 0.9, "crc")) == crc


@given(st.integers(1, 400), st.integers(0, 40), st.integers(1, 60))
def test_p_values_are_those_of_scipys_exact_test(n, errors, percent):
    errors = min(errors, n)
    expected = binomtest(errors, n, percent / 100, alternative="less").pvalue
    assert binomial_p_value(errors, n, percent / 100) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("n", [1, 44, 45, 60, 137, 200])
@pytest.mark.parametrize("max_risk", [0.01, 0.05, 0.13, 0.3])
@pytest.mark.parametrize("confidence", [0.8, 0.9, 0.99])
def test_allowed_errors_agree_with_rational_arithmetic(n, max_risk, confidence):
    delta = 1 - Fraction(str(confidence))
    k = -1
    while exact_tail(k + 1, n, max_risk) <= delta:
        k += 1
    assert allowed_errors(n, Goal(max_risk, confidence, "ltt")) == k


@given(st.integers(1, 99), st.integers(1, 60))
def test_rounding_costs_conformal_risk_control_no_error(percent, hundreds):
    # With n + 1 = 100 h images, exactly `percent` times h errors less one are allowed; in binary
    # 0.29 * 100 is less than 29.
    goal = Goal(percent / 100, 0.9, "crc")
    assert allowed_errors(100 * hundreds - 1, goal) == percent * hundreds - 1


@given(st.integers(0, 2000), goals)
def test_allowed_errors_grow_with_the_images_and_the_risk(n, goal):
    allowed = allowed_errors(n, goal)
    assert allowed <= allowed_errors(n + 1, goal) <= allowed + 1
    assert allowed <= allowed_errors(n, Goal(goal.max_risk + 0.01, goal.confidence, goal.method))
    stricter = Goal(goal.max_risk, (1 + goal.confidence) / 2, goal.method)
    assert allowed_errors(n, stricter) <= allowed
    assert allowed < max(goal.max_risk * n, 1)


@given(goals)
def test_the_images_needed_are_the_fewest_that_certify(goal):
    needed = images_needed(goal)
    assert allowed_errors(needed, goal) >= 0
    assert allowed_errors(needed - 1, goal) == -1


def test_candidates_lie_midway_and_above_the_largest():
    scores = np.array([3.0, 1.0, 1.0, 2.0], np.float32)
    np.testing.assert_allclose(candidate_thresholds(scores), [1.5, 2.5, 3 + 2 / 3])
    assert candidate_thresholds(scores).dtype == np.float64


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=60))
def test_candidates_give_every_division_but_escalating_all(values):
    scores = np.array(values, np.float32)
    escalated = [
        int(escalation_mask(scores, threshold, Overrides()).sum())
        for threshold in candidate_thresholds(scores)
    ]
    counts = [int((scores > score).sum()) for score in np.unique(scores)]
    assert escalated == counts
    assert counts[-1] == 0
    assert max(counts) < len(scores)


def test_neighbouring_fp32_scores_are_told_apart():
    low = np.float32(7.3)
    scores = np.array([low, np.nextafter(low, np.float32(8))], np.float32)
    between = candidate_thresholds(scores)[0]
    np.testing.assert_array_equal(escalation_mask(scores, between, Overrides()), [False, True])


def test_many_scores_give_a_thousand_evenly_spaced_candidates():
    scores = np.random.default_rng(0).normal(size=30_000).astype(np.float32)
    candidates = candidate_thresholds(scores)
    assert len(candidates) == MAX_CANDIDATES
    assert np.all(np.diff(candidates) > 0)
    kept = np.searchsorted(np.sort(scores.astype(np.float64)), candidates) / len(scores)
    assert kept[0] < 0.001
    assert kept[-1] == 1
    assert np.diff(kept).max() < 0.002


def test_the_previous_threshold_is_kept_when_one_fails():
    # 100 images, five of them lost. At ε = 0.05 and confidence 0.9, 100 images allow one error.
    scores = np.arange(100, dtype=np.float32)
    loss = np.isin(scores, [20, 40, 60, 80, 99])
    candidates = np.array([10.5, 20.5, 39.5, 40.5, 90.5])
    verdict = certify(scores, loss, candidates, LTT)
    path = (Step(10.5, 0), Step(20.5, 1), Step(39.5, 1), Step(40.5, 2))
    assert verdict == Verdict(threshold=39.5, n=100, errors=1, allowed=1, path=path)
    assert binomial_p_value(1, 100, 0.05) <= 0.1 < binomial_p_value(2, 100, 0.05)
    # 5 / 101 ≤ 0.05 < 6 / 101: on average, four errors are allowed.
    assert certify(scores, loss, candidates, CRC).threshold == 90.5


def test_an_image_at_the_threshold_is_kept_low():
    scores = np.full(50, 2.0, np.float32)
    loss = np.ones(50, np.bool_)
    assert certify(scores, loss, np.array([2.0]), LTT).errors == 50
    assert certify(scores, loss, np.array([np.nextafter(2.0, 0)]), LTT).errors == 0


def test_nothing_is_certified_by_too_few_images_or_by_too_many_errors():
    candidates = np.array([0.5, 1.5])
    few = certify(np.zeros(44, np.float32), np.zeros(44, np.bool_), candidates, LTT)
    assert (few.threshold, few.errors, few.allowed, few.n) == (None, 0, -1, 44)
    bad = certify(np.zeros(45, np.float32), np.arange(45) < 3, candidates, LTT)
    assert (bad.threshold, bad.errors, bad.allowed, bad.n) == (None, 3, 0, 45)
    assert bad.path == (Step(0.5, 3),)


@given(images, goals)
def test_certify_is_the_sequence_of_tests_written_out(pairs, goal):
    scores, loss = arrays(pairs)
    candidates = candidate_thresholds(scores)
    expected = None
    for candidate in candidates:
        errors = int((~escalation_mask(scores, candidate, Overrides()) & loss).sum())
        if goal.method == "ltt":
            passed = exact_tail(errors, len(loss), goal.max_risk) <= 1 - Fraction(
                str(goal.confidence)
            )
        else:
            passed = Fraction(errors + 1, len(loss) + 1) <= Fraction(str(goal.max_risk))
        if not passed:
            break
        expected = candidate
    assert certify(scores, loss, candidates, goal).threshold == expected


@given(images, goals, st.data())
def test_more_errors_never_certify_more(pairs, goal, data):
    scores, loss = arrays(pairs)
    candidates = candidate_thresholds(scores)
    worse = loss.copy()
    worse[data.draw(st.integers(0, len(loss) - 1))] = True
    before, after = (certify(scores, column, candidates, goal) for column in (loss, worse))
    assert height(after) <= height(before)


@given(images, goals, st.randoms(use_true_random=False))
def test_the_order_of_the_images_changes_nothing(pairs, goal, random):
    scores, loss = arrays(pairs)
    candidates = candidate_thresholds(scores)
    shuffled = random.sample(pairs, len(pairs))
    assert certify(*arrays(shuffled), candidates, goal) == certify(scores, loss, candidates, goal)


@given(images, goals, st.lists(st.floats(-1, 4), max_size=20))
def test_more_careful_candidates_never_change_a_certified_threshold(pairs, goal, extra):
    scores, loss = arrays(pairs)
    candidates = candidate_thresholds(scores)
    verdict = certify(scores, loss, candidates, goal)
    careful = [threshold for threshold in extra if threshold < height(verdict)]
    again = certify(scores, loss, np.union1d(candidates, careful), goal)
    assert (again.threshold, again.errors) == (verdict.threshold, verdict.errors)


@given(st.lists(st.integers(0, 8), min_size=1, max_size=60), st.integers(0, 9), st.data())
def test_one_image_of_each_group_is_drawn(names, seed, data):
    groups = np.array([f"group {name}" for name in names])
    rows = np.array(sorted(data.draw(st.sets(st.integers(0, len(names) - 1), min_size=1))))
    drawn = one_per_group(groups, rows, seed)
    assert set(drawn) <= set(rows)
    assert sorted(groups[drawn]) == sorted(set(groups[rows]))
    np.testing.assert_array_equal(drawn, one_per_group(groups, rows, seed))


def test_every_image_of_a_group_is_drawn_equally_often():
    groups, rows = np.array(["a", "b", "b", "b"]), np.arange(4)
    draws = [one_per_group(groups, rows, seed)[1] for seed in range(600)]
    assert binomtest(draws.count(1), 600, 1 / 3).pvalue > 1e-3
    assert binomtest(draws.count(2), 600, 1 / 3).pvalue > 1e-3
    assert set(draws) == {1, 2, 3}


def test_what_a_tested_certificate_says():
    assert statement(Verdict(1.5, 480, 15, 17, ()), LTT, TOP1) == (
        "With confidence 90 %, at most 5 % of images drawn as the calibration images were, "
        "requested without parameters and not marked degraded, get an answer that names another "
        "class than the full rung. "
        "Of 480 certify images that nothing was fitted on, 15 did; up to 17 would have been "
        "allowed."
    )
    assert allowed_errors(480, LTT) == 17


def test_what_a_certificate_on_average_says():
    text = statement(Verdict(1.5, 480, 20, 23, ()), CRC, Fidelity("cosine", 0.1))
    assert text == (
        "On average over repeated calibrations, at most 5 % of images drawn as the calibration "
        "images were, requested without parameters and not marked degraded, get an answer that has "
        "a cosine below 0.9 to the full rung's embedding; no confidence is attached. Of 480 "
        "certify images that nothing was fitted on, 20 did; up to 23 would have been allowed."
    )
    assert allowed_errors(480, CRC) == 23


def test_what_is_said_where_nothing_is_certified():
    assert statement(Verdict(None, 40, 0, -1, ()), LTT, TOP1) == (
        "No threshold is certified for a risk of at most 5 % with confidence 90 %: that takes 45 "
        "independent certify images even if none of them is lost, and there are 40. Every image "
        "therefore goes to the full rung."
    )
    assert statement(Verdict(None, 480, 30, 23, ()), CRC, TOP1) == (
        "No threshold is certified for a risk of at most 5 % on average over calibrations: even at "
        "the most careful threshold 30 of 480 certify images get an answer that names another "
        "class than the full rung, and up to 23 would have been allowed. Every image therefore "
        "goes to the full rung."
    )


def test_the_certificate_is_json_and_complete():
    record = certificate(Verdict(1.5, 480, 15, 17, ()), LTT, TOP1, "margin")
    text = record.pop("statement")
    assert text == statement(Verdict(1.5, 480, 15, 17, ()), LTT, TOP1)
    assert json.loads(json.dumps(record)) == {
        "certified": True,
        "method": "ltt",
        "epsilon": 0.05,
        "confidence": 0.9,
        "fidelity": "top1",
        "tolerance": None,
        "signal": "margin",
        "split": "certify",
        "n": 480,
        "errors": 15,
        "allowed": 17,
        "choices": 1,
        "reference": "full rung",
    }


def test_a_certificate_on_average_has_no_confidence_and_a_cosine_its_tolerance():
    verdict = certify(np.zeros(5, np.float32), np.zeros(5, np.bool_), np.array([1.0]), CRC)
    record = certificate(verdict, CRC, Fidelity("cosine", 0.2), "cls_path")
    assert (record["certified"], record["confidence"], record["tolerance"]) == (False, None, 0.2)
    json.dumps(record, allow_nan=False)


@pytest.mark.parametrize(("choices", "allowed"), [(1, 17), (2, 15), (4, 14)])
def test_each_of_several_cascades_is_tested_at_its_share_of_delta(choices, allowed):
    goal = Goal(0.05, 0.9, "ltt", choices)
    assert goal.delta == pytest.approx(0.1 / choices)
    assert allowed_errors(480, goal) == allowed
    assert binomial_p_value(allowed, 480, 0.05) <= 0.1 / choices
    assert binomial_p_value(allowed + 1, 480, 0.05) > 0.1 / choices
    assert images_needed(goal) == math.ceil(math.log(0.1 / choices) / math.log(0.95))


def test_the_certificate_of_a_choice_says_of_how_many():
    goal = Goal(0.05, 0.9, "ltt", 4)
    text = statement(Verdict(1.5, 480, 12, 14, ()), goal, TOP1, reference="full FP32 model")
    assert text.startswith("With confidence 90 %, at most 5 % of images")
    assert "names another class than the full FP32 model" in text
    assert "whichever of the 4 cascades that were tested is chosen (each at 97.5 %)" in text
    record = certificate(Verdict(1.5, 480, 12, 14, ()), goal, TOP1, "margin")
    assert (record["choices"], record["confidence"]) == (4, 0.9)


triples = st.lists(
    st.tuples(st.integers(0, 30).map(lambda i: i / 8), st.booleans(), st.booleans()),
    min_size=1,
    max_size=120,
)


@given(triples, st.integers(5, 49), st.sampled_from([0.5, 0.8, 0.9]))
def test_with_a_full_rung_that_loses_too_the_walk_ends_at_the_first_failure(rows, percent, sure):
    scores, loss = arrays([(score, lost) for score, lost, _ in rows])
    high_loss = np.array([lost for _, _, lost in rows])
    candidates, goal = candidate_thresholds(scores), Goal(percent / 100, sure, "ltt")
    expected, tried = None, []
    for candidate in candidates:
        escalated = escalation_mask(scores, candidate, Overrides())
        errors = int(np.where(escalated, high_loss, loss).sum())
        tried.append(Step(candidate, errors))
        if errors > allowed_errors(len(rows), goal):
            break
        expected = candidate
    verdict = certify(scores, loss, candidates, goal, high_loss)
    assert (verdict.threshold, verdict.path) == (expected, tuple(tried))


def test_a_later_threshold_with_fewer_errors_is_not_reached_past_a_failure():
    # Keeping the first ten low saves the full rung's losses, but half of them are lost first.
    scores = np.arange(100, dtype=np.float32)
    loss, high_loss = (scores >= 5) & (scores < 10), scores >= 95
    candidates = np.array([2.5, 7.5, 99.5])
    verdict = certify(scores, loss, candidates, Goal(0.1, 0.9, "ltt"), high_loss)
    assert [step.errors for step in verdict.path] == [5, 8]
    assert (verdict.threshold, verdict.errors, verdict.allowed) == (2.5, 5, 5)
    alone = certify(scores, loss, candidates[2:], Goal(0.1, 0.9, "ltt"), high_loss)
    assert (alone.threshold, alone.errors) == (99.5, 5)


def test_conformal_risk_control_is_refused_where_escalated_images_can_be_lost():
    scores, none = np.zeros(50, np.float32), np.zeros(50, np.bool_)
    with pytest.raises(CertifyError, match="only grows with the threshold.*use ltt") as error:
        certify(scores, none, np.array([1.0]), CRC, none)
    assert "\n" not in str(error.value)
    assert certify(scores, none, np.array([1.0]), CRC).threshold == 1.0


def test_the_outlook_is_what_the_test_would_allow_of_more_images():
    rng = np.random.default_rng(0)
    ranked, loss = np.arange(400.0), rng.uniform(size=400) < 0.15
    goal, n = Goal(0.1, 0.9, "ltt", choices=3), 120
    found = outlook(ranked, loss, None, goal, n)
    assert [row["n"] for row in found["images"]] == [n, 2 * n, 4 * n, 10 * n]
    for row in found["images"]:
        share = allowed_errors(row["n"], goal) / row["n"]
        kept = ranked < 400 * (1 - row["escalation"])
        assert (loss & kept).mean() <= share  # and one image less escalated would be too many
        assert (loss & (ranked <= kept.sum())).mean() > share
    shares = [row["escalation"] for row in found["images"]]
    assert shares == sorted(shares, reverse=True) and shares[0] > shares[-1]


@pytest.mark.parametrize("n", [20, 120, 1000])
def test_the_least_risk_is_the_least_that_could_be_certified(n):
    goal = Goal(0.1, 0.9, "ltt")
    ranked = np.arange(300.0)
    loss = ranked >= 290  # told apart without fail: none of the images kept low is lost
    least = outlook(ranked, loss, None, goal, n)["least_risk"]
    assert images_needed(replace(goal, max_risk=least)) <= n
    assert least < 0.002 or images_needed(replace(goal, max_risk=least - 0.001)) > n
    # A full rung that is not the reference loses images that no threshold saves.
    floor = outlook(ranked, loss, ranked % 10 == 0, goal, n)["least_risk"]
    assert floor > max(least, 0.09)


def test_too_few_images_have_no_outlook():
    goal = Goal(0.01, 0.9, "ltt")
    found = outlook(np.arange(50.0), np.arange(50) >= 49, None, goal, 50)
    assert [row["escalation"] is None for row in found["images"]] == [True, True, True, False]
