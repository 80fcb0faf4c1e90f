import re

import jinja2
import pytest

from perf.figures import conclude
from report import frontier as frontier_figure
from report import performance_page
from report.performance_page import system_order, write_performance
from tests.unit.pages import Page, drawn_words
from tests.unit.perf_summary import STATEMENT, around, load, measured, sample_summary, spread


def page_of(tmp_path, summary):
    path = tmp_path / "new" / "report.html"
    write_performance(path, conclude(summary))
    return Page(path)


def without_figures(**changes):
    """A summary whose page takes no time to draw."""
    kept = {
        key: value
        for key, value in sample_summary().items()
        if key not in ("answers", "attribution", "systems")
    }
    return kept | changes


LOOPS = ("closed", "open")
LOCUST = "constant 8.00 163 0 20.4 181 342 398 13.5 %"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return page_of(tmp_path_factory.mktemp("report"), sample_summary())


def test_the_page_is_one_file_without_anything_loaded(page):
    page.assert_self_contained()
    assert len(page.loaded) == 4  # frontier, time, closed and open loop
    assert "None" not in page.text and "{" not in page.text


def test_the_first_sentence_answers_with_numbers(page):
    assert "certified" in page.classes  # the green one
    assert (
        "Faster than the alternatives? Yes Adaptive is 2.34 times as fast as always running the "
        "full rung at 95.0 % agreement with it. Of the static alternatives that agree at least as "
        "often, the cheapest, static 168 px, costs 1.34 times as much."
    ) in page.text
    assert f"Certificate: {STATEMENT}" in page.text
    assert "an answer agrees if it names the same class." in page.text
    assert "Counted on exactly the 40 images that were timed, one of which is 2.5 %." in page.text
    assert page.text.index("Adaptive is 2.34") < page.text.index("formula")


SHOWN = {
    "": [
        "2.34× 2.31 to 2.38, 4 runs speed-up over always running the full rung",
        "0.94 0.93 to 0.95, 4 runs the same with the server saturated",
        "1.03 1.03 to 1.04, 4 runs router overhead",
        "1.05 1.04 to 1.06, 4 runs peak memory",
        "Absolute times are this machine's; the ratios are what compares.",
    ],
    "How the figures are made": [  # every derived figure with its formula
        "speed-up, one request in flight 2.34× 2.31× to 2.38× 4 "
        "time of the full rung always ÷ time of adaptive",
        "cascade bound, one request in flight 2.44× 2.42× to 2.45× 4 1 ÷ (1/r + p), where r = time "
        "of the full rung ÷ of the cheap rung, p = share escalated",
        "cascade efficiency, one request in flight 0.960 0.952 to 0.970 4 speed-up ÷ cascade bound",
        "speed-up, saturated 2.23× 2.21× to 2.26× 4 throughput of adaptive ÷ throughput of the "
        "full rung always",
        "cascade bound, saturated 2.38× 2.36× to 2.40× 4 1 ÷ (1/r + p), where r = 1/throughput",
        "cascade efficiency, saturated 0.937 0.930 to 0.951 4 speed-up ÷ cascade bound",
        "router overhead 1.033 1.030 to 1.040 4 time of adaptive told never to escalate ÷ time of "
        "the cheap rung always",
        "ensemble over router 1.071 1.060 to 1.080 4 time of adaptive from image bytes",
        "peak memory ratio 1.050 1.040 to 1.060 4 peak memory of a server with the cascade",
        "agreement with the full rung 95.0 % – images whose adaptive answer agrees",
    ],
    "Every system: agreement and cost": [
        "static 168 px 97.5 % – – 60.0 58.8 to 61.2 0.571 0.566 to 0.577",
        "adaptive, calibrated threshold 95.0 % 12.5 % – 44.9",
    ],
    "Where the time goes, in numbers": [
        "full rung 0.00 0.0 % 102 74.4 % 12.7 27.4 %",
        "whole request 33.5 137 46.4",
        "cheap rung 28.6 85.4 % 28.7 20.9 % 28.6 61.6 %",
    ],
    "Every system and load: closed loop": [
        "cheap rung always (112 px) mixed images, 1 in flight, gRPC 120 33.3",
        "33.3 32.7 to 34.0 30.0 29.4 to 30.6 60.0 58.8 to 61.2 75.0",
        "mixed images, 1 in flight, HTTP",
        "mixed images, 1 in flight, gRPC, shared memory",
        "easy images, 1 in flight, gRPC",
    ],
    "Every system and load: open loop": ["7.20 per second, gRPC"],
    "The server's own times": ["vit_high 12.5 % 0.21 0.12 101 0.05"],
    "Memory": [
        "cheap rung always (112 px) 312 390 – 84.2 27.0 %",
        "adaptive, calibrated threshold 693 866 – 169 24.3 %",
    ],
    "Locust": [
        f"4 closed-loop grpc {LOCUST}",
        f"4 closed-loop http {LOCUST}",
        "4 open-loop grpc spike",
    ],
    "Stand-in backend against ONNX Runtime": [
        "batch 1 1.018 1.012 to 1.024 4",
        "batch 8 1.008 1.004 to 1.011 4",
    ],
    "Run": ["command python -m perf run --images sample --suite quick", "took 171 s"],
    "Images": ["sample crops, seed 21; pool of 200", "set mixed 40 images, 12.5 % escalated"],
    "Notes": ["CPU time of the server could not be read for 1 run."],
}


