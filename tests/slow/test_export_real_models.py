"""The two named backbones at full size, as a user exports them."""

from __future__ import annotations

import json

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from typer.testing import CliRunner

from export.__main__ import app


@pytest.mark.parametrize(
    ("model", "low_px", "high_px", "width", "classes"),
    [("static-vit", 32, 64, 192, 200), ("dinov2-small", 112, 224, 384, None)],
)
def test_named_backbones(model, low_px, high_px, width, classes, tmp_path):
    result = CliRunner().invoke(app, ["rungs", "--model", model, "--out", str(tmp_path), "--json"])
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert record["image"]["shape"] == [3, high_px, high_px]
    assert (record["embedding_dim"], record["layers"], record["classes"]) == (width, 12, classes)
    assert [rung["px"] for rung in record["rungs"].values()] == [low_px, high_px]
    # Measured: 2.8e-5 at worst. A looser default would let a real difference pass.
    assert max(check["max_abs_diff"] for check in record["parity"]["checks"]) < 1e-4
    image = np.random.default_rng(0).normal(size=(5, 3, high_px, high_px)).astype(np.float32)
    for name in ("vit_low", "vit_high"):
        file = tmp_path / f"{name}.onnx"
        graph = onnx.load(file)
        assert graph.ir_version <= 10
        assert max(entry.version for entry in graph.opset_import) <= 21
        session = ort.InferenceSession(file, providers=["CPUExecutionProvider"])
        embedding, cls_layers, *rest = session.run(None, {"image": image})
        assert embedding.shape == (5, width)
        assert cls_layers.shape == (5, 13, width)
        assert [logits.shape for logits in rest] == ([(5, classes)] if classes else [])
