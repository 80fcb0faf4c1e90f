"""What the demo says of what it measured: summary.json, the terminal and the page."""

import re
from dataclasses import replace

import numpy as np
import pytest

from bundle.graphs import GraphSet
from bundle.recipe import Recipe
from calibration.images import SampleImages
from demo import run, show
from demo.roads import planned, resolutions
from export.graphs import export_graphs
from export.pretrained import pretrained
from export.request import GraphsRequest
from tests.unit.demo_measured import (
    ALONE,
    CERTIFICATE,
    CHEAP,
    CLASSES,
    FULL,
    INT8,
    LABELS,
    MERGED,
    PLANNED,
    TWO_RESOLUTIONS,
    alone,
    graph_set,
    plan_summary,
    saturated,
    summary_of,
)
from tests.unit.export_tiny import PX, QUIET, save_tiny
from tests.unit.fakes import make_calibration
from tests.unit.perf_measured import make_answer

# --- what is asked, and the figures ------------------------------------------------------------


@pytest.mark.parametrize(
    ("graphs", "models"),
    [
        (graph_set(FULL, ("tome8", MERGED)), {"static-high": "vit_high"}),
        (PLANNED, {"static-high": "full", "static-escalation": "vit_high"}),
    ],
)
def test_static_high_is_the_full_model_and_an_int8_full_rung_a_system_beside_it(graphs, models):
    found = {system.name: system.model for system in run.asked(graphs, 0.5)}
    always = {"static-low": "vit_low", "static-tome8": "tome8"}
    assert found == {**always, **models, "adaptive": "router", "adaptive-0": "router"}


def test_the_figures_of_the_cascade_by_hand():
    # Bound: 1 / (25/100 + 1/4) = 2; speed-up 100 / 55.
    summary = summary_of(alone())
    spreads = {key: entry for key, entry in summary.items() if isinstance(entry, dict)}
    medians = {key: entry["median"] for key, entry in spreads.items() if "median" in entry}
    assert medians == pytest.approx(
        {
            **{"speedup_c1": 100 / 55, "cpu_speedup_c1": 100 / 55, "bound_c1": 2.0},
            **{"cascade_efficiency_c1": 50 / 55, "router_overhead_c1": 1.1},
        }
    )
    adaptive, low = summary["answers"]["adaptive"], summary["answers"]["static-low"]
    assert (adaptive["escalation_rate"], adaptive["agreement_with_high"]) == (0.25, 0.75)
    assert (adaptive["accuracy"], low["accuracy"]) == (0.5, 0.5)
    assert (low["p50_ms"], low["cpu_ms"]["median"]) == (25.0, 22.5)
    assert summary["disturbed"] is False and summary["certificate"] == CERTIFICATE
    assert summary["model"]["backbone"] == "tiny" and "plan" not in summary


def test_the_top_of_the_summary_holds_each_figure_by_its_name():
    top = {
        **{"backbone": "tiny", "low_px": 112, "high_px": 224, "images": 4},
        **{"escalation_rate": 0.25, "agreement_with_high": 0.75, "realised_risk": 0.25},
        "accuracy": {"low": 0.5, "high": 0.75, "adaptive": 0.5},
        "latency_ms_p50": {"low": 25.0, "high": 100.0, "adaptive": 55.0},
        "throughput_per_s": pytest.approx({"low": 40.0, "high": 10.0, "adaptive": 1000 / 55}),
        **{"speedup_vs_high": pytest.approx(100 / 55), "cascade_bound": pytest.approx(2.0)},
        "cascade_efficiency": pytest.approx(50 / 55),
        **{"router_overhead": pytest.approx(1.1), "protocols": ["grpc", "http"]},
    }
    summary = summary_of(alone())
    assert {name: summary[name] for name in top} == top
    plan = plan_summary()["plan"]
    best = plan["best_alternative"]
    assert (plan["signal"], plan["agreement_with_high"]) == (make_calibration().signal, 0.75)
    assert plan["speedup_vs_high"] == pytest.approx(6.0)
    assert best["cost_ratio_to_plan"] == best["cost_ratio"]["median"]


