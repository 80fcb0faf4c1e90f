"""What a Triton model configuration asks of an ONNX Runtime session.

The keys are those of Triton's C++ onnxruntime backend, and `session.disable_prepacking`, ONNX
Runtime's name of that session option. With "1" a session on the CPU uses its weights as they lie in
the file and not a copy in another order, so that processes which map the same external weights
share them. The C++ backend hands no such option on (its issue 107 asks for it): it passes over the
key without a word and prepacks always.

Like `onnx_model_config`, this module is imported by its bare name from `model.py` beside it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from onnx_model_config import ConfigError

_THREAD_KEYS = ("intra_op_thread_count", "inter_op_thread_count")
_PREPACKING_KEY = "session.disable_prepacking"
_ARENA_KEY, _PATTERN_KEY = "enable_mem_arena", "enable_mem_pattern"
_KNOWN_KEYS = (*_THREAD_KEYS, "execution_mode", _PREPACKING_KEY, _ARENA_KEY, _PATTERN_KEY)
# optimization.graph.level -> onnxruntime.GraphOptimizationLevel, as the C++ backend maps it.
_GRAPH_LEVELS = {-1: "ORT_ENABLE_BASIC", 1: "ORT_ENABLE_EXTENDED", 2: "ORT_DISABLE_ALL"}


@dataclass
class SessionSettings:
    """Settings of a session, read from a model configuration.

    Attributes:
        intra_op_threads: threads inside an operator; 0 leaves ONNX Runtime's own, all cores.
        inter_op_threads: threads across operators; 0 leaves ONNX Runtime's own.
        parallel: whether independent operators may run at the same time.
        graph_level: name in `onnxruntime.GraphOptimizationLevel`.
        prepacking: whether the weights are copied into the order that is fastest on the CPU.
        memory_arena: whether memory on the CPU is kept for the next run.
        memory_pattern: whether the memory that a batch size took is kept as one block for it.
        cuda_options: provider options for CUDA.
        warnings: lines worth a warning in the log.
    """

    intra_op_threads: int = 0
    inter_op_threads: int = 0
    parallel: bool = False
    graph_level: str = "ORT_ENABLE_ALL"
    prepacking: bool = True
    memory_arena: bool = True
    memory_pattern: bool = True
    cuda_options: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def session_settings(config: dict[str, Any]) -> SessionSettings:
    """Read the settings out of a model configuration.

    Args:
        config: the model configuration.

    Raises:
        ConfigError: a value that is no integer, an execution mode or a prepacking value other than
            0 and 1, a memory switch that is no boolean, or an execution accelerator that the C++
            backend does not know.
    """
    model, parameters = config["name"], config.get("parameters", {})
    intra, inter = (_integer(model, parameters, key) for key in _THREAD_KEYS)
    parallel = _switch(model, parameters, "execution_mode", "0 (sequential) or 1 (parallel)")
    unpacked = _switch(model, parameters, _PREPACKING_KEY, "0 (prepack) or 1 (do not)")
    optimization = config.get("optimization", {})
    settings = SessionSettings(intra, inter, parallel=parallel, prepacking=not unpacked)
    settings.memory_arena = _boolean(model, parameters, _ARENA_KEY, default=True)
    settings.memory_pattern = _boolean(model, parameters, _PATTERN_KEY, default=True)
    level = int(optimization.get("graph", {}).get("level", 0))
    settings.graph_level = _GRAPH_LEVELS.get(level, settings.graph_level)
    _read_accelerators(model, optimization.get("execution_accelerators", {}), settings)
    if unpacked:
        settings.warnings.append(
            f"model '{model}': parameter '{_PREPACKING_KEY}' is honoured by the stand-in "
            "onnxruntime backend only; the C++ one prepacks always"
        )
    settings.warnings += [
        f"model '{model}': parameter '{key}' is unknown to the stand-in onnxruntime backend and "
        f"ignored; it honours {', '.join(_KNOWN_KEYS)}"
        for key in sorted(set(parameters) - set(_KNOWN_KEYS))
    ]
    return settings


def names_gpu(config_text: str) -> bool:
    """Whether an instance group asks for KIND_GPU itself, where KIND_AUTO may become it.

    Args:
        config_text: a `config.pbtxt`.
    """
    return bool(re.search(r"\bkind\s*:\s*KIND_GPU\b", re.sub(r"#.*", "", config_text)))


def _integer(model: str, parameters: dict[str, Any], key: str) -> int:
    text = parameters.get(key, {}).get("string_value", "0")
    try:
        return int(text)
    except ValueError:
        raise ConfigError(
            f"unable to load model '{model}', parameter '{key}' must be an integer, got '{text}'"
        ) from None


def _switch(model: str, parameters: dict[str, Any], key: str, meaning: str) -> bool:
    value = _integer(model, parameters, key)
    if value not in (0, 1):
        raise ConfigError(
            f"unable to load model '{model}', parameter '{key}' must be {meaning}, got {value}"
        )
    return value == 1


def _boolean(model: str, parameters: dict[str, Any], key: str, default: bool) -> bool:
    text = parameters.get(key, {}).get("string_value", str(default))
    if text.lower() not in ("true", "1", "false", "0"):
        raise ConfigError(
            f"unable to load model '{model}', parameter '{key}' must be true, 1, false or 0, "
            f"got '{text}'"
        )
    return text.lower() in ("true", "1")


def _read_accelerators(model: str, accelerators: dict[str, Any], settings: SessionSettings) -> None:
    for known, asked in (
        (("cuda", "tensorrt"), accelerators.get("gpu_execution_accelerator", [])),
        (("openvino",), accelerators.get("cpu_execution_accelerator", [])),
    ):
        for accelerator in asked:
            name = accelerator["name"]
            if name not in known:
                raise ConfigError(
                    f"unable to load model '{model}', unknown Execution Accelerator '{name}' is "
                    f"requested, known here: {', '.join(known)}"
                )
            if name == "cuda":
                settings.cuda_options.update(accelerator.get("parameters", {}))
            else:
                settings.warnings.append(
                    f"model '{model}': execution accelerator '{name}' is not available in the "
                    "stand-in onnxruntime backend and ignored"
                )
