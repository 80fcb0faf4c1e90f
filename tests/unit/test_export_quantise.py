"""INT8 rungs are the FP32 rung within a stated fidelity, in standard operators."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from export.errors import UsageError
from export.onnx_graph import check_versions
from export.parity import sample_images
from export.recipes.quantise import quantise_dynamic, quantise_static
from tests.unit.quantised_files import FULL_PX, ask, cosines, export_static_vit

pytestmark = pytest.mark.usefixtures("remembered_exports")

IMAGES = sample_images(24, FULL_PX, seed=3)
SEEN, UNSEEN = IMAGES[:16], IMAGES[16:]


@pytest.fixture(scope="module")
def rung(tmp_path_factory):
    return onnx.load(export_static_vit(tmp_path_factory.mktemp("onnx"), 32))


@pytest.fixture(scope="module")
def dynamic(rung):
    return quantise_dynamic(rung)


@pytest.fixture(scope="module")
def static(rung):
    return quantise_static(rung, SEEN)


@pytest.fixture(scope="module", params=["dynamic", "static"])
def quantised(request):
    return request.getfixturevalue(request.param)


def test_the_embedding_stays_within_a_cosine_of_0_99(rung, quantised):
    whole, cheap = ask(rung, UNSEEN), ask(quantised, UNSEEN)
    assert {name: value.shape for name, value in cheap.items()} == {
        name: value.shape for name, value in whole.items()
    }
    assert cosines(whole["embedding"], cheap["embedding"]).min() > 0.99
    assert not np.array_equal(whole["embedding"], cheap["embedding"])


def test_the_weights_take_a_quarter_and_the_graph_contract_holds(rung, quantised):
    assert quantised.ByteSize() < 0.3 * rung.ByteSize()
    assert list(quantised.graph.input) == list(rung.graph.input)
    assert list(quantised.graph.output) == list(rung.graph.output)


def test_only_standard_operators_and_no_provenance(quantised):
    check_versions(quantised)
    assert {node.domain for node in quantised.graph.node} == {""}
    assert not quantised.metadata_props and not quantised.doc_string
    assert not any(node.doc_string or node.metadata_props for node in quantised.graph.node)


def test_weights_are_int8_per_channel_and_activations_uint8(static):
    initializers = {initializer.name: initializer for initializer in static.graph.initializer}
    scales = [
        (initializers[node.input[0]], initializers[node.input[1]])
        for node in static.graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in initializers
    ]
    assert len(scales) == 4 * 6  # four Linears of the attention, two of the MLP
    for weights, scale in scales:
        assert weights.data_type == TensorProto.INT8
        assert list(scale.dims) == [weights.dims[1]]
    steps = [node for node in static.graph.node if node.op_type == "QuantizeLinear"]
    assert {initializers[node.input[2]].data_type for node in steps} == {TensorProto.UINT8}


def test_nothing_quantises_an_output_of_a_product(static):
    products = {name for n in static.graph.node if n.op_type == "MatMul" for name in n.output}
    steps = {node.input[0] for node in static.graph.node if node.op_type == "QuantizeLinear"}
    assert not products & steps


def test_dynamic_scales_couple_an_answer_to_its_batch_and_static_ones_do_not(dynamic, static):
    loud = np.concatenate([UNSEEN[:1], 5 * UNSEEN[1:]])
    for model, coupled in ((dynamic, True), (static, False)):
        alone = ask(model, UNSEEN[:1])["embedding"][0]
        beside = ask(model, loud)["embedding"][0]
        assert (np.abs(alone - beside).max() > 1e-3) == coupled


def test_the_argument_is_left_as_it_is():
    model = images_to_logits()
    before = model.SerializeToString(deterministic=True)
    quantise_dynamic(model)
    quantise_static(model, np.ones((1, 3, 4, 4), np.float32))
    assert model.SerializeToString(deterministic=True) == before


def test_the_head_and_products_of_two_activations_stay_fp32():
    for quantised in (
        quantise_dynamic(images_to_logits()),
        quantise_static(images_to_logits(), SEEN[:4, :, :4, :4].copy()),
    ):
        kept = {i.name: i.data_type for i in quantised.graph.initializer}
        assert kept["head"] == kept["bias"] == TensorProto.FLOAT
        assert "hidden" not in kept
        assert "self" in {node.name for node in quantised.graph.node}


def test_equal_inputs_give_equal_bytes_in_any_process(tmp_path):
    onnx.save(images_to_logits(), tmp_path / "tiny.onnx")
    program = (
        "import hashlib, sys, numpy as np, onnx\n"
        "from export.recipes.quantise import quantise_dynamic, quantise_static\n"
        "model = onnx.load(sys.argv[1])\n"
        "images = np.linspace(-1, 1, 12 * 48, dtype=np.float32).reshape(12, 3, 4, 4)\n"
        "for made in (quantise_dynamic(model), quantise_static(model, images)):\n"
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
    assert runs[0].stdout == runs[1].stdout and len(runs[0].stdout.split()) == 2
    assert runs[0].stderr == ""  # no request to pre-process, no warning


def test_no_temporary_file_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    quantise_dynamic(images_to_logits())
    quantise_static(images_to_logits(), np.ones((9, 3, 4, 4), np.float32))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.ones((2, 3, 8, 8), np.float32), r"float32 \(2, 3, 8, 8\); give float32 \(n, 3, 4, 4\)"),
        (np.ones((2, 3, 4, 4)), "float64"),
        (np.ones((0, 3, 4, 4), np.float32), "n at least 1"),
        (np.full((1, 3, 4, 4), np.nan, np.float32), "NaN or Inf"),
    ],
)
def test_images_that_cannot_calibrate_are_refused(images, message):
    with pytest.raises(UsageError, match=message):
        quantise_static(images_to_logits(), images)


def test_a_graph_with_a_head_alone_has_nothing_to_quantise():
    model = images_to_logits()
    for node in [node for node in model.graph.node if node.name == "hidden"]:
        node.op_type = "Add"
    with pytest.raises(UsageError, match="no matrix product with constant weights"):
        quantise_dynamic(model)


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
