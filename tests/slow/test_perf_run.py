"""`python -m perf run --suite quick` from end to end, on `static-vit` and a real server."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from export.static_vit import static_vit
from server import TritonServer
from tests.triton.conftest import run_command

ROOT = Path(__file__).resolve().parents[2]
FIGURES = (
    "router_overhead_c1",
    "cascade_efficiency_c1",
    "cascade_efficiency_saturated",
    "ensemble_over_router",
    "standin_over_ort_b1",
    "standin_over_ort_b8",
    "peak_memory_ratio",
)
STATICS = {"static-40", "static-48", "static-56"}
SYSTEMS = {
    *("static-low", "static-high", "adaptive-0", "adaptive", "adaptive-30", "adaptive-100"),
    "ensemble",
    *STATICS,
}


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """Everything that `perf run` needs, of two backbones that differ in their weights."""
    folder = tmp_path_factory.mktemp("perf")
    static_vit(seed=1).model.save_pretrained(folder / "model")
    for name, model in (("one", "static-vit"), ("other", folder / "model")):
        onnx, artifact = folder / name / "onnx", folder / name / "calibration.json"
        outputs = folder / name / "outputs.json"
        run_command(
            *("export", "rungs", "--model", model),
            *("--beside", "px=40", "--beside", "px=48", "--beside", "px=56", "--out", onnx),
        )
        run_command(
            *("calibration", "collect", "--images", "sample", "--limit", 300),
            *("--onnx", onnx, "--out", outputs, "--answers", folder / "answers"),
        )
        run_command(
            *("calibration", "fit", "--escalation-rate", 0.2, "--onnx", onnx),
            *("--outputs", outputs, "--out", artifact),
        )
        run_command(
            *("export", "repository", "--onnx", onnx, "--calibration", artifact),
            *("--out", folder / name / "model_repository", "--client-parameters", "any"),
        )
    return folder


def arguments(build, name, out, *more):
    folder = build / name
    return [
        *(sys.executable, "-m", "perf", "run", "--onnx", str(folder / "onnx")),
        *("--calibration", str(folder / "calibration.json")),
        *("--repository", str(folder / "model_repository"), "--out", str(out), *more),
    ]


@pytest.fixture(scope="module")
def measured(build, tmp_path_factory):
    """The folder of a whole run, and how long it took."""
    out = tmp_path_factory.mktemp("out")
    done = subprocess.run(
        arguments(build, "one", out), cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="module")
def summary(measured):
    return json.loads((measured / "summary.json").read_text())


def test_it_ends_within_three_minutes_with_everything_measured(summary):
    assert summary["complete"] and summary["seconds"] < 180
    assert summary["notes"] == []


def test_every_figure_has_its_spread(summary):
    for name in FIGURES:
        figure = summary[name]
        assert figure["runs"] == len(figure["values"]) >= 1
        assert 0 < figure["min"] <= figure["median"] <= figure["max"]


def test_every_system_is_asked_about_the_same_images(summary):
    answers = summary["answers"]
    assert set(answers) == SYSTEMS
    assert answers["static-high"]["agreement_with_high"] == 1
    assert answers["adaptive-100"]["agreement_with_high"] == 1
    assert answers["adaptive-100"]["escalation_rate"] == 1
    assert answers["adaptive-0"]["escalation_rate"] == 0
    low = answers["static-low"]["agreement_with_high"]
    assert answers["adaptive-0"]["agreement_with_high"] == low
    images = summary["images"]["sets"]["mixed"]["images"]
    assert answers["adaptive-30"]["escalation_rate"] == pytest.approx(0.3, abs=0.5 / images)
    assert answers["ensemble"]["escalation_rate"] == answers["adaptive"]["escalation_rate"]
    assert low < answers["adaptive"]["agreement_with_high"] <= 1


def test_the_sets_escalate_as_they_are_said_to(summary):
    sets = summary["images"]["sets"]
    assert sets["easy"]["escalation_rate"] == 0 and sets["hard"]["escalation_rate"] == 1
    assert 0 < sets["mixed"]["escalation_rate"] < 1


def test_easy_and_hard_images_take_the_paths_they_should(summary):
    for name, share in (("easy", 0), ("hard", 1)):
        (entry,) = (e for e in summary["systems"] if e["set"] == name)
        rungs = entry["server_ms"]
        assert rungs["vit_low"]["images_share"] > 0
        assert ("vit_high" in rungs) == bool(share)


def test_loads_are_closed_and_open_over_both_protocols_and_shared_memory(summary):
    loads = [entry["load"] for entry in summary["systems"]]
    assert {load["loop"] for load in loads} == {"closed", "open"}
    assert {load["protocol"] for load in loads} == {"grpc", "http"}
    assert {load["shared_memory"] for load in loads} == {"none", "system"}
    assert all(entry["throughput_per_s"]["runs"] >= 2 for entry in summary["systems"])


def test_unstable_loads_say_why(summary):
    for entry in summary["systems"]:
        assert entry["stable"] == (entry["unstable_reason"] is None)


def test_the_parts_of_a_request_add_up_to_it(summary):
    for path in ("kept", "escalated", "all"):
        spent = summary["attribution"][path]
        assert sum(part["ms"] for part in spent["parts"]) == pytest.approx(spent["total_ms"])
        assert all(part["ms"] > -0.1 * spent["total_ms"] for part in spent["parts"])


def test_locust_sent_requests_over_both_protocols(summary):
    assert [run["protocol"] for run in summary["locust"]] == ["grpc", "http"]
    for run in summary["locust"]:
        assert run["requests"] > 0 and run["failures"] == 0
        assert set(run["paths"]) <= {"low", "high"} and run["paths"]["low"] > 0


def test_each_system_has_its_memory(summary):
    memory = summary["memory"]
    assert set(memory) == {"static-low", "static-high", "adaptive"}
    assert memory["static-low"]["peak_pss_mib"] < memory["adaptive"]["peak_pss_mib"]
    assert all(entry["weights_mib"] > 1 for entry in memory.values())


def test_the_report_and_the_raw_files_are_there(measured):
    assert "static-vit" in (measured / "report.html").read_text()
    raw = measured / "perf_analyzer"
    assert list(raw.glob("*.csv")) and not list(raw.glob("*.json"))


def test_a_run_compared_with_itself_has_not_changed(measured):
    out = run_command("perf", "compare", measured, measured)
    assert "nothing changed" in out.lower()


def test_a_server_elsewhere_is_measured_but_not_its_memory(build, tmp_path):
    with TritonServer(build / "one" / "model_repository", free_ports=True) as server:
        url = ("--url", server.grpc_url, "--http-url", server.http_url)
        done = subprocess.run(
            arguments(build, "one", tmp_path, *url), cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        other = subprocess.run(
            arguments(build, "other", tmp_path / "no", *url),
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert "memory" not in summary and any("not ours" in note for note in summary["notes"])
    assert other.returncode == 2
    assert other.stderr.strip().splitlines()[-1].startswith("error: vit_low at ")


def test_ctrl_c_keeps_what_was_measured(build, tmp_path):
    process = subprocess.Popen(
        arguments(build, "one", tmp_path), cwd=ROOT, stdout=subprocess.DEVNULL, text=True
    )
    path = tmp_path / "summary.json"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if path.is_file() and "answers" in json.loads(path.read_text()):
            break
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    summary = json.loads(path.read_text())
    assert not summary["complete"] and "interrupted" in summary["notes"][-1]
    assert "router_overhead_c1" in summary
    assert (tmp_path / "report.html").is_file()