def test_the_bound_of_a_plan_counts_what_an_escalation_really_costs():
    # 25 ms for each image and 50 ms for a quarter of them, against 100 ms.
    assert plan_summary()["bound_c1"]["median"] == pytest.approx(100 / (25 + 0.25 * 50))


def test_a_plans_figures_are_taken_within_turns():
    summary = plan_summary()
    assert summary["speedup_saturated"]["values"] == pytest.approx([6, 8, 4])
    assert summary["plan"]["cheap_rung"]["cost_ratio"]["values"] == pytest.approx([0.75, 1, 0.5])
    names = {key: summary["plan"][key] for key in ("low", "high", "reference")}
    assert names == {"low": CHEAP.recipe, "high": INT8.recipe, "reference": "px=224"}


def test_agreement_is_with_the_full_model_not_with_the_full_rung():
    found = plan_summary()["saturated"]["systems"]
    assert found["static-high"]["agreement_with_high"] == 1.0
    for system in ("static-escalation", "adaptive", "static-low"):
        assert found[system]["agreement_with_high"] == 0.75


@pytest.mark.parametrize(
    ("changes", "rival", "costs"),
    [
        ({}, "static-escalation", [3, 4, 2]),
        # Something in between is no rival where it agrees less often, however cheap.
        ({"static-escalation": [3] * 4}, "static-tome8", [4, 5.5, 2.5]),
        # The cheap rung is part of the cascade, and none to it.
        ({"static-low": [0, 1, 2, 3]}, "static-escalation", [3, 4, 2]),
        ({"adaptive": [0, 1, 2, 3]}, "static-high", [6, 8, 4]),
    ],
)
def test_the_rival_is_the_cheapest_that_agrees_as_often(changes, rival, costs):
    summary = plan_summary({**CLASSES, **changes})
    found = summary["plan"]["best_alternative"]
    assert (found["name"], found["disturbed"]) == (rival, False)
    assert found["cost_ratio"]["values"] == pytest.approx(costs)
    title = summary["saturated"]["systems"][rival]["title"]
    assert f"the cheapest is {title}" in show.plan_sentences(summary)[1]


# --- on the terminal ---------------------------------------------------------------------------


def test_the_terminal_says_what_was_measured(capsys):
    show.print_summary(summary_of(alone()))
    shown = capsys.readouterr().out
    assert "4 unseen crops, tiny at 112,int8=static,align/224 px" in shown
    assert re.search(r"full rung always +│ +75.0% +│ +100.0 ms │ +10.0 │ +90.0 ms", shown)
    assert (
        "1.82x as fast as the full rung, 1.82x by CPU time (bound 2.00x, efficiency 0.91); "
        "router overhead 1.10\n25.0% escalated; 75.0% answered as the full rung\n"
    ) in shown
    assert "with confidence 90%; seen on these crops: 25.0%" in shown


