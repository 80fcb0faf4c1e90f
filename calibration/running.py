"""Run exported graphs over images on this machine: decode them in threads, ask ONNX Runtime."""

from __future__ import annotations

import ctypes
import os
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from bundle.prints import Looks, look_of, no_looks
from imaging import ImageError, Preprocessing, decode, pixels_sha256
from routing import RungOutputs
from routing.provenance import processor

from .source import ImageSource

THREADS = min(8, os.cpu_count() or 1)  # each may hold a photograph of 50 megapixels


@dataclass(frozen=True)
class DecodedImage:
    """An image as the graphs take it.

    Attributes:
        name: the image's name, unique within its source.
        group: images of one group stay in one split.
        label: the class name, or None.
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
        return f"{name if name.isprintable() else ascii(name)}: {error}"
    sha256 = pixels_sha256(decoded)
    look = no_looks(1)[0] if image.independent else look_of(decoded)
    return DecodedImage(image.name, image.group, image.label, sha256, look, tensor)


def open_session(file: Path) -> ort.InferenceSession:
    """Open an ONNX Runtime session on the GPU where there is one, else on every CPU core."""
    providers = ["CPUExecutionProvider"]
    if _has_gpu():
        ort.preload_dlls()
        providers.insert(0, "CUDAExecutionProvider")
    options = ort.SessionOptions()
    # Threads that spin while they wait take the cores from those that decode the next images.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return ort.InferenceSession(str(file), options, providers=providers)


def local_runtime() -> dict[str, Any]:
    """What `open_session` runs graphs with: its `name` with the release, and the `processor`."""
    device = "CUDA" if _has_gpu() else "CPU"
    return {"name": f"onnxruntime {ort.__version__} on {device}", "processor": processor()}


def _has_gpu() -> bool:
    # onnxruntime-gpu offers CUDA on every machine and complains at length where none is.
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return "CUDAExecutionProvider" in ort.get_available_providers()


def run_session(
    session: ort.InferenceSession, image: NDArray[np.float32], layers: bool
) -> RungOutputs:
    """Run a graph on `image` (B, 3, H, W); without `layers`, `cls_layers` is not asked for."""
    names = [output.name for output in session.get_outputs()]
    names = [name for name in names if layers or name != "cls_layers"]
    values = dict(zip(names, session.run(names, {"image": image}), strict=True))
    return RungOutputs(values["embedding"], values.get("cls_layers"), values.get("logits"))
