"""`python -m planner plan` from end to end: real exports, priced by a real server."""

import html
import json
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from bundle.graphs import GraphSet
from calibration.fidelity import Fidelity
from calibration.images import open_images
from calibration.outputs import Made, Outputs
from calibration.running import open_session, run_session
from imaging import Preprocessing, decode
from routing import Calibration, Overrides, escalation_mask
from tests.triton.conftest import ROOT, run_command

IMAGES, SEED, MAX_RISK = 400, 3, 0.2


def plan(folder, out, max_risk):
    arguments = (
        *("planner", "plan", "--model", "static-vit", "--images", f"sample:{SEED}"),
        *("--limit", IMAGES, "--max-risk", max_risk, "--seed", SEED),
        *("--candidates", "px=32,int8=static,align; px=32", "--highs", "fp32; int8=static"),
        *("--beside", "px=48; tome=8", "--cache", folder / "cache", "--out", folder / out),
        *("--answers", folder / "answers"),
    )
    started = subprocess.Popen([sys.executable, "-m", *map(str, arguments)], cwd=ROOT)
    commands = set()
    while started.poll() is None:
        commands |= set(command_lines(started.pid))
        time.sleep(0.2)
    assert started.returncode == 0
    # It does everything itself: whatever imports torch once more would be a command of ours.
    modules = {words[words.index("-m") + 1] for words in commands if "-m" in words}
    assert modules <= {"server"}, modules
    assert any("tritonserver" in " ".join(words) for words in commands)
    return json.loads((folder / out / "plan.json").read_text())


def command_lines(pid):
    """Of the processes below a process, those that are gone meanwhile left out."""
    for thread in Path(f"/proc/{pid}/task").glob("*"):
        with suppress(OSError):
            for child in (thread / "children").read_text().split():
                words = Path(f"/proc/{child}/cmdline").read_bytes().decode().split("\0")
                yield tuple(words)
                yield from command_lines(child)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("plan")


@pytest.fixture(scope="module")
def content(folder):
    return plan(folder, "first", MAX_RISK)


@pytest.fixture(scope="module")
def out(folder, content):
    return folder / "first"


def test_something_is_certified_and_cheaper_than_the_full_model(content):
    chosen = content["chosen"]
    assert chosen is not None, content["notes"]
    certificate = chosen["certificate"]
    assert certificate["certified"] and certificate["errors"] <= certificate["allowed"]
    assert certificate["choices"] == len(content["tested"])
    assert content["disturbed"] or chosen["certify"]["speedup"] > 1


def test_every_graph_was_priced_as_served(content):
    recipes = {graph["recipe"] for graph in content["graphs"].values()}
    assert recipes == {
        *("px=32,int8=static,align", "px=32", "px=64", "px=64,int8=static"),
        *("px=48", "px=64,tome=8"),
    }
    for graph in content["graphs"].values():
        assert graph["ms_per_image"] > 0 and graph["latency_ms"]["median"] > 0
    assert content["graphs"]["full"]["cost_ratio"]["median"] == 1.0


def test_images_play_one_part_each(content):
    parts = {name: count for name, count in content["images"].items() if name != "source"}
    assert set(parts) == {"align", "fit", "certify", "test"}
    assert sum(parts.values()) == IMAGES and min(parts.values()) > 20


def test_the_page_is_whole(out, content):
    page = (out / "plan.html").read_text()
    statement = content["chosen"]["certificate"]["statement"]
    assert " ".join(statement.split()) in " ".join(html.unescape(page).split())
    assert page.rstrip().endswith("</html>") and len(page) > 20_000


def test_plan_artifact_graphs_and_outputs_belong_together(out, content):
    graphs, calibration = GraphSet.load(out / "onnx"), Calibration.load(out / "calibration.json")
    calibration.check_rungs({name: graphs.files[name] for name in ("vit_low", "vit_high")})
    assert graphs.rungs["vit_low"].recipe == content["chosen"]["low_recipe"]
    assert graphs.rungs["vit_high"].recipe == content["chosen"]["high_recipe"]
    assert calibration.threshold == content["chosen"]["threshold"]
    assert calibration.certificate == content["chosen"]["certificate"]
    assert Outputs.load(out / "outputs.json").made == Made.by(graphs)


def test_the_threshold_holds_for_what_the_chosen_graphs_answer_now(out, content):
    """Not for the stored outputs: the chosen files are run again."""
    graphs, calibration = GraphSet.load(out / "onnx"), Calibration.load(out / "calibration.json")
    stored = Outputs.load(out / "outputs.json")
    source = open_images(f"sample:{SEED}", IMAGES)
    preprocessing = Preprocessing.from_dict(graphs.preprocessing)
    tensors = {}
    for index in range(len(source)):
        image = source[index]
        tensors[image.name] = preprocessing(decode(image.data))
    image = np.stack([tensors[name] for name in stored.names])
    low = run_session(open_session(graphs.files["vit_low"]), image, layers=True)
    np.testing.assert_allclose(low.embedding, stored.low.embedding, rtol=1e-3, atol=1e-3)
    scores = calibration.score(low)
    escalated = escalation_mask(scores, calibration.threshold, Overrides())
    fidelity = Fidelity.of(calibration)
    high_loss = fidelity.high_loss(stored)
    high_loss = np.zeros(len(stored), bool) if high_loss is None else high_loss
    risk = np.where(escalated, high_loss, fidelity.loss(stored)).mean()
    figures = [content["chosen"][split]["escalation_rate"] for split in ("certify", "test")]
    assert risk < MAX_RISK
    assert min(figures) - 0.15 < escalated.mean() < max(figures) + 0.15


def test_export_repository_accepts_what_was_chosen(folder, out):
    repository = folder / "model_repository"
    run_command(
        *("export", "repository", "--onnx", out / "onnx"),
        *("--calibration", out / "calibration.json", "--out", repository),
    )
    models = {path.parent.name for path in repository.glob("*/config.pbtxt")}
    assert {"vit_low", "vit_high", "router", "adaptive_vit", "preprocess"} <= models


def test_another_risk_exports_nothing_and_asks_no_graph_again(folder, content):
    """The full model is priced anew, because that is what the machine is like now."""

    def kept():
        files = [*(folder / "cache").rglob("*.onnx"), *(folder / "answers").rglob("*.npz")]
        return {file: file.stat().st_mtime_ns for file in files}

    before = kept()
    assert len(before) > 12
    again = plan(folder, "second", 0.3)
    assert kept() == before
    assert again["goal"]["max_risk"] == 0.3
    assert again["images"] == content["images"]
    assert set(again["graphs"]) == set(content["graphs"])
    assert again["chosen"]["certificate"]["allowed"] >= content["chosen"]["certificate"]["allowed"]
