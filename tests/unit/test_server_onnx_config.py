"""What the stand-in onnxruntime backend completes, refuses and honours; no server, no session."""

import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest

from server.installation import STAND_IN

INPUTS, OUTPUTS = {"x": ("TYPE_FP32", [3])}, {"y": ("TYPE_FP32", [2])}


@dataclass
class NodeArg:
    """Stands for `onnxruntime.NodeArg`."""

    name: str
    type: str
    shape: list[Any]


@pytest.fixture
def rules() -> Iterator[ModuleType]:
    # As in Triton: the backend's directory is on sys.path, its modules have bare names.
    sys.path.append(str(STAND_IN))
    yield importlib.import_module("onnx_config")
    sys.path.remove(str(STAND_IN))
    del sys.modules["onnx_config"]


def config(**changes: Any) -> dict[str, Any]:
    return {"name": "m", "max_batch_size": 8, "input": [], "output": [], **changes}


def parameters(**values: str) -> dict[str, Any]:
    return config(parameters={key: {"string_value": value} for key, value in values.items()})


def io(name: str, dims: list[Any], data_type: str = "TYPE_FP32", **more: Any) -> dict[str, Any]:
    return {"name": name, "data_type": data_type, "dims": dims, **more}


def accelerator(side: str, name: str) -> dict[str, Any]:
    return {"execution_accelerators": {f"{side}_execution_accelerator": [{"name": name}]}}


# --- what it does not do -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"max_batch_size": 0}, "max_batch_size: 0"),
        ({"default_model_filename": "other.onnx"}, "default_model_filename"),
        ({"optimization": {"graph": {"level": 1}}}, "optimization.graph"),
        ({"optimization": accelerator("gpu", "cuda")}, "optimization.execution_accelerators"),
        ({"optimization": accelerator("cpu", "openvino")}, "optimization.execution_accelerators"),
        ({"sequence_batching": {"max_sequence_idle_microseconds": 5}}, "sequence_batching"),
        ({"batch_input": [{"kind": "BATCH_ELEMENT_COUNT"}]}, "batch_input"),
        ({"batch_output": [{"kind": "BATCH_SCATTER_WITH_INPUT_SHAPE"}]}, "batch_output"),
        ({"input": [io("x", [1], reshape={"shape": []})]}, "reshape of 'x'"),
        ({"input": [io("x", [3], optional=True)]}, "optional of 'x'"),
        ({"input": [io("x", [3], allow_ragged_batch=True)]}, "allow_ragged_batch of 'x'"),
        ({"output": [io("y", [3], is_shape_tensor=True)]}, "is_shape_tensor of 'y'"),
        (parameters(execution_mode="1"), "the parameter 'execution_mode'"),
        (parameters(intra_op_threads="2"), "the parameter 'intra_op_threads'"),
    ],
)
def test_what_it_does_not_do_is_refused_by_name(rules: ModuleType, changes: dict, key: str):
    with pytest.raises(rules.ConfigError) as caught:
        rules.refuse(config(**{**changes, "name": "m"}))
    message = str(caught.value)
    assert "\n" not in message and "model 'm'" in message and f"does not do {key}" in message
    assert message.endswith("run a tritonserver with the C++ onnxruntime backend")


def test_what_triton_hands_on_by_itself_is_not_refused(rules: ModuleType):
    rules.refuse(
        config(
            default_model_filename="model.onnx",
            optimization={"priority": "PRIORITY_DEFAULT", "graph": {"level": 0}},
            batch_input=[],
            batch_output=[],
            input=[io("x", [3], optional=False, allow_ragged_batch=False, is_shape_tensor=False)],
            dynamic_batching={"preferred_batch_size": [8]},
            parameters={"intra_op_thread_count": {"string_value": "1"}},
        )
    )


@pytest.mark.parametrize(
    ("type_", "shape", "said"),
    [
        ("tensor(int64)", ["N", 3], r"'x' is tensor\(int64\) of shape \[-1,3\]"),
        ("tensor(string)", ["N", 3], r"tensor\(string\)"),
        ("tensor(float)", ["N"], r"of shape \[-1\]"),
        ("tensor(float)", [], r"of shape \[\]"),
        ("tensor(float)", [1, 3], r"\[-1,...\], a batch of any size, but 'x' .* shape \[1,3\]"),
    ],
)
def test_other_tensors_than_batches_of_fp32_and_int32_are_refused(
    rules: ModuleType, type_: str, shape: list, said: str
):
    with pytest.raises(rules.ConfigError, match=f"model 'm'.*{said}.*C\\+\\+ onnxruntime backend"):
        rules.file_tensors("m", [NodeArg("x", type_, shape)])


def test_dynamic_dimensions_become_minus_one(rules: ModuleType):
    found = rules.file_tensors("m", [NodeArg("x", "tensor(float)", ["N", None, 3, -5])])
    assert found == {"x": ("TYPE_FP32", [-1, 3, -1])}


# --- completing and comparing ------------------------------------------------------------------