@pytest.mark.parametrize("section", SHOWN)
def test_what_was_measured_is_shown_with_its_spread(page, section):
    for text in SHOWN[section]:
        assert text in (page.sections[section] if section else page.text)


def test_systems_and_loads_are_all_there_and_in_order(page):
    rows = page.sections["Every system: agreement and cost"]
    order = ["cheap rung always", "static 140 px", "static 168 px", "full rung always"]
    assert [rows.index(title) for title in order] == sorted(rows.index(title) for title in order)
    closed, opened = (page.sections[f"Every system and load: {loop} loop"] for loop in LOOPS)
    assert "in flight" not in opened
    loads = closed.count("in flight") + opened.count("per second, gRPC")
    assert loads == len(sample_summary()["systems"])


def test_a_single_run_is_called_one_and_text_cannot_become_markup(tmp_path):
    summary = without_figures(peak_memory_ratio=spread(1.05), notes=["<b>bold</b>"])
    page = page_of(tmp_path, summary)
    assert "1.05 1 run peak memory" in page.text and page.sections["Notes"] == "<b>bold</b>"


def test_the_certificate_is_told_from_none_and_from_a_refusal(tmp_path):
    summary = without_figures(certificate=None)
    assert "No certificate: nothing is guaranteed" in page_of(tmp_path, summary).text
    summary["certificate"] = {"certified": False, "statement": "No threshold is certified."}
    assert "Not certified: No threshold is certified." in page_of(tmp_path, summary).text


def test_the_time_is_attributed_in_a_bar(page):
    words = drawn_words(page.loaded[1])
    assert {"kept low", "escalated", "router, BLS hops, ensemble", "33.5 ms", "137 ms"} <= set(
        words
    )


def test_runs_that_did_not_stabilise_are_marked_with_their_reason(page, tmp_path):
    rows = page.sections["Every system and load: closed loop"]
    reason = "not stable: latencies still grew after 3 passes"
    assert f"mixed images, 8 in flight, gRPC {reason} 120" in rows
    assert "8 in flight, gRPC (not stable)" in page.sections["The server's own times"]
    assert rows.count("not stable") == 1
    assert "hollow: did not stabilise" in drawn_words(page.loaded[2])
    entries = [entry for entry in sample_summary()["systems"] if entry["stable"]][:3]
    stable = page_of(tmp_path, without_figures(systems=entries))
    assert "not stable" not in stable.text
    assert "hollow: did not stabilise" not in drawn_words(stable.loaded[0])


