"""A repository that starts without a calibration: what it holds, and what is refused instead."""

import math
import shutil
from dataclasses import replace

import numpy as np
import pytest

from bundle import manifest
from bundle.fidelity import FidelityLoss
from bundle.graphs import GraphSet
from bundle.versions import live_folder
from calibration.fidelity import Fidelity
from calibration.outputs import Made
from export.errors import UsageError
from export.live import live_artifact
from export.repository import RepositorySettings, assemble
from export.versions import add_version
from routing import (
    Calibration,
    CascadeRequest,
    Overrides,
    RungOutputs,
    RungRecord,
    run_cascade,
)
from tests.unit.calibration_outputs import with_reference
from tests.unit.export_tiny import run_export
from tests.unit.fakes import FakeRung
from tests.unit.onnx_files import CLASSES, LAYERS, SIZE, D, write_graph_set
from tests.unit.router_parts import backend, deployed
from tests.unit.test_export_repository import contents, read_configs, router_parameters

__all__ = ["backend", "deployed"]  # fixtures

TOP1 = FidelityLoss("top1")


@pytest.fixture(scope="module")
def onnx(tmp_path_factory):
    """Exported graphs of a model that names classes; nobody changes them."""
    return write_graph_set(tmp_path_factory.mktemp("inputs") / "onnx")


@pytest.fixture(scope="module")
def graphs(onnx):
    return GraphSet.load(onnx)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "repository"


def go_live(onnx, out, *more):
    return run_export("repository", "--live", "--onnx", onnx, "--out", out, *more)


def artifact_in(repository, version=1):
    return Calibration.load(repository / f"router/{version}/calibration.json")


def saved_as(graphs, folder, **changes):
    """The same graphs, as a model that answers something else."""
    shutil.copytree(graphs.low.file.parent, folder)
    replace(GraphSet.load(folder), **changes).save(folder)
    return folder


# --- what is assembled ---------------------------------------------------------------------------


def test_a_repository_without_a_calibration_is_whole_and_escalates_every_image(onnx, graphs, out):
    result = go_live(onnx, out, "--max-risk", 0.05)
    assert (result.code, result.err) == (0, "") and len(result.out.splitlines()) == 1
    assert list(out.parent.iterdir()) == [out]  # evidence gets its folder from who writes some
    manifest.verify(out)
    artifact = artifact_in(out)
    artifact.check_rungs(graphs.files)
    assert artifact.is_live and artifact.is_about_full_rung and artifact.threshold is None
    assert Made.of(artifact).difference(Made.by(graphs)) is None
    assert Fidelity.of(artifact).kind == "top1"
    goal = [artifact.chosen_by[name] for name in ("max_risk", "confidence", "audit_share")]
    assert goal == [0.05, 0.9, 1.0] and 0 < artifact.chosen_by["audit_floor"] < 0.1
    assert (artifact.certificate["certified"], artifact.certificate["n"]) == (False, 0)
    low, high = FakeRung(1.0), FakeRung(2.0)
    request = CascadeRequest(np.zeros((3, 3, SIZE, SIZE), np.float32), Overrides())
    (answer,) = run_cascade([request], artifact, low, high)
    assert answer.escalated.all() and low.batches == [] and len(high.batches) == 1


def test_the_router_takes_the_settings_of_a_live_repository(onnx, out, deployed):
    go_live(onnx, out, "--max-risk", 0.05, "--live-folder", out.parent / "elsewhere")
    router = read_configs(out)["router"]
    values = router_parameters(out).items()
    settings = deployed("settings").RouterSettings.of(
        {
            "parameters": {name: {"string_value": value} for name, value in values},
            "max_batch_size": router.max_batch_size,
            "instance_group": [{"count": 1, "gpus": []}],
            "dynamic_batching": {"default_queue_policy": {"max_queue_size": 64}},
        }
    )
    assert settings.careful_only and settings.audit_fraction == 0
    assert settings.live_folder == str(out.parent / "elsewhere")
    assert live_folder(out) == out.parent / "elsewhere"


def test_router_and_keeper_look_in_the_folder_beside_by_default_whatever_the_way_there(
    onnx, out, monkeypatch
):
    go_live(onnx, out, "--max-risk", 0.05)
    link = out.parent / "current"
    link.symlink_to(out)
    monkeypatch.chdir(out)
    beside = out.parent / "repository.live"
    assert live_folder(out) == live_folder(link) == live_folder(out / ".") == beside


