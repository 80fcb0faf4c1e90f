"""One pass of perf_analyzer: command line, warm-up, input files, failures, installation.

A stand-in program plays perf_analyzer: it writes the recorded report and an export of as many
requests as it was asked for, and logs its arguments.
"""

import base64
import json
import shutil
import stat
import struct
import sys
from pathlib import Path

import numpy as np
import pytest

import perf.__main__ as command_line
from perf.analyzer import (
    Analyzer,
    InputData,
    Load,
    PerfAnalyzerError,
    UnstableError,
    find_analyzer,
    installation,
    run,
    write_bytes,
    write_tensors,
)

DATA = Path(__file__).parent / "data" / "perf_analyzer_2.50"

STAND_IN = """#!{python}
import json, pathlib, shutil, sys
arguments = sys.argv[1:]
if arguments == ["--version"]:
    sys.exit()
with open({log!r}, "a") as log:
    log.write(json.dumps(arguments) + "\\n")
value = lambda option: arguments[arguments.index(option) + 1]
shutil.copy({report!r}, value("-f"))
if "--profile-export-file" in arguments:
    one = '{{"timestamp":%d,"response_timestamps":[%d],"x":[{{"escalated":%s}}]}}'
    requests = ""
    for i in range(int(value("--request-count")) - {lost}):
        start, took = i * 10**6, (9 if i < {slow} else 1) * 10**5
        requests += one % (start, start + took, "true" if i % 2 else "false")
    export = '{{"experiments":[{{"requests":[' + requests + "]}}]}}"
    pathlib.Path(value("--profile-export-file")).write_text(export[:{size}])
"""


class StandIn:
    def __init__(self, folder, slow=0, lost=0, size=None, script=None):
        self.log = folder / "log"
        path = folder / "perf_analyzer"
        report = str(DATA / "report.csv")
        text = script or STAND_IN.format(
            python=sys.executable, log=str(self.log), report=report, slow=slow, lost=lost, size=size
        )
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        self.analyzer = Analyzer(path)

    def calls(self):
        return [json.loads(line) for line in self.log.read_text().splitlines()]


def option(arguments, name):
    return arguments[arguments.index(name) + 1]


def load(**changes):
    inputs = InputData(Path("inputs.json"), items=5)
    return Load("router", "127.0.0.1:8001", inputs, **{"rounds": 4, **changes})


# --- one pass ----------------------------------------------------------------------------------


def test_one_at_a_time_the_warm_up_is_the_head_of_the_pass_and_is_dropped(tmp_path):
    program = StandIn(tmp_path, slow=10)
    result = run(load(warmup_requests=10), program.analyzer)
    (arguments,) = program.calls()
    assert option(arguments, "--request-count") == "30"
    assert result.figures.requests == 20
    assert result.figures.latency_ms_mean == pytest.approx(0.1)  # the ten slow ones are gone
    assert result.figures.escalation_rate == 0.5
    assert result.report["Server Queue"] > 0


@pytest.mark.parametrize("changes", [{"concurrency": 3}, {"records": False}])
def test_else_the_warm_up_is_a_pass_before_so_that_items_stay_equally_covered(tmp_path, changes):
    program = StandIn(tmp_path)
    result = run(load(warmup_requests=10, **changes), program.analyzer)
    counts = [option(arguments, "--request-count") for arguments in program.calls()]
    assert counts == ["10", "20"]
    assert result.figures.requests == 20
    assert (result.records is None) == ("records" in changes)


def test_without_records_the_figures_are_those_of_the_report(tmp_path):
    result = run(load(records=False, warmup_requests=0), StandIn(tmp_path).analyzer)
    assert result.figures.latency_ms_mean == result.report["Avg latency"] / 1e3


def test_windows_replace_the_request_count(tmp_path):
    program = StandIn(tmp_path)
    run(load(count_windows=50, warmup_requests=0), program.analyzer)
    (arguments,) = program.calls()
    assert option(arguments, "--measurement-mode") == "count_windows"
    assert option(arguments, "--measurement-request-count") == "50"
    assert "--request-count" not in arguments
    assert "--profile-export-file" not in arguments