def test_the_curves_leave_out_what_does_not_compare(tmp_path):
    entries = [
        measured("adaptive", load(protocol="http"), 25.0, 40.0),
        measured("adaptive", load(), 30.0, 33.0, images="easy"),
    ]
    page = page_of(tmp_path, without_figures(systems=entries))
    assert page.loaded == []
    section = page.sections["Closed loop: a fixed number in flight"]
    assert section == "Not measured."
    assert "1 in flight, HTTP" in page.sections["Every system and load: closed loop"]


def test_the_environment_is_shown_whole(page, tmp_path):
    shown = page.sections["Environment"]
    summary = without_figures()
    for name, value in summary["environment"].items():
        assert name == "gpus" or str(value) in shown, name
    assert shown.endswith("GPU none")
    gpu = {"name": "H100", "driver": "550.5", "memory_mib": 81559, "sm_clock_mhz": 1980}
    summary["environment"] |= {"gpus": [gpu], "something_new": 7}
    shown = page_of(tmp_path, summary).sections["Environment"]
    assert "GPU 0 H100, driver 550.5, memory, MiB 81559, SM clock, MHz 1980" in shown
    assert "something new 7" in shown


def test_a_run_that_was_cut_short_says_so(page, tmp_path):
    banner = "This run was cut short"
    assert banner not in page.text and "loud" not in page.classes
    cut = page_of(tmp_path, without_figures(complete=False))
    assert banner in cut.text and "loud" in cut.classes


def test_an_efficiency_a_little_above_one_is_explained(page, tmp_path):
    batches = "fewer images share a batch"
    assert batches not in page.text
    summary = without_figures(cascade_efficiency_saturated=spread(1.01, 1.02, 1.03))
    text = page_of(tmp_path, summary).text
    assert f"above 1 is possible: saturated, in the cascade {batches}" in text
    assert "client and network are paid once" not in text
    summary = without_figures(cascade_efficiency_c1=spread(1.01, 1.02))
    text = page_of(tmp_path, summary).text
    assert "client and network are paid once" in text and batches not in text


@pytest.mark.parametrize(
    ("load", "words", "box"),
    [
        ("c1", "With one request in flight the machine was too busy", "2.34× 2.31 to 2.38"),
        ("saturated", "Saturated the machine was too busy", "0.94 0.93 to 0.95, 4 runs the same"),
    ],
)
def test_figures_that_cannot_be_true_are_said_and_not_shown_in_large_type(
    page, tmp_path, load, words, box
):
    assert words not in page.text and "loud" not in page.classes and box in page.text
    summary = without_figures(disturbed=True, doubts={load: ["a reason"]})
    disturbed = page_of(tmp_path, summary)
    assert f"{words} for a figure: a reason." in disturbed.text and "loud" in disturbed.classes
    assert box not in disturbed.text and "not believed" in disturbed.text


def test_no_figure_that_cannot_be_true_is_anywhere_on_the_page(page, tmp_path):
    impossible = {
        "speedup_c1": spread(4.01, 4.02, 4.03),
        "cascade_efficiency_c1": spread(2.06, 2.07, 2.08),
        "router_overhead_c1": spread(0.51, 0.52, 0.53),
        "ensemble_over_router": spread(0.61, 0.62, 0.63),
    }
    found = page_of(tmp_path, sample_summary() | impossible)
    assert "an efficiency of 2.07 is more than the rungs allow" in found.text
    for shown in ("4.02×", "2.070", "0.520", "0.620"):
        assert shown not in found.text
    made = found.sections["How the figures are made"]
    assert "speed-up, one request in flight not believed" in made
    assert "router overhead not believed" in made and "ensemble over router not believed" in made
    # What was measured saturated stays, and so do times.
    assert "cascade efficiency, saturated 0.937" in made and "peak memory ratio not" not in made
    table = "Every system: agreement and cost"
    assert "0.295" in page.sections[table] and "0.295" not in found.sections[table]
    assert "31.0" in found.sections[table]
    assert "Not drawn" in found.sections["What agreement costs"]
    assert len(found.loaded) == len(page.loaded) - 1


