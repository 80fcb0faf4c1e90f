"""Triton adapter around `routing`: only translates tensors; every decision is made in `routing`.

Input `image` FP32 [B, 3, H, W]. Outputs `embedding` FP32 [B, D], `logits` FP32 [B, C] (models with
a head), `escalated` BOOL [B, 1], `score` FP32 [B, 1], `degraded` BOOL [B, 1].
Request parameters: `policy` (auto, low, high) and `threshold` (a float in oracle units, or its
text).
"""

import json
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils

from .routing import (
    Calibration,
    CascadeRequest,
    RequestError,
    RungError,
    RungOutputs,
    manifest,
    parse_overrides,
    run_cascade,
)

_ON_HIGH_FAILURE = ("error", "low")


def _version_dir():
    return Path(pb_utils.get_model_dir())


class TritonPythonModel:
    """One instance of `router`."""

    @staticmethod
    def auto_complete_config(config):
        """Declare the tensors that the artifact describes."""
        calibration = Calibration.load(_version_dir() / "calibration.json")
        config.add_input(_tensor("image", "TYPE_FP32", calibration.image_shape))
        config.add_output(_tensor("embedding", "TYPE_FP32", [calibration.embedding_dim]))
        if calibration.classes is not None:
            config.add_output(_tensor("logits", "TYPE_FP32", [calibration.classes]))
        config.add_output(_tensor("escalated", "TYPE_BOOL", [1]))
        config.add_output(_tensor("score", "TYPE_FP32", [1]))
        config.add_output(_tensor("degraded", "TYPE_BOOL", [1]))
        return config

    def initialize(self, args):
        """Load the artifact and refuse files that it was not made with."""
        config = json.loads(args["model_config"])
        on_high_failure = config["parameters"]["on_high_failure"]["string_value"]
        if on_high_failure not in _ON_HIGH_FAILURE:
            raise ValueError(f"on_high_failure {on_high_failure!r} is none of error, low")
        self.degrade = on_high_failure == "low"
        self.calibration = Calibration.load(_version_dir() / "calibration.json")
        repository = _version_dir().parent.parent
        self.calibration.check_rungs(
            {name: repository / name / "1" / "model.onnx" for name in self.calibration.rungs}
        )
        manifest.verify(repository)
        head = ["logits"] if self.calibration.classes is not None else []
        self.low_outputs = ["embedding", "cls_layers", *head]
        self.high_outputs = ["embedding", *head]

    def execute(self, requests):
        """Answer all requests with at most one call of each rung."""
        results = [None] * len(requests)
        sound = []
        tensors = {}
        for i, request in enumerate(requests):
            tensor = pb_utils.get_input_tensor_by_name(request, "image")
            image = tensor.as_numpy()
            try:
                overrides = parse_overrides(json.loads(request.parameters() or "{}"))
            except ValueError as error:
                results[i] = RequestError(str(error))
                continue
            sound.append((i, CascadeRequest(image, overrides)))
            tensors[id(image)] = tensor  # `image` lives in `sound`, so its id stays its own

        def rung(model_name, output_names):
            def call(image):
                # A lone request's tensor is already in shared memory: hand on that one.
                tensor = tensors.get(id(image)) or pb_utils.Tensor("image", image)
                return _infer(model_name, tensor, output_names)

            return call

        answers = run_cascade(
            [request for _, request in sound],
            self.calibration,
            low=rung("vit_low", self.low_outputs),
            high=rung("vit_high", self.high_outputs),
            degrade_on_high_failure=self.degrade,
        )
        for (i, _), answer in zip(sound, answers, strict=True):
            results[i] = answer
        return [_response(result) for result in results]


def _tensor(name, data_type, dims):
    return {"name": name, "data_type": data_type, "dims": list(dims)}


def _infer(model_name, image, output_names):
    response = pb_utils.InferenceRequest(
        model_name=model_name,
        requested_output_names=output_names,
        inputs=[image],
        preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU),
    ).exec()
    if response.has_error():
        raise RungError(f"{model_name} failed: {response.error().message()}")
    arrays = {tensor.name(): tensor.as_numpy() for tensor in response.output_tensors()}
    return RungOutputs(arrays["embedding"], arrays.get("cls_layers"), arrays.get("logits"))


def _response(result):
    if isinstance(result, Exception):
        codes = pb_utils.TritonError  # not there yet when Triton imports this for auto-complete
        code = codes.INVALID_ARG if isinstance(result, RequestError) else codes.INTERNAL
        return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(result), code))
    tensors = [pb_utils.Tensor("embedding", result.embedding)]
    if result.logits is not None:
        tensors.append(pb_utils.Tensor("logits", result.logits))
    for name in ("escalated", "score", "degraded"):
        column = getattr(result, name)[:, np.newaxis]  # (b, 1)
        tensors.append(pb_utils.Tensor(name, column))
    return pb_utils.InferenceResponse(tensors)
