"""What `make tokens` makes of its figures: tokens that are always as many, who wins, the page."""

from __future__ import annotations

import re
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest

from bundle.recipe import Recipe
from demo.tokens import METHODS, RECIPES, Row, fixed_tokens, print_tokens, winners
from perf.token_costs import Follows
from report.token_maps import TokenMap
from report.tokens_page import write_tokens

GRAPHS = SimpleNamespace(layers=12)


def row(method, cost, agreement, **more):
    given = {"recipe": method, "adapted": False, "cost_ratio": cost, "cpu_cost_ratio": cost}
    tokens = {"tokens_mean": 100.0, "tokens_min": 60.0, "tokens_max": 200.0}
    return Row(method, **{**given, "agreement": agreement, **tokens, **more})


def test_every_method_has_one_recipe():
    assert tuple(recipe.partition("=")[0] for recipe in RECIPES) == METHODS
    assert all(Recipe.parse(recipe) for recipe in RECIPES)


@pytest.mark.parametrize(
    ("recipe", "tokens"),
    [
        ("fp32", 257),
        ("px=154", 122),
        ("depth=6", 257 / 2),
        ("tome=24", np.mean([257, 233, 209, 185, 161, 137, 113, 89, 65, 41, 21, 11])),
        ("px=28,tome=24", np.mean([5, 3, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2])),
    ],
)
def test_tokens_that_are_the_same_for_every_image(recipe, tokens):
    assert fixed_tokens(Recipe.parse(recipe), GRAPHS) == pytest.approx(tokens)


def test_who_is_not_beaten_in_cost_and_agreement_at_once():
    rows = [row("apt", 0.4, 0.8), row("tome", 0.5, 0.9), row("px", 0.5, 0.7), row("halt", 0.3, 0.5)]
    assert winners(rows) == ["apt", "tome", "halt"]
    # A little cheaper is no better; of equals neither beats the other, nor does a method itself.
    assert winners([row("apt", 0.46, 0.8), row("tome", 0.5, 0.9)]) == ["tome"]
    assert winners([row("apt", 0.4, 0.8), row("px", 0.4, 0.8)]) == ["apt", "px"]
    assert winners([row("apt", 0.5, 0.8), row("tome", 0.46, 0.8)]) == ["tome"]
    assert winners([row("apt", 0.4, 0.8), row("apt", 0.3, 0.9, adapted=True)]) == ["apt"]
    nothing = Row("halt", "halt=5.5", False, note="nothing halts")
    assert winners([nothing, row("px", 0.5, 0.5)]) == ["px"]


def summary(rows):
    line = Follows(0.99, 1.02, 0.01, 12)
    by_batch = {"1": asdict(line), "8": asdict(replace(line, slope=0.9))}
    return {
        "images": {"learned": 1084, "test": 392, "timed": 96},
        "minutes": 4,
        "alike": 0.1,
        "rows": [asdict(one) for one in rows],
        "cost_follows_tokens": {
            "apt": {"r": line.r, "slope": line.slope, "by_batch": by_batch},
            "halt": None,
        },
        "won": winners(rows),
    }


ROWS = [
    row("apt", 0.46, 0.812),
    Row("halt", "halt=5.5", False, note="nothing halts before a gate is trained"),
    row("halt", None, 0.61, adapted=True, cpu_cost_ratio=0.5),
    row("px", 0.46, 0.75, tokens_min=100.0, tokens_max=100.0),
]


def test_the_page_has_every_row_and_what_there_is_not(tmp_path):
    drawn = TokenMap(
        "apt",
        np.zeros((8, 8, 3), np.uint8),
        np.array([2]),
        np.full(4, 2),
        "one.jpg",
    )
    write_tokens(tmp_path / "tokens.html", summary(ROWS), [drawn])
    text = re.sub(r"\s+", " ", (tmp_path / "tokens.html").read_text())
    assert "nothing halts before a gate is trained" in text
    assert "81.2" in text and "1.02" in text and "one.jpg" in text
    table = text[text.index("<table>") : text.index("</table>")]
    assert table.count("<tr>") == 1 + len(ROWS)
    assert "–" in table  # a cost of which clock and CPU time tell different stories


def test_the_terminal_has_every_row(capsys):
    print_tokens(summary(ROWS))
    said = capsys.readouterr().err
    assert "nothing halts" in said and "r 0.990, slope 1.02" in said and "slope 0.90" in said
    assert "100 (60 to 200)" in said
