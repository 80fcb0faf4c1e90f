"""Input files for perf_analyzer, made from real images.

perf_analyzer repeats one random input unless it is given data, and one input sends a router down
one path for ever. All images go into a *single* stream, as its steps: of several streams a model
without sequences is sent the first only.
"""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class InputData:
    """A written input file.

    Attributes:
        path: the file.
        items: how many inputs it holds. They are sent in turn, so that a request count of
            k x items sends each of them k times, at any concurrency.
    """

    path: Path
    items: int


def _element(content: bytes, shape: Sequence[int]) -> dict[str, Any]:
    encoded = base64.b64encode(content).decode("ascii")
    return {"content": {"b64": encoded}, "shape": list(shape)}


def _write(path: Path, name: str, elements: Sequence[dict[str, Any]]) -> InputData:
    if not elements:
        raise ValueError("there is no image to write an input file from")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"data": [{name: element} for element in elements]}))
    return InputData(path, len(elements))


def write_tensors(
    path: Path, images: Sequence[NDArray[np.float32]], name: str = "image"
) -> InputData:
    """Write image tensors.

    Args:
        path: JSON file to write.
        images: FP32, each of shape (3, H, W), without a batch axis.
        name: the model's input.

    Raises:
        ValueError: no image, or one of another dtype.
    """
    if any(image.dtype != np.float32 for image in images):
        raise ValueError("image tensors must be float32")
    elements = [_element(np.asarray(i, dtype="<f4").tobytes(), i.shape) for i in images]
    return _write(path, name, elements)


def write_bytes(path: Path, images: Sequence[bytes], name: str = "image_bytes") -> InputData:
    """Write encoded images for a BYTES input of shape [1].

    Args:
        path: JSON file to write.
        images: JPEG, PNG or WebP files.
        name: the model's input.

    Raises:
        ValueError: no image.
    """
    # Each element of a serialised BYTES tensor starts with its length, 4 bytes little-endian.
    elements = [_element(struct.pack("<I", len(image)) + image, (1,)) for image in images]
    return _write(path, name, elements)
