import re
import sys
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest

from calibration.images import SampleImages
from demo import __main__ as demo
from demo import steps
from demo.page import write_page
from demo.serve import Asked
from demo.summary import Served, summarise
from demo.tables import sentences
from tests.unit.demo_measured import measured

CERTIFIED = {
    **{"epsilon": 0.05, "confidence": 0.9, "method": "ltt", "n": 480, "errors": 15, "allowed": 17},
    **{"certified": True, "signal": "margin", "statement": "With confidence 90 %, ..."},
}


CLASSES = {"static-low": [0, 1, 0, 3], "static-high": [0, 1, 2, 3]}
TRUTH = np.array([0, 1, 2, 2])


def alone(adaptive, escalated, *shares, never, **options):
    """What `serve.measure` returns; a share is the milliseconds of low, high and adaptive."""
    costs = [
        dict(zip(("static-low", "static-high", "adaptive"), share, strict=True)) for share in shares
    ]
    return measured({**CLASSES, "adaptive": adaptive}, escalated, costs, never, **options)


def served(adaptive, escalated, found, scores=(0.0,) * 4):
    own = Asked(np.array(adaptive), np.array(escalated), np.array(scores, np.float32))
    return Served.of(own, TRUTH, found, None, ("static-low", "static-high", "adaptive"))


ESCALATED = [False, False, True, False]
ENVIRONMENT = {"triton_version": "2.51.0", "cpu": "<one> & only"}


def summary_of(found, adaptive=(0, 1, 2, 3), escalated=ESCALATED, certificate=CERTIFIED):
    answers = served(adaptive, escalated, found)
    return summarise("tiny", (32, 64), answers, found, certificate, ENVIRONMENT)


def test_figures_by_hand():
    # Bound: 1 / (25/100 + 1/4) = 2; speed-up 100 / 55.
    found = alone([0, 1, 2, 3], ESCALATED, (25.0, 100.0, 55.0), never=[27.5], cpu=0.9)
    summary = summary_of(found)
    assert summary["escalation_rate"] == 0.25
    assert summary["agreement_with_high"] == 1.0
    assert summary["realised_risk"] == 0.0
    assert summary["certificate"] == CERTIFIED
    assert summary["accuracy"] == {"static-low": 0.5, "static-high": 0.75, "adaptive": 0.75}
    assert summary["latency_ms_p50"] == {"static-low": 25.0, "static-high": 100.0, "adaptive": 55.0}
    assert summary["throughput_per_s"] == pytest.approx(
        {"static-low": 40, "static-high": 10, "adaptive": 1000 / 55}
    )
    assert summary["cpu_ms"] == pytest.approx(
        {"static-low": 22.5, "static-high": 90, "adaptive": 49.5}
    )
    assert summary["speedup_vs_high"] == pytest.approx(100 / 55)
    assert summary["cpu_speedup_vs_high"] == pytest.approx(100 / 55)
    assert summary["cascade_bound"] == pytest.approx(2.0)
    assert summary["cascade_efficiency"] == pytest.approx(50 / 55)
    assert summary["router_overhead"] == pytest.approx(1.1)
    assert summary["disturbed"] is False and summary["doubts"] == []
    assert summary["triton_version"] == "2.51.0"
    assert summary["environment"] == {"cpu": "<one> & only"}


def test_ratios_are_taken_within_shares_of_the_crops():
    # Of the slow second share every system takes four times as long.
    shares = [(25.0, 100.0, 50.0), (100.0, 400.0, 200.0), (25.0, 100.0, 40.0)]
    summary = summary_of(alone([0, 1, 0, 3], ESCALATED, *shares, never=[50, 110, 26]), (0, 1, 0, 3))
    assert summary["speedup_vs_high"] == pytest.approx(2.0)
    assert summary["router_overhead"] == pytest.approx(1.1)
    assert summary["latency_ms_p50"]["static-low"] == 25.0
    assert summary["throughput_per_s"]["static-high"] == pytest.approx(
        4 / 0.7
    )  # two, one and one crop
    assert summary["agreement_with_high"] == 0.75 and summary["realised_risk"] == 0.25


