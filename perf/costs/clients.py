"""Clients that keep every instance of a served graph busy, and cost the machine little themselves.

They run on the cores that the server needs, so a request is made once and sent many times, and what
CPU time the client takes is measured beside the rest.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from statistics import median

import numpy as np
import tritonclient.grpc as triton

from ..measure.cpu import CpuMeter
from ..measure.sets import Pool

SATURATED_S = 1.0  # that one measurement takes at least
_LONE_S = 0.5
_FEWEST = 3  # requests of each client, however long they take
_TIMEOUT_S = 120.0


class Clients:
    """A number of clients of one server.

    Args:
        client: the connection they share.
        threads: one for each of them.
        count: how many they are.
        inputs: requests' tensors by batch, 1 among the batches.
        outputs: names of what each graph is asked for.
        meter: of the server's processes; None: their CPU time is not measured.
    """

    def __init__(
        self,
        client: triton.InferenceServerClient,
        threads: ThreadPoolExecutor,
        count: int,
        inputs: Mapping[int, Sequence[triton.InferInput]],
        outputs: Mapping[str, Sequence[str]],
        meter: CpuMeter | None = None,
    ) -> None:
        self._meter = meter
        self._client = client
        self._threads = threads
        self._count = count
        self._inputs = inputs
        self._outputs = {
            graph: [triton.InferRequestedOutput(name) for name in names]
            for graph, names in outputs.items()
        }

    def warm_up(self, graph: str, batch: int) -> None:
        """Send every instance a few requests."""
        self._send_together(graph, batch, window_s=0.0)

    def latency_ms(self, graph: str) -> float:
        """Median of lone requests of one image, milliseconds."""
        return 1e3 * median(self._send(graph, 1, 0, _LONE_S))

    def saturate(self, graph: str, batch: int) -> tuple[float, float, float | None]:
        """Keep one request of each client in flight.

        Returns:
            Milliseconds per image: by the clock, of the client's CPU time, and of the server's,
            None where that is not measured.
        """
        start, cpu_s = time.perf_counter(), time.process_time()
        server_s = 0.0 if self._meter is None else self._meter.read_s()
        taken = self._send_together(graph, batch, SATURATED_S)
        cpu_s = time.process_time() - cpu_s
        # Client by client: the others idle while the last one ends, which is not the graph's cost.
        images_per_s = sum(batch * len(times) / sum(times) for times in taken)
        images = batch * sum(map(len, taken))
        server_ms = None
        if self._meter is not None:
            used_s = self._meter.used_s(server_s, time.perf_counter() - start)
            server_ms = 1e3 * used_s / images
        return 1e3 / images_per_s, 1e3 * cpu_s / images, server_ms

    def _send_together(self, graph: str, batch: int, window_s: float) -> list[list[float]]:
        sent = [
            self._threads.submit(self._send, graph, batch, client, window_s)
            for client in range(self._count)
        ]
        return [future.result() for future in sent]

    def _send(self, graph: str, batch: int, client: int, window_s: float) -> list[float]:
        """One request after the other; the seconds that each took."""
        inputs, outputs = self._inputs[batch], self._outputs[graph]
        times: list[float] = []
        while len(times) < _FEWEST or sum(times) < window_s:
            tensor = inputs[(client + len(times) * self._count) % len(inputs)]
            start = time.perf_counter()
            self._client.infer(graph, [tensor], outputs=outputs, client_timeout=_TIMEOUT_S)
            times.append(time.perf_counter() - start)
        return times


def input_tensors(pool: Pool, batch: int) -> list[triton.InferInput]:
    """The pool's images in requests of `batch` images each; those left over are left out."""
    tensors = []
    for start in range(0, len(pool) - batch + 1, batch):
        rows = np.stack(pool.tensors[start : start + batch])  # (batch, 3, H, W)
        tensor = triton.InferInput("image", list(rows.shape), "FP32")
        tensor.set_data_from_numpy(rows)
        tensors.append(tensor)
    return tensors
