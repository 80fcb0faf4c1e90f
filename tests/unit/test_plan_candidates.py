from pathlib import Path

import pytest

from bundle.graphs import GraphSet
from bundle.recipe import Recipe
from planner.candidates import FULL, default_candidates, find, recipes, said, shelf_graphs
from planner.subprocesses import PlanError
from tests.unit.plan_workplace import SIZE, write_shelf

PARTS = {"px=112", "depth=9", "tome=4", "int8=static", "align"}


@pytest.fixture
def graphs(tmp_path):
    low, *beside = "px=4,int8=static", "px=4", "depth=2", "px=6,depth=2"
    return shelf_graphs(GraphSet.load(write_shelf(tmp_path / "shelf", low, beside)))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("px=112,int8=static,align", [{"px=112", "int8=static", "align"}]),
        (" px=112 , align ;px=98; ", [{"px=112", "align"}, {"px=98"}]),
        ("fp32; int8=static", [set(), {"int8=static"}]),
        ("px=112,fp32", [{"px=112"}]),
        ("", []),
        (" ; ", []),
    ],
)
def test_recipes_are_read_whatever_their_spaces_and_order(text, expected):
    assert recipes(text) == [frozenset(parts) for parts in expected]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("px=112,int8", "px=112,int8: with dynamic int8 .* use int8=static"),
        ("px=112,tome=4; tome=4,px=112", "px=112.* is named more than once"),
        ("fp32; fp32", "fp32 is named more than once"),
    ],
)
def test_recipes_that_cannot_be_planned_are_one_line(text, message):
    with pytest.raises(PlanError, match=message) as error:
        recipes(text)
    assert "\n" not in str(error.value)


def test_the_same_graph_with_and_without_alignment_are_two_candidates():
    assert len(recipes("px=112; px=112,align")) == 2


def test_what_is_said_is_what_export_reads_without_the_alignment():
    recipe = Recipe.parse(said(frozenset(PARTS)))
    assert recipe == Recipe(112, 9, 4, "int8=static")
    assert said(frozenset({"align"})) == said(frozenset()) == "fp32"


def test_the_shelf_shows_rungs_and_alternatives_by_name(graphs):
    assert set(graphs) == {"px4_int8static", FULL, "px4", "depth2", "px6_depth2"}
    assert graphs["px4"].file.name == "px4.onnx"
    assert graphs[FULL].record.recipe == f"px={SIZE}"


@pytest.mark.parametrize(
    ("recipe", "name"),
    [
        ("int8=static,px=4", "px4_int8static"),
        ("px=4", "px4"),
        ("fp32", FULL),
        (f"px={SIZE}", FULL),
        ("depth=2", "depth2"),
        ("depth=2,px=6", "px6_depth2"),
    ],
)
def test_a_recipe_finds_its_graph(graphs, recipe, name):
    (parts,) = recipes(recipe)
    found = find(graphs, parts)
    assert found.name == name and found.file == Path(graphs[name].file)


def test_a_recipe_that_was_not_exported_is_one_line(graphs):
    with pytest.raises(PlanError, match="no graph of recipe px=5 was exported"):
        find(graphs, frozenset({"px=5"}))


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
def test_default_candidates_are_smaller_and_hold_whole_patches(patch_size, px, sizes):
    text = default_candidates(patch_size, px, aligns=True)
    assert text == "; ".join(f"px={size},int8=static,align" for size in sizes)
    plain = default_candidates(patch_size, px, aligns=False)
    assert plain == "; ".join(f"px={size},int8=static" for size in sizes)
    assert all(size % patch_size == 0 and size < px for size in sizes)
