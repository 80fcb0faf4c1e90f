"""`make demo PLAN=1`: what it serves, measures and says of that."""

import io
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from bundle.graphs import HIGH, LOW, REFERENCE, Graph, GraphSet
from calibration.images import SampleImages
from demo.page import write_page
from demo.plan_summary import best_sentence, served_rows, speedup_sentence, summarise_plan
from demo.serve import Asked
from demo.summary import Served, summarise
from demo.systems import recipes, resolutions_px, served_systems
from demo.tables import plan_table, result_table, sentences
from routing import RungRecord
from tests.unit.demo_measured import measured

FULL = RungRecord(224, "px=224", "f" * 64)
CHEAP = RungRecord(112, "px=112,int8=static,align", "c" * 64)
INT8 = RungRecord(224, "px=224,int8=static", "8" * 64)
MERGED = RungRecord(224, "px=224,tome=8", "m" * 64)
CERTIFICATE = {
    **{"epsilon": 0.05, "confidence": 0.9, "method": "ltt", "n": 480, "errors": 15, "allowed": 17},
    **{"certified": True, "signal": "margin", "statement": "With confidence 90 %, ..."},
}
RECIPES = {
    "static-low": CHEAP.recipe,
    "static-high": FULL.recipe,
    "static-escalation": INT8.recipe,
    "static-tome8": MERGED.recipe,
}


def rung_set(high, *beside):
    records = {"px112_int8static_align": CHEAP, "high": high, **dict(beside)}
    graphs = {name: Graph(name, record, Path(name)) for name, record in records.items()}
    full = "high" if high is FULL else "full"
    return GraphSet(
        backbone="tiny",
        image_shape=(3, 224, 224),
        embedding_dim=4,
        layers=2,
        classes=4,
        labels=("ant", "bee", "cat", "dog"),
        preprocessing={},
        graphs=graphs,
        roles={LOW: "px112_int8static_align", HIGH: "high", REFERENCE: full},
    )


def models(graphs):
    """The model that answers as each system."""
    return {name: system.model for name, system in served_systems(graphs).items()}


def test_the_full_rung_is_static_high_where_it_is_the_full_model():
    found = rung_set(FULL, ("tome8", MERGED))
    assert models(found) == {
        **{"static-low": "vit_low", "static-high": "vit_high", "static-tome8": "tome8"},
        **{"adaptive": "router", "adaptive-0": "router"},
    }
    assert recipes(found)["static-high"] == "px=224" and "adaptive" not in recipes(found)


def test_an_int8_full_rung_is_a_system_beside_the_full_model():
    found = rung_set(INT8, ("tome8", MERGED), ("full", FULL))
    assert models(found) == {
        **{"static-low": "vit_low", "static-high": "full", "adaptive": "router"},
        **{"static-escalation": "vit_high", "static-tome8": "tome8", "adaptive-0": "router"},
    }
    assert recipes(found) == RECIPES
    assert resolutions_px(found) == (112, 224)


CLASSES = {
    **{"static-low": [0, 1, 0, 3], "static-high": [0, 1, 2, 3], "adaptive": [0, 1, 1, 3]},
    **{"static-escalation": [0, 1, 1, 3], "static-tome8": [0, 1, 2, 0]},
}
ESCALATED = [False, False, True, False]
RATES = {
    **{"static-low": [80, 88, 40], "static-high": [10, 11, 5], "adaptive": [60, 88, 20]},
    **{"static-escalation": [20, 22, 10], "static-tome8": [15, 16, 8]},
}


def saturated(doubts=()):
    """Three turns at these images per second."""
    turns = [{name: 1000 / rates[turn] for name, rates in RATES.items()} for turn in range(3)]
    return measured(CLASSES, ESCALATED, turns, doubts=doubts)


def alone():
    costs = {"static-low": 25.0, "static-high": 100.0, "adaptive": 50.0, "static-escalation": 50.0}
    classes = {name: CLASSES[name] for name in costs}
    return measured(classes, ESCALATED, [costs], never=[27.5])


