"""The two named backbones at full size, as a user exports them."""

from __future__ import annotations

import json

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from calibration.images import SampleImages
from imaging import Preprocessing, decode
from tests.commands import said
from tests.unit.quantised_files import ask, cosines


@pytest.mark.parametrize(
    ("model", "low_px", "high_px", "width", "classes"),
    [("static-vit", 32, 64, 192, 200), ("dinov2-small", 112, 224, 384, None)],
)
def test_named_backbones(model, low_px, high_px, width, classes, tmp_path):
    record = json.loads(said("export", "rungs", "--model", model, "--out", tmp_path, "--json"))
    assert record["image"]["shape"] == [3, high_px, high_px]
    assert (record["embedding_dim"], record["layers"], record["classes"]) == (width, 12, classes)
    assert [graph["px"] for graph in record["graphs"].values()] == [low_px, high_px]
    # Measured: 2.8e-5 at worst. A looser default would let a real difference pass.
    checks = [check for graph in record["graphs"].values() for check in graph["checks"]]
    assert max(check["max_abs_diff"] for check in checks) < 1e-4
    image = np.random.default_rng(0).normal(size=(5, 3, high_px, high_px)).astype(np.float32)
    for name in record["roles"].values():
        file = tmp_path / f"{name}.onnx"
        graph = onnx.load(file, load_external_data=False)
        assert graph.ir_version == 9
        assert max(entry.version for entry in graph.opset_import) <= 21
        session = ort.InferenceSession(file, providers=["CPUExecutionProvider"])
        embedding, cls_layers, *rest = session.run(None, {"image": image})
        assert embedding.shape == (5, width)
        assert cls_layers.shape == (5, 13, width)
        assert [logits.shape for logits in rest] == ([(5, classes)] if classes else [])


def test_recipes_of_dinov2_hold_their_stated_fidelity(tmp_path):
    photographs, out = tmp_path / "photographs", tmp_path / "onnx"
    photographs.mkdir()
    for index, crop in enumerate(SampleImages(64, seed=5)):
        (photographs / f"{index:02}.jpg").write_bytes(crop.data)
    options = ["--low", "px=112,int8=static", "--beside", "px=112", "--beside", "tome=8"]
    options += ["--model", "dinov2-small", "--fit-images", str(photographs), "--out", str(out)]
    record = json.loads(said("export", "rungs", *options, "--json"))
    preprocessing = Preprocessing.from_dict(record["preprocessing"])
    images = np.stack([preprocessing(decode(crop.data)) for crop in SampleImages(16, seed=6)])
    answers = {
        name: ask(out / f"{name}.onnx", images)["embedding"]
        for name in ("px112_int8static", "px112", "tome8", "full")
    }
    # Measured: 0.9977 for static int8, see export/recipes/quantise.py.
    assert cosines(answers["px112_int8static"], answers["px112"]).mean() > 0.995
    assert cosines(answers["tome8"], answers["full"]).mean() > 0.95
    # The weights of the three FP32 graphs lie on disk once: 21 million in 4 bytes each.
    sizes = {file.name: file.stat().st_size / 2**20 for file in out.iterdir()}
    assert 80 < sizes["weights.bin"] < 90
    assert max(sizes[f"{name}.onnx"] for name in ("px112", "tome8", "full")) < 3
    assert sizes["px112_int8static.onnx"] < 25
