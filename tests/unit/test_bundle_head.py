"""The head is read from a graph whatever the graph's precision, or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from bundle.head import LinearHead
from export.recipes.half import to_half
from export.recipes.quantise import quantise
from export.shared_weights import share_weights
from tests.unit.onnx_files import CLASSES, D, write_rung
from tests.unit.quantised_files import ask

SIDE = 4
IMAGES = np.random.default_rng(1).normal(size=(5, 3, SIDE, SIDE)).astype(np.float32)


def graph(*head: onnx.NodeProto, width: int = D, **weights: np.ndarray) -> onnx.ModelProto:
    """The pixels' sums times a matrix are the embedding; `head` makes the logits of it."""
    rng = np.random.default_rng(0)
    body = rng.normal(size=(3 * SIDE * SIDE, width)).astype(np.float32)
    nodes = [
        helper.make_node("Flatten", ["image"], ["flat"], "flatten", axis=1),
        helper.make_node("MatMul", ["flat", "body"], ["tokens"], "body"),
        helper.make_node("Slice", ["tokens", "start", "end", "axis"], ["embedding"], "slice"),
        *head,
    ]
    shapes = {"embedding": ["batch", D], "logits": ["batch", CLASSES]}
    outputs = {name: shapes[name] for name in ("embedding", "logits") if name != "logits" or head}
    limits = {"start": np.array([0]), "end": np.array([D]), "axis": np.array([1])}
    made = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, SIDE, SIDE])],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in outputs.items()],
        [
            numpy_helper.from_array(array, name)
            for name, array in {"body": body, **limits, **weights}.items()
        ],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def array(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape)).normal(size=shape).astype(np.float32)


def gemm(*inputs: str, **fields: int) -> onnx.NodeProto:
    return helper.make_node("Gemm", list(inputs), ["logits"], "head", **fields)


PRODUCT = helper.make_node("MatMul", ["embedding", "H"], ["scores"], "head")
HEADS = {
    "gemm": graph(gemm("embedding", "H", "b", transB=1), H=array(CLASSES, D), b=array(CLASSES)),
    "gemm, not transposed": graph(gemm("embedding", "H", "b"), H=array(D, CLASSES), b=array(4)),
    "gemm without bias": graph(gemm("embedding", "H", transB=1), H=array(CLASSES, D)),
    "product": graph(
        helper.make_node("MatMul", ["embedding", "H"], ["logits"], "head"), H=array(D, CLASSES)
    ),
    "product and bias": graph(
        PRODUCT, helper.make_node("Add", ["scores", "b"], ["logits"]), H=array(D, 4), b=array(4)
    ),
    "bias first": graph(
        PRODUCT, helper.make_node("Add", ["b", "scores"], ["logits"]), H=array(D, 4), b=array(4)
    ),
}
NO_HEADS = {
    "none": graph(),
    "all tokens": graph(gemm("tokens", "H", "b"), width=2 * D, H=array(2 * D, 4), b=array(4)),
    "computed weights": graph(
        helper.make_node("Mul", ["W", "W"], ["H"]), gemm("embedding", "H"), W=array(D, CLASSES)
    ),
    "softmax": graph(PRODUCT, helper.make_node("Softmax", ["scores"], ["logits"]), H=array(D, 4)),
    "two products": graph(
        PRODUCT,
        helper.make_node("MatMul", ["embedding", "G"], ["others"]),
        helper.make_node("Add", ["scores", "others"], ["logits"]),
        **{"H": array(D, CLASSES), "G": array(D, CLASSES)},
    ),
}


def check(model: onnx.ModelProto, file: Path, tolerance: float) -> None:
    onnx.checker.check_model(model)
    onnx.save(model, file)
    head, answers = LinearHead.read(file), ask(file, IMAGES)
    assert head is not None and head.weights.shape == (D, CLASSES)
    assert head.weights.dtype == head.bias.dtype == np.float32
    np.testing.assert_allclose(
        head(answers["embedding"]), answers["logits"], rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("name", HEADS)
def test_a_linear_head_answers_as_the_graph(name, tmp_path):
    check(HEADS[name], tmp_path / "a.onnx", 1e-5)


@pytest.mark.parametrize("name", HEADS)
def test_the_head_of_an_int8_graph(name, tmp_path):
    check(quantise(HEADS[name]), tmp_path / "a.onnx", 1e-5)


@pytest.mark.parametrize("name", HEADS)
def test_the_head_of_an_fp16_graph(name, tmp_path):
    check(to_half(HEADS[name]), tmp_path / "a.onnx", 0.05)


def test_a_head_whose_weights_lie_beside_the_graph_and_in_folders_that_link_them(tmp_path):
    files = [tmp_path / name for name in ("a.onnx", "b.onnx")]
    for file in files:
        onnx.save(HEADS["gemm"], file)
    before = LinearHead.read(files[0])
    assert all(share_weights(files, tmp_path / "weights.bin", at_least_bytes=1).values())
    os.link(tmp_path / "weights.bin", tmp_path / "chosen.bin")  # as `GraphSet.place` does
    after = LinearHead.read(files[0])
    np.testing.assert_array_equal(before.weights, after.weights)
    np.testing.assert_array_equal(before.bias, after.bias)


@pytest.mark.parametrize("name", NO_HEADS)
def test_any_other_head_is_none(name, tmp_path):
    onnx.checker.check_model(NO_HEADS[name])
    onnx.save(NO_HEADS[name], tmp_path / "a.onnx")
    assert LinearHead.read(tmp_path / "a.onnx") is None


def test_the_head_of_a_rung_of_the_other_tests(tmp_path):
    write_rung(tmp_path / "a.onnx", seed=1)
    assert LinearHead.read(tmp_path / "a.onnx").weights.shape == (D, CLASSES)
    write_rung(tmp_path / "b.onnx", seed=1, classes=None)
    assert LinearHead.read(tmp_path / "b.onnx") is None


@pytest.mark.parametrize("mean", ["ReduceMean", "Div"])
def test_a_head_on_a_mean_of_tokens_is_not_linear_on_the_embedding(mean, tmp_path):
    # As wide as the embedding, as CLIP's and SigLIP's classifiers are.
    inputs = ["embedding"] if mean == "ReduceMean" else ["embedding", "embedding"]
    fields = {"keepdims": 1, "noop_with_empty_axes": 1} if mean == "ReduceMean" else {}
    pooled = helper.make_node(mean, inputs, ["pooled"], "mean", **fields)
    passed = helper.make_node("Cast", ["pooled"], ["read"], "cast", to=TensorProto.FLOAT)
    model = graph(pooled, passed, gemm("read", "H"), H=array(D, CLASSES))
    (tmp_path / "a.onnx").write_bytes(model.SerializeToString())
    assert LinearHead.read(tmp_path / "a.onnx") is None
    (tmp_path / "b.onnx").write_bytes(HEADS["gemm"].SerializeToString())
    assert LinearHead.read(tmp_path / "b.onnx") is not None
