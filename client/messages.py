"""What goes over the wire, the same for every protocol: inputs, parameters, outputs."""

from __future__ import annotations

import math
import os
import re
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2
from tritonclient.http import InferInput
from tritonclient.utils import (
    InferenceServerException,
    np_to_triton_dtype,
    serialize_byte_tensor,
)

from .errors import AnswerMismatchError, InvalidRequestError, ServerError, named_request
from .files import shown
from .images import encoded, is_file, is_path

ENSEMBLE = "adaptive_vit"
TENSOR_ENSEMBLE = "adaptive_tensor"
ROUTER = "router"
LABEL_THRESHOLD = 0.5
UNSCORED = float(np.finfo(np.float32).max)  # the router's finite word for a score that is none


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
        """The k likeliest classes and their probabilities in 0..1, the likeliest first.

        Raises:
            ValueError: the served model has no head, or one output.
        """
        logits = self._needed_logits()
        if len(logits) == 1:
            raise ValueError("the served model has one output, a value or a label: see `logits`")
        shares = np.exp(logits.astype(np.float64) - logits.max())
        shares /= shares.sum()
        order = np.argsort(-shares, kind="stable")[:k]
        return [(int(index), float(shares[index])) for index in order]

    def label_set(self, threshold: float = LABEL_THRESHOLD) -> list[tuple[int, float]]:
        """The labels that belong to the image, of a model that answers independent ones.

        Args:
            threshold: a label belongs to it from this probability on; more than 0, less than 1.

        Returns:
            (label index, probability in 0..1), the likeliest first.

        Raises:
            ValueError: the served model has no head.
        """
        logits = self._needed_logits()
        # In logits, as the calibration decides it: a probability's last bit could decide otherwise.
        cut = math.log(threshold / (1 - threshold))
        return [(index, p) for index, p in self.probabilities() if float(logits[index]) >= cut]

    def probabilities(self) -> list[tuple[int, float]]:
        """As `label_set`, of all labels."""
        logits = self._needed_logits()
        halves = np.tanh(logits.astype(np.float64) / 2)  # no overflow, whatever the logit
        order = np.argsort(-logits, kind="stable")
        return [(int(index), float((1 + halves[index]) / 2)) for index in order]

    def _needed_logits(self) -> NDArray[np.float32]:
        if self.logits is None:
            raise ValueError("the served model has no head, so it names no classes or labels")
        return self.logits


@dataclass(frozen=True)
class Task:
    """What a served model's logits mean.

    Attributes:
        kind: `classes`: one of C, by softmax; `labels`: each of C independently, by sigmoid;
            `value`: C numbers; None: no head, or a server that does not say.
        label_threshold: of labels: one belongs to the image from this probability on.
    """

    kind: str | None = None
    label_threshold: float = LABEL_THRESHOLD

    @classmethod
    def of(cls, parameters: Mapping[str, str]) -> Task:
        """What the router's configuration says; repositories of earlier releases say nothing."""
        threshold = float(parameters.get("label_threshold", LABEL_THRESHOLD))
        return cls(parameters.get("task") or None, threshold)

    def kind_of(self, prediction: Prediction) -> str | None:
        """The kind, guessed from an answer where nobody said it; None without logits."""
        if prediction.logits is None:
            return None
        return self.kind or ("value" if len(prediction.logits) == 1 else "classes")


def as_batch(image: NDArray[Any]) -> NDArray[Any]:
    """An image tensor with its batch axis: (3, H, W) becomes (1, 3, H, W).

    The dtype is left alone: the server says what it expects instead of getting a silent cast.
    """
    return image[np.newaxis] if image.ndim == 3 else image


def request_parameters(policy: str, threshold: float | None) -> dict[str, Any]:
    """The request parameters of the router, which is the one to judge their values.

    Numbers become floats, so that 1 and 1.0 and numpy's scalars are the same request.
    """
    parameters: dict[str, Any] = {"policy": policy}
    if threshold is not None:
        number = isinstance(threshold, Real) and not isinstance(threshold, bool)
        parameters["threshold"] = float(threshold) if number else threshold
    return parameters


