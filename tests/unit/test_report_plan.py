"""The plan's page: it says what plan.json says, in every case that is a normal result."""

import re

import pytest

from planner.result import outcome
from report import frontier, plan_page
from report.page import RED
from report.plan_page import cascade_marks, graph_marks, mean_words, points, write_plan
from tests.unit.pages import Page, squeeze
from tests.unit.plan_content import (
    FULL_MS,
    STATEMENT,
    candidates,
    cascade,
    graph,
    growth,
    plan_content,
    spread,
    varied,
)

LOW, HIGH = "static_112_int8static_align", "static_int8static"
FRONTIER = "What it costs and how often the answer will do"
ALIGNING = "What aligning is worth"


def write(tmp_path, content):
    path = tmp_path / "plan.html"
    chosen = content["chosen"]
    content = content | {"outcome": outcome(content)}
    write_plan(path, content, chosen and str(chosen["threshold"]))
    return Page(path)


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    """The page of the plan as it is written down."""
    return write(tmp_path_factory.mktemp("plan"), plan_content())


def nothing_chosen(**changes):
    return plan_content(chosen=None, best_alternative=None, **changes)


def test_the_page_begins_with_the_certificate_and_what_is_served(usual):
    usual.assert_self_contained()
    top = usual.sections["Plan"]
    assert "certified" in usual.classes and STATEMENT in top
    assert "Every image runs through 112 px, int8, aligned (no. 3)." in top
    assert "deferral predicts a change above 0.7134, the answer of 224 px, int8 (no. 6)" in top
    assert "dinov2-small on crops" in top and "names another class than the full model" in top


def test_the_page_says_what_is_saved_over_the_full_model_and_over_the_best_single_graph(usual):
    content = plan_content()
    top = usual.sections["Plan"]
    test = content["chosen"]["measured"]
    ms, speedup = f"{test['ms_per_image']:.2f} ms", test["speedup"]
    assert "4.6 % escalate; 97.2 % of the answers are acceptable" in top
    costs = f"An image costs {ms} where the full model takes {FULL_MS} ms: {speedup:.2f}× cheaper"
    assert costs in top
    assert "On 288 test images, which decided nothing, 4.6 % escalate" in top
    ratio = content["best_alternative"]["cost_ratio_to_plan"]
    assert f"is 224 px, int8 (no. 6) (99.0 % acceptable): it costs {ratio:.2f} times" in top
    assert f"{speedup:.2f}× cheaper than the full model {ratio:.2f}× cheaper than the best" in top


def test_what_is_measured_on_fit_images_is_named_so(usual, tmp_path):
    content = plan_content(measured_on="fit")
    del content["images"]["test"]
    content["chosen"]["measured"] |= {"risk": 0.062, "acceptable": 0.938}
    page = write(tmp_path, content)
    words = "On 576 fit images, each answered and scored by what was fitted without it, 4.6 % escal"
    assert words in page.sections["Plan"]
    assert "On the fit images the risk is 6.2 %, ABOVE the limit" in page.sections["Plan"]
    assert "acceptable answers, fit images" in page.sections["Plan"]
    assert "Fit images, each answered by an alignment" in page.sections[FRONTIER]
    assert "acceptable, fit split" in page.sections["The cascades that were tested"]
    valid = page.sections["Why the choice leaves the certificate valid"]
    assert "and made the shortlist; measured what this page shows" in valid
    assert "test image" not in page.text.lower() and "test split" not in page.text.lower()
    assert "fit images" not in usual.text.lower()


def test_where_only_the_full_model_agrees_as_often_the_page_says_so(tmp_path):
    best = {"name": "vit_high", "recipe": "px=224", "agreement": 1.0, "cost_ratio_to_plan": 8.13}
    top = write(tmp_path, plan_content(best_alternative=best)).sections["Plan"]
    assert "No cheaper graph alone agrees" in top
    assert "the full model itself costs 8.13 times as much" in top


def test_every_graph_has_a_row_with_the_content_s_figures(usual):
    content = plan_content()
    table = usual.sections["Every graph"]
    assert (
        "3 112 px, int8, aligned 7.86 ms 0.100 [0.095, 0.105] 95.5 % 10.2 ms cheap candidate"
    ) in table
    assert (
        "8 224 px, 16 tokens merged per block 47.2 ms 0.600 [0.570, 0.630] 97.0 % 61.3 ms alterna"
    ) in table
    assert "12 224 px, full model 78.6 ms 1.000 [1.000, 1.000] 100.0 % 102 ms full" in table
    assert "8 to a request" in table
    for name, mark in graph_marks(content).items():
        cost = content["graphs"][name]["cost_ratio"]["median"]
        assert re.search(rf"(^| ){mark} [^[]* {cost:.3f} \[", table), name


