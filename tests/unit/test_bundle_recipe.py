"""Recipes in words: what users write, what is recorded, and what files are called."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bundle.recipe import PRECISIONS, Recipe, RecipeError

FULL_PX = 224
recipes = st.builds(
    Recipe,
    px=st.none() | st.integers(1, FULL_PX),
    depth=st.none() | st.integers(1, 48),
    tome=st.integers(0, 128),
    adapted=st.none() | st.text("0123456789abcdef", min_size=12, max_size=12),
    precision=st.sampled_from(PRECISIONS),
    align=st.booleans(),
)


@given(recipes)
def test_a_recipe_reads_what_it_writes(recipe):
    assert Recipe.parse(str(recipe)) == recipe


@given(recipes, st.randoms(use_true_random=False))
def test_parts_come_in_any_order_and_with_spaces(recipe, random):
    parts = str(recipe).split(",")
    random.shuffle(parts)
    assert Recipe.parse(" , ".join(parts)) == recipe


@given(recipes, recipes)
def test_different_recipes_have_different_slugs(first, second):
    first, second = first.at(FULL_PX), second.at(FULL_PX)
    assert (first.slug(FULL_PX) == second.slug(FULL_PX)) == (first == second)


@given(recipes)
def test_a_slug_fits_a_model_name_and_the_full_resolution_is_not_said(recipe):
    slug = recipe.slug(FULL_PX)
    assert re.fullmatch(r"[a-z0-9_]+", slug)
    assert recipe.at(FULL_PX).slug(FULL_PX) == slug


@given(st.text(st.characters(exclude_characters=",")), st.randoms(use_true_random=False))
def test_a_folder_of_any_name_without_a_comma_is_read(folder, random):
    folder = folder.strip()
    parts = [f"adapted={folder}", "px=112", "int8", "align"]
    random.shuffle(parts)
    if not folder:
        with pytest.raises(RecipeError, match="'adapted=' is unknown"):
            Recipe.parse(",".join(parts))
        return
    recipe = Recipe.parse(" , ".join(parts))
    assert recipe == Recipe(112, adapted=folder, precision="int8", align=True)
    assert Recipe.parse(str(recipe)) == recipe


@given(st.text())
def test_any_other_text_is_refused_in_one_line(text):
    try:
        recipe = Recipe.parse(text)
    except RecipeError as error:
        assert len(str(error).splitlines()) == 1
    else:
        assert Recipe.parse(str(recipe)) == recipe


@pytest.mark.parametrize(
    ("text", "canonical", "slug"),
    [
        ("px=140", "px=140", "px140"),
        ("px=224", "px=224", "full"),
        ("fp32", "fp32", "full"),
        ("tome=8", "tome=8", "tome8"),
        ("tome=0", "fp32", "full"),
        ("int8=static", "int8=static", "int8static"),
        ("align,int8=static,px=112", "px=112,int8=static,align", "px112_int8static_align"),
        ("int8,tome=4,depth=9", "depth=9,tome=4,int8", "depth9_tome4_int8"),
        ("fp16,px=0168", "px=168,fp16", "px168_fp16"),
        ("apt=5.50", "apt=5.5", "apt5p5"),
        (
            "int8=static,apt=5.75 / 4,px=112",
            "px=112,apt=5.75/4,int8=static",
            "px112_apt5p75-4_int8static",
        ),
        ("apt=0", "apt=0", "apt0"),
        ("halt", "halt", "halt"),
        ("align,halt=8.0", "halt=8,align", "halt8_align"),
        ("adapted=0a,halt=5.5", "halt=5.5,adapted=0a", "halt5p5_adapted0a"),
        ("int8,adapted=0a1b2c,px=8", "px=8,adapted=0a1b2c,int8", "px8_adapted0a1b2c_int8"),
    ],
)
def test_texts_and_slugs(text, canonical, slug):
    recipe = Recipe.parse(text)
    assert (str(recipe), recipe.slug(FULL_PX)) == (canonical, slug)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "recipe '': '' is unknown; known are px=N, depth=N, tome=N, apt=BITS, apt="),
        ("px=112,", "recipe 'px=112,': '' is unknown"),
        ("px=112;tome=4", "'px=112;tome=4' in a recipe must be a whole number, as px=112"),
        ("112", "'112' is unknown"),
        ("px", "'px' in a recipe must be a whole number"),
        ("px=-14", "'px=-14' in a recipe must be a whole number"),
        ("tome=1.5", "'tome=1.5' in a recipe must be a whole number"),
        ("PX=112", "'PX=112' is unknown"),
        ("int8=dynamic", "'int8=dynamic' is unknown"),
        ("align=yes", "'align=yes' is unknown"),
        ("px=112,px=112", "says its px twice"),
        ("int8,fp16", "recipe 'int8,fp16' says its precision twice; once is enough"),
        ("align,align", "says its align twice"),
        ("adapted=a,px=8,adapted=a", "says its adapted twice"),
        ("px=8,adapted=", "'adapted=' is unknown"),
        ("adapted", "'adapted' is unknown"),
        ("adapted=a,b", "'b' is unknown"),
        ("apt=9.1", "'apt=9.1' in a recipe must be one or two numbers of bits from 0 to 9"),
        ("apt=-0.1", "must be one or two numbers of bits from 0 to 9, as apt=5.5 or apt=5.75/4"),
        ("apt=5/4/3", "must be one or two numbers of bits"),
        ("apt=5/", "must be one or two numbers of bits"),
        ("apt=nan", "must be one or two numbers of bits"),
        ("apt", "must be one or two numbers of bits"),
        ("apt=5,apt=6", "says its apt twice"),
        ("halt=0", "'halt=0' in a recipe must be blocks, as halt=8"),
        ("halt=-1", "must be blocks, as halt=8"),
        ("halt=", "must be blocks, as halt=8"),
        ("halt=inf", "must be blocks, as halt=8"),
        ("halt=nan", "must be blocks, as halt=8"),
        ("halt,halt=8", "says its halt twice"),
    ],
)
def test_a_bad_part_is_named_in_one_line(text, message):
    with pytest.raises(RecipeError, match=re.escape(message)) as caught:
        Recipe.parse(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "varies"),
    [("apt=5.5", True), ("px=8,halt", True), ("halt=3", True), ("tome=8", False), ("fp32", False)],
)
def test_only_what_chooses_tokens_by_the_image_costs_more_for_some(text, varies):
    assert Recipe.parse(text).varies == varies


def test_a_resolution_is_filled_in_only_where_none_is_said():
    assert Recipe(112).at(224) == Recipe(112)
    assert Recipe(tome=8).at(224) == Recipe(224, tome=8)
