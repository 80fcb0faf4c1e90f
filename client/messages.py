"""What goes over the wire, the same for every protocol: inputs, parameters, outputs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from numbers import Real
from types import ModuleType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from tritonclient.utils import np_to_triton_dtype

from .errors import InvalidRequestError, ServerError

ENSEMBLE = "adaptive_vit"
ROUTER = "router"


@dataclass(frozen=True, eq=False)
class Prediction:
    """The answer for one image.

    Attributes:
        embedding: final normalised CLS token, FP32, shape (D,).
        logits: FP32, shape (C,); None where the served model has no head.
        escalated: the full rung answered.
        score: predicted change that full cost would make, in oracle units; NaN where it was not
            computed (`policy="high"` skips the cheap rung).
        degraded: escalation was wanted, but the full rung was unavailable.
    """

    embedding: NDArray[np.float32]
    logits: NDArray[np.float32] | None
    escalated: bool
    score: float
    degraded: bool

    def top(self, k: int = 5) -> list[tuple[int, float]]:
        """The likeliest classes.

        Args:
            k: how many; fewer come back where the model has fewer classes.

        Returns:
            (class index, probability in 0..1), the likeliest first.

        Raises:
            ValueError: the served model has no head.
        """
        if self.logits is None:
            raise ValueError("the served model has no head, so it names no classes")
        exponentials = np.exp(self.logits.astype(np.float64) - self.logits.max())
        probabilities = exponentials / exponentials.sum()
        order = np.argsort(-probabilities, kind="stable")[:k]
        return [(int(index), float(probabilities[index])) for index in order]


class Result(Protocol):
    """What tritonclient's gRPC and HTTP results have in common."""

    def as_numpy(self, name: str) -> NDArray[Any] | None:
        """The output of this name, None if the server sent none."""


def encode_images(images: Sequence[bytes]) -> NDArray[np.object_]:
    """Encoded images as the BYTES tensor of the ensemble, shape (N, 1)."""
    rows = np.empty((len(images), 1), dtype=np.object_)
    for index, image in enumerate(images):
        rows[index, 0] = bytes(image)
    return rows


def as_batch(image: NDArray[Any]) -> NDArray[Any]:
    """An image tensor with its batch axis: (3, H, W) becomes (1, 3, H, W).

    The dtype is left alone: the server says what it expects instead of getting a silent cast.
    """
    return image[np.newaxis] if image.ndim == 3 else image


def request_parameters(policy: str, threshold: float | None) -> dict[str, Any]:
    """The request parameters of the router, which is the one to judge their values.

    Args:
        policy: `auto`, `low` or `high`.
        threshold: replaces the calibrated threshold, in oracle units; None keeps it.

    Returns:
        Parameters as tritonclient takes them. Numbers become floats, so that 1 and 1.0 and
        numpy's scalars are the same request.
    """
    parameters: dict[str, Any] = {"policy": policy}
    if threshold is not None:
        number = isinstance(threshold, Real) and not isinstance(threshold, bool)
        parameters["threshold"] = float(threshold) if number else threshold
    return parameters


def build_input(protocol: ModuleType, name: str, rows: NDArray[Any]) -> Any:
    """One input tensor for `tritonclient.grpc` or `tritonclient.http`.

    Args:
        protocol: the tritonclient module whose `InferInput` to make.
        name: the input's name in the model.
        rows: shape (N, ...).

    Returns:
        The module's `InferInput`, holding the data.

    Raises:
        InvalidRequestError: Triton has no such dtype.
    """
    datatype = np_to_triton_dtype(rows.dtype)
    if datatype is None:
        raise InvalidRequestError(f"{name} has dtype {rows.dtype}, which no Triton model takes")
    tensor = protocol.InferInput(name, list(rows.shape), datatype)
    tensor.set_data_from_numpy(rows)
    return tensor


def split(rows: NDArray[Any], max_batch: int) -> Iterator[NDArray[Any]]:
    """Cut a batch into pieces of at most `max_batch` rows, in order."""
    for start in range(0, len(rows), max_batch):
        yield rows[start : start + max_batch]


def predictions(result: Result, count: int) -> list[Prediction]:
    """Read one response.

    Args:
        result: tritonclient's result.
        count: how many images were asked about, N.

    Returns:
        N predictions in the order of the images.

    Raises:
        ServerError: an output is missing or has another number of rows.
    """
    names = ("embedding", "escalated", "score", "degraded")
    outputs = {name: result.as_numpy(name) for name in names}
    for name, values in outputs.items():
        if values is None:
            raise ServerError(f"the server's answer has no output {name!r}; is it an adaptive ViT?")
        if len(values) != count:
            raise ServerError(f"{name!r} has {len(values)} rows for {count} images")
    logits = result.as_numpy("logits")
    return [
        Prediction(
            embedding=embedding,
            logits=None if logits is None else logits[index],
            escalated=bool(escalated[0]),
            score=float(score[0]),
            degraded=bool(degraded[0]),
        )
        for index, (embedding, escalated, score, degraded) in enumerate(
            zip(*outputs.values(), strict=True)
        )
    ]


def number_or_none(value: float) -> float | None:
    """A float for JSON, which knows no NaN."""
    return value if math.isfinite(value) else None