def test_every_tested_cascade_has_a_row_with_its_certificate(usual):
    content = plan_content()
    table = usual.sections["The cascades that were tested"]
    ms, speedup = (content["chosen"]["measured"][key] for key in ("ms_per_image", "speedup"))
    assert (
        "B 112 px, int8, aligned (no. 3), then 224 px, int8 (no. 6) deferral 3.6 % 5.1 % 4.6 % yes "
        f"13 / 18 97.2 % {ms:.2f} ms {speedup:.2f}×"
    ) in table
    assert "100.0 % no 31 / 18 99.0 %" in table and "among the 560 independent images" in table
    assert usual.classes.count("chosen") == 2  # among those tested, and among those considered


def test_a_test_with_too_few_images_allows_none(tmp_path):
    tested = cascade(LOW, certified=False)
    tested["certificate"] |= {"n": 12, "errors": 0, "allowed": -1}
    page = write(tmp_path, nothing_chosen(tested=[tested]))
    assert "no 0 / none" in page.sections["The cascades that were tested"]
    assert "among the 12 independent images" in page.sections["The cascades that were tested"]


def test_candidates_show_each_pair_s_best_signal_its_outcome_and_all_others_folded(usual):
    shown, folded = usual.sections["The cascades that were considered"].split("All 24 combinations")
    cheapest = "112 px, int8, aligned (no. 3) 224 px, int8 (no. 6) deferral 3.0 % 90.0 % 9.04 ms"
    assert f"{cheapest} certified" in shown
    assert "224 px, int8 (no. 6) deferral 8.0 % 90.0 % 9.43 ms tested, not certified" in shown
    assert "deferral 17.0 % 90.0 % 18.2 ms not tested: others are predicted to be cheaper" in shown
    assert "margin" not in shown and folded.count("margin") == 6
    assert folded.count("cls_path – 0.0 % 78.6 ms") == 6


def test_pairs_over_the_latency_budget_are_named_as_that(tmp_path):
    content = nothing_chosen(tested=[])
    content["goal"]["latency_budget_ms"] = 60.0
    page = write(tmp_path, content)
    shown = page.sections["The cascades that were considered"]
    assert "not tested: 61.3 ms is over the latency budget" in shown  # 112 px and int8
    assert "not tested: 59.3 ms" not in shown  # 98 px and int8
    assert "longer than the latency budget of 60.0 ms" in page.sections["Plan"]
    assert "60.0 ms latency budget" in page.sections["Plan"]
    content["graphs"][LOW] |= {"per_image": varied(0.1, 0.1, 0.2), "budget_latency_ms": 11.0}
    shown = write(tmp_path, content).sections["The cascades that were considered"]
    assert "not tested: 62.1 ms is over the latency budget" in shown


def varying(**changes):
    """A plan whose chosen cheap graph, and one to compare with, keep tokens by the image."""
    content = plan_content(**changes)
    content["graphs"][LOW] |= {
        "recipe": "px=112,apt=5.5,align",
        "per_image": varied(0.62, 0.41, 0.88),
        "budget_latency_ms": 50.0,
    }
    halting = graph("static_168") | {"recipe": "px=224,halt=8", "per_image": varied(0.7, 0.6, 0.8)}
    content["graphs"]["halting"] = halting
    return content


def test_a_graph_whose_cost_depends_on_the_image_shows_its_spread_and_what_that_is(usual, tmp_path):
    page = write(tmp_path, varying())
    words = "112 px, flat areas in larger patches (below 5.5 bits), aligned"
    table = page.sections["Every graph"]
    cost = "0.100 [0.095, 0.105] 0.62 (0.41 to 0.88 by image)"
    assert f"3 {words} 7.86 ms {cost} 95.5 % 10.2 ms 50.0 ms cheap candidate" in table
    assert "mean over 32 fit images and, in brackets, their 5th to 95th percentile" in table
    assert "the 95th percentile of their latency, which a latency budget counts" in table
    assert f"{words} keeps 150 tokens of an image, as a mean over its blocks (90 to 257)" in table
    saved = (
        "cheaper, as a mean over images: what the cheap graph costs depends on the image, and the "
        "certificate is about answers, not about cost."
    )
    assert saved in page.sections["Plan"]
    assert "those that escalate may cost the full graph more" in page.text
    for said in ("by image", "depends on the image", "percentile", "those that escalate may"):
        assert said in page.text and said not in usual.text


