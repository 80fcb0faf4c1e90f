"""Costs image by image: of a graph that does more for some images than for others."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from perf.token_costs import Costs, by_tokens, follows, measure

PX = 8
WIDTH = 256


def varying(path, counts=True):
    """`image` to `embedding`, by as many rows as its largest value says, and `tokens`."""
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, PX, PX])
    outputs = [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["n", WIDTH])]
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((WIDTH, WIDTH)).astype(np.float32) / 16
    constants = [
        onnx.numpy_helper.from_array(value, name)
        for name, value in {
            "weights": weights,
            "row": np.ones((1, WIDTH), np.float32),
            "width": np.array([WIDTH]),
            "one_axis": np.array([1]),
        }.items()
    ]
    nodes = [
        helper.make_node("ReduceMax", ["image"], ["most"], keepdims=0),
        helper.make_node("Cast", ["most"], ["count"], to=TensorProto.INT64),
        helper.make_node("Reshape", ["count", "one_axis"], ["counts"]),
        helper.make_node("Concat", ["counts", "width"], ["shape"], axis=0),
        helper.make_node("Expand", ["row", "shape"], ["rows"]),
        helper.make_node("MatMul", ["rows", "weights"], ["a"]),
        helper.make_node("MatMul", ["a", "weights"], ["b"]),
        helper.make_node("MatMul", ["b", "weights"], ["embedding"]),
    ]
    if counts:
        outputs.append(helper.make_tensor_value_info("tokens", TensorProto.INT32, ["m"]))
        nodes.append(helper.make_node("Cast", ["counts"], ["tokens"], to=TensorProto.INT32))
    graph = helper.make_graph(nodes, "varying", [image], outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.save(model, path)
    return path


def images(counts):
    found = np.zeros((len(counts), 3, PX, PX), np.float32)
    found[:, 0, 0, 0] = counts
    return found


def test_tokens_are_read_and_costs_grow_with_them(tmp_path):
    files = {"one": varying(tmp_path / "a.onnx"), "two": varying(tmp_path / "b.onnx", False)}
    turns = []
    counts = [64, 4096, 1024, 2048, 64, 3072]
    found = measure(files, images(counts), 1, 3, progress=lambda: turns.append(1))
    assert found["one"].tokens.tolist() == counts and np.isnan(found["two"].tokens).all()
    assert len(turns) == 3 * len(counts)
    costs = found["one"]
    assert costs.seconds.shape == costs.cpu_s.shape == (len(counts),)
    assert costs.cpu_s[1] > 3 * max(costs.cpu_s[0], costs.cpu_s[4])


def test_a_request_holds_several_images_and_what_is_left_over_is_left_out(tmp_path):
    found = measure({"one": varying(tmp_path / "a.onnx")}, images([8] * 7), 2, 1)
    assert len(found["one"].seconds) == 3


def costs(cpu, tokens=None, seconds=None):
    tokens = [np.nan] * len(cpu) if tokens is None else tokens
    return Costs(*(np.array(values, float) for values in (seconds or cpu, cpu, tokens)))


def test_a_line_by_hand():
    full = costs([2.0, 2.0, 2.0])
    line = follows(costs([0.6, 1.1, 1.6], [50, 100, 150]), full, 200)
    assert line is not None
    assert (line.slope, line.intercept, line.requests) == (
        pytest.approx(1.0),
        pytest.approx(0.05),
        3,
    )
    assert line.r == pytest.approx(1.0)
    falling = follows(costs([1.6, 1.1, 0.6], [50, 100, 150]), full, 200)
    assert falling is not None and falling.r == pytest.approx(-1.0)


@pytest.mark.parametrize("tokens", [[100, 100, 100], [50]])
def test_no_line_goes_through_one_place(tokens):
    cpu = [0.5, 0.6, 0.7][: len(tokens)]
    assert follows(costs(cpu, tokens), costs([1.0] * len(cpu)), 200) is None


def test_a_ratio_is_of_sums_and_is_not_told_where_the_clock_says_another():
    full = costs([1.0, 3.0])
    assert costs([1.0, 1.0]).ratio_to(full) == 0.5
    assert costs([1.0, 1.0], seconds=[1.0, 1.8]).ratio_to(full) is None
    assert costs([1.0, 1.0], seconds=[1.0, 1.8]).cpu_ratio_to(full) == 0.5


def test_images_of_a_request_keep_about_as_many_tokens():
    assert by_tokens([5, 1, 5, 3]).tolist() == [1, 3, 0, 2]
