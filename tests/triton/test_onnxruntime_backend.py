"""The stand-in onnxruntime backend on a real tritonserver, against ONNX Runtime itself."""

from __future__ import annotations

import queue
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import tritonclient.grpc as triton
from onnx import TensorProto, helper
from tritonclient.utils import InferenceServerException

from server import ServerStartError, TritonServer
from tests.servers import running

MINIMAL = (
    'backend: "onnxruntime"\nmax_batch_size: 8\ninstance_group [ { kind: KIND_CPU count: 1 } ]\n'
)
# Long enough for four requests of one client to meet, however busy the machine is.
SLOW_BATCHING = (
    "dynamic_batching { preferred_batch_size: [ 4 ] max_queue_delay_microseconds: 2000000 }\n"
)
FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64


def tensor(name: str, shape: list, type_: int = FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, type_, shape)


def save(repository: Path, name: str, config: str, model: tuple) -> None:
    """Write a model: its configuration and (nodes, inputs, outputs, initializers)."""
    nodes, inputs, outputs, constants = model
    graph = helper.make_graph(nodes, name, inputs, outputs, constants)
    opsets = [helper.make_opsetid("", 17)]
    folder = repository / name / "1"
    folder.mkdir(parents=True)
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), folder / "model.onnx")
    (repository / name / "config.pbtxt").write_text(config)


def projection(batch: str | int = "N") -> tuple:
    """`image` [N, 3, 8, 8] -> `embedding` [N, 5], `mean` [N, 1]."""
    weights = np.random.default_rng(0).normal(size=(192, 5)).astype(np.float32)
    nodes = [
        helper.make_node("Flatten", ["image"], ["flat"], axis=1),
        helper.make_node("MatMul", ["flat", "weights"], ["embedding"]),
        helper.make_node("ReduceMean", ["flat"], ["mean"], axes=[1], keepdims=1),
    ]
    outputs = [tensor("embedding", [batch, 5]), tensor("mean", [batch, 1])]
    constants = [onnx.numpy_helper.from_array(weights, "weights")]
    return nodes, [tensor("image", [batch, 3, 8, 8])], outputs, constants


def lookup() -> tuple:
    """`index` [N, 1] -> `value` [N, 1], `rows` [N, 1]: rows in the run. Index <= 2."""
    nodes = [
        helper.make_node("Cast", ["index"], ["whole"], to=INT64),
        helper.make_node("Gather", ["table", "whole"], ["value"]),
        helper.make_node("Shape", ["index"], ["shape"]),
        helper.make_node("Gather", ["shape", "zero"], ["count"]),
        helper.make_node("Cast", ["count"], ["counted"], to=FLOAT),
        helper.make_node("Expand", ["counted", "shape"], ["rows"]),
    ]
    constants = [
        helper.make_tensor("table", FLOAT, [3], [10.0, 11.0, 12.0]),
        helper.make_tensor("zero", INT64, [1], [0]),
    ]
    outputs = [tensor("value", ["N", 1]), tensor("rows", ["N", 1])]
    return nodes, [tensor("index", ["N", 1])], outputs, constants


def identity(type_: int, shape: list) -> tuple:
    nodes = [helper.make_node("Identity", ["x"], ["y"])]
    return nodes, [tensor("x", shape, type_)], [tensor("y", shape, type_)], []


def parameter(key: str, value: str) -> str:
    return f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}\n'


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("onnxruntime") / "repository"
    tuned = parameter("intra_op_thread_count", "1") + parameter("enable_mem_pattern", "0")
    save(folder, "minimal", MINIMAL + tuned, projection())
    save(folder, "lookup", MINIMAL + SLOW_BATCHING, lookup())
    return folder


@pytest.fixture(scope="module")
def server(repository: Path) -> Iterator[TritonServer]:
    with running(repository) as server:
        yield server


@pytest.fixture
def client(server: TritonServer) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(server.grpc_url) as opened:
        yield opened