def test_a_ratio_that_cannot_be_true_is_not_said(tmp_path):
    shares = (25.0, 100.0, 20.0)
    steady = alone([0, 1, 2, 3], ESCALATED, shares, never=[27.0])
    reasons = steady.paired.doubts(cpu_counts=True)
    assert len(reasons) == 2  # above its bound, and faster than its own cheap rung
    found = alone([0, 1, 2, 3], ESCALATED, shares, never=[27.0], doubts=reasons)
    summary = summary_of(found)
    assert summary["disturbed"] is True and summary["doubts"] == reasons
    assert summary["speedup_vs_high"] == 5.0  # kept for machines
    (line, *others) = sentences(summary)
    assert "the machine was too busy for a figure" in line and reasons[0] in line
    assert not re.search(r"\d\.\d\dx", "".join([line, *others]))
    page = make_page(tmp_path / "index.html", ESCALATED, 1.5, CERTIFIED, found)
    assert "machine was too busy" in page and reasons[0] in page
    assert "5.00×" not in page and "best speed-up possible" not in page
    assert "The router itself costs" not in page


def test_the_efficiency_that_is_said_is_the_one_that_was_judged():
    # Speed-up and bound of five shares; the quotient of their medians is 2.6 / 2.2.
    pairs = [(2.0, 2.0), (2.1, 2.05), (2.6, 2.2), (2.7, 2.6), (2.8, 2.9)]
    # No image escalates, so that the bound is the full rung's cost over the cheap one's.
    shares = [(100 / bound, 100.0, 100 / speedup) for speedup, bound in pairs]
    found = measured(
        {name: [0] * 5 for name in ("static-low", "static-high", "adaptive")},
        [False] * 5,
        [
            dict(zip(("static-low", "static-high", "adaptive"), share, strict=True))
            for share in shares
        ],
        [1.1 * low for low, *_ in shares],
    )
    (doubt,) = found.paired.doubts(cpu_counts=True)
    assert "an efficiency of 1.18 is more than the rungs allow" in doubt
    own = Asked(np.zeros(5, int), np.zeros(5, bool), np.zeros(5, np.float32))
    answers = Served.of(
        own, np.zeros(5, int), found, None, ("static-low", "static-high", "adaptive")
    )
    summary = summarise("tiny", (32, 64), answers, found, CERTIFIED, ENVIRONMENT)
    assert summary["cascade_efficiency"] == pytest.approx(2.1 / 2.05)


def test_a_ratio_that_can_be_true_is_said_with_the_one_by_cpu_time(tmp_path):
    found = alone([0, 1, 2, 3], ESCALATED, (25.0, 100.0, 55.0), never=[27.5], cpu=0.9)
    assert sentences(summary_of(found))[0] == (
        "1.82x as fast as the full rung, 1.82x by CPU time (bound 2.00x, efficiency 0.91); "
        "router overhead 1.10"
    )
    page = make_page(tmp_path / "index.html", ESCALATED, 1.5, CERTIFIED, found)
    assert "1.82×" in page and "too busy" not in page


def make_page(path, escalated, threshold, certificate, found=None, scores=(0, 1, 2, 3)):
    """The page of four crops: what a person sees of it."""
    found = found or alone([0, 1, 2, 3], escalated, (25.0, 100.0, 55.0), never=[27.5])
    scores = np.float32(scores if threshold is not None else [np.nan] * 4)
    answers = served([0, 1, 2, 3], escalated, found, scores)
    summary = summarise("tiny", (32, 64), answers, found, certificate, ENVIRONMENT)
    crops = [crop.data for crop in SampleImages(4, seed=0)]
    write_page(
        path, summary, answers, threshold, crops, ["ant", "bee", "cat", "dog"], "report.html"
    )
    return path.read_text()


def test_the_page_shows_the_certificate_and_every_crop_once(tmp_path):
    page = make_page(tmp_path / "index.html", [False, False, True, False], 1.5, CERTIFIED)
    assert CERTIFIED["statement"] in page
    kept, escalated = page.split("Escalated: 1")
    assert "Stayed cheap: 3" in kept
    assert kept.count("<figure>") == 3 and escalated.count("<figure>") == 1
    assert "cheap said ant" in escalated  # the third crop, which low takes for class 0
    assert "&lt;one&gt; &amp; only" in page
    loaded = re.findall(r'(?:src|href)="(?!data:)([^"]*)"', page)
    assert loaded == ["report.html"]  # its only reference is a link


