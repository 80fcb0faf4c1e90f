"""Weights that several graphs hold lie once beside them, and the graphs answer as before."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.external_data_helper import uses_external_data

from export.shared_weights import ALIGNMENT, share_weights
from tests.unit.quantised_files import ask

WIDTH = 32  # a matrix of it takes 4,096 bytes
IMAGES = np.random.default_rng(9).normal(size=(3, WIDTH)).astype(np.float32)


def matrix(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(WIDTH, WIDTH)).astype(np.float32)


def write_chain(file: Path, *weights: np.ndarray, prefix: str = "w") -> Path:
    """A graph that multiplies its input with one matrix after the other."""
    names = [f"{prefix}{i}" for i in range(len(weights))]
    tensors = ["image", *(f"{name}_out" for name in names[:-1]), "embedding"]
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", [tensors[i], name], [tensors[i + 1]])
            for i, name in enumerate(names)
        ],
        "chain",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", WIDTH])],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["batch", WIDTH])],
        [numpy_helper.from_array(w, name) for w, name in zip(weights, names, strict=True)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, file)
    return file


@pytest.fixture
def chains(tmp_path):
    """Two graphs with two weights in common, under other names, and one that shares nothing."""
    return [
        write_chain(tmp_path / "low.onnx", matrix(1), matrix(2), matrix(3)),
        write_chain(tmp_path / "high.onnx", matrix(2), matrix(1), matrix(4), prefix="v"),
        write_chain(tmp_path / "other.onnx", matrix(5)),
    ]


def digests(folder: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.iterdir()}


def test_answers_stay_the_same_and_each_shared_weight_lies_once(chains, tmp_path):
    before = [ask(file, IMAGES)["embedding"] for file in chains]
    store = tmp_path / "weights.bin"
    assert share_weights(chains, store) == dict(zip(chains, (True, True, False), strict=True))
    assert store.stat().st_size == 2 * 4 * WIDTH * WIDTH
    for file, answer in zip(chains, before, strict=True):
        onnx.checker.check_model(str(file))
        np.testing.assert_array_equal(ask(file, IMAGES)["embedding"], answer)
    assert {f.name for f in tmp_path.iterdir()} == {f.name for f in [*chains, store]}


def test_what_one_graph_alone_holds_stays_in_it(chains, tmp_path):
    share_weights(chains, tmp_path / "weights.bin")
    outside = [
        [uses_external_data(t) for t in onnx.load(file, load_external_data=False).graph.initializer]
        for file in chains
    ]
    assert outside == [[True, True, False], [True, True, False], [False]]


def test_locations_are_relative_and_offsets_start_at_pages(tmp_path):
    odd = np.random.default_rng(1).normal(size=(WIDTH, WIDTH + 1)).astype(np.float32)
    back = np.random.default_rng(2).normal(size=(WIDTH + 1, WIDTH)).astype(np.float32)
    files = [write_chain(tmp_path / name, odd, back) for name in ("a.onnx", "b.onnx")]
    share_weights(files, tmp_path / "weights.bin")
    for tensor in onnx.load(files[0], load_external_data=False).graph.initializer:
        place = {entry.key: entry.value for entry in tensor.external_data}
        assert place["location"] == "weights.bin"
        assert int(place["offset"]) % ALIGNMENT == 0
    assert (tmp_path / "weights.bin").stat().st_size == 2 * ALIGNMENT + 4 * WIDTH * (WIDTH + 1)


def test_sharing_again_changes_nothing(chains, tmp_path):
    share_weights(chains, tmp_path / "weights.bin")
    once = digests(tmp_path)
    share_weights(chains, tmp_path / "weights.bin")
    assert digests(tmp_path) == once


def test_a_graph_that_no_longer_shares_becomes_self_contained_again(chains, tmp_path):
    store = tmp_path / "weights.bin"
    share_weights(chains, store)
    answer = ask(chains[0], IMAGES)["embedding"]
    write_chain(chains[1], matrix(6))
    assert not any(share_weights(chains, store).values())
    assert not store.exists()
    np.testing.assert_array_equal(ask(chains[0], IMAGES)["embedding"], answer)


def test_equal_bytes_of_another_shape_or_type_are_not_the_same_weight(tmp_path):
    for name, dims, kind in (
        ("a", (32, 32), np.float32),
        ("b", (16, 64), np.float32),
        ("c", (32, 32), np.int32),
    ):
        model = onnx.ModelProto()
        model.graph.initializer.append(numpy_helper.from_array(np.zeros(dims, kind), "w"))
        onnx.save(model, tmp_path / f"{name}.onnx")
    files = sorted(tmp_path.iterdir())
    assert not any(share_weights(files, tmp_path / "weights.bin").values())


def test_small_tensors_stay_where_they_are(chains, tmp_path):
    store = tmp_path / "weights.bin"
    assert not any(share_weights(chains, store, at_least_bytes=4097).values())
    assert all(share_weights(chains[:2], store, at_least_bytes=4096).values())


def test_weights_in_typed_fields_are_shared_too(tmp_path):
    for name in ("a", "b"):
        model = onnx.load(write_chain(tmp_path / f"{name}.onnx", matrix(1)))
        tensor = model.graph.initializer[0]
        tensor.float_data.extend(numpy_helper.to_array(tensor).ravel())
        tensor.ClearField("raw_data")
        onnx.save(model, tmp_path / f"{name}.onnx")
    files = sorted(tmp_path.iterdir())
    before = ask(files[0], IMAGES)["embedding"]
    assert all(share_weights(files, tmp_path / "weights.bin").values())
    assert files[0].stat().st_size < 1000
    np.testing.assert_array_equal(ask(files[0], IMAGES)["embedding"], before)