def test_a_saving_is_a_mean_by_whichever_graph_varies():
    content = varying()
    chosen = content["chosen"]
    assert "the cheap graph costs" in mean_words(content, chosen)
    content["graphs"][HIGH]["per_image"] = varied(0.5, 0.4, 0.6)
    assert "what its graphs cost depends" in mean_words(content, chosen)
    content["graphs"][LOW]["per_image"] = None
    assert "the full graph costs" in mean_words(content, chosen)
    assert mean_words(plan_content(), chosen) == ""


def test_a_spread_by_image_is_not_told_where_costs_are_not_believed(tmp_path):
    page = write(tmp_path, varying(disturbed=True, doubts=["the machine was too busy"]))
    assert "0.62" not in page.text


def test_points_stand_where_the_content_puts_them():
    content = plan_content()
    found = {point["mark"]: point for point in points(content)}
    low, high = (content["graphs"][name]["cost_ratio"] for name in (LOW, HIGH))
    assert found["3"]["cost"] == low["median"] and found["3"]["acceptable"] == 0.955
    assert found["3"]["spread"] == (low["min"], low["max"])
    chosen = found[cascade_marks(content)[LOW, HIGH]]
    assert chosen["kind"] == "chosen" and chosen["acceptable"] == 1 - 0.0275
    assert chosen["cost"] == pytest.approx(1 / content["chosen"]["measured"]["speedup"])
    assert chosen["spread"] == pytest.approx([low[k] + 0.046 * high[k] for k in ("min", "max")])
    kinds = [found[mark]["kind"] for mark in ("3", "6", "12", "7", "8", "9", "A", "C")]
    assert kinds == ["low", "high", "reference", "px", "tome", "other", "certified", "refused"]


def test_only_graphs_cheaper_in_one_way_are_joined_by_a_line():
    found = {point["mark"]: point["family"] for point in points(plan_content())}
    assert [mark for mark in found if found[mark] == "px"] == ["4", "5", "7", "10"]
    assert [mark for mark in found if found[mark] == "tome"] == ["8", "11"]
    content = varying()
    content["graphs"]["flat"] = graph("static_168") | {"recipe": "px=224,apt=5.75/4"}
    found = {point["mark"]: point for point in points(content)}
    assert {p["family"] for p in found.values()} == {None, "px", "tome", "apt", "halt"}
    assert {p["kind"] for p in found.values() if p["family"] == "halt"} == {"halt"}


def crowded():
    """Fifteen graphs, several of them alike, and two cascades that are nearly one."""
    content = plan_content()
    for px in (126, 119, 105):
        like = graph(LOW) | {"recipe": f"px={px},int8=static,align"}
        content["graphs"][f"static_{px}"] = like | {"cost_ratio": spread(0.1 + px / 1e5)}
    content["tested"].append(cascade("static_112_int8static_align", HIGH, 0.047, 0.0274))
    content["tested"][-1]["low"] = "static_119"
    return content


def drawn(monkeypatch, content):
    """The series of the frontier, and of the growth of alignments, that a page draws."""
    charts = []
    for page in (frontier, plan_page):
        monkeypatch.setattr(page, "chart", lambda series, *_, **__: charts.append(series) or "")
    plan_page._frontier(content)
    aligned = {n: g["alignment"] for n, g in content["graphs"].items() if g["alignment"]}
    plan_page._growth(content, aligned)
    return charts


def test_every_point_s_mark_is_in_its_marker_once(monkeypatch):
    content = crowded()
    points_of, _ = drawn(monkeypatch, content)
    marks = [mark for series in points_of for mark in series.numbers]
    assert sorted(marks) == sorted(point["mark"] for point in points(content)) and len(marks) == 19
    looks = [(series.colour, series.marker) for series in points_of if series.name]
    assert len(set(looks)) == len(looks)
    lines = [series for series in points_of if series.line]
    assert [len(series.x) for series in lines] == [5, 3]  # each ends at the full model


def test_an_alignment_that_does_not_help_is_red_in_its_figure(monkeypatch):
    content = plan_content()
    curve = {"helps": False, "growth": growth(0.9, 0.85, 0.87, 0.88, 0.89)}
    content["graphs"][LOW]["alignment"] = curve
    _, lines = drawn(monkeypatch, content)
    assert [series.colour == RED for series in lines] == [True, False, False]
    assert lines[0].name == "112 px, int8, aligned: does not help"
    assert lines[0].x == [0, 96, 192, 384, 768]


def test_nothing_certified_is_shown_as_a_normal_result(tmp_path):
    page = write(tmp_path, nothing_chosen(tested=[cascade(LOW, certified=False)]))
    top = page.sections["Plan"]
    assert "unasked" in page.classes and "loud" not in page.classes
    assert "Nothing beats the full model" in top and STATEMENT not in top
    assert "Every image runs through 224 px, full model, as without a plan." in top
    assert "could be certified for a risk of at most 5 %" in top


