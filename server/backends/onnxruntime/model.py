"""A python-based Triton backend named onnxruntime, for servers without the C++ one.

Triton runs it for models with `backend: "onnxruntime"` where its backend directory has no
`libtriton_onnxruntime.so`. The model repository needs no change between the two. It runs our rungs,
batches of FP32 and INT32 tensors, and refuses what else a configuration may ask for
(`onnx_config`).

Python imports this file twice per model (once to complete the configuration), so the import of
ONNX Runtime waits until it is needed.
"""

from __future__ import annotations

import json
import os
from typing import Any

import numpy as np
import onnx_config
import triton_python_backend_utils as pb_utils
from stall_guard import StallGuard


class TritonPythonModel:
    """One instance of an ONNX model."""

    @staticmethod
    def auto_complete_config(auto_complete_model_config: Any) -> Any:
        """Fill in inputs, outputs and batching from the ONNX file, as the C++ backend does."""
        config = auto_complete_model_config.as_dict()
        onnx_config.refuse(config)
        if not (config.get("input") and config.get("output")):
            ort = _import_onnxruntime()
            options = ort.SessionOptions()
            # Only names, types and shapes are read: optimising the graph would be wasted time.
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
            options.intra_op_num_threads = 1
            session = _load(config["name"], options, ["CPUExecutionProvider"])
            onnx_config.complete(config, *_tensors(config["name"], session))
        return auto_complete_model_config

    def initialize(self, args: dict[str, str]) -> None:
        """Open the session and refuse a configuration that does not match the file."""
        config = json.loads(args["model_config"])
        onnx_config.refuse(config)
        device = int(args["model_instance_device_id"])
        self._session = _open_session(config, args["model_instance_kind"], device)
        onnx_config.validate(config, *_tensors(config["name"], self._session))
        self._input_names = [io["name"] for io in config["input"]]
        self._output_names = [io["name"] for io in config["output"]]
        self._guard = StallGuard()  # last: opening a session may keep other threads waiting

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer all requests with one run of the session.

        Requests that cannot run together run alone, so that each gets its own answer or error.
        """
        self._guard.begin()
        answers = None
        if len(requests) > 1:
            try:
                answers = self._answer(requests)
            except Exception as error:
                pb_utils.Logger.log_warn(
                    f"a batch of {len(requests)} requests failed, running each alone: {error}"
                )
        answers = answers or [self._answer_alone(request) for request in requests]
        self._guard.check()
        return answers

    def finalize(self) -> None:
        """Free the session's memory before the process ends."""
        del self._session

    def _answer_alone(self, request: Any) -> Any:
        try:
            return self._answer([request])[0]
        except Exception as error:
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error)))

    def _answer(self, requests: list[Any]) -> list[Any]:
        feeds = [self._feed(request) for request in requests]
        wanted = [set(request.requested_output_names()) for request in requests]
        names = [name for name in self._output_names if any(name in one for one in wanted)]
        counts = [len(feed[self._input_names[0]]) for feed in feeds]
        together = feeds[0]
        if len(feeds) > 1:
            together = {name: np.concatenate([feed[name] for feed in feeds]) for name in feeds[0]}
        outputs = self._session.run(names, together)
        for name, output in zip(names, outputs, strict=True):
            if len(output) != sum(counts):
                raise ValueError(
                    f"output '{name}' has {len(output)} rows for a batch of {sum(counts)}"
                )
        responses, start = [], 0
        for mine, count in zip(wanted, counts, strict=True):
            # Rows are views: the copy into shared memory is the only one.
            tensors = [
                pb_utils.Tensor(name, output[start : start + count])
                for name, output in zip(names, outputs, strict=True)
                if name in mine
            ]
            responses.append(pb_utils.InferenceResponse(tensors))
            start += count
        return responses

    def _feed(self, request: Any) -> dict[str, np.ndarray[Any, Any]]:
        return {
            name: pb_utils.get_input_tensor_by_name(request, name).as_numpy()
            for name in self._input_names
        }


def _tensors(model: str, session: Any) -> tuple[onnx_config.FileTensors, onnx_config.FileTensors]:
    """The inputs and the outputs that the ONNX file declares."""
    return (
        onnx_config.file_tensors(model, session.get_inputs()),
        onnx_config.file_tensors(model, session.get_outputs()),
    )


def _open_session(config: dict[str, Any], kind: str, device: int) -> Any:
    attributes, entries = onnx_config.session_options(config)
    ort = _import_onnxruntime()
    options = ort.SessionOptions()
    for name, value in attributes.items():
        setattr(options, name, value)
    for name, value in entries.items():
        options.add_session_config_entry(name, value)
    providers: list[Any] = ["CPUExecutionProvider"]
    if kind == "GPU":
        if hasattr(ort, "preload_dlls"):  # CUDA and cuDNN out of their wheels, where installed.
            ort.preload_dlls()
        providers.insert(0, ("CUDAExecutionProvider", {"device_id": str(device)}))
    model = config["name"]
    session = _load(model, options, providers)
    if kind == "GPU" and "CUDAExecutionProvider" not in session.get_providers():
        # ONNX Runtime itself only logs that CUDA cannot be had and goes on without: that would be a
        # silent CPU model under KIND_GPU.
        without = f"ONNX Runtime has no CUDA here (it has {', '.join(session.get_providers())})"
        if onnx_config.names_gpu(_config_text()):
            raise pb_utils.TritonModelException(
                f"unavailable: model '{model}' asks for KIND_GPU, but {without}; "
                "use KIND_CPU or KIND_AUTO"
            )
        pb_utils.Logger.log_warn(f"model '{model}' runs on the CPU under KIND_AUTO: {without}")
    return session


def _load(model: str, options: Any, providers: list[Any]) -> Any:
    path = os.path.join(pb_utils.get_model_dir(), onnx_config.FILENAME)
    if not os.path.exists(path):
        raise pb_utils.TritonModelException(f"unable to find '{path}' for model '{model}'")
    try:
        return _import_onnxruntime().InferenceSession(path, options, providers=providers)
    except Exception as error:  # ONNX Runtime's errors have no common base class.
        raise pb_utils.TritonModelException(f"unable to load model '{model}': {error}") from error


def _config_text() -> str:
    """The configuration as it was written: in the one that Triton hands on, AUTO is resolved."""
    path = os.path.join(os.path.dirname(pb_utils.get_model_dir()), "config.pbtxt")
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except OSError:  # Without one Triton writes its own, with KIND_AUTO.
        return ""


def _import_onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise pb_utils.TritonModelException(
            f"onnxruntime cannot be imported by Triton's Python ({error}); "
            "pip install onnxruntime-gpu"
        ) from error
    return onnxruntime
