"""What the supervisor asks a running server: canary inferences, and facts that Triton keeps.

Canaries are sent without waiting, so that one that hangs keeps nothing else from being seen. Their
id tells the router that they are no traffic.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import tritonclient.grpc as triton
from PIL import Image
from tritonclient.utils import InferenceServerException

from routing import PROBE_ID

from .channel import PLAIN, Channel
from .readiness import ENTRY_MODEL, QUEUE_FULL

LOW, HIGH, PREPROCESS = "vit_low", "vit_high", "preprocess"
# Every step that a canary can be sent to alone.
PARTS = (PREPROCESS, LOW, HIGH)

# Long for what a server knows without running a model, short for a supervisor that waits for it.
_QUESTION_TIMEOUT_S = 1.5
_IMAGE_SIDE_PX = 64


@dataclass(frozen=True)
class Answer:
    """What came back from one canary.

    Attributes:
        error: one line, empty if it was answered.
        is_unavailable: whether the error says that the model cannot take the request now: its
            queue is full, a rung is late, or nobody listens.
        exercised: models that took part in the answer.
    """

    error: str = ""
    is_unavailable: bool = False
    exercised: frozenset[str] = frozenset()


@dataclass
class Question:
    """A canary on its way; `answer` is None until it is back."""

    model: str
    answer: Answer | None = None


@dataclass(frozen=True)
class ModelState:
    """A version of a model as the server's index has it."""

    model: str
    version: str
    is_ready: bool
    state: str


class Canaries:
    """The questions, over one connection of its own. Use as a context manager."""

    def __init__(
        self,
        grpc_url: str,
        *,
        channel: Channel = PLAIN,
        headers: Mapping[str, str] | None = None,
        shapes: dict[str, list[int]] | None = None,
    ) -> None:
        """Say where the server is.

        Args:
            grpc_url: `host:port`.
            channel: how to connect there.
            headers: what calls of restricted APIs carry.
            shapes: shape of the one image to send to each model, filled in when first needed;
                give the same again for the same server.
        """
        self._client = channel.open(grpc_url)
        self._headers = dict(headers or {})
        self._shapes = {} if shapes is None else shapes

    def __enter__(self) -> Canaries:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection, which takes back the canaries that are not answered yet."""
        self._client.close()

    def ask(self, model: str) -> Question:
        """Send one image to a model.

        Args:
            model: `adaptive_vit`, or one of `PARTS`.
        """
        question = Question(model)
        try:
            tensor = self._input(model)
        except InferenceServerException as error:
            question.answer = _failure(error)
            return question

        def keep(result: Any, error: InferenceServerException | None) -> None:
            question.answer = (
                _failure(error) if error else Answer("", False, _exercised(model, result))
            )

        self._client.async_infer(model, [tensor], keep, request_id=PROBE_ID)
        return question

    def successes(self) -> dict[str, int] | None:
        """Requests that each model has answered so far; None if the server does not say."""
        try:
            answer = self._client.get_inference_statistics(
                headers=self._headers, client_timeout=_QUESTION_TIMEOUT_S
            )
        except InferenceServerException:
            return None
        counts: dict[str, int] = {}
        for model in answer.model_stats:
            count = int(model.inference_stats.success.count)
            counts[model.name] = counts.get(model.name, 0) + count
        return counts

    def states(self) -> list[ModelState] | None:
        """Every model of the repository; None if the server does not say."""
        try:
            index = self._client.get_model_repository_index(
                headers=self._headers, client_timeout=_QUESTION_TIMEOUT_S
            )
        except InferenceServerException:
            return None
        return [
            ModelState(
                model.name,
                model.version,
                model.state == "READY",
                f"{model.state} ({model.reason})" if model.reason else model.state,
            )
            for model in index.models
        ]

    def instances(self, model: str, version: str) -> int | None:
        """Instances that a model runs by its configuration; None if the server does not say."""
        try:
            answer = self._client.get_model_config(
                model, version, headers=self._headers, client_timeout=_QUESTION_TIMEOUT_S
            )
        except InferenceServerException:
            return None
        return sum(group.count * max(1, len(group.gpus)) for group in answer.config.instance_group)

    def _input(self, model: str) -> triton.InferInput:
        if model in (ENTRY_MODEL, PREPROCESS):
            tensor = triton.InferInput("image_bytes", [1, 1], "BYTES")
            tensor.set_data_from_numpy(np.array([[_encoded_image()]], dtype=np.object_))
            return tensor
        if model not in self._shapes:
            metadata = self._client.get_model_metadata(model, client_timeout=_QUESTION_TIMEOUT_S)
            self._shapes[model] = [1, *metadata.inputs[0].shape[1:]]
        shape = self._shapes[model]
        tensor = triton.InferInput("image", shape, "FP32")
        tensor.set_data_from_numpy(np.zeros(shape, dtype=np.float32))
        return tensor


def _encoded_image() -> bytes:
    encoded = io.BytesIO()
    Image.new("RGB", (_IMAGE_SIDE_PX, _IMAGE_SIDE_PX), (124, 116, 104)).save(encoded, format="PNG")
    return encoded.getvalue()


def _exercised(model: str, result: triton.InferResult) -> frozenset[str]:
    if model != ENTRY_MODEL:
        return frozenset({model})
    models = {ENTRY_MODEL, PREPROCESS}
    score = result.as_numpy("score")
    if score is not None and np.isfinite(score).all():
        models.add(LOW)
    escalated = result.as_numpy("escalated")
    if escalated is not None and escalated.all():
        models.add(HIGH)
    return frozenset(models)


def _failure(error: InferenceServerException) -> Answer:
    message = " ".join(error.message().split())
    is_unavailable = error.status() == "StatusCode.UNAVAILABLE"
    return Answer(message, is_unavailable or bool(QUEUE_FULL.search(message)))
