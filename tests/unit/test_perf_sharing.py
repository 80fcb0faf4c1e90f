"""What sharing weights costs is measured on rungs that share some, and refused on others."""

import contextlib

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from export.shared_weights import share_weights
from perf.costs.session_process import SessionProcess
from perf.costs.sharing import REQUESTS, WAYS, measure_sharing
from perf.figures import PerfError
from routing import RUNGS
from tests.unit.onnx_files import write_rung_set

BALLAST_MIB = 8


def add_ballast(file):
    """Weights large enough to be seen in a process's memory, added to an output."""
    model = onnx.load(file)
    ballast = np.random.default_rng(0).normal(size=(BALLAST_MIB * 2**18, 1)).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(ballast, "ballast"))
    model.graph.initializer.append(numpy_helper.from_array(np.array([0], np.int64), "first"))
    model.graph.node.insert(
        0, onnx.helper.make_node("ReduceMax", ["ballast"], ["peak"], keepdims=0)
    )
    for node in model.graph.node:
        if node.output[0] == "cls_layers":
            node.output[0] = "layers"
    model.graph.node.append(onnx.helper.make_node("Add", ["layers", "peak"], ["cls_layers"]))
    onnx.save(model, file)


@pytest.fixture
def folder(tmp_path):
    folder = write_rung_set(tmp_path / "onnx")
    for name in RUNGS:
        add_ballast(folder / f"{name}.onnx")
    return folder


def test_all_four_ways_are_measured(folder):
    share_weights([folder / f"{name}.onnx" for name in RUNGS], folder / "weights.bin")
    done = []
    found = measure_sharing(folder, 2, lambda: done.append(1))
    assert [sharing.way for sharing in found] == list(WAYS)
    assert len(done) == len(WAYS) + 2
    for sharing in found:
        assert set(sharing.pss_mib) == set(REQUESTS)
        assert all(pss > sharing.idle_mib > 0 for pss in sharing.pss_mib.values())
        assert set(sharing.ms_per_image) == {(name, batch) for name in RUNGS for batch in REQUESTS}
        expected = BALLAST_MIB * (1 if sharing.way.shared else 2)
        assert sharing.disk_mib == pytest.approx(expected, abs=0.1)


def test_rungs_without_a_weight_in_common_are_refused(folder):
    with pytest.raises(PerfError, match="vit_low and vit_high share no weights; export both"):
        measure_sharing(folder, 1, lambda: None)


def test_a_rung_that_does_not_load_is_named(folder):
    share_weights([folder / f"{name}.onnx" for name in RUNGS], folder / "weights.bin")
    model = onnx.load(folder / "vit_high.onnx", load_external_data=False)
    model.graph.node[1].op_type = "NoSuchOperator"
    onnx.save(model, folder / "vit_high.onnx")
    with pytest.raises(PerfError, match="vit_high.onnx: .*NoSuchOperator"):
        measure_sharing(folder, 1, lambda: None)


def write_product(file, weights, scale):
    """image (batch, n) -> embedding (batch, m): a product with the weights, times a number."""
    tensor = onnx.TensorProto.FLOAT
    rows, columns = weights.shape
    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node("MatMul", ["image", "weights"], ["product"]),
            onnx.helper.make_node("Mul", ["product", "scale"], ["embedding"]),
        ],
        "product",
        [onnx.helper.make_tensor_value_info("image", tensor, ["batch", rows])],
        [onnx.helper.make_tensor_value_info("embedding", tensor, ["batch", columns])],
        [
            numpy_helper.from_array(weights, "weights"),
            numpy_helper.from_array(np.array([scale], np.float32), "scale"),
        ],
    )
    opsets = [onnx.helper.make_opsetid("", 18)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10), file)


def pss_mib(files):
    """PSS of two processes that each serve one file, after they have answered."""
    with contextlib.ExitStack() as stack:
        servers = [SessionProcess(file, prepacking=False) for file in files]
        for server in servers:
            stack.callback(server.close)
            server.open()
            server.run((1, 2048))
        return sum(server.pss() for server in servers) / 2**20


def test_without_prepacking_two_processes_hold_shared_weights_once(tmp_path):
    weights = np.random.default_rng(0).normal(size=(2048, 4096)).astype(np.float32)  # 32 MiB
    files = [tmp_path / f"{scale}.onnx" for scale in (1, 2)]
    for scale, file in enumerate(files, start=1):
        write_product(file, weights, scale)
    separate = pss_mib(files)
    assert all(share_weights(files, tmp_path / "weights.bin").values())
    assert separate - pss_mib(files) > 24
