"""`vit_high` on the server against ONNX Runtime alone: what serving through the backend costs.

Both run the same file on the same images, outputs, device and threads. The server's side is
Triton's own time of a request, queue and compute, out of its statistics: no client, no network. The
other side is one call of a session in this process, opened as `server/backends/onnxruntime` does.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import tritonclient.grpc as triton
from numpy.typing import NDArray
from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelInstanceGroup

from client.errors import server_errors

from .figures import PerfError, Spread
from .server_times import counted
from .target import Target

MODEL = "vit_high"
_TIMEOUT_S = 60.0


def measure_backend(
    target: Target,
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
        target: the server, which nobody else uses.
        onnx: the file that it serves as `vit_high`.
        images: FP32 (N, 3, H, W), N at least `batch`; consecutive requests take other rows.
        batch: images per request.
        rounds: values in the result.
        pairs: requests of each side per round, besides one to warm up.
        on_step: called after each pair.

    Raises:
        PerfError: somebody else sends the server requests meanwhile, or it counts none.
        ClientError: it does not answer.
    """
    values = []
    with server_errors(target.grpc_url):
        config = target.client.get_model_config(MODEL, client_timeout=_TIMEOUT_S).config
        for number in range(rounds):
            session = open_direct(onnx, config)
            # The outputs that the router asks `vit_high` for.
            names = [out.name for out in session.get_outputs() if out.name != "cls_layers"]
            ratios = []
            for step in [0, *range(number * pairs, (number + 1) * pairs)]:
                start = step * batch % (len(images) - batch + 1)
                image = np.ascontiguousarray(images[start : start + batch])  # (batch, 3, H, W)
                if step % 2 == 0:
                    served_s = _served_s(target, names, image)
                    ratios.append(served_s / _direct_s(session, names, image))
                else:
                    direct_s = _direct_s(session, names, image)
                    ratios.append(_served_s(target, names, image) / direct_s)
                if len(ratios) > 1:
                    on_step()
            values.append(statistics.median(ratios[1:]))  # the first one warmed up
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


def _direct_s(
    session: ort.InferenceSession, names: Sequence[str], image: NDArray[np.float32]
) -> float:
    start = time.perf_counter()
    session.run(names, {"image": image})
    return time.perf_counter() - start


def _served_s(target: Target, names: Sequence[str], image: NDArray[np.float32]) -> float:
    tensor = triton.InferInput("image", list(image.shape), "FP32")
    tensor.set_data_from_numpy(image)
    outputs = [triton.InferRequestedOutput(name) for name in names]
    before = target.times()
    target.client.infer(MODEL, [tensor], outputs=outputs, client_timeout=_TIMEOUT_S)
    times = counted(target.times, before, [MODEL], 1)[MODEL]
    if times["requests"] > 1:
        raise PerfError(f"somebody else uses {MODEL} on this server; measure it alone")
    return times["total"] / 1e9
