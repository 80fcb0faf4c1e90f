"""Numbers and recipes read as people write them."""

import pytest

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
        (words.interval, None, "–"),
        (words.spread_range, {"min": 1, "max": 12.5, "runs": 3}, "1.00 to 12.5"),
        (words.spread_range, {"min": 1, "max": 1, "runs": 1}, ""),
        (words.spread_range, None, ""),
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
        ("px=98,sparse=2", "98 px, sparse=2"),
    ],
)
def test_a_recipe_reads_in_words(recipe, text):
    assert words.recipe_words(recipe) == text
