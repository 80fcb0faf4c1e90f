"""Ask a system about images, as a client that waits for the answer or keeps many in flight."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import tritonclient.grpc as triton
from numpy.typing import NDArray

from client.errors import server_errors

from .cpu import CpuMeter
from .sets import Pool
from .systems import System
from .target import Target


@dataclass(frozen=True, eq=False)
class Answer:
    """What one request got.

    Attributes:
        latency_ms: from sending to the answer, in milliseconds; of a span of many in flight, the
            span's time per image.
        embedding: FP32 (D,).
        logits: FP32 (C,), or None.
        escalated: the full rung answered; False for a static system.
        score: oracle units; NaN for a static system.
        cpu_ms: CPU time of the server's processes meanwhile; None where it is not measured.
    """

    latency_ms: float
    embedding: NDArray[np.float32]
    logits: NDArray[np.float32] | None
    escalated: bool
    score: float
    cpu_ms: float | None = None


class Asker:
    """Sends the images of a pool over gRPC, one request at a time or many.

    Args:
        target: the server.
        pool: the images.
        has_head: whether the model has logits.
        meter: of the server's processes; None: no CPU time is measured.
    """

    def __init__(
        self, target: Target, pool: Pool, has_head: bool, meter: CpuMeter | None = None
    ) -> None:
        self._target = target
        self._pool = pool
        self._meter = meter
        self._answer = ["embedding", "logits"] if has_head else ["embedding"]

    def ask(self, system: System, row: int) -> Answer:
        """Ask about image `row`, nobody else asking meanwhile.

        Raises:
            ClientError: the server did not answer as it should.
        """
        before_s = 0.0 if self._meter is None else self._meter.read_s()
        answer = self._ask(system, row)
        if self._meter is None:
            return answer
        cpu_s = self._meter.used_s(before_s, answer.latency_ms / 1e3)
        return replace(answer, cpu_ms=1e3 * cpu_s)

    def ask_span(
        self, system: System, rows: Sequence[int], threads: ThreadPoolExecutor
    ) -> list[Answer]:
        """Ask about many images, as many requests in flight as there are threads.

        Each answer has its part of the span's time, by the clock and of CPU: requests in flight
        together share them.

        Raises:
            ClientError: the server did not answer as it should.
        """
        before_s = 0.0 if self._meter is None else self._meter.read_s()
        start = time.perf_counter()
        answers = list(threads.map(lambda row: self._ask(system, row), rows))
        seconds = time.perf_counter() - start
        cpu_ms = None
        if self._meter is not None:
            cpu_ms = 1e3 * self._meter.used_s(before_s, seconds) / len(rows)
        return [
            replace(answer, latency_ms=1e3 * seconds / len(rows), cpu_ms=cpu_ms)
            for answer in answers
        ]

    def _ask(self, system: System, row: int) -> Answer:
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