def given(name: str, array: np.ndarray, type_: str = "FP32") -> triton.InferInput:
    tensor = triton.InferInput(name, list(array.shape), type_)
    tensor.set_data_from_numpy(array)
    return tensor


def images(count: int) -> np.ndarray:
    return np.random.default_rng(count).normal(size=(count, 3, 8, 8)).astype(np.float32)


def completed(client: triton.InferenceServerClient, model: str) -> dict:
    return client.get_model_config(model, as_json=True)["config"]


@pytest.mark.parametrize("count", [1, 3, 8])
def test_answers_equal_a_direct_session(client, repository: Path, count: int):
    batch = images(count)
    session = onnxruntime.InferenceSession(
        repository / "minimal/1/model.onnx", providers=["CPUExecutionProvider"]
    )
    embedding, mean = session.run(["embedding", "mean"], {"image": batch})
    answer = client.infer("minimal", [given("image", batch)])
    np.testing.assert_allclose(answer.as_numpy("embedding"), embedding, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(answer.as_numpy("mean"), mean, rtol=1e-6, atol=1e-6)


def test_a_minimal_config_is_completed(client):
    config = completed(client, "minimal")
    assert [(io["name"], io["data_type"], io["dims"]) for io in config["input"]] == [
        ("image", "TYPE_FP32", ["3", "8", "8"])
    ]
    assert [(io["name"], io["data_type"], io["dims"]) for io in config["output"]] == [
        ("embedding", "TYPE_FP32", ["5"]),
        ("mean", "TYPE_FP32", ["1"]),
    ]
    assert config["max_batch_size"] == 8
    assert config["dynamic_batching"] == {"preferred_batch_size": [8]}


def test_only_requested_outputs_come_back(client):
    wanted = [triton.InferRequestedOutput("rows")]
    answer = client.infer("lookup", [given("index", np.ones((4, 1), np.float32))], outputs=wanted)
    assert [output.name for output in answer.get_response().outputs] == ["rows"]
    assert answer.as_numpy("rows").tolist() == [[4]] * 4


def test_requests_of_one_run_get_what_each_asked_for(client):
    outputs = [["value"], ["rows"], ["rows", "value"], None]
    answers = together(client, [0, 1, 2, 1], outputs)
    names = [{output.name for output in answer.get_response().outputs} for answer in answers]
    assert names == [{"value"}, {"rows"}, {"rows", "value"}, {"rows", "value"}]
    assert answers[0].as_numpy("value").item() == 10
    assert answers[1].as_numpy("rows").item() == 4
    assert answers[2].as_numpy("value").item() == 12


def together(
    client: triton.InferenceServerClient,
    indices: list[int],
    outputs: list[list[str] | None] | None = None,
) -> list:
    """Send one request per index at once; the answers or errors in order."""
    arrived: queue.Queue = queue.Queue()
    for i, index in enumerate(indices):
        names = outputs[i] if outputs else None
        client.async_infer(
            "lookup",
            [given("index", np.array([[index]], np.float32))],
            callback=lambda result, error, i=i: arrived.put((i, error or result)),
            outputs=[triton.InferRequestedOutput(name) for name in names] if names else None,
        )
    answers = dict(arrived.get(timeout=30) for _ in indices)
    return [answers[i] for i in range(len(indices))]


def test_concurrent_requests_share_one_run(client):
    answers = together(client, [0, 1, 2, 1])
    assert [answer.as_numpy("value").item() for answer in answers] == [10, 11, 12, 11]
    # The graph itself counts the rows it is run with.
    assert [answer.as_numpy("rows").item() for answer in answers] == [4, 4, 4, 4]


@pytest.mark.stand_in
def test_a_bad_request_does_not_fail_its_neighbours(client):
    answers = together(client, [0, 99, 2, 1])
    assert isinstance(answers[1], InferenceServerException)
    assert "Gather" in str(answers[1])
    good = [answer.as_numpy("value").item() for i, answer in enumerate(answers) if i != 1]
    assert good == [10, 12, 11]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (lambda: given("image", np.zeros((1, 3, 8, 9), np.float32)), "unexpected shape"),
        (lambda: given("image", np.zeros((1, 3, 8, 8), np.int32), "INT32"), "data-type"),
        (lambda: given("image", images(9)), "batch-size must be <= 8"),
        (lambda: given("picture", images(1)), "unexpected inference input 'picture'"),
    ],
)
def test_the_core_refuses_a_bad_request_and_goes_on(client, request_, message: str):
    with pytest.raises(InferenceServerException, match=message):
        client.infer("minimal", [request_()])
    assert client.infer("minimal", [given("image", images(1))]).as_numpy("mean").shape == (1, 1)


