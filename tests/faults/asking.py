"""Requests as bytes, ready to send, and what became of each.

Nothing is encoded while load runs, and no client of ours is in between: no retry, no splitting.
"""

from __future__ import annotations

import asyncio
import itertools
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import aiohttp
import grpc
import numpy as np
import tritonclient.grpc as triton
import tritonclient.http as triton_http
from tritonclient.grpc import service_pb2

from tests.faults.truth import Truth

METHOD = "/inference.GRPCInferenceService/ModelInfer"
# A client that gives up on reconnecting for seconds would measure itself.
CHANNEL = [
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 200),
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
]
# gRPC's own UNAVAILABLE, which no server has said.
_NO_CONNECTION = re.compile(
    r"failed to connect|socket closed|connection reset|stream removed|goaway|broken pipe"
    r"|endpoint clos|keepalive|recvmsg|connection refused|transport",
    re.IGNORECASE,
)
OUTCOMES = ("ok", "wrong", "refused", "failed", "timeout")


@dataclass(frozen=True)
class Question:
    """One request.

    Attributes:
        protocol: `grpc` or `http`.
        model: `adaptive_vit` (bytes), `adaptive_tensor` or `router` (tensors).
        rows: the images, as places in the truth.
        body: what is sent.
        json_length: of an HTTP body, its first part.
    """

    protocol: str
    model: str
    rows: tuple[int, ...]
    body: bytes = field(repr=False)
    json_length: int = 0


@dataclass(frozen=True)
class Request:
    """What became of a request.

    Attributes:
        question: what was sent.
        started: `time.monotonic()` when it was sent, or due.
        ended: when its answer was read.
        outcome: `ok`; `wrong`; `refused` (the server itself answered UNAVAILABLE); `failed` (any
            other error, a broken connection too); `timeout`.
        degraded: how many of its images were answered `degraded`.
        detail: why it is not ok.
    """

    question: Question
    started: float
    ended: float
    outcome: str
    degraded: int = 0
    detail: str = ""

    @property
    def seconds(self) -> float:
        """How long the answer took."""
        return self.ended - self.started


def question(
    truth: Truth,
    protocol: str,
    model: str,
    rows: Sequence[int],
    parameters: dict[str, object] | None = None,
    timeout_us: int | None = None,
) -> Question:
    """Encode a request about some images of the truth."""
    module = triton if protocol == "grpc" else triton_http
    if model in ("adaptive_tensor", "router"):
        values, name, datatype = truth.images[list(rows)], "image", "FP32"
    else:
        values = np.array([[truth.files[row]] for row in rows], dtype=np.object_)
        name, datatype = "image_bytes", "BYTES"
    tensor = module.InferInput(name, list(values.shape), datatype)
    tensor.set_data_from_numpy(values)
    if protocol == "http":
        body, json_length = triton_http.InferenceServerClient.generate_request_body(
            [tensor], parameters=parameters, timeout=timeout_us
        )
        return Question(protocol, model, tuple(rows), body, json_length)
    message = service_pb2.ModelInferRequest(model_name=model, inputs=[tensor._get_tensor()])
    message.raw_input_contents.append(tensor._get_content())
    for key, value in {**(parameters or {}), "timeout": timeout_us}.items():
        if value is not None:
            kind = {str: "string_param", bool: "bool_param", int: "int64_param"}[type(value)]
            setattr(message.parameters[key], kind, value)
    return Question(protocol, model, tuple(rows), message.SerializeToString())


def mixed_questions(
    truth: Truth, protocol: str, model: str, sizes: Sequence[int] = (1, 2, 4)
) -> list[Question]:
    """Requests that together ask about every image, of the sizes in turn."""
    found, place = [], 0
    for size in itertools.cycle(sizes):
        if place >= len(truth.files):
            return found
        rows = range(place, min(place + size, len(truth.files)))
        found.append(question(truth, protocol, model, rows))
        place += size
    raise AssertionError("no sizes")


class Asker:
    """Sends questions over one gRPC channel and one HTTP connection pool, inside an event loop."""

    def __init__(self, grpc_url: str, http_url: str, truth: Truth, timeout_s: float) -> None:
        self._truth = truth
        self._timeout_s = timeout_s
        self._http_url = http_url
        self._channel = grpc.aio.insecure_channel(grpc_url, CHANNEL)
        # Without serialiser the bytes go out as they are.
        self._infer = self._channel.unary_unary(
            METHOD, response_deserializer=service_pb2.ModelInferResponse.FromString
        )
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=timeout_s),
        )

    async def ask(self, asked: Question, due: float | None = None) -> Request:
        """Send a question and judge the answer.

        Args:
            asked: the question.
            due: when it should have been sent, from which its latency counts.
        """
        started = due if due is not None else time.monotonic()
        ask = self._ask_grpc if asked.protocol == "grpc" else self._ask_http
        outcome, detail, result = await ask(asked)
        ended = time.monotonic()
        if result is None:
            return Request(asked, started, ended, outcome, detail=" ".join(detail.split())[:300])
        names = ("embedding", "logits", "escalated", "degraded", "score")
        answer = {name: result.as_numpy(name) for name in names}
        wrong = self._truth.wrong(asked.rows, answer)
        if wrong is not None:
            return Request(asked, started, ended, "wrong", detail=wrong)
        return Request(asked, started, ended, "ok", degraded=int(answer["degraded"].sum()))

    async def _ask_grpc(self, asked: Question):
        try:
            answer = await self._infer(asked.body, timeout=self._timeout_s)
        except grpc.aio.AioRpcError as error:
            return grpc_outcome(error), f"{error.code().name}: {error.details()}", None
        return "ok", "", triton.InferResult(answer)

    async def _ask_http(self, asked: Question):
        url = f"http://{self._http_url}/v2/models/{asked.model}/infer"
        headers = {
            "Inference-Header-Content-Length": str(asked.json_length),
            "Content-Type": "application/octet-stream",
        }
        try:
            async with self._session.post(url, data=asked.body, headers=headers) as response:
                body = await response.read()
        except asyncio.TimeoutError:
            return "timeout", "no answer over HTTP", None
        except (aiohttp.ClientError, OSError) as error:
            return "failed", f"{type(error).__name__}: {error}", None
        if response.status != 200:
            outcome = "refused" if response.status == 503 else "failed"
            return outcome, f"{response.status}: {body[:300].decode(errors='replace')}", None
        length = int(response.headers["Inference-Header-Content-Length"])
        return (
            "ok",
            "",
            triton_http.InferenceServerClient.parse_response_body(body, header_length=length),
        )

    async def close(self) -> None:
        """Close every connection."""
        await self._session.close()
        await self._channel.close()


def grpc_outcome(error: grpc.aio.AioRpcError) -> str:
    """`timeout`, `refused` or `failed`."""
    if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
        return "timeout"
    if error.code() is grpc.StatusCode.UNAVAILABLE and not _NO_CONNECTION.search(
        error.details() or ""
    ):
        return "refused"
    return "failed"