def test_the_goal_of_the_command_line_reaches_the_artifact(onnx, out):
    goal = ("--max-risk", 0.2, "--confidence", 0.95, "--audit-floor", 0.5)
    result = go_live(onnx, out, *goal, "--fidelity", "cosine", "--tolerance", 0.25)
    assert result.code == 0
    artifact = artifact_in(out)
    assert artifact.chosen_by["max_risk"] == artifact.certificate["epsilon"] == 0.2
    assert artifact.chosen_by["confidence"] == artifact.certificate["confidence"] == 0.95
    assert artifact.chosen_by["audit_floor"] == 0.5
    assert Fidelity.of(artifact) == Fidelity("cosine", 0.25)


def test_assembling_twice_gives_identical_bytes(onnx, out):
    first, again = (contents(out) for _ in range(2) if go_live(onnx, out, "--max-risk", 0.05))
    assert first == again


def test_a_live_repository_takes_a_certified_version_of_the_same_graphs(graphs, tmp_path, out):
    artifact = live_artifact(graphs, TOP1, 0.05)
    artifact.save(tmp_path / "first.json")
    assemble(graphs, tmp_path / "first.json", out)
    replace(artifact, threshold=0.5).save(tmp_path / "second.json")
    assert add_version(out, tmp_path / "second.json") == 2
    assert artifact_in(out, 2).scoring_sha256 == artifact.scoring_sha256


def outputs_of(logits):
    """The cheap rung's, where only what the head says matters."""
    rows = len(logits)
    layers = np.arange(LAYERS + 1, dtype=np.float32)[:, np.newaxis]
    layers = np.broadcast_to(layers, (rows, LAYERS + 1, D))  # steps of length sqrt(D)
    return RungOutputs(np.zeros((rows, D), np.float32), layers, np.array(logits, np.float32))


def test_a_score_of_classes_is_their_margin_and_needs_no_images(graphs):
    artifact = live_artifact(graphs, TOP1, 0.05)
    score = artifact.score(outputs_of([[9, 0, 0, 0], [0, 0, 0, 0], [1, 1, -20, -20]]))
    assert artifact.signal == "margin" and artifact.coefficients == {}
    assert score[0] < 0.01 and score[1:] == pytest.approx([1, 1])


@pytest.mark.parametrize("share", [0.5, 0.8])
def test_a_score_of_labels_is_the_distance_of_the_nearest_one_to_the_cut(graphs, share):
    loss = FidelityLoss("labels", label_threshold=share)
    artifact = live_artifact(replace(graphs, task="labels"), loss, 0.05)
    cut = math.log(share / (1 - share))
    score = artifact.score(outputs_of([[cut + 3, cut - 0.5, -9, -9], [cut, 9, 9, 9]]))
    assert artifact.signal == "label_margin" and score == pytest.approx([-0.5, 0], abs=1e-6)


def test_a_model_without_a_head_is_scored_by_its_path_and_judged_by_the_cosine(tmp_path, out):
    onnx = write_graph_set(tmp_path / "headless", classes=None)
    assert go_live(onnx, out, "--max-risk", 0.05).code == 0
    artifact = artifact_in(out)
    manifest.verify(out)
    assert (artifact.signal, Fidelity.of(artifact).kind) == ("cls_path", "cosine")
    outputs = replace(outputs_of(np.zeros((2, CLASSES))), logits=None)
    assert artifact.score(outputs) == pytest.approx([math.sqrt(D)] * 2)


def test_a_value_with_a_tolerance_is_scored_by_the_path_too(graphs, tmp_path, out):
    onnx = saved_as(graphs, tmp_path / "value", task="value")
    tolerance = ("--fidelity", "value", "--tolerance", 0.5, "--relative")
    assert go_live(onnx, out, "--max-risk", 0.05, *tolerance).code == 0
    artifact = artifact_in(out)
    assert artifact.signal == "cls_path"
    assert Fidelity.of(artifact) == Fidelity("value", 0.5, relative=True)