def served():
    """Four crops: adaptive escalates the third, and the int8 rung gets it wrong."""
    own = Asked(np.array(CLASSES["adaptive"]), np.array(ESCALATED), np.arange(4, dtype=np.float32))
    return Served.of(own, np.array([0, 1, 2, 2]), alone(), saturated(), list(CLASSES))


def plan_entry(agreement=None, doubts=()):
    return summarise_plan(
        RECIPES,
        (CHEAP.recipe, INT8.recipe),
        CERTIFICATE,
        agreement or served().agreement(),
        saturated(doubts),
    )


def test_a_graph_whose_own_clock_was_disturbed_gets_no_ratio():
    whole = saturated()
    for share in whole.paired.shares:  # half of what tome8 took was something else
        share["static-tome8"] = [
            replace(answer, cpu_ms=answer.cpu_ms / 2) for answer in share["static-tome8"]
        ]
    agreement = served().agreement() | {"static-tome8": 1.0, "static-escalation": 0.0}
    arguments = (RECIPES, (CHEAP.recipe, INT8.recipe), CERTIFICATE, agreement)
    plan = summarise_plan(*arguments, whole)
    assert not plan["disturbed"] and plan["disturbed_systems"] == ["static-tome8"]
    assert plan["best_alternative"]["name"] == "static-tome8"
    assert {row["system"]: row["speedup"] for row in served_rows(plan)}["static-tome8"] == "–"
    sentence = best_sentence(plan).replace("\N{NO-BREAK SPACE}", " ")
    assert "it agrees on 100.0 %. " in sentence and "of the cascade." in sentence
    # Where CPU time says nothing, nothing is held against it.
    on_gpu = summarise_plan(*arguments, replace(whole, cpu_counts=False))
    assert on_gpu["disturbed_systems"] == [] and "times as much" in best_sentence(on_gpu)


def test_the_speedup_is_taken_within_turns():
    plan = plan_entry()
    assert plan["speedup_vs_high"] == pytest.approx(6.0)  # of 6, 8 and 4
    assert plan["speedup_spread"] == {"min": pytest.approx(4.0), "max": pytest.approx(8.0)}
    assert plan["low_cost_ratio_to_plan"] == pytest.approx(0.75)  # of 0.75, 1 and 0.5
    assert plan["throughput_per_s"]["adaptive"] == pytest.approx(60)
    assert (plan["low"], plan["high"]) == (CHEAP.recipe, INT8.recipe)
    assert (plan["signal"], plan["max_risk"]) == ("margin", 0.05)


def test_agreement_is_with_the_full_model_not_with_the_full_rung():
    agreement = plan_entry()["agreement"]
    assert agreement["static-high"] == 1.0
    assert (
        agreement["static-escalation"] == agreement["adaptive"] == agreement["static-low"] == 0.75
    )


def agreeing(low, adaptive, escalation):
    """Shares of crops answered as the full model does."""
    found = {"static-low": low, "adaptive": adaptive, "static-escalation": escalation}
    return {**found, "static-high": 1.0, "static-tome8": 0.99}


def test_the_best_alternative_is_the_cheapest_that_agrees_as_often():
    agreement = agreeing(0.9, 0.97, 0.97)
    best = plan_entry(agreement=agreement)["best_alternative"]
    assert best == {
        "name": "static-escalation",
        "agreement": 0.97,
        "cost_ratio_to_plan": pytest.approx(3.0),  # of 3, 4 and 2
        "disturbed": False,
    }
    agreement["static-escalation"] = 0.96
    assert plan_entry(agreement=agreement)["best_alternative"]["name"] == "static-tome8"


def test_the_cheap_rung_is_part_of_the_cascade_and_no_alternative_to_it():
    agreement = agreeing(0.97, 0.97, 0.97)
    plan = plan_entry(agreement=agreement)
    assert plan["best_alternative"]["name"] == "static-escalation"
    assert "The cheap rung alone, for which nothing is certified, agrees on 97.0" in best_sentence(
        plan
    )