SECTIONS = {
    "answers": ("What agreement costs", "Every system: agreement and cost"),
    "attribution": ("Where the time goes", "Where the time goes, in numbers"),
    "systems": (
        "Closed loop: a fixed number in flight",
        "Open loop: arrivals at a fixed rate",
        "Every system and load: closed loop",
        "Every system and load: open loop",
        "The server's own times",
    ),
    "memory": ("Memory",),
    "locust": ("Locust",),
    "environment": ("Environment",),
    "images": ("Images",),
}


@pytest.mark.parametrize(
    "keys",
    [("answers", "systems", "locust"), ("attribution", "memory", "environment", "images")],
)
def test_a_section_that_is_missing_says_not_measured(tmp_path, keys):
    gone, null = sample_summary(), sample_summary() | dict.fromkeys(keys)
    for key in keys:
        del gone[key]
    page = page_of(tmp_path, gone)
    silent = {name for name, text in page.sections.items() if text.startswith("Not measured.")}
    assert silent == {heading for key in keys for heading in SECTIONS[key]}
    assert page_of(tmp_path, null).sections == page.sections


def test_the_standin_section_says_not_measured(tmp_path):
    summary = without_figures()
    del summary["standin_over_ort_b1"], summary["standin_over_ort_b8"]
    section = page_of(tmp_path, summary).sections["Stand-in backend against ONNX Runtime"]
    assert section == "Not measured."


def test_a_summary_with_nothing_measured_makes_a_page_without_figures(tmp_path):
    page = page_of(tmp_path, {"schema_version": 1, "command": "c", "suite": "quick"})
    assert page.loaded == []
    assert "The speed-up over always running the full rung was not measured." in page.text
    assert not re.search(r"\d\.\d\d", page.text)


def test_one_missing_side_of_the_attribution_leaves_the_other(tmp_path):
    found = sample_summary()["attribution"] | {"escalated": None, "all": None}
    page = page_of(tmp_path, without_figures(attribution=found))
    rows = page.sections["Where the time goes, in numbers"]
    assert rows.startswith("mean per request, ms kept low client") and rows.endswith("33.5")


def test_equal_summaries_make_equal_pages(tmp_path):
    summary = without_figures(answers=sample_summary()["answers"])
    for name in ("a.html", "b.html"):
        write_performance(tmp_path / name, conclude(summary))
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


CASES = {
    "not_measured": "Faster than the alternatives? Not measured",
    "too_busy": "Faster than the alternatives? The machine was too busy to say",
    "faster": "Faster than the alternatives? Yes",
    "slower": "Faster than the alternatives? No Adaptive",
    "unclear": "Faster than the alternatives? Not clearly",
}


@pytest.mark.parametrize("case", CASES)
def test_each_verdict_has_its_caption_and_no_other_one(tmp_path, case):
    found = conclude(without_figures())
    found["verdict"] = {"case": case}
    write_performance(tmp_path / "page.html", found)
    text = Page(tmp_path / "page.html").text
    assert [name for name, caption in CASES.items() if caption in text] == [case]
    with pytest.raises(jinja2.UndefinedError, match="undefined_case"):
        write_performance(tmp_path / "page.html", found | {"verdict": {"case": "new"}})


RIVAL = (
    "Of the static alternatives that agree at least as often, the cheapest, static 168 px, costs"
)


@pytest.mark.parametrize(
    ("agreement", "rival", "alternatives", "words"),
    [
        (0.95, spread(1.3, 1.34, 1.4), True, "2.34 times as fast as always running the full rung"),
        (0.95, spread(1.3, 1.34, 1.4), True, f"{RIVAL} 1.34 times as much."),
        (0.95, spread(0.9, 0.94, 0.95), True, f"{RIVAL} 0.94 times as much."),
        (0.95, spread(0.94, 1.01, 1.07), True, f"{RIVAL} 1.01 times as much, about the same (0.94"),
        (0.95, None, True, "No static alternative below the full rung agrees as often."),
        (0.95, None, False, "No static alternative was measured beside it."),
        (None, None, False, "full rung; its agreement with the full rung was not measured."),
    ],
)
def test_the_verdict_says_what_it_is_held_against(tmp_path, agreement, rival, alternatives, words):
    found = conclude(without_figures())
    answer = sample_summary()["answers"]["adaptive"] | {"agreement_with_high": agreement}
    found |= {"answers": {"adaptive": answer}, "alternatives": alternatives}
    found["rival"] = rival and {"title": "static 168 px", "cost_ratio": rival}
    write_performance(tmp_path / "page.html", found)
    assert words in Page(tmp_path / "page.html").text


