"""A cascade whose cheap rung lets tokens halt, from export to a real server."""

from dataclasses import replace

import numpy as np
import tritonclient.grpc as triton

from bundle.graphs import GraphSet
from bundle.recipe import Recipe
from calibration.running import open_session, run_session
from client import GrpcClient
from export.graphs import export_graphs
from export.pretrained import pretrained
from export.request import GraphsRequest
from routing import Calibration, Overrides, escalation_mask
from tests.commands import said
from tests.servers import running
from tests.shared_build import linked_copy, shared
from tests.unit.export_tiny import PX, QUIET, save_tiny

GATE = (4.0, 4.0)


def make_halting(folder):
    """onnx/, calibration.json and model_repository/ of a tiny ViT with a gate."""
    saved = save_tiny(folder / "model", "ViTForImageClassification", num_hidden_layers=3)
    backbone = replace(pretrained(str(saved)), gate=GATE)
    request = GraphsRequest(folder / "onnx", Recipe.parse("px=8,halt"))
    export_graphs(backbone, request, QUIET)
    onnx, artifact = ("--onnx", folder / "onnx"), folder / "calibration.json"
    outputs = ("--outputs", folder / "outputs.json")
    said(
        *("calibration", "collect", "--images", "sample", "--limit", 120, *onnx),
        *("--out", outputs[1], "--answers", folder / "answers"),
    )
    said(*("calibration", "fit", "--escalation-rate", 0.3, *onnx, *outputs, "--out", artifact))
    said(
        *("export", "repository", *onnx, "--calibration", artifact),
        *("--out", folder / "model_repository", "--client-parameters", "any"),
    )


def test_a_halting_rung_is_calibrated_assembled_and_served(tmp_path, crops):
    build = linked_copy(shared("halting", make_halting), tmp_path / "build")
    graphs, calibration = (
        GraphSet.load(build / "onnx"),
        Calibration.load(build / "calibration.json"),
    )
    assert graphs.low.record.recipe == "px=8,halt"
    images = np.random.default_rng(3).normal(size=(24, 3, PX, PX)).astype(np.float32)
    low = run_session(open_session(graphs.low.file), images, layers=True)
    high = run_session(open_session(graphs.high.file), images, layers=False)
    score = calibration.score(low)
    escalated = escalation_mask(score, calibration.threshold, Overrides())
    assert 0 < escalated.sum() < len(images)
    expected = np.where(escalated[:, None], high.logits, low.logits)
    with running(build / "model_repository") as server, GrpcClient(server.grpc_url) as client:
        # Other batch mates than offline; then as bytes.
        found = [p for part in np.split(images, [5, 8]) for p in client.infer_tensor(part)]
        assert [one.escalated for one in found] == escalated.tolist()
        np.testing.assert_allclose([p.logits for p in found], expected, rtol=1e-4, atol=1e-4)
        assert len(client.infer(crops[:8])) == 8
        live = triton.InferenceServerClient(server.grpc_url)
        tensor = triton.InferInput("image", list(images.shape), "FP32")
        tensor.set_data_from_numpy(images)
        answer = live.infer("vit_low", [tensor])
        tokens, patches = answer.as_numpy("tokens"), answer.as_numpy("patches")
    assert tokens.dtype == patches.dtype == np.int32
    assert (tokens[:, 0] == 5).all() and len(np.unique(tokens, axis=0)) > 1
    assert (patches.max(axis=1) <= (tokens > 0).sum(axis=1)).all()