def test_the_terminal_names_the_rungs_of_a_plan_by_their_recipes(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    summary = plan_summary()
    show.print_summary(summary)
    shown = capsys.readouterr().out
    assert "tiny planned" in shown and "full model always" in shown and "6.00×" in shown
    assert "planned: 112 px, int8, aligned, escalating by margin to 224 px, int8\n" in shown
    for sentence in show.plan_sentences(summary):
        assert sentence in shown


def test_rows_stand_from_the_fastest_to_the_slowest():
    rows = show.served_rows(plan_summary())
    assert [system for system, *_ in rows] == [
        *("static-low", "adaptive", "static-escalation", "static-tome8", "static-high")
    ]
    assert rows[-1][1:] == [
        *("full model always (224 px)", "100.0\N{NO-BREAK SPACE}%", "10.0", "90.0", "1.00×")
    ]


def test_a_graph_whose_own_clock_was_disturbed_gets_no_ratio():
    classes = {**CLASSES, "static-escalation": [3] * 4}  # tome8 is the rival
    whole = saturated(classes)
    for share in whole.paired.shares:  # half of what tome8 took was something else
        share["static-tome8"] = [
            replace(answer, cpu_ms=answer.cpu_ms / 2) for answer in share["static-tome8"]
        ]
    one = alone({**ALONE, "static-escalation": 50.0})
    summary = summary_of(one, whole, graphs=PLANNED)
    assert not summary["disturbed"] and summary["plan"]["best_alternative"]["disturbed"]
    assert [row[0] for row in show.served_rows(summary) if row[-1] == "–"] == ["static-tome8"]
    _, best = show.plan_sentences(summary)
    assert "times as much" not in best and "of the cascade" in best
    # Where CPU time says nothing, nothing is held against it.
    on_gpu = summary_of(one, replace(whole, cpu_counts=False), graphs=PLANNED)
    assert not on_gpu["plan"]["best_alternative"]["disturbed"]
    assert "times as much" in show.plan_sentences(on_gpu)[1]
    assert "–" not in [row[-1] for row in show.served_rows(on_gpu)]


def test_a_plan_on_a_busy_machine_says_so_and_shows_no_ratio():
    summary = plan_summary(doubts=["a reason"])
    assert summary["disturbed"] is True
    assert summary["speedup_saturated"]["median"] == pytest.approx(6.0)  # kept for machines
    busy, best = show.plan_sentences(summary)
    assert busy == "saturated, the machine was too busy for a figure: a reason"
    assert "times as much" not in best and "of the cascade" not in best
    assert {row[-1] for row in show.served_rows(summary)} == {"–"}
    assert "saturated 6.00x as fast as the full model" in show.plan_sentences(plan_summary())[0]


# --- on the page -------------------------------------------------------------------------------


@pytest.fixture
def page(tmp_path, monkeypatch):
    """Writes the page of four crops, and returns it."""
    monkeypatch.setattr(show, "PAGE", tmp_path / "index.html")
    crops = [crop.data for crop in SampleImages(4, seed=0)]

    def write(summary, measured=None, threshold=1.5, graphs=TWO_RESOLUTIONS):
        paired = (measured or alone()).paired
        toy = "static-vit"
        road = planned(toy, 0.05) if "plan" in summary else resolutions(toy)
        show.write_page(road, graphs, summary, paired, threshold, crops, LABELS)
        return (tmp_path / "index.html").read_text()

    return write


def loaded(page):
    return set(re.findall(r'(?:src|href)="(?!data:)([^"]*)"', page))


def test_the_page_shows_the_certificate_and_every_crop_once(page):
    shown = page(summary_of(alone()))
    assert CERTIFICATE["statement"] in shown and "1.82×" in shown and "too busy" not in shown
    kept, escalated = shown.split("Escalated: 1")
    assert "Stayed cheap: 3" in kept
    assert kept.count("<figure>") == 3 and escalated.count("<figure>") == 1
    assert "cheap said ant" in escalated  # the third crop, which low takes for class 0
    assert "&lt;one&gt; &amp; only" in shown
    assert loaded(shown) == {"report.html"}  # its only reference is a link


def test_the_page_of_a_plan_shows_every_system_and_links_its_reasons(page):
    summary = plan_summary()
    shown = page(summary)
    assert "a <b>cheap rung</b> (112 px, int8, aligned)" in shown
    for row in show.served_rows(summary):
        assert f'<td class="words">{row[1]}' in shown
    assert all(sentence in shown for sentence in show.plan_sentences(summary))
    assert loaded(shown) == {"plan/report.html", "plan/plan.html"}


def test_a_ratio_that_cannot_be_true_is_not_said(page):
    costs = {**ALONE, "adaptive": 20.0, "adaptive-0": 27.0}
    reasons = alone(costs).paired.doubts(cpu_counts=True)
    assert len(reasons) == 2  # above its bound, and faster than its own cheap rung
    summary = summary_of(alone(costs, reasons))
    assert summary["disturbed"] is True and summary["doubts"]["c1"] == reasons
    assert summary["speedup_c1"]["median"] == 5.0  # kept for machines
    line, *others = show.sentences(summary)
    assert "the machine was too busy for a figure" in line and reasons[0] in line
    assert not re.search(r"\d\.\d\dx", "".join([line, *others]))
    shown = page(summary)
    assert "machine was too busy" in shown and reasons[0] in shown
    assert "5.00×" not in shown and "best speed-up possible" not in shown
    assert "The router itself costs" not in shown


def test_scores_on_the_page_of_the_demo_lie_on_their_side_of_the_threshold(page):
    scores = np.float32([15.6531, 15.65565, 15.655651, 15.6585]).astype(float)
    threshold = float(scores[1:3].mean())
    measured = alone(escalated=[False, False, True, True], scores=scores)
    kept, rest = page(summary_of(measured), measured, threshold).split("Escalated: 2")
    assert f"(at {threshold!r})" in kept
    low, high = (list(map(float, re.findall(r"score ([\d.]+)<", part))) for part in (kept, rest))
    assert len(low) == len(high) == 2
    assert max(low) <= threshold < min(high)


def test_the_page_of_an_uncertified_demo_says_that_everything_escalates(page):
    nothing = {**CERTIFICATE, "certified": False, "statement": "No threshold is certified."}
    measured = alone(escalated=[True] * 4, scores=[np.nan] * 4)
    shown = page(summary_of(measured, certificate=nothing), measured, None)
    assert "dashed line" not in shown
    assert "no crop is scored" in shown and "Stayed cheap: 0" in shown and "Escalated: 4" in shown


def test_a_threshold_far_from_every_score_is_no_line_in_the_histogram(page):
    measured = alone(escalated=[False] * 4)
    shown = page(summary_of(measured), measured, 99.0)
    assert "Above 99, which is not among the scores drawn" in shown and "dashed" not in shown


def test_the_page_shows_where_the_tokens_of_crops_went(page, tmp_path, remembered_exports):
    backbone = pretrained(str(save_tiny(tmp_path / "model", "ViTForImageClassification")))
    export_graphs(backbone, GraphsRequest(tmp_path / "onnx", Recipe(PX, apt=(4.7,))), QUIET)
    graphs = GraphSet.load(tmp_path / "onnx")
    shown = page(summary_of(alone()), graphs=graphs)
    assert "Where the tokens went" in shown and "The cheap rung: " in shown
    assert "The full rung: " not in shown and "4 images of the crops" in shown
    # Ordered from fewest to most; of 16 patches and a CLS token at most.
    said = re.findall(r"<figcaption>(\w+), (kept low|escalated)<br>(\d+) of 17 tokens", shown)
    tokens = [int(number) for *_, number in said]
    assert len(said) == 4 and tokens == sorted(tokens) and tokens[0] < tokens[-1]
    assert [made for _, made, _ in said].count("escalated") == 1
    assert loaded(shown) == {"report.html"}
    assert "Where the tokens went" not in page(summary_of(alone()))


# --- what the server is asked ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "same"), [({}, True), ({"names": 1}, False), ({"escalated": True}, False)]
)
def test_image_bytes_over_either_protocol_must_be_answered_as_tensors_are(
    changes, same, monkeypatch
):
    asked = []

    class Client:
        def __init__(self, url):
            self.url = url

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def infer(self, images):
            asked.append((self.url, *images))
            return [make_answer(**(changes if self.url == "http" else {}))]

    class Server:
        def url(self, protocol):
            return protocol

    monkeypatch.setattr(run, "GrpcClient", Client)
    monkeypatch.setattr(run, "HttpClient", Client)
    if same:
        run.query(Server(), [b"a crop"], [make_answer()])
        assert asked == [("grpc", b"a crop"), ("http", b"a crop")]
    else:
        with pytest.raises(run.DemoError, match="different answers"):
            run.query(Server(), [b"a crop"], [make_answer()])
