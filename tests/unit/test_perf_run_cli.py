"""`python -m perf run`: what is missing or wrong is one line and exit code 2, before the work."""

import json
import re
import socket
import sys

import numpy as np
import pytest

import perf.__main__ as command_line
from bundle.graphs import GraphSet
from perf import analyzer_install as installation
from perf import run as perf_run
from routing import RungRecord
from tests.unit.perf_summary import sample_summary
from tests.unit.perf_workplace import calibration_of, write_workplace


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """The current folder, with everything in its place and a perf_analyzer that starts on PATH."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "perf_analyzer").write_text("#!/bin/sh\n")
    (programs / "perf_analyzer").chmod(0o755)
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.setattr(installation, "FOLDER", tmp_path / "nothing installed")
    monkeypatch.setattr(perf_run, "TritonServer", no_server)
    folder = write_workplace(tmp_path / "user")
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def perf(workplace, monkeypatch, capsys):
    """Runs `python -m perf run`; gives the exit code and the lines on stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["perf", "run", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            command_line.main()
        captured = capsys.readouterr()
        assert captured.out == ""
        return left.value.code, captured.err.splitlines()

    return run


def refused(answer):
    """The one line, without its `error:`."""
    code, (line,) = answer
    assert code == 2 and line.startswith("error: ")
    return line.removeprefix("error: ")


def free_url():
    """An address where nobody listens."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{found.getsockname()[1]}"


class FakeTarget:
    """A server that passes every check."""

    version, models, server = "2.51.0", {"vit_low", "vit_high", "router"}, None

    def __init__(self, grpc_url, http_url, server):
        self.url = self.grpc_url = grpc_url

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def check(self, graph_set, calibration, image):
        assert image.shape == graph_set.image_shape


def no_server(*arguments, **options):
    """Stands in for `TritonServer`: whatever is wrong is told before one is started."""
    raise AssertionError("a server was started")


def score_all(score):
    """Stands in for `perf.run.score_pool`: every image has this score."""
    return lambda target, pool, advance: np.full(len(pool), score, np.float32)


# --- before anything is written ----------------------------------------------------------------


def test_a_missing_perf_analyzer_is_told_how_to_get(perf, workplace, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert refused(perf()) == "perf_analyzer is not installed; run python -m perf install"
    assert not (workplace / "build/perf").exists()


def test_a_perf_analyzer_that_does_not_start_says_why_itself(perf, workplace):
    program = workplace.parent / "bin" / "perf_analyzer"
    program.write_text("#!/bin/sh\necho libb64.so.0d: cannot open >&2\nexit 127\n")
    assert "does not start (libb64.so.0d: cannot open)" in refused(perf())


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--onnx", "elsewhere", "^no graphs.json in elsewhere; run python -m export rungs first$"),
        ("--calibration", "nowhere.json", "^nowhere.json: .*python -m calibration fit"),
        ("--calibration", "other.json", "is not the file that was calibrated"),
        ("--calibration", "never.json", "^nothing was certified.*--escalation-rate 0.1"),
        ("--repository", "images", "run python -m export repository"),
        ("--images", "empty", "file below empty"),
        ("--images", "nowhere", "^no such folder: nowhere$"),
        ("--http-url", "127.0.0.1:8000", "^--http-url belongs to --url$"),
        ("--suite", "long", "'quick', 'full'"),
    ],
)
def test_what_is_missing_or_makes_no_sense_is_told(perf, workplace, option, value, said):
    graphs = GraphSet.load(workplace / "build/onnx")
    others = {name: RungRecord(4, "px=4", "0" * 64) for name in graphs.rungs}
    calibration_of(graphs, rungs=others).save(workplace / "other.json")
    calibration_of(graphs, threshold=None).save(workplace / "never.json")
    (workplace / "empty").mkdir()
    assert re.search(said, refused(perf(option, value)))
    assert not (workplace / "build/perf").exists()


def test_a_place_that_cannot_be_written_to_is_told(perf, workplace):
    (workplace / "file").write_text("")
    assert refused(perf("--images", "images", "--out", "file")) == "file: File exists"


def test_no_repository_is_needed_where_a_server_runs_elsewhere(perf, workplace):
    (workplace / "none").mkdir()
    said = refused(perf("--repository", "nowhere", "--images", "none", "--url", free_url()))
    assert "below none" in said  # the next thing that is wrong


def test_a_folder_that_the_repository_lies_in_is_not_written_to(perf, workplace):
    before = sorted((workplace / "build/model_repository").rglob("*"))
    code, lines = perf("--images", "images", "--out", "build")
    assert code == 2 and "would overwrite the model repository" in lines[-1]
    assert sorted((workplace / "build/model_repository").rglob("*")) == before


# --- after that ---------------------------------------------------------------------------------


def told(answer, workplace):
    """The last line, after the bars of the stages that were done; nothing was measured to keep."""
    code, lines = answer
    assert code == 2 and lines[-1].startswith("error: ")
    assert sum("error" in line for line in lines) == 1
    assert not (workplace / "build/perf/summary.json").exists()
    return lines[-1].removeprefix("error: ")


def test_a_server_that_nobody_started_is_told(perf, workplace):
    url = free_url()
    said = told(perf("--images", "images", "--url", url), workplace)
    assert said == f"no server answers at {url}; start one with python -m server"


def test_images_that_cannot_be_read_are_told(perf, workplace):
    for file in (workplace / "images").iterdir():
        file.write_bytes(b"no image")
    said = told(perf("--images", "images"), workplace)
    assert said.startswith("none of the 8 images can be read; first: 0.png: ")


def test_too_few_images_are_told(perf, workplace, monkeypatch):
    monkeypatch.setattr(perf_run, "Target", FakeTarget)
    monkeypatch.setattr(perf_run, "score_pool", score_all(0.1))
    for file in list((workplace / "images").iterdir())[3:]:
        file.unlink()
    said = told(perf("--images", "images", "--url", "host:1"), workplace)
    assert said == "3 images are too few to measure, 4 are needed"


@pytest.fixture
def interrupted(monkeypatch):
    """A server elsewhere, and Ctrl-C as soon as the systems were asked."""

    def answer(bench):
        bench.record.summary["answers"] = sample_summary()["answers"]
        return {}

    def interrupt(bench):
        raise KeyboardInterrupt

    monkeypatch.setattr(perf_run, "Target", FakeTarget)
    monkeypatch.setattr(perf_run, "score_pool", score_all(0.1))
    monkeypatch.setattr(perf_run, "ask_in_turn", answer)
    monkeypatch.setattr(perf_run, "attribute_costs", interrupt)


def test_ctrl_c_ends_the_run_with_what_was_measured(perf, workplace, interrupted):
    code, lines = perf("--images", "images", "--url", "host:1")
    assert code == 130 and not any("Traceback" in line for line in lines)
    found = json.loads((workplace / "build/perf/summary.json").read_text())
    assert found["complete"] is False
    assert found["notes"][-1] == "stopped before its end: interrupted"
    assert "its memory and its CPU time are not measured" in found["notes"][0]
    assert found["notes"][1].startswith("too few images escalate: the hard set is left out")
    assert found["images"]["sets"]["easy"] == {"images": 8, "escalation_rate": 0.0}
    assert found["environment"]["triton_version"] == "2.51.0"


def test_the_summary_says_which_command_and_which_model_it_is_of(perf, workplace, interrupted):
    code, _ = perf(*("--images", "images", "--url", "host:1", "--suite", "full"))
    assert code == 130
    found = json.loads((workplace / "build/perf/summary.json").read_text())
    command = "python -m perf run --images images --url host:1 --suite full"
    assert found["command"] == command
    assert (found["suite"], found["fidelity"]) == ("full", "names the same class")
    assert found["model"]["backbone"] == "tiny" and found["certificate"] is None


def test_the_terminal_prints_no_ratio_that_cannot_be_true(capsys):
    summary = sample_summary()
    for answer in summary["answers"].values():
        answer["escalation_rate"] = answer["escalation_rate"] or 0.0
    command_line._print_verdict(summary)
    text = capsys.readouterr().out
    assert "2.340" in text and "0.43" in text and "too busy" not in text  # 44.9 of 105 ms
    command_line._print_verdict(summary | {"doubts": {"c1": ["a reason"], "saturated": []}})
    text = capsys.readouterr().out
    assert "one request in flight: the machine was too busy for a figure (a reason)" in text
    assert "2.340" not in text and "0.43" not in text and "speedup_saturated" in text
    assert "router_overhead_c1" not in text and "peak_memory_ratio" in text