def test_what_is_scored_and_what_is_lost_tell_evidence_apart_and_thresholds_do_not(graphs):
    first = live_artifact(graphs, TOP1, 0.05)
    alike = [
        replace(first, threshold=0.5),
        live_artifact(graphs, TOP1, 0.2, 0.99, 0.5),
        Calibration.from_dict(replace(first, threshold=0.25).to_dict()),
    ]
    assert {each.scoring_sha256 for each in alike} == {first.scoring_sha256}
    others = [
        live_artifact(graphs, FidelityLoss("cosine"), 0.05),
        live_artifact(graphs, FidelityLoss("cosine", 0.2), 0.05),
        replace(first, signal="entropy"),
        replace(first, preprocessing_sha256="0" * 64),
        replace(first, score_map=replace(first.score_map, values=(0.0, 2.0))),
        replace(first, rungs={**first.rungs, "vit_low": RungRecord(4, "px=4", "f" * 64)}),
    ]
    assert len({each.scoring_sha256 for each in (first, *others)}) == 1 + len(others)


# --- what is refused -----------------------------------------------------------------------------

RISK = ("--max-risk", 0.05)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ((), "--max-risk"),
        (("--max-risk", 0), "--max-risk"),
        (("--max-risk", 1), "--max-risk"),
        (("--max-risk", "nan"), "--max-risk"),
        ((*RISK, "--confidence", 1), "--confidence"),
        ((*RISK, "--confidence", 0.4), "--confidence"),
        ((*RISK, "--audit-floor", 0), "--audit-floor"),
        ((*RISK, "--audit-floor", 1.5), "--audit-floor"),
        ((*RISK, "--client-parameters", "any"), "--client-parameters"),
        ((*RISK, "--audit-fraction", 0.1), "--audit-fraction"),
        ((*RISK, "--reference-check", "refuse"), "--reference-check"),
        ((*RISK, "--degrade-queue-depth", 8, "--degrade-threshold", 0.9), "--degrade-threshold"),
        ((*RISK, "--add-version"), "--add-version"),
        ((*RISK, "--shadow", 0.1), "--shadow"),
        ((*RISK, "--fidelity", "labels"), "--fidelity"),
        ((*RISK, "--tolerance", 3, "--fidelity", "cosine"), "--tolerance"),
    ],
)
def test_a_goal_or_a_setting_that_cannot_be_meant_is_refused_in_one_line(onnx, out, options, named):
    result = go_live(onnx, out, *options)
    assert (result.code, result.out) == (2, "") and len(result.err.splitlines()) == 1
    assert named in result.err and not out.exists()


def test_a_value_whose_differences_nobody_judged_is_refused(graphs, tmp_path, out):
    result = go_live(saved_as(graphs, tmp_path / "value", task="value"), out, *RISK)
    assert result.code == 2 and len(result.err.splitlines()) == 1
    assert "--tolerance" in result.err and not out.exists()


def test_a_full_rung_that_is_not_the_full_model_is_refused(tmp_path):
    graphs = with_reference(GraphSet.load(write_graph_set(tmp_path / "onnx")))
    with pytest.raises(UsageError, match="--live"):
        live_artifact(graphs, TOP1, 0.05)


@pytest.mark.parametrize("rung", ["vit_low", "vit_high"])
def test_a_rung_whose_answers_depend_on_their_batch_is_refused(graphs, rung):
    def quantised(recipe):
        graph = graphs.graphs[graphs.roles[rung]]
        return graphs.adding(replace(graph, record=replace(graph.record, recipe=recipe)))

    with pytest.raises(UsageError, match=f"{rung} .*int8=static"):
        live_artifact(quantised("px=4,int8"), TOP1, 0.05)
    assert live_artifact(quantised("px=4,int8=static"), TOP1, 0.05).is_live


@pytest.mark.parametrize("below", [".", "evidence", "router/../evidence"])
def test_a_folder_for_evidence_in_the_repository_is_refused(onnx, out, below):
    """The router refuses a repository that holds what its manifest does not list."""
    result = go_live(onnx, out, *RISK, "--live-folder", out / below)
    assert (result.code, result.out) == (2, "") and len(result.err.splitlines()) == 1
    assert "--live-folder" in result.err and not out.exists()


def test_a_folder_for_evidence_without_any_is_refused(graphs, tmp_path, out):
    artifact = replace(live_artifact(graphs, TOP1, 0.05), chosen_by={"threshold": 0.5})
    artifact.save(tmp_path / "calibration.json")
    with pytest.raises(UsageError, match="--live-folder goes with --live"):
        assemble(
            graphs, tmp_path / "calibration.json", out, RepositorySettings(live_folder="/evidence")
        )


def test_nothing_is_lost_of_a_repository_that_is_to_be_replaced_by_a_refused_one(onnx, out):
    go_live(onnx, out, *RISK)
    before = contents(out)
    assert go_live(onnx, out, "--max-risk", 0).code == 2
    assert contents(out) == before
