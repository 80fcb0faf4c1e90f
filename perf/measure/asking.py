"""Ask a system about one image, as a client that waits for the answer."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import tritonclient.grpc as triton
from numpy.typing import NDArray

from client.errors import server_errors

from .sets import Pool
from .systems import System
from .target import Target


@dataclass(frozen=True, eq=False)
class Answer:
    """What one request got.

    Attributes:
        latency_ms: from sending to the answer, in milliseconds.
        embedding: FP32 (D,).
        logits: FP32 (C,), or None.
        escalated: the full rung answered; False for a static system.
        score: oracle units; NaN for a static system.
    """

    latency_ms: float
    embedding: NDArray[np.float32]
    logits: NDArray[np.float32] | None
    escalated: bool
    score: float


class Asker:
    """Sends the images of a pool over gRPC, one request at a time.

    Args:
        target: the server.
        pool: the images.
        has_head: whether the model has logits.
    """

    def __init__(self, target: Target, pool: Pool, has_head: bool) -> None:
        self._target = target
        self._pool = pool
        self._answer = ["embedding", "logits"] if has_head else ["embedding"]

    def ask(self, system: System, row: int) -> Answer:
        """Ask about image `row`.

        Raises:
            ClientError: the server did not answer as it should.
        """
        tensor = self._input(system, row)
        names = self._answer if system.is_static else [*self._answer, "escalated", "score"]
        outputs = [triton.InferRequestedOutput(name) for name in names]
        parameters = {
            name: float(value) if name == "threshold" else value
            for name, value in system.parameters.items()
        }
        with server_errors(self._target.grpc_url):
            start = time.perf_counter()
            result = self._target.client.infer(
                system.model, [tensor], outputs=outputs, parameters=parameters, client_timeout=120.0
            )
            latency_ms = 1e3 * (time.perf_counter() - start)
        values = {name: result.as_numpy(name)[0] for name in names}
        return Answer(
            latency_ms,
            values["embedding"],
            values.get("logits"),
            bool(values.get("escalated", [False])[0]),
            float(values.get("score", [np.nan])[0]),
        )

    def _input(self, system: System, row: int) -> triton.InferInput:
        if system.takes_bytes:
            tensor = triton.InferInput("image_bytes", [1, 1], "BYTES")
            tensor.set_data_from_numpy(np.array([[self._pool.encoded[row]]], dtype=np.object_))
            return tensor
        image = self._pool.tensors[row]
        tensor = triton.InferInput("image", [1, *image.shape], "FP32")
        tensor.set_data_from_numpy(image[np.newaxis])
        return tensor
