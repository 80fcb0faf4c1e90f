"""Recipes as a user writes them, and those that are tried by default."""

import pytest

from bundle.recipe import Recipe
from planner.candidates import default_candidates, recipes
from planner.request import PlanError

ALIGNED = Recipe(112, precision="int8=static", align=True)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("px=112,int8=static,align", [ALIGNED]),
        ("align, int8=static ,px=0112", [ALIGNED]),
        (" px=112 , align ;px=98; ", [Recipe(112, align=True), Recipe(98)]),
        ("fp32; int8=static", [Recipe(), Recipe(precision="int8=static")]),
        ("px=112; px=112,align", [Recipe(112), Recipe(112, align=True)]),
        ("", []),
        (" ; ", []),
    ],
)
def test_recipes_are_read_whatever_their_spaces_and_order(text, expected):
    assert recipes("--candidates", text) == tuple(expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("px=112,int8", "px=112,int8: with dynamic int8 .* use int8=static"),
        (
            "px=4; int8=static,align",
            "--highs int8=static,align: only cheap graphs, those of --cand",
        ),
        ("px=4; speed=9", "--highs speed=9: recipe .*'speed=9' is unknown"),
        ("px=four", "--highs px=four: 'px=four' in a recipe must be a whole number"),
    ],
)
def test_recipes_that_cannot_be_planned_are_one_line(text, message):
    with pytest.raises(PlanError, match=message) as error:
        recipes("--highs", text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("aligns", [True, False])
@pytest.mark.parametrize(
    ("patch_size", "px", "sizes"),
    [
        (14, 224, [112, 98, 84]),
        (16, 224, [112, 96, 80]),
        (8, 64, [32, 24]),
        (4, 8, [4]),
        (8, 8, []),
    ],
)
def test_default_candidates_are_smaller_and_hold_whole_patches(patch_size, px, sizes, aligns):
    found = default_candidates(patch_size, px, aligns)
    assert found == tuple(Recipe(size, precision="int8=static", align=aligns) for size in sizes)
