"""What a rung's `config.pbtxt` may say to the stand-in backend, and what it must agree on.

Honoured is what the configurations of `model_repository/vit_*` and the options of
`export repository` can say; everything else is refused by name when the model is loaded. What is
completed and compared follows Triton's C++ onnxruntime backend, so that a repository which loads
here loads there.

Pure functions over the configuration, as the dict that Triton hands a Python backend. Triton hands
defaults on as empty lists, zeros and empty texts, so what counts is the value, not the key. The
module lies beside `model.py` in the backend's directory and is imported by its bare name, the only
way a python-based backend can import a neighbour; hence the telling name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

FILENAME = "model.onnx"
# Of each tensor of an ONNX file the type, as a configuration names it, and the dimensions without
# the batch's; -1 is a dynamic one.
FileTensors = dict[str, tuple[str, list[int]]]
_TYPES = {"tensor(float)": "TYPE_FP32", "tensor(int32)": "TYPE_INT32"}  # of images, and of counts
# ONNX Runtime's name of a session option. With 1 a session on the CPU uses its weights as they lie
# in the file, so that processes which map the same external weights share them. The C++ backend
# passes over the key without a word (its issue 107 asks for it) and prepacks always.
_PREPACKING_KEY = "session.disable_prepacking"
# The C++ backend's keys, and the attribute of ONNX Runtime's `SessionOptions` that each one sets.
_THREADS = {
    "intra_op_thread_count": "intra_op_num_threads",
    "inter_op_thread_count": "inter_op_num_threads",
}
_MEMORY = {"enable_mem_arena": "enable_cpu_mem_arena", "enable_mem_pattern": "enable_mem_pattern"}
_PARAMETERS = (*_THREADS, *_MEMORY, _PREPACKING_KEY)
_TENSOR_FIELDS = ("reshape", "optional", "allow_ragged_batch", "is_shape_tensor")


class ConfigError(ValueError):
    """The configuration asks for what cannot be done. The message is one line."""


def refuse(config: dict[str, Any]) -> None:
    """Refuse what this backend does not do.

    Raises:
        ConfigError: naming the model and the key.
    """
    optimization = config.get("optimization") or {}
    tensors = [*(config.get("input") or ()), *(config.get("output") or ())]
    asked = {
        "max_batch_size: 0": not config.get("max_batch_size"),
        "default_model_filename": config.get("default_model_filename") not in (None, "", FILENAME),
        "optimization.graph": (optimization.get("graph") or {}).get("level"),
        "optimization.execution_accelerators": any(
            (optimization.get("execution_accelerators") or {}).values()
        ),
        **{key: config.get(key) for key in ("sequence_batching", "batch_input", "batch_output")},
        **{f"{key} of '{io['name']}'": io.get(key) for io in tensors for key in _TENSOR_FIELDS},
        **{
            f"the parameter '{key}' (it honours {', '.join(_PARAMETERS)})": True
            for key in sorted(config.get("parameters") or {})
            if key not in _PARAMETERS
        },
    }
    for what, is_asked in asked.items():
        if is_asked:
            raise ConfigError(
                f"unable to load model '{config['name']}': the stand-in onnxruntime backend does "
                f"not do {what}; run a tritonserver with the C++ onnxruntime backend"
            )


def file_tensors(model: str, node_args: Iterable[Any]) -> FileTensors:
    """Translate what `InferenceSession.get_inputs()` or `get_outputs()` returns.

    Args:
        model: the model's name, for the error's text.
        node_args: objects with `name`, `type` and `shape`, as ONNX Runtime has them.

    Raises:
        ConfigError: a tensor that is neither FP32 nor INT32, whose first dimension does not vary
            with the batch, or that has no other.
    """
    found = {}
    for node in node_args:
        # A dynamic dimension is a name or None; some exporters write a negative number.
        shape = [d if isinstance(d, int) and d >= 0 else -1 for d in node.shape or []]
        if node.type not in _TYPES or len(shape) < 2 or shape[0] != -1:
            raise ConfigError(
                f"unable to load model '{model}': the stand-in onnxruntime backend takes FP32 "
                f"and INT32 tensors of shape [-1,...], a batch of any size, but '{node.name}' is "
                f"{node.type} of shape {_shape(shape)}; run a tritonserver with the C++ "
                "onnxruntime backend"
            )
        found[node.name] = _TYPES[node.type], shape[1:]
    return found


def complete(config: dict[str, Any], inputs: FileTensors, outputs: FileTensors) -> None:
    """Fill in the inputs, outputs and dynamic batching that are left out, in place."""
    if config["max_batch_size"] > 1 and "dynamic_batching" not in config:
        # Triton's core then adds the preferred size (max_batch_size) and the delay (0).
        config["dynamic_batching"] = {}
    for side, tensors in (("input", inputs), ("output", outputs)):
        config[side] = config.get(side) or [
            {"name": name, "data_type": data_type, "dims": dims}
            for name, (data_type, dims) in tensors.items()
        ]


def validate(config: dict[str, Any], inputs: FileTensors, outputs: FileTensors) -> None:
    """Check that a complete configuration describes the file.

    Every input of the file must be configured, while outputs may be left out.

    Raises:
        ConfigError: naming the model, the tensor, and what each side says.
    """
    for side, tensors in (("input", inputs), ("output", outputs)):
        known = {name: f"{data_type} {_shape(dims)}" for name, (data_type, dims) in tensors.items()}
        written = {io["name"]: f"{io['data_type']} {_shape(io['dims'])}" for io in config[side]}
        for name in written | (known if side == "input" else {}):
            says, has = written.get(name, "nothing"), known.get(name, "nothing")
            if says != has:
                raise ConfigError(
                    f"unable to load model '{config['name']}': the configuration says {says} of "
                    f"{side} '{name}', the file {has}; it has {', '.join(known)}"
                )


def session_options(config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Read what a session is opened with.

    Returns:
        Attributes of `onnxruntime.SessionOptions`, and its configuration entries.

    Raises:
        ConfigError: a value that is no number, or no switch.
    """
    attributes = {}
    for key, attribute in _THREADS.items():
        text = _text(config, key, "0")
        if not re.fullmatch(r"-?\d+", text):
            raise _bad_value(config, key, "an integer", text)
        attributes[attribute] = max(int(text), 0)  # 0 leaves ONNX Runtime's own: all cores.
    for key, attribute in _MEMORY.items():
        text = _text(config, key, "true").lower()
        if text not in ("true", "1", "false", "0"):
            raise _bad_value(config, key, "true, 1, false or 0", text)
        attributes[attribute] = text in ("true", "1")
    unpacked = _text(config, _PREPACKING_KEY, "0")
    if unpacked not in ("0", "1"):
        raise _bad_value(config, _PREPACKING_KEY, "0 (prepack) or 1 (do not)", unpacked)
    return attributes, {_PREPACKING_KEY: "1"} if unpacked == "1" else {}


def names_gpu(config_text: str) -> bool:
    """Whether an instance group asks for KIND_GPU itself, where KIND_AUTO may become it.

    Args:
        config_text: a `config.pbtxt`.
    """
    return bool(re.search(r"\bkind\s*:\s*KIND_GPU\b", re.sub(r"#.*", "", config_text)))


def _text(config: dict[str, Any], key: str, default: str) -> str:
    return str((config.get("parameters") or {}).get(key, {}).get("string_value", default))


def _bad_value(config: dict[str, Any], key: str, wanted: str, text: str) -> ConfigError:
    return ConfigError(
        f"unable to load model '{config['name']}', parameter '{key}' must be {wanted}, got '{text}'"
    )


def _shape(dims: Iterable[object]) -> str:
    return f"[{','.join(map(str, dims))}]"
