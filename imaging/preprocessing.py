"""Resize, crop and normalise a decoded image the way a backbone was trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_RESAMPLE = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


@dataclass(frozen=True)
class Preprocessing:
    """A backbone's preprocessing.

    Attributes:
        height: rows of the image tensor.
        width: columns of the image tensor.
        resize_shortest_edge: scale the image so that its shorter edge has this many pixels, then
            take the centre crop of (height, width). None: scale to (height, width) directly,
            whatever the aspect ratio.
        resample: `nearest`, `bilinear`, `bicubic` or `lanczos`.
        mean: per channel (R, G, B), in units of 0..1.
        std: per channel (R, G, B), in units of 0..1.
    """

    height: int
    width: int
    resize_shortest_edge: int | None
    resample: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __post_init__(self) -> None:
        """Refuse a specification that cannot be carried out.

        Raises:
            ValueError: an unknown filter, a crop larger than the resized image, or a std of 0.
        """
        if self.resample not in _RESAMPLE:
            raise ValueError(f"resample {self.resample!r} is none of {', '.join(_RESAMPLE)}")
        edge = self.resize_shortest_edge
        if edge is not None and edge < max(self.height, self.width):
            raise ValueError(
                f"a shortest edge of {edge} px leaves no {self.height} x {self.width} px crop"
            )
        if min(self.height, self.width) < 1 or min(self.std) <= 0:
            raise ValueError("height, width and std must be positive")

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Preprocessing:
        """Read what `to_dict` wrote.

        Raises:
            TypeError: a field is missing or unknown.
            ValueError: as the constructor.
        """
        values = dict(fields)
        for name in ("mean", "std"):
            if name in values:
                red, green, blue = (float(value) for value in values[name])
                values[name] = (red, green, blue)
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The fields, ready for JSON."""
        return asdict(self)

    def __call__(self, image: Image.Image) -> NDArray[np.float32]:
        """Turn an RGB image into the `image` tensor.

        Args:
            image: mode RGB, any size.

        Returns:
            FP32, shape (3, height, width), C-contiguous.
        """
        width, height = image.size
        if self.resize_shortest_edge is None:
            scaled = (self.width, self.height)
        else:
            # As transformers and torchvision do: the long edge is truncated, not rounded.
            short, long = sorted((width, height))
            edge = self.resize_shortest_edge
            stretched = int(edge * long / short)
            scaled = (edge, stretched) if width <= height else (stretched, edge)
        if scaled != image.size:
            image = image.resize(scaled, _RESAMPLE[self.resample])
        left = (scaled[0] - self.width) // 2
        top = (scaled[1] - self.height) // 2
        image = image.crop((left, top, left + self.width, top + self.height))
        pixels = np.asarray(image, dtype=np.float32)  # (H, W, 3), 0..255
        scale = 1.0 / (255.0 * np.asarray(self.std, dtype=np.float32))
        shift = np.asarray(self.mean, dtype=np.float32) / np.asarray(self.std, dtype=np.float32)
        normalised = pixels * scale - shift
        return np.ascontiguousarray(normalised.transpose(2, 0, 1), dtype=np.float32)  # (3, H, W)