def test_scores_on_the_page_of_the_demo_lie_on_their_side_of_the_threshold(tmp_path):
    scores = [15.6531, 15.65565, 15.655651, 15.6585]
    threshold = float(np.float32(scores[1:3]).astype(np.float64).mean())
    escalated = [False, False, True, True]
    page = make_page(tmp_path / "index.html", escalated, threshold, CERTIFIED, scores=scores)
    kept, rest = page.split("Escalated: 2")
    assert f"(at {threshold!r})" in kept
    low, high = (list(map(float, re.findall(r"score ([\d.]+)<", part))) for part in (kept, rest))
    assert len(low) == len(high) == 2
    assert max(low) <= threshold < min(high)


def test_the_page_of_an_uncertified_demo_says_that_everything_escalates(tmp_path):
    nothing = {**CERTIFIED, "certified": False, "statement": "No threshold is certified."}
    page = make_page(tmp_path / "index.html", [True] * 4, None, nothing)
    assert "dashed line" not in page
    assert "no crop is scored" in page and "Stayed cheap: 0" in page and "Escalated: 4" in page


def test_a_threshold_far_from_every_score_is_no_line_in_the_histogram(tmp_path):
    page = make_page(tmp_path / "index.html", [False] * 4, 99.0, CERTIFIED)
    assert "Above 99, which is not among the scores drawn" in page and "dashed" not in page


class Commands:
    """Stands in for `subprocess`: notes each command and makes the file it was asked for."""

    def __init__(self, failing=None):
        self.verbs = []
        self.lines = []
        self.failing = failing

    def run(self, line):
        assert line[:2] == [sys.executable, "-m"]
        self.verbs.append(f"{line[2]} {line[3]}")
        self.lines.append(line)
        if line[3] == self.failing:
            return CompletedProcess(line, 2)
        made = Path(line[line.index("--out") + 1])
        made.parent.mkdir(parents=True, exist_ok=True)
        made.write_text("made")
        return CompletedProcess(line, 0)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """The demo at work in an empty folder, in which no server can start."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "ROOT", tmp_path)
    return tmp_path


def test_prepare_makes_the_repository_and_serves_nothing(elsewhere, monkeypatch, capsys):
    commands = Commands()
    monkeypatch.setattr(steps, "subprocess", commands)
    demo.main(["--prepare"])
    assert commands.verbs == [
        *("calibration sample", "export rungs", "calibration collect"),
        *("calibration fit", "calibration report", "export repository"),
    ]
    printed = capsys.readouterr().out
    for place in ("onnx", "calibration.json", "report.html", "model_repository"):
        assert f"build/demo/{place}" in printed
    assert not (elsewhere / "build/demo/summary.json").exists()
    demo.main(["--prepare"])
    assert len(commands.verbs) == 6  # nothing was done again


def test_a_step_that_fails_ends_the_preparation(elsewhere, monkeypatch, capsys):
    commands = Commands(failing="fit")
    monkeypatch.setattr(steps, "subprocess", commands)
    with pytest.raises(SystemExit) as ended:
        demo.main(["--prepare"])
    assert ended.value.code == 1
    assert commands.verbs[-1] == "calibration fit"
    printed = capsys.readouterr()
    assert printed.out == ""
    assert re.search(r"^error: `python -m calibration fit .*` failed with exit", printed.err, re.M)


@pytest.mark.parametrize(
    ("options", "model", "low", "high", "beside"),
    [
        ([], "dinov2-small", "px=112", "px=224", ["px=140", "px=168", "px=196", "tome=8"]),
        (["--model", "static-vit"], "static-vit", "px=32", "px=64", ["px=48", "tome=8"]),
    ],
)
def test_the_demo_exports_two_resolutions_and_what_a_user_could_serve_instead(
    elsewhere, monkeypatch, options, model, low, high, beside
):
    commands = Commands()
    monkeypatch.setattr(steps, "subprocess", commands)
    demo.main(["--prepare", *options])
    (export,) = (line for line in commands.lines if line[2:4] == ["export", "rungs"])
    said = dict(zip(export[4::2], export[5::2], strict=True))
    assert (said["--model"], said["--low"], said["--high"]) == (model, low, high)
    assert [export[i + 1] for i, word in enumerate(export) if word == "--beside"] == beside


def test_a_model_that_the_demo_does_not_know_is_refused(capsys):
    with pytest.raises(SystemExit) as ended:
        demo.main(["--model", "resnet"])
    assert ended.value.code == 2 and "static-vit" in capsys.readouterr().err
