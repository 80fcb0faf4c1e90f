import re
import sys
from dataclasses import replace
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest

from calibration.sample import crops as sample_crops
from demo import __main__ as demo
from demo import roads, steps
from demo.page import write_page
from demo.summary import Pass, Served, summarise

CERTIFIED = {
    **{"epsilon": 0.05, "confidence": 0.9, "method": "ltt", "n": 480, "errors": 15, "allowed": 17},
    **{"certified": True, "signal": "margin", "statement": "With confidence 90 %, ..."},
}


def served(adaptive, escalated):
    return Served(
        low=np.array([0, 1, 0, 3]),
        high=np.array([0, 1, 2, 3]),
        adaptive=np.array(adaptive),
        escalated=np.array(escalated),
        score=np.zeros(4, np.float32),
        truth=np.array([0, 1, 2, 2]),
    )


def passes(low, high, adaptive):
    systems = {"low": low, "high": high, "adaptive": adaptive}
    return {
        name: [Pass(40, 1000 / rate, rate) for rate in rates] for name, rates in systems.items()
    }


def test_figures_by_hand():
    summary = summarise(
        "tiny",
        (32, 64),
        served([0, 1, 2, 3], [False, False, True, False]),
        passes([40], [10], [18]),
        [(20.0, 21.0), (40.0, 44.0), (20.0, 90.0)],
        CERTIFIED,
        {"triton_version": "2.51.0", "cpu": "one"},
    )
    assert summary["escalation_rate"] == 0.25
    assert summary["agreement_with_high"] == 1.0
    assert summary["realised_risk"] == 0.0
    assert summary["certificate"] == CERTIFIED
    assert summary["accuracy"] == {"low": 0.5, "high": 0.75, "adaptive": 0.75}
    assert summary["throughput_per_s"] == {"low": 40, "high": 10, "adaptive": 18}
    assert summary["speedup_vs_high"] == pytest.approx(1.8)
    assert summary["cascade_bound"] == pytest.approx(2.0)
    assert summary["cascade_efficiency"] == pytest.approx(0.9)
    assert summary["router_overhead"] == pytest.approx(1.1)
    assert summary["triton_version"] == "2.51.0" and summary["environment"] == {"cpu": "one"}


def test_throughput_is_all_requests_over_all_time():
    # 40 requests at 40/s take 1 s, 40 at 10/s take 4 s: 80 requests in 5 s.
    summary = summarise(
        "tiny",
        (32, 64),
        served([0, 1, 0, 3], [False] * 4),
        passes([40, 10], [10, 2.5], [40, 10]),
        [(1.0, 2.0)],
        CERTIFIED,
        {"triton_version": "x"},
    )
    assert summary["throughput_per_s"] == pytest.approx({"low": 16, "high": 4, "adaptive": 16})
    assert summary["latency_ms_p50"]["low"] == (25 + 100) / 2
    assert summary["cascade_efficiency"] == pytest.approx(1.0)
    assert summary["router_overhead"] == pytest.approx(2.0)
    assert summary["agreement_with_high"] == 0.75
    assert summary["realised_risk"] == 0.25


def make_page(path, escalated, threshold, certificate, scores=(0, 1, 2, 3)):
    """The page of four crops: what a person sees of it."""
    answers = served([0, 1, 2, 3], escalated)
    answers = replace(answers, score=np.float32(scores if threshold is not None else [np.nan] * 4))
    summary = summarise(
        *("tiny", (32, 64), answers, passes([40], [10], [18]), [(1.0, 1.1)], certificate),
        {"triton_version": "2.51.0", "cpu": "<one> & only"},
    )
    crops = [crop.data for crop in sample_crops(4, seed=0)]
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
    page = make_page(tmp_path / "index.html", escalated, threshold, CERTIFIED, scores)
    kept, rest = page.split("Escalated: 2")
    assert f"(at {threshold!r})" in kept
    low, high = (list(map(float, re.findall(r"score ([\d.]+)<", part))) for part in (kept, rest))
    assert len(low) == len(high) == 2
    assert max(low) <= threshold < min(high)


def test_the_page_of_an_uncertified_demo_says_that_everything_escalates(tmp_path):
    nothing = {**CERTIFIED, "certified": False, "statement": "No threshold is certified."}
    page = make_page(tmp_path / "index.html", [True] * 4, None, nothing)
    assert "no crop is scored" in page and "Stayed cheap: 0" in page and "Escalated: 4" in page


class Commands:
    """Stands in for `subprocess`: notes each command and makes the file it was asked for."""

    def __init__(self, failing=None):
        self.verbs = []
        self.failing = failing

    def run(self, line):
        assert line[:2] == [sys.executable, "-m"]
        self.verbs.append(f"{line[2]} {line[3]}")
        if line[3] == self.failing:
            return CompletedProcess(line, 2)
        Path(line[line.index("--out") + 1]).write_text("made")
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


def test_the_demo_exports_two_resolutions_and_what_a_user_could_serve_instead():
    (export,) = (
        step.arguments
        for step in roads.resolutions().steps
        if step.arguments[:2] == ("export", "rungs")
    )
    assert export[export.index("--low") + 1] == "px=112"
    assert export[export.index("--high") + 1] == "px=224"
    beside = [export[i + 1] for i, argument in enumerate(export) if argument == "--beside"]
    assert beside == ["px=140", "px=168", "px=196", "tome=8"]
