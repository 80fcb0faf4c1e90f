"""What the stand-in onnxruntime backend completes, refuses and honours; no server, no session."""

import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest

from server.backend_directory import STAND_IN


@dataclass
class NodeArg:
    """Stands for `onnxruntime.NodeArg`."""

    name: str
    type: str
    shape: list[Any]


@pytest.fixture
def modules() -> Iterator[tuple[ModuleType, ModuleType]]:
    # As in Triton: the backend's directory is on sys.path, its modules have bare names.
    names = ("onnx_model_config", "onnx_session_settings")
    sys.path.append(str(STAND_IN))
    yield tuple(importlib.import_module(name) for name in names)
    sys.path.remove(str(STAND_IN))
    for name in names:
        del sys.modules[name]


@pytest.fixture
def rules(modules: tuple[ModuleType, ModuleType]) -> ModuleType:
    return modules[0]


@pytest.fixture
def settings(modules: tuple[ModuleType, ModuleType]) -> ModuleType:
    return modules[1]


def tensors(rules: ModuleType, *nodes: tuple[str, list[Any]], type_: str = "tensor(float)"):
    return rules.tensor_infos("m", [NodeArg(name, type_, shape) for name, shape in nodes])


def config(**changes: Any) -> dict[str, Any]:
    return {"name": "m", "max_batch_size": 8, "input": [], "output": [], **changes}


def io(name: str, dims: list[Any], data_type: str = "TYPE_FP32", **more: Any) -> dict[str, Any]:
    return {"name": name, "data_type": data_type, "dims": dims, **more}


def test_dynamic_dimensions_become_minus_one(rules: ModuleType):
    (tensor,) = tensors(rules, ("x", ["N", None, 3, -5]))
    assert tensor.shape == (-1, -1, 3, -1)
    assert tensor.data_type == "TYPE_FP32"


def test_a_type_that_triton_does_not_know_is_refused(rules: ModuleType):
    with pytest.raises(rules.ConfigError, match=r"model 'm', tensor 'x' has type tensor\(bfl"):
        tensors(rules, ("x", ["N"]), type_="tensor(bfloat16)")


def test_completion_of_an_empty_config(rules: ModuleType):
    completed = config(max_batch_size=0)
    warnings = rules.complete(
        completed,
        tensors(rules, ("image", ["N", 3, 8, 8])),
        tensors(rules, ("embedding", ["N", 5]), ("score", ["N"])),
    )
    assert completed["max_batch_size"] == 4
    assert completed["dynamic_batching"] == {}
    assert completed["input"] == [io("image", [3, 8, 8])]
    assert completed["output"] == [
        io("embedding", [5]),
        io("score", [1], reshape={"shape": []}),
    ]
    assert len(warnings) == 1 and "autofilled max_batch_size to 4" in warnings[0]


def test_completion_keeps_what_is_written(rules: ModuleType):
    scheduler = {"max_queue_delay_microseconds": 7}
    written = config(dynamic_batching=scheduler, input=[io("image", [3])])
    rules.complete(written, tensors(rules, ("x", ["N", 3])), tensors(rules, ("y", ["N", 2])))
    assert written["dynamic_batching"] is scheduler
    assert written["input"] == [io("image", [3])]
    assert written["output"] == [io("y", [2])]


def test_a_complete_config_is_left_alone(rules: ModuleType):
    written = config(input=[io("x", [3])], output=[io("y", [2])])
    before = dict(written)
    assert not rules.needs_completion(written)
    rules.complete(written, tensors(rules, ("x", ["N", 3])), tensors(rules, ("y", ["N", 2])))
    assert written == before


def test_no_batching_for_a_fixed_first_dimension(rules: ModuleType):
    completed = config(max_batch_size=0)
    rules.complete(completed, tensors(rules, ("x", [2, 3])), tensors(rules, ("y", [])))
    assert completed["max_batch_size"] == 0
    assert "dynamic_batching" not in completed
    assert completed["input"] == [io("x", [2, 3])]
    assert completed["output"] == [io("y", [1])]


def test_a_batch_of_one_needs_no_scheduler(rules: ModuleType):
    completed = config(max_batch_size=1)
    rules.complete(completed, tensors(rules, ("x", ["N"])), tensors(rules, ("y", ["N"])))
    assert "dynamic_batching" not in completed


def test_completion_refuses_batching_that_the_file_cannot_do(rules: ModuleType):
    with pytest.raises(rules.ConfigError, match=r"model 'm'.*'x' has shape \[1,3\].*size is 8"):
        rules.complete(config(), tensors(rules, ("x", [1, 3])), tensors(rules, ("y", ["N"])))


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
    written = config(**{**MATCHING, **changes})
    rules.validate(written, tensors(rules, ("x", ["N", 3])), tensors(rules, ("y", ["N", 2])))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input": [io("z", [3])]}, "unexpected inference input 'z', allowed inputs are: x"),
        ({"output": [io("z", [2])]}, "unexpected inference output 'z', allowed outputs are: y"),
        ({"input": [io("x", [3]), io("z", [1])]}, r"expects 2 inputs \(x, z\), .*provides 1 \(x"),
        ({"input": [io("x", [3], "TYPE_FP16")]}, "TYPE_FP16 for input 'x', .*provides TYPE_FP32"),
        ({"output": [io("y", [2], "TYPE_INT8")]}, "TYPE_INT8 for output 'y', .*provides TYPE_FP32"),
        ({"input": [io("x", [4])]}, r"tensor 'x'.*\(shape \[-1,3\]\).*\(shape \[-1,4\]\)"),
        ({"input": [io("x", [3, 1])]}, r"tensor 'x'.* 2 dimensions .*specifies 3 dimensions"),
        ({"output": [io("y", [-1])]}, r"tensor 'y'.*\(shape \[-1,2\]\).*\(shape \[-1,-1\]\)"),
        ({"max_batch_size": 0}, r"tensor 'x'.*\(shape \[-1,3\]\).*\(shape \[3\]\)"),
    ],
)
def test_validation_refuses(rules: ModuleType, changes: dict[str, Any], message: str):
    written = config(**{**MATCHING, **changes})
    with pytest.raises(rules.ConfigError, match=f"model 'm'.*{message}"):
        rules.validate(written, tensors(rules, ("x", ["N", 3])), tensors(rules, ("y", ["N", 2])))


