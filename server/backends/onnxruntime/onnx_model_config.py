"""What a Triton model configuration and an ONNX file must agree on.

Pure functions over the configuration (as the dict that Triton hands a Python backend) and the
tensors that the file declares. They follow Triton's C++ onnxruntime backend
(`AutoCompleteConfig`, `ValidateInputs`, `ValidateOutputs` and `CompareDimsSupported` in
`onnxruntime.cc` and `onnxruntime_utils.cc`), so that a repository which loads here loads there.

This module lies beside `model.py` in the backend's directory and is imported by its bare name,
the only way a python-based backend can import a neighbour; hence the telling name.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

DEFAULT_MODEL_FILENAME = "model.onnx"
# Triton's --default-max-batch-size default. A python-based backend is not told the option's value.
DEFAULT_MAX_BATCH_SIZE = 4

_TYPES = {
    "tensor(bool)": "TYPE_BOOL",
    "tensor(uint8)": "TYPE_UINT8",
    "tensor(uint16)": "TYPE_UINT16",
    "tensor(uint32)": "TYPE_UINT32",
    "tensor(uint64)": "TYPE_UINT64",
    "tensor(int8)": "TYPE_INT8",
    "tensor(int16)": "TYPE_INT16",
    "tensor(int32)": "TYPE_INT32",
    "tensor(int64)": "TYPE_INT64",
    "tensor(float16)": "TYPE_FP16",
    "tensor(float)": "TYPE_FP32",
    "tensor(double)": "TYPE_FP64",
    "tensor(string)": "TYPE_STRING",
}


class ConfigError(ValueError):
    """The configuration and the ONNX file disagree. The message is one line."""


@dataclass(frozen=True)
class TensorInfo:
    """An input or output that the ONNX file declares.

    Attributes:
        name: the tensor's name.
        data_type: Triton's name of its type, such as `TYPE_FP32`.
        shape: its dimensions, batch included where there is one; -1 is a dynamic one.
    """

    name: str
    data_type: str
    shape: tuple[int, ...]


def tensor_infos(model: str, node_args: Iterable[Any]) -> list[TensorInfo]:
    """Translate what `InferenceSession.get_inputs()` or `get_outputs()` returns.

    Args:
        model: the model's name, for the error text.
        node_args: objects with `name`, `type` and `shape`, as ONNX Runtime has them.

    Raises:
        ConfigError: a type that Triton has no name for.
    """
    infos = []
    for node in node_args:
        if node.type not in _TYPES:
            raise ConfigError(
                f"unable to load model '{model}', tensor '{node.name}' has type {node.type}, "
                "which Triton's onnxruntime backend does not support"
            )
        # A dynamic dimension is a name or None; some exporters write a negative number.
        shape = tuple(d if isinstance(d, int) and d >= 0 else -1 for d in node.shape or [])
        infos.append(TensorInfo(node.name, _TYPES[node.type], shape))
    return infos


def needs_completion(config: dict[str, Any]) -> bool:
    """Whether the configuration leaves its inputs or its outputs to the ONNX file.

    With both written the C++ backend completes nothing, dynamic batching included.
    """
    has_inputs = bool(config.get("input")) or bool(config.get("batch_input"))
    return not (has_inputs and bool(config.get("output")))


def complete(
    config: dict[str, Any], inputs: Sequence[TensorInfo], outputs: Sequence[TensorInfo]
) -> list[str]:
    """Fill in what the configuration leaves out, in place.

    Args:
        config: the model configuration; `max_batch_size`, `dynamic_batching`, `input` and `output`
            may be set.
        inputs: the file's inputs.
        outputs: the file's outputs.

    Returns:
        Lines worth a warning in the log.

    Raises:
        ConfigError: `max_batch_size` is set and a tensor has no dynamic first dimension.
    """
    if not needs_completion(config):
        return []
    warnings = []
    fixed = next((t for t in [*inputs, *outputs] if t.shape[:1] != (-1,)), None)
    if fixed is None:
        if config["max_batch_size"] == 0:
            config["max_batch_size"] = DEFAULT_MAX_BATCH_SIZE
            warnings.append(
                f"autofilled max_batch_size to {DEFAULT_MAX_BATCH_SIZE} for model "
                f"'{config['name']}' since batching is supported but no max_batch_size is "
                "specified in model configuration"
            )
        has_scheduler = "sequence_batching" in config or "dynamic_batching" in config
        if config["max_batch_size"] > 1 and not has_scheduler:
            # Triton's core then adds the preferred size (max_batch_size) and the delay (0).
            config["dynamic_batching"] = {}
    elif config["max_batch_size"] != 0:
        raise ConfigError(
            f"autofill failed for model '{config['name']}': model does not support batching while "
            f"non-zero max_batch_size is specified: tensor '{fixed.name}' has shape "
            f"{_shape(fixed.shape)}, max_batch_size is {config['max_batch_size']}"
        )
    batched = config["max_batch_size"] > 0
    if not config.get("input") and not config.get("batch_input"):
        config["input"] = [_completed(t, batched) for t in inputs]
    if not config.get("output"):
        config["output"] = [_completed(t, batched) for t in outputs]
    return warnings


def validate(
    config: dict[str, Any], inputs: Sequence[TensorInfo], outputs: Sequence[TensorInfo]
) -> None:
    """Check that a complete configuration describes the file.

    As in the C++ backend, every input of the file must be configured, while outputs may be left
    out; a configured input may be narrower than a dynamic dimension, an output must be equal.

    Raises:
        ConfigError: naming the model, the tensor, and what each side says.
    """
    model = config["name"]
    required = [io for io in config["input"] if not io.get("optional")]
    if len(required) != len(inputs):
        raise ConfigError(
            f"unable to load model '{model}', configuration expects {len(required)} inputs "
            f"({_names(required)}), model provides {len(inputs)} "
            f"({', '.join(t.name for t in inputs)})"
        )
    _validate_side(config, "input", inputs)
    _validate_side(config, "output", outputs)


def _validate_side(config: dict[str, Any], side: str, tensors: Sequence[TensorInfo]) -> None:
    model, known = config["name"], {t.name: t for t in tensors}
    for io in config[side]:
        name = io["name"]
        if io.get("optional") and config["max_batch_size"] != 0:
            raise ConfigError(
                f"unable to load model '{model}', optional input '{name}' is not supported for "
                f"models that support batching (max_batch_size is {config['max_batch_size']})"
            )
        if name not in known:
            raise ConfigError(
                f"unable to load model '{model}', unexpected inference {side} '{name}', "
                f"allowed {side}s are: {', '.join(sorted(known))}"
            )
        if io["data_type"] != known[name].data_type:
            raise ConfigError(
                f"unable to load model '{model}', configuration expects datatype "
                f"{io['data_type']} for {side} '{name}', model provides {known[name].data_type}"
            )
        _validate_dims(config, io, known[name], exact=side == "output")


def _validate_dims(
    config: dict[str, Any], io: dict[str, Any], tensor: TensorInfo, exact: bool
) -> None:
    model, batched = config["name"], config["max_batch_size"] > 0
    dims = [int(d) for d in (io["reshape"].get("shape", []) if "reshape" in io else io["dims"])]
    if not tensor.shape and not batched:  # A scalar: Triton can only write it as ones.
        if any(d != 1 for d in dims):
            raise ConfigError(
                f"unable to load model '{model}', scalar tensor '{tensor.name}' should only "
                f"provide 1 in the model configuration, which provides {_shape(dims)}"
            )
        return
    if batched and tensor.shape[:1] != (-1,):
        raise ConfigError(
            f"model '{model}', tensor '{tensor.name}': for the model to support batching the "
            "shape should have at least 1 dimension and the first dimension must be -1; but "
            f"shape expected by the model is {_shape(tensor.shape)} "
            f"and max_batch_size is {config['max_batch_size']}"
        )
    full = [-1, *dims] if batched else dims
    if len(full) != len(tensor.shape) or any(
        (exact or of_model != -1) and of_model != of_config
        for of_model, of_config in zip(tensor.shape, full, strict=False)
    ):
        batch_note = (
            " (an initial batch dimension because max_batch_size > 0, then the explicit dims)"
        )
        raise ConfigError(
            f"model '{model}', tensor '{tensor.name}': the model expects {len(tensor.shape)} "
            f"dimensions (shape {_shape(tensor.shape)}) but the model configuration specifies "
            f"{len(full)} dimensions (shape {_shape(full)}){batch_note if batched else ''}"
        )


def _completed(tensor: TensorInfo, batched: bool) -> dict[str, Any]:
    dims = list(tensor.shape[1:] if batched else tensor.shape)
    io: dict[str, Any] = {"name": tensor.name, "data_type": tensor.data_type, "dims": dims or [1]}
    if not dims and batched:
        # One value per row: Triton has no empty dims, so [1] on the wire and [] for the model.
        io["reshape"] = {"shape": []}
    return io


def _names(ios: Iterable[dict[str, Any]]) -> str:
    return ", ".join(io["name"] for io in ios)


def _shape(dims: Iterable[int]) -> str:
    return "[" + ",".join(str(d) for d in dims) + "]"