def test_parameters_are_sent_with_their_type(tmp_path):
    program = StandIn(tmp_path)
    run(load(parameters={"policy": "low", "threshold": 3, "x": True}), program.analyzer)
    (arguments,) = program.calls()
    sent = [arguments[i + 1] for i, a in enumerate(arguments) if a == "--request-parameter"]
    assert sent == ["policy:low:string", "threshold:3:int", "x:true:bool"]


def test_the_report_is_kept_where_asked(tmp_path):
    kept = tmp_path / "raw" / "router.csv"
    run(load(), StandIn(tmp_path).analyzer, csv_path=kept)
    assert kept.read_text() == (DATA / "report.csv").read_text()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"parameters": {"threshold": 0.25}}, "no float parameter"),
        ({"parameters": {"policy": "low"}, "protocol": "http"}, "gRPC only"),
        ({"protocol": "smtp"}, "smtp"),
        ({"shared_memory": "cuda"}, "cuda"),
        ({"rounds": 0}, "rounds"),
    ],
)
def test_what_perf_analyzer_would_not_do_is_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        load(**changes)


# --- failures ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind", "said"),
    [
        ("refused.txt", PerfAnalyzerError, "unknown policy 'zz'"),
        ("unstable.txt", UnstableError, "stable measurement"),
    ],
)
def test_a_failed_pass_shows_its_own_message(tmp_path, name, kind, said):
    program = StandIn(tmp_path, script=f"#!/bin/sh\ncat '{DATA / name}' >&2\nexit 99\n")
    with pytest.raises(PerfAnalyzerError, match=said) as caught:
        run(load(), program.analyzer)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)


def test_lost_requests_are_noticed(tmp_path):
    with pytest.raises(PerfAnalyzerError, match="29 requests recorded, 30 asked for"):
        run(load(), StandIn(tmp_path, lost=1).analyzer)


@pytest.mark.parametrize("size", [0, 100])
def test_an_export_that_broke_off_is_explained(tmp_path, size):
    with pytest.raises(PerfAnalyzerError, match="NaN"):
        run(load(), StandIn(tmp_path, size=size).analyzer)


def test_a_pass_that_hangs_is_ended(tmp_path):
    program = StandIn(tmp_path, script="#!/bin/sh\nexec sleep 60\n")
    with pytest.raises(PerfAnalyzerError, match=r"not done within 0\.2 s"):
        run(load(timeout_s=0.2), program.analyzer)


# --- input files -------------------------------------------------------------------------------


def elements(path, name):
    """Every element must be a step of the one stream: a list would start streams of its own."""
    steps = json.loads(path.read_text())["data"]
    assert all(isinstance(step, dict) for step in steps)
    return [(base64.b64decode(s[name]["content"]["b64"]), s[name]["shape"]) for s in steps]


def test_tensors_round_trip(tmp_path):
    images = [np.random.default_rng(i).normal(size=(3, 4, 5)).astype(np.float32) for i in range(3)]
    written = write_tensors(tmp_path / "new" / "t.json", images)
    assert written.items == 3
    for image, (content, shape) in zip(images, elements(written.path, "image"), strict=True):
        assert shape == [3, 4, 5]
        assert (np.frombuffer(content, np.float32).reshape(shape) == image).all()


def test_bytes_round_trip_behind_their_length(tmp_path):
    images = [b"\xff\xd8\x00", b"", bytes(range(256))]
    written = write_bytes(tmp_path / "b.json", images)
    for image, (content, shape) in zip(images, elements(written.path, "image_bytes"), strict=True):
        assert shape == [1]
        assert struct.unpack("<I", content[:4]) == (len(image),)
        assert content[4:] == image


def test_input_files_need_float32_images(tmp_path):
    with pytest.raises(ValueError, match="no image"):
        write_tensors(tmp_path / "t.json", [])
    with pytest.raises(ValueError, match="float32"):
        write_tensors(tmp_path / "t.json", [np.zeros((3, 2, 2))])


# --- finding and installing --------------------------------------------------------------------


TRUE, FALSE = shutil.which("true"), shutil.which("false")