def test_what_is_left_out_is_completed(rules: ModuleType):
    completed = config()
    nodes = [
        NodeArg("embedding", "tensor(float)", ["N", 5]),
        NodeArg("tokens", "tensor(int32)", ["N", 1]),
    ]
    rules.complete(completed, {"image": ("TYPE_FP32", [3, 8, 8])}, rules.file_tensors("m", nodes))
    assert completed["input"] == [io("image", [3, 8, 8])]
    assert completed["output"] == [io("embedding", [5]), io("tokens", [1], "TYPE_INT32")]
    assert completed["dynamic_batching"] == {}
    single = config(max_batch_size=1)
    rules.complete(single, INPUTS, OUTPUTS)
    assert "dynamic_batching" not in single


def test_what_is_written_is_kept(rules: ModuleType):
    scheduler = {"max_queue_delay_microseconds": 7}
    written = config(dynamic_batching=scheduler, input=[io("image", [3])])
    rules.complete(written, INPUTS, OUTPUTS)
    assert written["dynamic_batching"] is scheduler
    assert (written["input"], written["output"]) == ([io("image", [3])], [io("y", [2])])
    whole = config(input=[io("x", [3])], output=[io("y", [2])])
    before = dict(whole)
    rules.complete(whole, INPUTS, OUTPUTS)
    assert whole == {**before, "dynamic_batching": {}}


MATCHING = {"input": [io("x", [3])], "output": [io("y", [2])]}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"input": [io("x", ["3"])]},  # Triton hands 64-bit numbers on as text in places.
        {"output": []},
        {"max_batch_size": 1},
    ],
)
def test_validation_accepts(rules: ModuleType, changes: dict[str, Any]):
    rules.validate(config(**{**MATCHING, **changes}), INPUTS, OUTPUTS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input": [io("z", [3])]}, r"TYPE_FP32 \[3\] of input 'z', the file nothing; it has x"),
        ({"output": [io("z", [2])]}, r"TYPE_FP32 \[2\] of output 'z', the file nothing; it has y"),
        ({"input": [io("x", [3]), io("z", [1])]}, r"\[1\] of input 'z', the file nothing"),
        ({"input": []}, r"nothing of input 'x', the file TYPE_FP32 \[3\]"),
        ({"input": [io("x", [3], "TYPE_FP16")]}, r"TYPE_FP16 \[3\] of input 'x', .* TYPE_FP32"),
        ({"output": [io("y", [2], "TYPE_INT8")]}, r"TYPE_INT8 \[2\] of output 'y', .* TYPE_FP32"),
        ({"input": [io("x", [4])]}, r"\[4\] of input 'x', the file TYPE_FP32 \[3\]"),
        ({"input": [io("x", [3, 1])]}, r"\[3,1\] of input 'x', the file TYPE_FP32 \[3\]"),
        ({"output": [io("y", [-1])]}, r"\[-1\] of output 'y', the file TYPE_FP32 \[2\]"),
    ],
)
def test_validation_refuses(rules: ModuleType, changes: dict[str, Any], message: str):
    with pytest.raises(rules.ConfigError, match=f"model 'm'.*{message}"):
        rules.validate(config(**{**MATCHING, **changes}), INPUTS, OUTPUTS)


# --- the session -------------------------------------------------------------------------------


def test_a_sessions_options_are_onnx_runtimes_own_unless_written(rules: ModuleType):
    own = {
        "intra_op_num_threads": 0,
        "inter_op_num_threads": 0,
        "enable_cpu_mem_arena": True,
        "enable_mem_pattern": True,
    }
    assert rules.session_options(config()) == (own, {})
    written = parameters(
        intra_op_thread_count="2",
        inter_op_thread_count="-1",
        enable_mem_arena="False",
        enable_mem_pattern="0",
        **{"session.disable_prepacking": "1"},
    )
    assert rules.session_options(written) == (
        {
            "intra_op_num_threads": 2,
            "inter_op_num_threads": 0,
            "enable_cpu_mem_arena": False,
            "enable_mem_pattern": False,
        },
        {"session.disable_prepacking": "1"},
    )


@pytest.mark.parametrize(
    ("key", "text", "wanted"),
    [
        ("intra_op_thread_count", "1.5", "an integer"),
        ("inter_op_thread_count", "two", "an integer"),
        ("enable_mem_arena", "off", "true, 1, false or 0"),
        ("enable_mem_pattern", "2", "true, 1, false or 0"),
        ("session.disable_prepacking", "true", "0 (prepack) or 1 (do not)"),
    ],
)
def test_a_value_that_says_nothing_is_refused(rules: ModuleType, key: str, text: str, wanted: str):
    with pytest.raises(rules.ConfigError) as caught:
        rules.session_options(parameters(**{key: text}))
    assert f"model 'm', parameter '{key}' must be {wanted}, got '{text}'" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("instance_group [ { count: 1 kind: KIND_GPU } ]", True),
        ("instance_group {\n  kind :  KIND_GPU\n}", True),
        ("instance_group [ { kind: KIND_AUTO }, { kind: KIND_GPU gpus: [ 0 ] } ]", True),
        ("instance_group [ { count: 1 kind: KIND_AUTO } ]", False),
        ("# not kind: KIND_GPU\ninstance_group [ { count: 1 } ]", False),
        ("", False),
    ],
)
def test_a_config_that_names_the_gpu_is_told_from_one_that_may_get_it(
    rules: ModuleType, text: str, named: bool
):
    assert rules.names_gpu(text) is named
