"""Rungs in INT8 and FP16 are the FP32 rung within a stated fidelity, in standard operators."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from export.onnx_graph import check_versions
from export.parity import sample_images
from export.recipes.half import to_half
from export.recipes.quantise import quantise
from tests.unit.quantised_files import FULL_PX, ask, cosines, export_static_vit

pytestmark = pytest.mark.usefixtures("remembered_exports")

IMAGES = sample_images(24, FULL_PX, seed=3)
SEEN, UNSEEN = IMAGES[:16], IMAGES[16:]
# What makes a graph, the least cosine of an embedding, the most of the bytes that are left.
KINDS = {
    "dynamic": (quantise, 0.99, 0.3),
    "static": (lambda rung: quantise(rung, SEEN), 0.99, 0.3),
    "half": (to_half, 0.9999, 0.55),
    "half at the full resolution": (to_half, 0.9999, 0.55),
}


@pytest.fixture(scope="module")
def rungs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("onnx")
    return {px: onnx.load(export_static_vit(folder, px)) for px in (32, FULL_PX)}


@pytest.fixture(scope="module")
def made(rungs):
    """Of each kind the rung and what was made of it."""
    found = {}
    for name, (make, *_) in KINDS.items():
        rung = rungs[FULL_PX if "full" in name else 32]
        before = rung.SerializeToString(deterministic=True)
        found[name] = rung, make(rung)
        assert rung.SerializeToString(deterministic=True) == before  # left as it is
    return found


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def test_the_embedding_stays_near_and_nothing_else_of_the_contract_changes(made, kind):
    (rung, cheap), (_, least, share) = made[kind], KINDS[kind]
    whole, answers = ask(rung, UNSEEN), ask(cheap, UNSEEN)
    for name, value in whole.items():
        assert (answers[name].dtype, answers[name].shape) == (np.float32, value.shape)
        if "half" in kind:
            assert np.abs(answers[name] - value).max() < 0.01 * np.abs(value).max()
    assert cosines(whole["embedding"], answers["embedding"]).min() > least
    assert not np.array_equal(whole["embedding"], answers["embedding"])
    assert cheap.ByteSize() < share * rung.ByteSize()
    assert list(cheap.graph.input) == list(rung.graph.input)
    assert list(cheap.graph.output) == list(rung.graph.output)


def test_only_standard_operators_and_no_provenance(made, kind):
    _, cheap = made[kind]
    check_versions(cheap)
    assert {node.domain for node in cheap.graph.node} == {""}
    assert not cheap.metadata_props and not cheap.doc_string
    assert not any(node.doc_string or node.metadata_props for node in cheap.graph.node)


def test_all_weights_of_half_are_fp16_and_conversions_stay_at_the_ends(made):
    for kind in ("half", "half at the full resolution"):
        rung, half = made[kind]
        kinds = {initializer.data_type for initializer in half.graph.initializer}
        assert TensorProto.FLOAT16 in kinds and TensorProto.FLOAT not in kinds
        resizes = [node for node in half.graph.node if node.op_type == "Resize"]
        assert len(resizes) == sum(node.op_type == "Resize" for node in rung.graph.node)
        assert all(node.input[0] == "image" for node in resizes)
        # One for the image or its resized copy, one for each output.
        casts = sum(node.op_type == "Cast" for node in half.graph.node)
        assert casts == 1 + len(half.graph.output)


def test_weights_are_int8_per_channel_and_activations_uint8(made):
    static = made["static"][1].graph
    initializers = {initializer.name: initializer for initializer in static.initializer}
    scales = [
        (initializers[node.input[0]], initializers[node.input[1]])
        for node in static.node
        if node.op_type == "DequantizeLinear" and node.input[0] in initializers
    ]
    assert len(scales) == 4 * 6  # four Linears of the attention, two of the MLP
    for weights, scale in scales:
        assert weights.data_type == TensorProto.INT8
        assert list(scale.dims) == [weights.dims[1]]
    steps = [node for node in static.node if node.op_type == "QuantizeLinear"]
    assert {initializers[node.input[2]].data_type for node in steps} == {TensorProto.UINT8}
    products = {name for n in static.node if n.op_type == "MatMul" for name in n.output}
    assert not products & {node.input[0] for node in steps}  # no output of a product is rounded


def test_dynamic_scales_couple_an_answer_to_its_batch_and_static_ones_do_not(made):
    loud = np.concatenate([UNSEEN[:1], 5 * UNSEEN[1:]])
    for kind, coupled in (("dynamic", True), ("static", False)):
        model = made[kind][1]
        alone, beside = (ask(model, images)["embedding"][0] for images in (UNSEEN[:1], loud))
        assert (np.abs(alone - beside).max() > 1e-3) == coupled


def test_the_head_and_products_of_two_activations_stay_fp32(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    images = np.ones((9, 3, 4, 4), np.float32)
    for make in (quantise, lambda model: quantise(model, images)):
        quantised = make(images_to_logits())
        kept = {i.name: i.data_type for i in quantised.graph.initializer}
        assert kept["head"] == kept["bias"] == TensorProto.FLOAT
        assert "hidden" not in kept
        assert "self" in {node.name for node in quantised.graph.node}
        assert not list(tmp_path.iterdir())  # no temporary file is left


def test_equal_inputs_give_equal_bytes_in_any_process(tmp_path):
    onnx.save(images_to_logits(), tmp_path / "tiny.onnx")
    program = (
        "import hashlib, sys, numpy as np, onnx\n"
        "from export.recipes.half import to_half\n"
        "from export.recipes.quantise import quantise\n"
        "model = onnx.load(sys.argv[1])\n"
        "images = np.linspace(-1, 1, 12 * 48, dtype=np.float32).reshape(12, 3, 4, 4)\n"
        "for made in (to_half(model), quantise(model), quantise(model, images)):\n"
        "    print(hashlib.sha256(made.SerializeToString(deterministic=True)).hexdigest())\n"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", program, str(tmp_path / "tiny.onnx")],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        )
        for seed in ("1", "2")
    ]
    assert runs[0].stdout == runs[1].stdout and len(runs[0].stdout.split()) == 3
    assert runs[0].stderr == ""  # no request to pre-process, no warning


def images_to_logits() -> onnx.ModelProto:
    """Rows of 4 pixels through one Linear, a product with itself, and a head with a bias."""
    rng = np.random.default_rng(0)
    weights = {"hidden": (4, 4), "head": (4, 2), "bias": (2,)}
    nodes = [
        helper.make_node("MatMul", ["image", "hidden"], ["tokens"], "hidden"),
        helper.make_node("MatMul", ["tokens", "tokens"], ["mixed"], "self"),
        helper.make_node("MatMul", ["mixed", "head"], ["scores"], "head"),
        helper.make_node("Add", ["scores", "bias"], ["logits"], "bias"),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, 4, 4])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3, 4, 2])],
        [
            numpy_helper.from_array(rng.normal(size=shape).astype(np.float32), name)
            for name, shape in weights.items()
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