class FakePip:
    """Installs a program that starts, as the wheel of one system or the other lays it out."""

    def __init__(self, program=TRUE, place="bin/perf_analyzer", launcher=False):
        self.program, self.place, self.launcher = program, place, launcher
        self.requirements = []

    def __call__(self, requirement, target):
        self.requirements.append(requirement)
        path = target / self.place
        path.parent.mkdir(parents=True)
        shutil.copy(self.program, path)
        if self.launcher:
            (target / "bin").mkdir()
            (target / "bin" / "perf_analyzer").write_text("#!/usr/bin/env python\n")


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Nothing installed; a wheel that carries the two libraries; glibc as the test says."""
    carried = tmp_path / "nvidia_pytriton.libs"
    carried.mkdir()
    for name in ("libb64-98cb.so.0d", "libcudart-0952.so.12.6.77"):
        (carried / name).write_text(name)
    monkeypatch.setattr(installation, "_carried_libraries", lambda: carried)
    monkeypatch.setenv("PATH", "")

    def prepare(pip, glibc):
        monkeypatch.setattr(installation, "_pip_install", pip)
        monkeypatch.setattr(installation, "glibc_version", lambda: glibc)
        return tmp_path / "venv" / "perf_analyzer"

    return prepare


def test_an_older_system_gets_the_old_program_and_its_libraries(machine):
    pip = FakePip()
    folder = machine(pip, (2, 36))
    analyzer = installation.install(folder)
    assert pip.requirements == [installation.OLD_REQUIREMENT]
    assert analyzer == Analyzer(folder / "bin" / "perf_analyzer", folder / "lib")
    linked = {path.name: path.read_text() for path in (folder / "lib").iterdir()}
    assert linked == {
        "libb64.so.0d": "libb64-98cb.so.0d",
        "libcudart.so.12": "libcudart-0952.so.12.6.77",
    }
    assert analyzer.environment()["LD_LIBRARY_PATH"].split(":")[0] == str(folder / "lib")


def test_a_newer_system_gets_the_new_program_not_its_launcher(machine):
    pip = FakePip(place="perf_analyzer/bin/perf_analyzer", launcher=True)
    folder = machine(pip, (2, 39))
    assert installation.install(folder) == Analyzer(folder / "perf_analyzer/bin/perf_analyzer")
    assert pip.requirements == [installation.NEW_REQUIREMENT]


def test_installing_again_does_nothing(machine):
    pip = FakePip()
    folder = machine(pip, (2, 36))
    assert installation.install(folder) == installation.install(folder) == find_analyzer(folder)
    assert len(pip.requirements) == 1


def test_a_broken_installation_is_replaced(machine):
    folder = machine(FakePip(program=FALSE), (2, 36))
    with pytest.raises(PerfAnalyzerError, match="does not start"):
        installation.install(folder)
    folder = machine(FakePip(), (2, 36))
    installation.install(folder)


def test_a_wheel_without_the_program_is_told(machine):
    folder = machine(FakePip(place="bin/other"), (2, 39))  # PyPI's empty placeholder
    with pytest.raises(PerfAnalyzerError, match="no perf_analyzer for this system"):
        installation.install(folder)


def test_a_missing_library_is_told_and_leaves_no_installation(machine):
    folder = machine(FakePip(), (2, 36))
    (installation._carried_libraries() / "libb64-98cb.so.0d").unlink()
    with pytest.raises(PerfAnalyzerError, match="libb64"):
        installation.install(folder)
    with pytest.raises(PerfAnalyzerError, match="run python -m perf install"):
        find_analyzer(folder)


def test_one_on_path_is_preferred(tmp_path, monkeypatch):
    program = StandIn(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_analyzer(tmp_path / "elsewhere") == program.analyzer
    assert installation.install(tmp_path / "elsewhere") == program.analyzer


def test_a_broken_one_on_path_is_passed_over_by_all(machine, tmp_path, monkeypatch):
    folder = machine(FakePip(), (2, 36))
    shutil.copy(FALSE, tmp_path / "perf_analyzer")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PerfAnalyzerError, match="perf_analyzer does not start .*; run python -m"):
        find_analyzer(folder)
    installed = installation.install(folder)
    assert installed.path.is_relative_to(folder)
    assert find_analyzer(folder) == installed


# --- command line ------------------------------------------------------------------------------


def test_without_a_verb_the_help_is_shown(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["perf"])
    with pytest.raises(SystemExit) as left:
        command_line.main()
    printed = capsys.readouterr()
    assert (left.value.code, printed.err) == (2, "")
    assert "Usage:" in printed.out and "install" in printed.out
