"""A python-based Triton backend named onnxruntime, for servers without the C++ one.

Triton runs it for models with `backend: "onnxruntime"` where its backend directory has no
`libtriton_onnxruntime.so`. The model repository needs no change between the two: what is completed,
refused and honoured is decided in `onnx_model_config` and `onnx_session_settings` after the C++
backend. Known differences: TensorRT and OpenVINO accelerators are ignored with a warning, and
sequence batching, ragged batches and custom operators are not supported.

Python imports this file twice per model (once to complete the configuration), so the import of
ONNX Runtime waits until it is needed.
"""

from __future__ import annotations

import json
import os
from typing import Any

import numpy as np
import onnx_model_config as model_config
import triton_python_backend_utils as pb_utils
from onnx_session_settings import SessionSettings, names_gpu, session_settings
from stall_guard import StallGuard


class TritonPythonModel:
    """One instance of an ONNX model."""

    @staticmethod
    def auto_complete_config(auto_complete_model_config: Any) -> Any:
        """Fill in inputs, outputs and batching from the ONNX file, as the C++ backend does."""
        config = auto_complete_model_config.as_dict()
        if not model_config.needs_completion(config):
            return auto_complete_model_config
        ort = _import_onnxruntime()
        options = ort.SessionOptions()
        # Only names, types and shapes are read: optimising the graph would be wasted time.
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.intra_op_num_threads = 1
        session = _load(config, options, ["CPUExecutionProvider"])
        inputs = model_config.tensor_infos(config["name"], session.get_inputs())
        outputs = model_config.tensor_infos(config["name"], session.get_outputs())
        for warning in model_config.complete(config, inputs, outputs):
            pb_utils.Logger.log_warn(warning)
        return auto_complete_model_config

    def initialize(self, args: dict[str, str]) -> None:
        """Open the session and refuse a configuration that does not match the file."""
        config = json.loads(args["model_config"])
        settings = session_settings(config)
        for warning in settings.warnings:
            pb_utils.Logger.log_warn(warning)
        device = int(args["model_instance_device_id"])
        self._session = _open_session(config, settings, args["model_instance_kind"], device)
        inputs = model_config.tensor_infos(config["name"], self._session.get_inputs())
        outputs = model_config.tensor_infos(config["name"], self._session.get_outputs())
        model_config.validate(config, inputs, outputs)

        self._batched = config["max_batch_size"] > 0
        self._input_names = [io["name"] for io in config["input"]]
        self._output_names = [io["name"] for io in config["output"]]
        self._strings = {t.name for t in inputs if t.data_type == "TYPE_STRING"}
        self._scalar_inputs = {t.name for t in inputs if not t.shape}
        self._scalar_outputs = {t.name for t in outputs if not t.shape}
        self._guard = StallGuard()  # last: opening a session may keep other threads waiting

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer all requests with one run of the session.

        Requests that cannot run together run alone, so that each gets its own answer or error.
        """
        answers = self._answer(requests)
        self._guard.check()
        return answers

    def _answer(self, requests: list[Any]) -> list[Any]:
        if len(requests) > 1 and self._batched:
            try:
                return self._answer_together(requests)
            except Exception as error:
                pb_utils.Logger.log_warn(
                    f"a batch of {len(requests)} requests failed, running each alone: {error}"
                )
        return [self._answer_alone(request) for request in requests]

    def finalize(self) -> None:
        """Free the session's memory before the process ends."""
        del self._session

    def _answer_alone(self, request: Any) -> Any:
        try:
            names = self._requested([request])
            outputs = self._session.run(names, self._feed(request))
            return _response(names, outputs, self._scalar_outputs)
        except Exception as error:
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error)))

    def _answer_together(self, requests: list[Any]) -> list[Any]:
        feeds = [self._feed(request) for request in requests]
        first = self._input_names[0]
        ends = np.cumsum([len(feed[first]) for feed in feeds])
        names = self._requested(requests)
        outputs = self._session.run(
            names, {name: np.concatenate([feed[name] for feed in feeds]) for name in feeds[0]}
        )
        for name, output in zip(names, outputs, strict=True):
            if len(output) != ends[-1]:
                raise ValueError(
                    f"output '{name}' has {len(output)} rows for a batch of {ends[-1]}"
                )
        responses = []
        for request, feed, end in zip(requests, feeds, ends, strict=True):
            wanted = set(request.requested_output_names())
            start = end - len(feed[first])
            rows = {
                name: output[start:end]  # A view: the copy into shared memory is the only one.
                for name, output in zip(names, outputs, strict=True)
                if name in wanted
            }
            responses.append(_response(list(rows), list(rows.values()), set()))
        return responses

    def _requested(self, requests: list[Any]) -> list[str]:
        wanted = {name for request in requests for name in request.requested_output_names()}
        return [name for name in self._output_names if name in wanted]

    def _feed(self, request: Any) -> dict[str, np.ndarray]:
        feed = {}
        for name in self._input_names:
            tensor = pb_utils.get_input_tensor_by_name(request, name)
            if tensor is None:  # An optional input that the request leaves out.
                continue
            array = tensor.as_numpy()
            if name in self._strings:
                texts = [v.decode() if isinstance(v, bytes) else v for v in array.ravel()]
                array = np.array(texts, dtype=object).reshape(array.shape)
            feed[name] = array.reshape(()) if name in self._scalar_inputs else array
        return feed