def test_a_certified_cascade_that_saves_nothing_explains_why_it_was_not_chosen(tmp_path):
    dear = cascade("static_tome8", escalation=0.3)
    top = write(tmp_path, nothing_chosen(tested=[dear])).sections["Plan"]
    ms = dear["certify"]["ms_per_image"]
    assert f"costs {ms:.1f} ms per image where the full model costs 78.6 ms" in top


def test_no_feasible_candidate_no_alternative_and_no_alignment_render(tmp_path):
    never = [c for c in candidates() if c["escalation"] is None and c["high"] == "vit_high"]
    content = nothing_chosen(tested=[], candidates=never)
    graphs = {n: g for n, g in content["graphs"].items() if "beside" not in g["roles"]}
    content["graphs"] = {name: g | {"alignment": None} for name, g in graphs.items()}
    page = write(tmp_path, content)
    assert "no cascade would ever be certified" in page.sections["Plan"]
    assert "The cascades that were tested" not in page.sections
    assert "No alternative was given" in page.sections[FRONTIER]
    assert "No candidate is aligned." in page.sections[ALIGNING]
    considered = page.sections["The cascades that were considered"]
    assert considered.count("not tested: it would never be certified") == 3


def test_a_plan_that_its_own_test_images_contradict_is_loud(usual, tmp_path):
    assert "loud" not in usual.classes
    content = plan_content()
    content["chosen"]["measured"] |= {"risk": 0.062, "acceptable": 0.938, "speedup": 0.97}
    content["best_alternative"] |= {"cost_ratio_to_plan": 0.81}
    page = write(tmp_path, content)
    assert page.classes.count("loud") == 3
    top = page.sections["Plan"]
    assert "the risk is 6.2 %, ABOVE the limit of 5 %" in top
    assert "224 px, int8 (no. 6) alone costs less than the cascade" in top
    assert "the cascade saves nothing" in top


def test_alignments_show_their_growth_and_warn_where_they_do_not_help(usual, tmp_path):
    content = plan_content()
    assert (
        "112 px, int8, aligned: 83.5 % acceptable without, 94.5 % with the alignment from 768 "
        "images; going from 384 to 768 images brought +2.0 points."
    ) in usual.sections[ALIGNING]
    assert "alignment does not help" not in usual.text
    name = "static_84_int8static_align"
    curve = {"helps": False, "growth": growth(0.9, 0.85, 0.87, 0.88, 0.87)}
    content["graphs"][name]["alignment"] = curve
    page = write(tmp_path, content)
    assert page.classes.count("loud") == 1
    assert "84 px, int8, aligned: the alignment does not help" in page.sections[ALIGNING]
    assert "brought -1.0 points" in page.sections[ALIGNING]


def test_the_page_says_how_many_images_the_test_took_at_the_least(usual):
    assert (
        "A risk of at most 5 % with confidence 90 % takes 45 independent certify images even if "
        "none of them is lost"
    ) in usual.text


def test_the_page_ends_with_the_procedure_what_is_left_out_and_the_notes(usual, tmp_path):
    content = plan_content(notes=["one thing to know"])
    page = write(tmp_path, content)
    valid = page.sections["Why the choice leaves the certificate valid"]
    assert content["goal"]["procedure"] in valid
    assert "measured what this page shows; decided nothing" in valid and "shortlist;" not in valid
    for part in ("fit 576", "certify 560", "test 288"):
        assert part in valid
    left_out = page.sections["What these figures leave out"]
    assert "2 instances of 1 thread, 8 images to a request" in left_out
    assert "The router" in left_out
    assert page.sections["Notes"] == "one thing to know"
    assert "Notes" not in usual.sections


def test_a_loss_is_explained_as_the_plan_does(tmp_path):
    content = plan_content()
    content["goal"]["loss"] = "has a cosine below 0.95 to the full model's embedding"
    top = write(tmp_path, content).sections["Plan"]
    assert "has a cosine below 0.95 to the full model's embedding" in top


def test_what_users_name_is_escaped(tmp_path):
    nasty = "<script>alert(1)</script>"
    content = plan_content(backbone=nasty, notes=[nasty])
    content["images"]["source"] = nasty
    content["chosen"]["certificate"]["statement"] = nasty
    content["graphs"][LOW]["recipe"] = f"px=112,{nasty},align"
    page = write(tmp_path, content)
    assert "<script" not in (tmp_path / "plan.html").read_text(encoding="utf-8")
    assert page.text.count(squeeze(nasty)) > 5
