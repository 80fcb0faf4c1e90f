"""Numbers and recipes read as people write them."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from report import words


@pytest.mark.parametrize(
    ("show", "value", "text"),
    [
        (words.percent, 0.0423, "4.2 %"),
        (words.percent, None, "–"),
        (words.setting, 0.05, "5 %"),
        (words.setting, 0.001, "0.1 %"),
        (words.setting, 1 - 0.9, "10 %"),
        (words.amount, 1204.4, "1,204"),
        (words.amount, 31.24, "31.2"),
        (words.amount, -0.618, "-0.62"),
        (words.amount, None, "–"),
        (words.milliseconds, 104.2, "104 ms"),
        (words.milliseconds, 6.254, "6.25 ms"),
        (words.ratio, 1.005, "1.00"),
        (words.fine, 1.0046, "1.005"),
        (words.times, 2.344, "2.34×"),
        (words.times, None, "–"),
        (words.interval, (0.6, 0.8), "0.60 to 0.80"),
        (words.moment, 1714555800.9, "2024-05-01 09:30:00 UTC"),
        (words.moment, 1e300, "–"),
        (words.interval, None, "–"),
    ],
)
def test_numbers(show, value, text):
    assert show(value).replace("\N{NO-BREAK SPACE}", " ") == text


def test_counts():
    assert words.count_of(1, "image") == "1 image"
    assert words.count_of(1200, "image") == "1,200 images"


@pytest.mark.parametrize(
    ("recipe", "text"),
    [
        (
            "px=112,depth=9,tome=4,int8=static,align",
            "112 px, 9 blocks, 4 tokens merged per block, int8, aligned",
        ),
        ("px=224,int8", "224 px, int8 (dynamic)"),
        ("depth=1,tome=1,fp16", "1 block, 1 token merged per block, fp16"),
        ("fp32", "fp32"),
        ("px=98,adapted=0123456789ab,int8", "98 px, adapted (0123456789ab), int8 (dynamic)"),
        ("px=98,sparse=2", "98 px, sparse=2"),
        ("apt=5.5,int8=static", "flat areas in larger patches (below 5.5 bits), int8"),
        (
            "apt=5.75/4,align",
            "flat areas in larger patches (below 5.75 bits, still larger ones below 4), aligned",
        ),
        ("px=224,halt", "224 px, tokens halt"),
        ("halt=8,adapted=01ab", "tokens halt after about 8 blocks, adapted (01ab)"),
        ("halt=1", "tokens halt after about 1 block"),
    ],
)
def test_a_recipe_reads_in_words(recipe, text):
    assert words.recipe_words(recipe) == text


FLOATS = st.floats(allow_nan=False, allow_infinity=False)
SCORES = st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=20)


@given(SCORES, FLOATS)
def test_scores_are_ordered_as_their_texts_among_each_other_and_against_the_threshold(
    scores, threshold
):
    texts = [float(text) for text in words.score_texts(scores, threshold)]
    for i, one in enumerate(scores):
        assert (texts[i] <= threshold) == (one <= threshold)
        assert all((texts[i] < texts[j]) == (one < other) for j, other in enumerate(scores))


def test_scores_have_the_digits_they_need_and_four_at_least():
    assert words.score_texts([0.25, 3.0]) == ["0.25", "3"]
    assert words.score_texts([1.23456, 7.0]) == ["1.235", "7"]
    assert words.score_texts([1.23456], threshold=1.23458) == ["1.23456"]
    assert words.score_texts([1.0, math.nan]) == ["1", "nan"]
    assert words.score_texts([]) == []
    close = [15.6531, 15.65565, 15.655651, 15.6585]
    assert len(set(words.score_texts(close, 15.6556505))) == 4