def test_the_full_model_is_the_best_alternative_where_nothing_else_agrees_as_often():
    agreement = agreeing(0.9, 1.0, 0.97)
    plan = plan_entry(agreement=agreement)
    assert plan["best_alternative"]["name"] == "static-high"
    assert plan["best_alternative"]["cost_ratio_to_plan"] == pytest.approx(plan["speedup_vs_high"])
    assert "the cheapest is the full model (224 px)" in best_sentence(plan)


def test_rows_stand_from_the_fastest_to_the_slowest():
    rows = served_rows(plan_entry())
    assert [row["system"] for row in rows] == [
        *("static-low", "adaptive", "static-escalation", "static-tome8", "static-high")
    ]
    assert rows[-1] == {
        **{
            "system": "static-high",
            "words": "the full model (224 px)",
            "agreement": "100.0\N{NO-BREAK SPACE}%",
        },
        **{"throughput": "10.0", "cpu": "100.0", "speedup": "1.00×"},
    }


def plan_summary(doubts=()):
    environment = {"triton_version": "2.51.0", "cpu": "one"}
    summary = summarise("tiny", (112, 224), served(), alone(), CERTIFICATE, environment)
    return {**summary, "plan": plan_entry(doubts=doubts)}


def test_a_plan_on_a_busy_machine_says_so_and_shows_no_ratio(tmp_path):
    plan = plan_entry(doubts=["a reason"])
    assert plan["disturbed"] is True and plan["speedup_vs_high"] == pytest.approx(6.0)
    assert speedup_sentence(plan) == ("Saturated, the machine was too busy for a figure: a reason.")
    assert "times as much" not in best_sentence(plan) and "of the cascade" not in best_sentence(
        plan
    )
    assert {row["speedup"] for row in served_rows(plan)} == {"–"}
    believed = plan_entry()
    assert believed["disturbed"] is False and "6.00 times" in speedup_sentence(believed)


def test_the_bound_counts_what_an_escalation_really_costs():
    summary = plan_summary()
    # 1/40 s for each image and 1/20 s for a quarter of them, against 1/10 s.
    assert summary["cascade_bound"] == pytest.approx(0.1 / (1 / 40 + 0.25 / 20))
    assert summary["speedup_vs_high"] == pytest.approx(2.0)


def test_an_escalated_image_that_the_full_rung_gets_wrong_counts_as_risk():
    assert plan_summary()["realised_risk"] == 0.25


def test_the_page_of_a_plan_shows_every_system_and_links_its_reasons(tmp_path):
    crops = [crop.data for crop in SampleImages(4, seed=0)]
    labels = ["ant", "bee", "cat", "dog"]
    path = tmp_path / "index.html"
    links = ("plan/report.html", "plan/plan.html")
    write_page(path, plan_summary(), served(), 1.5, crops, labels, *links)
    page = path.read_text()
    assert "a <b>cheap rung</b> (112 px, int8, aligned)" in page
    assert "pixels and the" not in page
    for words in (
        "the planned cascade",
        "224 px, 8 tokens merged per block",
        "the full rung (224 px, int8)",
    ):
        assert f'<td class="words">{words}' in page or f"({words})" in page
    assert best_sentence(plan_summary()["plan"]) in page
    loaded = set(re.findall(r'(?:src|href)="(?!data:)([^"]*)"', page))
    assert loaded == {"plan/report.html", "plan/plan.html"}


def test_the_terminal_names_the_rungs_by_their_recipes():
    console = Console(width=120, record=True, file=io.StringIO())
    summary = plan_summary()
    console.print(result_table(summary))
    console.print(plan_table(summary))
    text = console.export_text()
    assert "tiny planned" in text and "full model always" in text and "6.00×" in text
    assert sentences(summary)[0] == (
        "planned: 112 px, int8, aligned, escalating by margin to 224 px, int8"
    )
    assert any(line == best_sentence(summary["plan"]) for line in sentences(summary))