IO = (
    'input [ {{ name: "{input}" data_type: {type} dims: [ 3, 8, {side} ] }} ]\n'
    'output [ {{ name: "embedding" data_type: TYPE_FP32 dims: [ {width} ] }} ]\n'
)
WRITTEN = {"input": "image", "type": "TYPE_FP32", "side": 8, "width": 5}
# Model name -> (configuration, batch dimension of the file, what the refusal says).
BROKEN = {
    "name": (IO.format(**{**WRITTEN, "input": "picture"}), "N", "input 'picture'.*it has image"),
    "dtype": (IO.format(**{**WRITTEN, "type": "TYPE_FP16"}), "N", "TYPE_FP16.*'image'.*TYPE_FP32"),
    "dims": (IO.format(**{**WRITTEN, "side": 9}), "N", r"\[3,8,9\].*'image'.*\[3,8,8\]"),
    "width": (IO.format(**{**WRITTEN, "width": 6}), "N", r"\[6\].*'embedding'.*\[5\]"),
    "threads": (parameter("intra_op_thread_count", "two"), "N", "must be an integer, got 'two'"),
    "batch": (IO.format(**WRITTEN), 1, r"a batch of any size, but 'image'.*\[1,3,8,8\]"),
    "parameter": (parameter("intra_op_threads", "1"), "N", "does not do the parameter 'intra_op"),
    "graph": ("optimization { graph { level: 1 } }\n", "N", "does not do optimization.graph"),
    "renamed": ('default_model_filename: "other.onnx"\n', "N", "not do default_model_filename"),
    "complete": ("", 1, r"a batch of any size, but 'image'.*\[1,3,8,8\]"),
}


@pytest.mark.stand_in
def test_what_does_not_match_the_file_is_refused_at_load(tmp_path: Path):
    for name, (config, batch, _) in BROKEN.items():
        save(tmp_path, name, MINIMAL + config, projection(batch))
    save(tmp_path, "damaged", MINIMAL, projection())
    (tmp_path / "damaged/1/model.onnx").write_bytes(b"not a model")
    save(tmp_path, "missing", MINIMAL, projection())
    (tmp_path / "missing/1/model.onnx").unlink()
    save(tmp_path, "unbatched", MINIMAL.replace("max_batch_size: 8\n", ""), projection())
    save(tmp_path, "text", MINIMAL, identity(TensorProto.STRING, ["N", "M"]))
    save(tmp_path, "scalar", MINIMAL, identity(FLOAT, []))
    with pytest.raises(ServerStartError) as caught:
        TritonServer(tmp_path, free_ports=True).start()
    reasons = caught.value.not_ready
    expected = {name: message for name, (_, _, message) in BROKEN.items()}
    expected |= {"damaged": "Protobuf parsing failed", "missing": "unable to find .*model.onnx"}
    expected |= {"unbatched": "does not do max_batch_size: 0", "text": r"'x' is tensor\(string\)"}
    expected |= {"scalar": r"'x' is tensor\(float\) of shape \[\]"}
    assert set(reasons) == set(expected)
    for name, message in expected.items():
        assert re.search(message, reasons[name]), reasons[name]
        assert f"model '{name}'" in reasons[name]
