"""What is measured: the systems, their titles, parameters and thresholds."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bundle.graphs import Graph
from perf.systems import systems, threshold_for
from routing import Overrides, escalation_mask, parse_overrides
from tests.unit.perf_workplace import write_rungs

SERVED = ["vit_low", "vit_high", "router", "preprocess", "adaptive_vit", "px5", "px6"]


@pytest.fixture(scope="module")
def graph_set(tmp_path_factory):
    """Rungs of 4 and 8 px, alternatives of 5 and 6 px."""
    return write_rungs(tmp_path_factory.mktemp("onnx"), alternatives=(5, 6))


def found(graph_set, served=SERVED, threshold=0.5):
    return {s.name: s for s in systems(graph_set, served, threshold, 0.1 + 0.2)}


def test_every_way_to_answer_is_measured_with_the_cheap_rung_first(graph_set):
    assert {name: system.model for name, system in found(graph_set).items()} == {
        "static-low": "vit_low",
        "static-5": "px5",
        "static-6": "px6",
        "static-high": "vit_high",
        "adaptive-0": "router",
        "adaptive": "router",
        "adaptive-30": "router",
        "adaptive-100": "router",
        "ensemble": "adaptive_vit",
    }
    assert next(iter(found(graph_set))) == "static-low"


def test_what_a_server_does_not_serve_is_not_measured(graph_set):
    names = found(graph_set, ["vit_low", "vit_high", "router", "px6"])
    assert "static-6" in names and "adaptive" in names
    assert "static-5" not in names and "ensemble" not in names


def test_titles_say_the_recipe_and_whether_a_threshold_was_certified(graph_set):
    titles = {name: system.title for name, system in found(graph_set).items()}
    assert (titles["static-low"], titles["static-6"]) == ("cheap rung always (4 px)", "static 6 px")
    assert titles["static-high"] == "full rung always (8 px)"
    for name in ("adaptive", "ensemble"):
        assert "calibrated threshold" in titles[name]
        assert "nothing certified" in found(graph_set, threshold=None)[name].title


def test_any_alternative_is_a_system_named_after_its_model_and_titled_after_its_recipe(graph_set):
    record = graph_set.graphs["px5"].record
    recipes = {"tome8": "px=8,tome=8", "px5_int8static_align": "px=5,int8=static,align"}
    low = replace(graph_set.low.record, recipe="px=4,int8")
    changed = graph_set.adding(replace(graph_set.low, record=low))
    for name, recipe in recipes.items():
        changed = changed.adding(Graph(name, replace(record, recipe=recipe), Path(name)))
    every = found(changed, SERVED + [*recipes])
    assert every["static-tome8"].model == "tome8"
    assert every["static-tome8"].title == "static 8 px, 8 tokens merged per block"
    assert every["static-5-int8static-align"].model == "px5_int8static_align"
    assert every["static-5-int8static-align"].title == "static 5 px, int8, aligned"
    assert every["static-low"].title == "cheap rung always (4 px, int8 (dynamic))"


def test_only_the_rungs_are_static_and_only_the_ensemble_takes_bytes(graph_set):
    every = found(graph_set)
    static = {name for name, system in every.items() if system.is_static}
    assert static == {"static-low", "static-5", "static-6", "static-high"}
    assert [name for name, system in every.items() if system.takes_bytes] == ["ensemble"]


def test_thresholds_are_sent_as_perf_analyzer_can_and_the_router_understands_them(graph_set):
    scores = np.array([-3.0, 0.0, 0.2, 0.4, 1e6], np.float32)
    escalated = {}
    every = found(graph_set)
    assert parse_overrides(every["adaptive-30"].parameters).threshold == 0.1 + 0.2  # not 0.3
    for name, system in every.items():
        assert all(isinstance(value, str | int) for value in system.parameters.values())
        if not system.is_static:
            overrides = parse_overrides(system.parameters)
            escalated[name] = escalation_mask(scores, 0.0, overrides).sum()
    assert escalated == {
        "adaptive-0": 0,
        "adaptive": 3,
        "adaptive-30": 2,
        "adaptive-100": 5,
        "ensemble": 3,
    }


# --- the threshold for a share -----------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("count", [1, 7, 10, 40])
def test_the_share_of_the_scores_lies_above_the_threshold(share, count):
    scores = np.random.default_rng(count).normal(size=count).astype(np.float32)
    mask = escalation_mask(scores, threshold_for(scores, share), Overrides())
    assert mask.sum() == round(share * count)


def test_the_threshold_lies_midway_so_that_rounding_moves_no_image():
    scores = np.array([0.0, 4.0, 1.0, 3.0], np.float32)
    assert threshold_for(scores, 0.5) == 2.0
    assert threshold_for(scores, 0.25) == 3.5
    assert threshold_for(scores, 0.0) == 4.0