@dataclass(frozen=True, eq=False)
class Request:
    """What to ask a model, for no protocol yet.

    Attributes:
        model: its name.
        name: of the input.
        rows: the input, shape (N, ...).
        parameters: see `request_parameters`.
        version: of the model; None lets the server choose, which takes the highest.

    Raises:
        InvalidRequestError: `version` is none that a model can have.
    """

    model: str
    name: str
    rows: NDArray[Any]
    parameters: dict[str, Any]
    version: int | None = None

    def __post_init__(self) -> None:
        # Over HTTP the server would only say that it has no such page.
        if self.version is not None and (type(self.version) is not int or self.version < 1):
            raise InvalidRequestError(
                f"version must be a whole number from 1, or None; got {self.version!r}"
            )

    def split(self, max_batch: int) -> Iterator[Request]:
        """The same for pieces of at most `max_batch` rows, in order."""
        for start in range(0, len(self.rows), max_batch):
            yield replace(self, rows=self.rows[start : start + max_batch])

    @property
    def has_files(self) -> bool:
        """Whether `read` reads any."""
        return self.rows.dtype == np.object_ and any(map(is_file, self.rows[:, 0]))

    def read(self) -> Request:
        """The same with files read; a request that holds tensors as it is.

        Raises:
            InvalidRequestError: a file cannot be read; its message begins as a server's refusal of
                one image of several.
        """
        if self.rows.dtype != np.object_:
            return self
        rows = np.empty_like(self.rows)
        for index, image in enumerate(self.rows[:, 0]):
            try:
                rows[index, 0] = encoded(image)
            except InvalidRequestError as error:
                place = f"image {index + 1} of {len(rows)}: "
                raise InvalidRequestError(f"{place if len(rows) > 1 else ''}{error}") from None
        return replace(self, rows=rows)

    def about(self, refusal: str, first: int, total: int) -> str:
        """What a refusal of this piece says, with the image's place among all of them or its path.

        Args:
            refusal: names an image by its place in this piece, or none: it is about the only one,
                or begins with the name of a parameter.
            first: the place of the piece's first image, from 0.
            total: the images of the whole call.
        """
        named = _PLACE.match(refusal)
        if named is None and len(self.rows) > 1:
            return refusal
        row = int(named[1]) - 1 if named else 0
        if not 0 <= row < len(self.rows) or refusal.split(" ")[0] in self.parameters:
            return refusal
        place = f"image {first + row + 1} of {total}" if total > 1 else ""
        image: Any = self.rows[row, 0] if self.rows.dtype == np.object_ else None
        path = os.fspath(image) if is_path(image) else ""
        path = shown(path if len(path) <= _SHOWN else f"{path[:_SHOWN]}…")
        both = f"{place} ({path})" if place and path else place or path
        said = refusal[named.end() :] if named else refusal
        return f"{both}{named[3] if named else ': '}{said}" if both else refusal

    def message(self, left_s: float | None) -> service_pb2.ModelInferRequest:
        """One try, for gRPC.

        Args:
            left_s: seconds until the deadline; None where there is none. The server learns it,
                and drops the request rather than start on it later.

        Raises:
            InvalidRequestError: Triton has no such dtype, or no parameters of such a type.
        """
        message = service_pb2.ModelInferRequest(id=_new_id(), model_name=self.model)
        message.model_version = "" if self.version is None else str(self.version)
        message.inputs.add(name=self.name, datatype=self._datatype, shape=self.rows.shape)
        is_bytes = self._datatype == "BYTES"
        content = serialize_byte_tensor(self.rows).item() if is_bytes else self.rows.tobytes()
        message.raw_input_contents.append(content)
        for name, value in self.parameters.items():
            field = _PARAMETER_FIELDS.get(type(value))
            if field is None:
                raise InvalidRequestError(f"{name} must be text or a number; got {value!r}")
            setattr(message.parameters[name], field, value)
        if left_s is not None:
            message.parameters["timeout"].int64_param = _microseconds(left_s)
        return message

    def arguments(self, left_s: float | None) -> dict[str, Any]:
        """One try, for `tritonclient.http`'s `generate_request_body`; as `message`."""
        tensor = InferInput(self.name, list(self.rows.shape), self._datatype)
        return {
            "request_id": _new_id(),
            "inputs": [tensor.set_data_from_numpy(self.rows)],
            "parameters": self.parameters,
            "timeout": None if left_s is None else _microseconds(left_s),
        }

    @property
    def _datatype(self) -> str:
        datatype = np_to_triton_dtype(self.rows.dtype)
        if datatype is None:
            raise InvalidRequestError(
                f"{self.name} has dtype {self.rows.dtype}, which no Triton model takes"
            )
        return str(datatype)


_SHOWN = 300  # characters of a path
_PLACE = re.compile(r"image (\d+) of (\d+)(:? )")  # as `preprocess` and `router` name one
_PARAMETER_FIELDS = {
    str: "string_param",
    bool: "bool_param",
    int: "int64_param",
    float: "double_param",
}


def _new_id() -> str:
    """Of one try: the answer to an earlier one is not this one's."""
    return uuid.uuid4().hex


def _microseconds(left_s: float) -> int:
    return max(1, int(left_s * 1e6))  # 0 would be no limit


@contextmanager
def own_answer(asked: str, url: str) -> Iterator[Callable[[str | None], None]]:
    """Around reading the answer to request `asked`; yields what to call with the answer's id.

    A refusal that is raised inside is held against the request too, where Triton's text names one.

    Raises:
        AnswerMismatchError: they differ. Whoever reads the connection has to give it up.
    """

    def check(answered: str | None) -> None:
        if answered != asked:
            whose = f"belongs to request {answered}" if answered else "names no request"
            raise AnswerMismatchError(
                f"an answer from {url} {whose}, where request {asked} was asked; it is not used, "
                "and its connection is given up"
            )

    try:
        yield check
    except InferenceServerException as refusal:
        named = named_request(refusal.message() or "")
        if named is not None:
            check(named)
        raise


def predictions(result: Any, count: int) -> list[Prediction]:
    """Read tritonclient's result of a question about `count` images, in their order.

    Raises:
        ServerError: an output is missing or has another number of rows.
    """
    outputs = {name: result.as_numpy(name) for name in _OUTPUTS}
    for name, values in outputs.items():
        if values is None and name != "logits":
            raise ServerError(f"the server's answer has no output {name!r}; is it an adaptive ViT?")
        if values is not None and len(values) != count:
            raise ServerError(f"{name!r} has {len(values)} rows for {count} images")
    embedding, escalated, score, degraded, logits = outputs.values()
    return [
        Prediction(
            embedding=embedding[row],
            logits=None if logits is None else logits[row],
            escalated=bool(escalated[row, 0]),
            score=math.nan if score[row, 0] >= UNSCORED else float(score[row, 0]),
            degraded=bool(degraded[row, 0]),
        )
        for row in range(count)
    ]


_OUTPUTS = ("embedding", "escalated", "score", "degraded", "logits")
