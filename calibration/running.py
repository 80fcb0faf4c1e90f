"""Run exported graphs over images on this machine: decode them in threads, ask ONNX Runtime."""

from __future__ import annotations

import ctypes
import os
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper

from bundle.graphs import GraphsError
from bundle.prints import Looks, look_of, no_looks
from client.files import shown
from imaging import ImageError, Preprocessing, decode, pixels_sha256
from routing import RungOutputs
from routing.provenance import processor

from .images import ImageSource

THREADS = min(8, os.cpu_count() or 1)  # each may hold a photograph of 50 megapixels


@dataclass(frozen=True)
class DecodedImage:
    """An image as the graphs take it.

    Attributes:
        name, group, label: as of the `SourceImage`.
        sha256: `imaging.pixels_sha256` of the decoded pixels.
        look: the UINT8 vector by which `bundle.prints` finds the image again re-encoded, resized
            or mirrored; an independent draw has an empty one.
        tensor: the preprocessed image, FP32 (3, H, W).
    """

    name: str
    group: str
    label: str | None
    sha256: str
    look: Looks
    tensor: NDArray[np.float32]


def decode_ahead(
    source: ImageSource, batches: Iterable[Sequence[int]], preprocessing: Preprocessing
) -> Generator[list[DecodedImage | str], None, None]:
    """Yield the images of each batch in order, or the line that says why one cannot be read.

    While the caller works on one batch, the next one is decoded in threads, and no more than that
    one. Close the generator to stop.
    """
    ahead: deque[list[Future[DecodedImage | str]]] = deque()
    pool = ThreadPoolExecutor(THREADS)
    try:
        for batch in batches:
            ahead.append([pool.submit(_read, source, index, preprocessing) for index in batch])
            if len(ahead) > 1:
                yield [future.result() for future in ahead.popleft()]
        while ahead:
            yield [future.result() for future in ahead.popleft()]
    finally:
        pool.shutdown(cancel_futures=True)


def _read(source: ImageSource, index: int, preprocessing: Preprocessing) -> DecodedImage | str:
    try:
        image = source[index]
        decoded = decode(image.data)
        tensor = preprocessing(decoded)
    except ImageError as error:
        name = source.names[index]
        return f"{shown(name)}: {error}"
    sha256 = pixels_sha256(decoded)
    look = no_looks(1)[0] if image.independent else look_of(decoded)
    return DecodedImage(image.name, image.group, image.label, sha256, look, tensor)


def open_session(file: Path) -> ort.InferenceSession:
    """Open an ONNX Runtime session on the GPU where there is one, else on every CPU core.

    Raises:
        GraphsError: the graph runs on the CPU where other graphs run on the GPU: what it answers
            would be kept as a GPU's.
    """
    session = _session(file, device())
    if _device_of(session) != device():
        raise GraphsError(
            f"{file.name} runs on the {_device_of(session)} although {device()} works; free memory "
            "of the GPU, or set CUDA_VISIBLE_DEVICES= to run every graph on the CPU"
        )
    return session


def local_runtime() -> dict[str, Any]:
    """What `open_session` runs graphs with: its `name` with the release, and the `processor`."""
    return {"name": f"onnxruntime {ort.__version__} on {device()}", "processor": processor()}


@cache
def device() -> str:
    """Where sessions of this process run: `CUDA` or `CPU`.

    A session is asked, because ONNX Runtime offers CUDA also where its libraries cannot be loaded,
    and then quietly runs on the CPU.
    """
    # onnxruntime-gpu offers CUDA on every machine and complains at length where none is.
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "CPU"
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        return "CPU"
    ort.preload_dlls()
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    node = helper.make_node("Identity", ["x"], ["y"])
    graph = helper.make_graph([node], "device", value[:1], value[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return _device_of(_session(model.SerializeToString(), "CUDA"))


def _session(graph: Path | bytes, where: str) -> ort.InferenceSession:
    options = ort.SessionOptions()
    # Threads that spin while they wait take the cores from those that decode the next images.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    providers = [f"{name}ExecutionProvider" for name in dict.fromkeys((where, "CPU"))]
    content = graph if isinstance(graph, bytes) else str(graph)
    return ort.InferenceSession(content, options, providers=providers)


def _device_of(session: ort.InferenceSession) -> str:
    return str(session.get_providers()[0]).removesuffix("ExecutionProvider")


def run_session(
    session: ort.InferenceSession, image: NDArray[np.float32], layers: bool
) -> RungOutputs:
    """Run a graph on `image` (B, 3, H, W); without `layers`, `cls_layers` is not asked for."""
    names = [output.name for output in session.get_outputs()]
    names = [name for name in names if layers or name != "cls_layers"]
    values = dict(zip(names, session.run(names, {"image": image}), strict=True))
    return RungOutputs(values["embedding"], values.get("cls_layers"), values.get("logits"))


def run_counts(
    session: ort.InferenceSession, image: NDArray[np.float32]
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """The `tokens` (B, 1 or L) and `patches` (B, S * S) of a graph whose recipe `varies`."""
    tokens, patches = session.run(["tokens", "patches"], {"image": image})
    return tokens, patches