def _response(names: list[str], outputs: list[np.ndarray], scalars: set[str]) -> Any:
    return pb_utils.InferenceResponse(
        [
            pb_utils.Tensor(name, np.reshape(output, 1) if name in scalars else output)
            for name, output in zip(names, outputs, strict=True)
        ]
    )


def _open_session(config: dict[str, Any], settings: SessionSettings, kind: str, device: int) -> Any:
    ort = _import_onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = max(settings.intra_op_threads, 0)
    options.inter_op_num_threads = max(settings.inter_op_threads, 0)
    if settings.parallel:
        options.execution_mode = ort.ExecutionMode.ORT_PARALLEL
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, settings.graph_level)
    options.enable_cpu_mem_arena = settings.memory_arena
    options.enable_mem_pattern = settings.memory_pattern
    if not settings.prepacking:
        options.add_session_config_entry("session.disable_prepacking", "1")
    providers: list[Any] = ["CPUExecutionProvider"]
    if kind == "GPU":
        if hasattr(ort, "preload_dlls"):  # CUDA and cuDNN out of their wheels, where installed.
            ort.preload_dlls()
        cuda = {**settings.cuda_options, "device_id": str(device)}
        providers.insert(0, ("CUDAExecutionProvider", cuda))
    session = _load(config, options, providers)
    if kind == "GPU" and "CUDAExecutionProvider" not in session.get_providers():
        _allow_only_under_auto(config["name"], session.get_providers())
    return session


def _allow_only_under_auto(model: str, providers: list[str]) -> None:
    # ONNX Runtime itself only logs that CUDA cannot be had and goes on without: that would be a
    # silent CPU model under KIND_GPU.
    without = f"ONNX Runtime has no CUDA here (it has {', '.join(providers)})"
    if names_gpu(_config_text()):
        raise pb_utils.TritonModelException(
            f"unavailable: model '{model}' asks for KIND_GPU, but {without}; "
            "use KIND_CPU or KIND_AUTO"
        )
    pb_utils.Logger.log_warn(f"model '{model}' runs on the CPU under KIND_AUTO: {without}")


def _load(config: dict[str, Any], options: Any, providers: list[Any]) -> Any:
    path = _model_path(config)
    try:
        return _import_onnxruntime().InferenceSession(path, options, providers=providers)
    except Exception as error:  # ONNX Runtime's errors have no common base class.
        raise pb_utils.TritonModelException(
            f"unable to load model '{config['name']}': {error}"
        ) from error


def _config_text() -> str:
    """The configuration as it was written: in the one that Triton hands on, AUTO is resolved."""
    path = os.path.join(os.path.dirname(pb_utils.get_model_dir()), "config.pbtxt")
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except OSError:  # Without one Triton writes its own, with KIND_AUTO.
        return ""


def _model_path(config: dict[str, Any]) -> str:
    filename = config.get("default_model_filename") or model_config.DEFAULT_MODEL_FILENAME
    path = os.path.join(pb_utils.get_model_dir(), filename)
    if os.path.isdir(path):
        path = os.path.join(path, model_config.DEFAULT_MODEL_FILENAME)
    if not os.path.exists(path):
        raise pb_utils.TritonModelException(f"unable to find '{path}' for model '{config['name']}'")
    return path


def _import_onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise pb_utils.TritonModelException(
            f"onnxruntime cannot be imported by Triton's Python ({error}); "
            "pip install onnxruntime-gpu"
        ) from error
    return onnxruntime