def with_alternatives(low="px=112", **costs):
    """A summary in which alternatives of these recipes agree in 96 % and cost this share."""
    summary = sample_summary()
    summary["answers"]["static-low"]["recipe"] = low
    like = summary["answers"]["static-168"] | {"agreement_with_high": 0.96}
    for recipe, cost in costs.items():
        costs_this = {"cost_ratio": around(cost, share=0.01), "recipe": recipe}
        summary["answers"][f"static-{recipe}"] = like | costs_this
    return summary


def frontier(monkeypatch, summary):
    """The series that the frontier draws, and where its shade begins."""
    drawn = []
    monkeypatch.setattr(
        frontier_figure, "chart", lambda series, *rest, **_: drawn.append((series, rest)) or ""
    )
    answers = conclude(summary)["answers"]
    performance_page._frontier(answers, sorted(answers, key=system_order))
    ((series, (_, _, _, beaten_by, _)),) = drawn
    return series, beaten_by


def test_the_frontier_has_every_system_s_number_once(monkeypatch):
    series, beaten_by = frontier(monkeypatch, sample_summary())
    numbers = [number for one in series for number in one.numbers]
    assert sorted(numbers) == list("123456789")
    looks = [(one.colour, one.marker) for one in series if one.numbers]
    assert len(set(looks)) == len(looks)
    names = {one.name for one in series}
    assert {"static, fewer pixels", "cheap rung", "full rung", "adaptive, as calibrated"} < names
    assert "static, merged tokens" not in names and "static, other" not in names
    assert [round(cost, 2) for cost, _ in beaten_by] == [0.3, 0.43, 0.6, 1.3]


def test_only_alternatives_that_differ_in_one_number_are_joined_and_end_at_the_full_model(
    monkeypatch,
):
    def lines(summary):
        series, _ = frontier(monkeypatch, summary)
        static = [one for one in series if one.line and not one.name]
        return [[round(x, 2) for x in one.x] for one in static]

    low, mid, full = round(30 / 105, 2), [round(43 / 105, 2), round(60 / 105, 2)], 1.0
    tokens = {"px=224,tome=8": 0.7, "px=224,tome=4": 0.8}
    others = {"px=224,int8=static": 0.5, "px=140,tome=4": 0.3}
    several = with_alternatives(**tokens, **others)
    assert lines(several) == [[low, *mid, full], [0.7, 0.8, full]]
    # A cheap rung that is more than a resolution stands for itself.
    aligned = with_alternatives("px=112,int8=static,align", **{"px=224,depth=9": 0.75})
    assert lines(aligned) == [[*mid, full], [0.75, full]]
    by_image = with_alternatives(**{"px=224,apt=5.5": 0.6, "px=224,apt=5.75/4": 0.5, "halt=8": 0.8})
    assert lines(by_image) == [[low, *mid, full], [0.5, 0.6, full], [0.8, full]]


def test_where_a_cost_depends_on_the_image_the_page_says_what_it_is_a_mean_of(page, tmp_path):
    words = "keeps as many tokens as an image needs, its cost is the mean over these images"
    assert words not in page.text
    for recipe in ("px=112,apt=5.5", "halt"):
        assert words in page_of(tmp_path, with_alternatives(recipe)).text


def test_systems_have_an_order():
    names = list(sample_summary()["answers"])
    assert sorted(set(names), key=system_order) == names
    others = ["static-98", "static-140", "static-140-int8static", "static-tome4", "static-tome12"]
    ordered = ["static-low", *others, "static-high"]
    assert sorted({*ordered}, key=system_order) == ordered
