"""`vit_high` on the server against ONNX Runtime alone: what serving through the backend costs.

Both run the same file on the same images, outputs, device and threads. The server's side is
Triton's own time of a request, queue and compute, out of its statistics: no client, no network. The
other side is one call of a session in this process, opened as `server/backends/onnxruntime` does.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import tritonclient.grpc as triton
from numpy.typing import NDArray
from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelInstanceGroup

from client.errors import server_errors

from .figures import PerfError, Spread

MODEL = "vit_high"
_PATIENCE_S = 5.0
_POLL_S = 0.001
_TIMEOUT_S = 60.0


def measure_backend(
    grpc_url: str,
    onnx: Path,
    images: NDArray[np.float32],
    batch: int,
    rounds: int,
    pairs: int,
    on_step: Callable[[], None],
) -> Spread:
    """Request time on the server over time of a direct run, in pairs, each side first in turn.

    A round's value is the median of its pairs' ratios. The two of a pair follow each other at once,
    so that a processor that changes its speed cancels out; what a shared machine does to one of
    them multiplies it, so a mean would tell how busy the neighbours were. Each round opens a direct
    session of its own: where its weights come to lie in memory alone makes one several per cent
    slower or faster than the next.

    Args:
        grpc_url: `host:port` of a server that nobody else uses.
        onnx: the file that it serves as `vit_high`.
        images: FP32 (N, 3, H, W), N at least `batch`; consecutive requests take other rows.
        batch: images per request.
        rounds: values in the result.
        pairs: requests of each side per round, besides one to warm up.
        on_step: called after each pair.

    Raises:
        PerfError: too few images, or somebody else sends the server requests meanwhile.
        ClientError: no server, or one without `vit_high`.
    """
    if not 1 <= batch <= len(images):
        raise PerfError(f"{len(images)} images do not fill a batch of {batch}; give more --images")
    values = []
    with server_errors(grpc_url), triton.InferenceServerClient(grpc_url) as client:
        config = client.get_model_config(MODEL, client_timeout=_TIMEOUT_S).config
        for number in range(rounds):
            pair = Pair(client, open_direct(onnx, config))
            pair.ratio(_rows(images, batch, 0), server_first=True)
            ratios = []
            for step in range(number * pairs, (number + 1) * pairs):
                rows = _rows(images, batch, step)
                ratios.append(pair.ratio(rows, server_first=step % 2 == 0))
                on_step()
            values.append(statistics.median(ratios))
    return Spread.of(values)


def open_direct(onnx: Path, config: ModelConfig) -> ort.InferenceSession:
    """A session on the device and with the threads of a served configuration."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = _threads(config, "intra_op_thread_count")
    options.inter_op_num_threads = _threads(config, "inter_op_thread_count")
    providers: list[Any] = ["CPUExecutionProvider"]
    group = config.instance_group[0]
    if group.kind == ModelInstanceGroup.KIND_GPU:
        ort.preload_dlls()
        providers.insert(0, ("CUDAExecutionProvider", {"device_id": str(group.gpus[0])}))
    return ort.InferenceSession(str(onnx), options, providers=providers)


def _threads(config: ModelConfig, key: str) -> int:
    # A map of protobuf messages makes the entry it is asked for; 0 is ONNX Runtime's own choice.
    return int(config.parameters[key].string_value) if key in config.parameters else 0


def _rows(images: NDArray[np.float32], batch: int, step: int) -> NDArray[np.float32]:
    start = step * batch % (len(images) - batch + 1)
    return np.ascontiguousarray(images[start : start + batch])  # (batch, 3, H, W)


class Pair:
    """The two ways to the same outputs: those that the router asks `vit_high` for.

    Args:
        client: of a server that serves it.
        session: the direct one.
    """

    def __init__(self, client: triton.InferenceServerClient, session: ort.InferenceSession) -> None:
        self._client = client
        self._session = session
        names = [output.name for output in session.get_outputs()]
        self._names = [name for name in names if name != "cls_layers"]
        self._outputs = [triton.InferRequestedOutput(name) for name in self._names]

    def ratio(self, image: NDArray[np.float32], server_first: bool) -> float:
        """Time on the server over time of the direct run, both of `image` (B, 3, H, W)."""
        if server_first:
            served_s = self._served_s(image)
            return served_s / self._direct_s(image)
        direct_s = self._direct_s(image)
        return self._served_s(image) / direct_s

    def _direct_s(self, image: NDArray[np.float32]) -> float:
        start = time.perf_counter()
        self._session.run(self._names, {"image": image})
        return time.perf_counter() - start

    def _served_s(self, image: NDArray[np.float32]) -> float:
        tensor = triton.InferInput("image", list(image.shape), "FP32")
        tensor.set_data_from_numpy(image)
        count, ns = self._successes()
        self._client.infer(MODEL, [tensor], outputs=self._outputs, client_timeout=_TIMEOUT_S)
        deadline = time.monotonic() + _PATIENCE_S
        while True:  # A request is counted a moment after it is answered.
            count_now, ns_now = self._successes()
            if count_now > count + 1:
                raise PerfError(f"somebody else uses {MODEL} on this server; measure it alone")
            if count_now > count:
                return (ns_now - ns) / 1e9
            if time.monotonic() > deadline:
                raise PerfError(f"{MODEL} answers, but the server's statistics do not count it")
            time.sleep(_POLL_S)

    def _successes(self) -> tuple[int, int]:
        """Requests that the server has answered, and their time in ns, queue and compute."""
        found = self._client.get_inference_statistics(MODEL, client_timeout=_TIMEOUT_S)
        versions = [entry.inference_stats.success for entry in found.model_stats]
        return sum(version.count for version in versions), sum(version.ns for version in versions)