def test_validation_refuses_a_fixed_batch_dimension(rules: ModuleType):
    with pytest.raises(rules.ConfigError, match=r"'x'.*must be -1.*\[1,3\].*max_batch_size is 8"):
        rules.validate(
            config(**MATCHING), tensors(rules, ("x", [1, 3])), tensors(rules, ("y", ["N", 2]))
        )


def parameters(**values: str) -> dict[str, Any]:
    return config(parameters={key: {"string_value": value} for key, value in values.items()})


def test_settings_default_to_onnx_runtimes_own(settings: ModuleType):
    assert settings.session_settings(config()) == settings.SessionSettings()


def test_settings_are_read(settings: ModuleType):
    written = parameters(intra_op_thread_count="2", inter_op_thread_count="3", execution_mode="1")
    written["optimization"] = {
        "graph": {"level": 1},
        "execution_accelerators": {
            "gpu_execution_accelerator": [
                {"name": "cuda", "parameters": {"cudnn_conv_use_max_workspace": "0"}}
            ]
        },
    }
    read = settings.session_settings(written)
    assert (read.intra_op_threads, read.inter_op_threads, read.parallel) == (2, 3, True)
    assert read.graph_level == "ORT_ENABLE_EXTENDED"
    assert read.cuda_options == {"cudnn_conv_use_max_workspace": "0"}
    assert read.warnings == []


@pytest.mark.parametrize(
    ("level", "name"),
    [(-1, "ORT_ENABLE_BASIC"), (0, "ORT_ENABLE_ALL"), (2, "ORT_DISABLE_ALL")],
)
def test_graph_levels(settings: ModuleType, level: int, name: str):
    written = config(optimization={"graph": {"level": level}})
    assert settings.session_settings(written).graph_level == name


@pytest.mark.parametrize("key", ["intra_op_thread_count", "inter_op_thread_count"])
def test_thread_counts_must_be_integers(settings: ModuleType, key: str):
    with pytest.raises(ValueError, match=f"model 'm', parameter '{key}' .*integer, got '1.5'"):
        settings.session_settings(parameters(**{key: "1.5"}))


def test_execution_mode_is_zero_or_one(settings: ModuleType):
    with pytest.raises(ValueError, match="'execution_mode' must be 0 .* got 2"):
        settings.session_settings(parameters(execution_mode="2"))


def test_prepacking_is_on_unless_it_is_turned_off(settings: ModuleType):
    assert settings.session_settings(config()).prepacking
    on = settings.session_settings(parameters(**{"session.disable_prepacking": "0"}))
    assert on.prepacking and on.warnings == []
    off = settings.session_settings(parameters(**{"session.disable_prepacking": "1"}))
    assert not off.prepacking
    (warning,) = off.warnings
    assert "model 'm'" in warning and "the C++ one prepacks always" in warning


@pytest.mark.parametrize(
    ("text", "said"), [("2", "0 .* or 1 .* got 2"), ("true", "integer, got 'true'")]
)
def test_prepacking_is_zero_or_one(settings: ModuleType, text: str, said: str):
    with pytest.raises(ValueError, match=f"'session.disable_prepacking' .*{said}"):
        settings.session_settings(parameters(**{"session.disable_prepacking": text}))


@pytest.mark.parametrize("key", ["memory_arena", "memory_pattern"])
def test_memory_is_kept_unless_that_is_turned_off(settings: ModuleType, key: str):
    name = key.replace("memory", "enable_mem")
    assert getattr(settings.session_settings(config()), key)
    for text, kept in (("1", True), ("True", True), ("0", False), ("false", False)):
        read = settings.session_settings(parameters(**{name: text}))
        assert getattr(read, key) is kept and read.warnings == []
    with pytest.raises(ValueError, match=f"'{name}' must be true, 1, false or 0, got 'off'"):
        settings.session_settings(parameters(**{name: "off"}))


def test_unknown_parameters_and_unavailable_accelerators_warn(settings: ModuleType):
    written = parameters(intra_op_threads="2")
    written["optimization"] = {
        "execution_accelerators": {
            "gpu_execution_accelerator": [{"name": "tensorrt"}],
            "cpu_execution_accelerator": [{"name": "openvino"}],
        }
    }
    warnings = settings.session_settings(written).warnings
    assert len(warnings) == 3
    for word in ("'intra_op_threads' is unknown", "'tensorrt'", "'openvino'"):
        assert sum(word in warning for warning in warnings) == 1


def test_an_unknown_accelerator_is_refused(settings: ModuleType):
    written = config(
        optimization={"execution_accelerators": {"gpu_execution_accelerator": [{"name": "warp"}]}}
    )
    with pytest.raises(ValueError, match="unknown Execution Accelerator 'warp'"):
        settings.session_settings(written)


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
    settings: ModuleType, text: str, named: bool
):
    assert settings.names_gpu(text) is named
