"""Printed scores and thresholds decide as the numbers do that they stand for."""

import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from routing import (
    Allowance,
    Overrides,
    escalation_mask,
    parse_overrides,
    score_texts,
    threshold_text,
)

NARROW = np.array([15.6531, 15.65565, 15.655651, 15.6585], np.float32)  # of a nearly flat score
BETWEEN = (float(NARROW[1]) + float(NARROW[2])) / 2
FLOATS = st.floats(allow_nan=False, allow_infinity=False)
SCORES = st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=20)


@given(FLOATS)
def test_a_threshold_reads_back_as_itself(threshold):
    assert float(threshold_text(threshold)) == threshold


@pytest.mark.parametrize(
    ("threshold", "text"),
    [(0.5, "0.5"), (2.0, "2"), (15.655650999, "15.655650999"), (1e-7, "1e-07")],
)
def test_a_threshold_is_no_longer_than_it_must_be(threshold, text):
    assert threshold_text(threshold) == text
    assert threshold_text(np.float64(threshold)) == text


@given(SCORES, FLOATS)
def test_scores_are_ordered_as_their_texts_among_each_other_and_against_the_threshold(
    scores, threshold
):
    texts = [float(text) for text in score_texts(scores, threshold)]
    for i, one in enumerate(scores):
        assert (texts[i] <= threshold) == (one <= threshold)
        assert all((texts[i] < texts[j]) == (one < other) for j, other in enumerate(scores))


def test_scores_have_the_digits_they_need_and_four_at_least():
    assert score_texts([0.25, 3.0]) == ["0.25", "3"]
    assert score_texts([1.23456, 7.0]) == ["1.235", "7"]
    assert score_texts([1.23456], threshold=1.23458) == ["1.23456"]
    assert score_texts([1.0, math.nan]) == ["1", "nan"]
    assert score_texts([]) == []
    assert len(set(score_texts(NARROW.tolist(), BETWEEN))) == 4


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
