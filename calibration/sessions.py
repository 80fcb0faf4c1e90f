"""ONNX Runtime sessions of the rungs, offline."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from routing import RungOutputs
from routing.provenance import processor


def open_session(file: Path) -> ort.InferenceSession:
    """A session on the GPU where there is one, else on every CPU core."""
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
    """Run a rung on `image` (B, 3, H, W); without `layers`, `cls_layers` is not asked for."""
    names = [output.name for output in session.get_outputs()]
    names = [name for name in names if layers or name != "cls_layers"]
    values = dict(zip(names, session.run(names, {"image": image}), strict=True))
    return RungOutputs(values["embedding"], values.get("cls_layers"), values.get("logits"))
