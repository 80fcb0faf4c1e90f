"""Exported graphs on a real server: they answer, side by side, wherever their weights lie."""

import shutil
from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from bundle import manifest
from bundle.graphs import Graph
from client import ClientError
from perf.images import QUIET, load_pool
from perf.prices import Served, price
from routing import WEIGHTS, RungRecord

SERVED = Served(instances=2, threads=1, batch=4, turns=1)


@pytest.fixture(scope="module")
def pool(graph_set):
    return load_pool(graph_set, "sample", 8)


def tell_tokens(graph):
    """Let a graph tell its tokens, INT32 (B, 1): here the values of an image that are not 0."""
    graph.initializer.append(numpy_helper.from_array(np.array([1]), "all_of_an_image"))
    graph.node.extend(
        [
            helper.make_node("Flatten", ["image"], ["values"]),
            helper.make_node("Sign", ["values"], ["signs"]),
            helper.make_node("Abs", ["signs"], ["ones"]),
            helper.make_node("ReduceSum", ["ones", "all_of_an_image"], ["count"]),
            helper.make_node("Cast", ["count"], ["tokens"], to=TensorProto.INT32),
        ]
    )
    shape = [graph.input[0].type.tensor_type.shape.dim[0].dim_param, 1]
    graph.output.append(helper.make_tensor_value_info("tokens", TensorProto.INT32, shape))


def with_outside_weights(graph_set, folder):
    """The rungs, and the cheap one once more with its weights in a file beside it.

    It is recorded as one whose cost depends on the image, and tells tokens.
    """
    file = folder / "outside.onnx"
    (folder / "own").mkdir()
    # onnx reads no weights that have several links
    own = graph_set.low.place(folder / "own", "own")
    for path in (own.file, own.file.parent / WEIGHTS):
        copied = path.with_suffix(".copy")
        shutil.copy(path, copied)
        copied.replace(path)
    model = onnx.load(own.file)
    tell_tokens(model.graph)
    onnx.save_model(
        model,
        file,
        save_as_external_data=True,
        location=WEIGHTS,
    )
    hashes = (manifest.sha256_file(path) for path in (file, folder / WEIGHTS))
    record = RungRecord(graph_set.rungs["vit_low"].px, "px=32,apt=5.5", *hashes)
    return graph_set.adding(Graph("outside", record, file))


def test_graphs_are_measured_side_by_side_wherever_their_weights_lie(graph_set, pool, tmp_path):
    rungs = with_outside_weights(graph_set, tmp_path)
    found = price(rungs, [], pool, SERVED, QUIET)
    assert set(found) == {"full", "px32", "outside"}
    assert found["full"]["cost_ratio"]["values"] == [1.0]
    own = found["outside"].pop("per_image")
    assert own["images"] == len(pool) and 0 < own["latency_ms"]["p50"] <= own["latency_ms"]["p95"]
    counts = [np.count_nonzero(tensor) for tensor in pool.tensors]
    assert own["tokens"] == {"mean": np.mean(counts), "min": min(counts), "max": max(counts)}
    assert found["full"]["per_image"] is found["px32"]["per_image"] is None
    for cost in found.values():  # no test asserts how fast
        spreads = [value for value in cost.values() if isinstance(value, dict)]
        assert len(spreads) == 5
        assert all(spread["runs"] == 1 and 0 < spread["median"] < 60_000 for spread in spreads)


def test_a_batch_that_the_server_refuses_is_one_line(graph_set, pool):
    many = replace(pool, tensors=[pool.tensors[0]] * 33, encoded=[b""] * 33)
    with pytest.raises(ClientError, match="batch-size must be <= 32") as caught:
        price(graph_set, ["full"], many, replace(SERVED, batch=33), QUIET)
    assert "\n" not in str(caught.value)
