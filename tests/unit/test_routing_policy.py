import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from routing import (
    Allowance,
    Overrides,
    Policy,
    escalation_mask,
    parse_overrides,
    threshold_text,
)

SCORES = np.array([0.1, 0.5, 0.9], np.float32)


def test_no_parameters_mean_auto():
    assert parse_overrides({}) == Overrides(Policy.AUTO, None)


def test_known_parameters():
    assert parse_overrides({"policy": "low"}) == Overrides(Policy.LOW)
    assert parse_overrides({"policy": "auto", "threshold": 2}) == Overrides(Policy.AUTO, 2.0)
    assert parse_overrides({"threshold": float("inf")}).threshold == float("inf")


@pytest.mark.parametrize(
    ("text", "number"), [("31.25", 31.25), ("-2", -2.0), ("1e9", 1e9), ("inf", float("inf"))]
)
def test_a_threshold_may_be_the_text_of_a_number(text, number):
    overrides = parse_overrides({"threshold": text})
    assert overrides == Overrides(Policy.AUTO, number)
    assert type(overrides.threshold) is float


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"policy": "medium"}, "policy 'medium' is none of auto, low, high"),
        ({"policy": 1}, "policy 1 is none of"),
        ({"threshold": "high"}, "threshold 'high' is not a number; send a float in oracle units"),
        ({"threshold": ""}, "threshold '' is not a number"),
        ({"threshold": "0,5"}, "threshold '0,5' is not a number"),
        ({"threshold": "0.5\n0.6"}, "is not a number"),
        ({"threshold": "True"}, "threshold 'True' is not a number"),
        ({"threshold": True}, "threshold True is not a number"),
        ({"threshold": [0.5]}, "is not a number"),
        ({"threshold": float("nan")}, "threshold is NaN; send a float in oracle units"),
        ({"threshold": "NaN"}, "threshold is NaN; send a float in oracle units"),
        ({"treshold": 0.5}, "unknown parameter 'treshold'"),
        ({"policy": "high", "threshold": 0.5}, "no meaning with policy=high"),
        ({"policy": "low", "threshold": "0.5"}, "no meaning with policy=low"),
    ],
)
def test_bad_parameters_are_one_clear_line(parameters, message):
    with pytest.raises(ValueError, match=message) as error:
        parse_overrides(parameters)
    assert "\n" not in str(error.value)


def test_only_scores_above_the_threshold_escalate():
    np.testing.assert_array_equal(
        escalation_mask(SCORES, float(SCORES[1]), Overrides()), [False, False, True]
    )


def test_the_threshold_is_not_rounded_to_fp32():
    just_below = np.nextafter(np.float64(SCORES[1]), -np.inf)
    assert np.float32(just_below) == SCORES[1]
    np.testing.assert_array_equal(
        escalation_mask(SCORES, just_below, Overrides()), [False, True, True]
    )


def test_a_score_that_is_no_number_escalates():
    scores = np.array([np.nan, 0.1], np.float32)
    np.testing.assert_array_equal(escalation_mask(scores, 0.5, Overrides()), [True, False])
    assert not escalation_mask(scores, 0.5, Overrides(Policy.LOW)).any()


def test_overrides_replace_the_calibrated_threshold():
    assert not escalation_mask(SCORES, 0.0, Overrides(Policy.LOW)).any()
    assert escalation_mask(SCORES, 1.0, Overrides(Policy.HIGH)).all()
    np.testing.assert_array_equal(
        escalation_mask(SCORES, 1.0, Overrides(threshold=0.2)), [False, True, True]
    )


def test_no_certified_threshold_means_always_high():
    assert escalation_mask(SCORES, None, Overrides()).all()
    assert not escalation_mask(SCORES, None, Overrides(Policy.LOW)).any()
    assert not escalation_mask(SCORES, None, Overrides(threshold=1.0)).any()


CAREFUL = Allowance(careful_only=True, threshold=0.5)


@pytest.mark.parametrize(
    "parameters", [{}, {"policy": "high"}, {"threshold": 0.5}, {"threshold": "-inf"}]
)
def test_a_request_may_always_be_more_careful(parameters):
    assert parse_overrides(parameters, CAREFUL) == parse_overrides(parameters)


@pytest.mark.parametrize(
    "parameters", [{"policy": "low"}, {"threshold": 0.500001}, {"threshold": "inf"}]
)
def test_a_request_may_be_less_careful_only_where_the_operator_says_so(parameters):
    parse_overrides(parameters, Allowance(careful_only=False, threshold=0.5))
    with pytest.raises(ValueError, match="may only lower the threshold or send policy=high"):
        parse_overrides(parameters, CAREFUL)


def test_where_all_escalate_no_threshold_is_more_careful():
    nothing_certified = Allowance(careful_only=True, threshold=None)
    assert parse_overrides({"policy": "high"}, nothing_certified).policy is Policy.HIGH
    with pytest.raises(ValueError, match="no threshold was certified"):
        parse_overrides({"threshold": -1e9}, nothing_certified)


@pytest.mark.parametrize("name", ["policy", "threshold", "x" * 10**6])
def test_a_refusal_repeats_only_the_beginning_of_what_was_sent(name):
    with pytest.raises(ValueError) as refused:
        parse_overrides({name: "a\n" * 10**6})
    assert len(str(refused.value)) < 200 and "\n" not in str(refused.value)


# --- thresholds as text --------------------------------------------------------------------------

NARROW = np.array([15.6531, 15.65565, 15.655651, 15.6585], np.float32)  # of a nearly flat score
BETWEEN = (float(NARROW[1]) + float(NARROW[2])) / 2


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_threshold_reads_back_as_itself(threshold):
    assert float(threshold_text(threshold)) == threshold


@pytest.mark.parametrize(
    ("threshold", "text"),
    [(0.5, "0.5"), (2.0, "2"), (15.655650999, "15.655650999"), (1e-7, "1e-07")],
)
def test_a_threshold_is_no_longer_than_it_must_be(threshold, text):
    assert threshold_text(threshold) == text
    assert threshold_text(np.float64(threshold)) == text


def test_pasting_a_printed_threshold_back_gives_the_same_decisions():
    """With four digits, 15.66, every one of these images would be kept low."""
    pasted = parse_overrides({"threshold": threshold_text(BETWEEN)})
    decided = escalation_mask(NARROW, BETWEEN, Overrides())
    np.testing.assert_array_equal(decided, [False, False, True, True])
    np.testing.assert_array_equal(escalation_mask(NARROW, None, pasted), decided)


def test_a_refused_threshold_is_told_from_the_calibrated_one():
    above = math.nextafter(BETWEEN, math.inf)
    with pytest.raises(ValueError, match="is above the calibrated") as error:
        parse_overrides({"threshold": above}, Allowance(True, BETWEEN))
    said = [float(number) for number in re.findall(r"\d+\.\d+", str(error.value))]
    assert said == [above, BETWEEN]
