"""Resize, crop and normalise a decoded image the way a backbone was trained."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .decode import ImageError, Limits

_RESAMPLE = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
# The resized image may be as large as a decoded one. Without a limit 1 x 65,535 px, a file of some
# hundred bytes, would become 256 x 16.8 million before all but its centre is cropped away.
MAX_RESIZED_PIXELS = Limits.max_pixels


class PreprocessingError(ValueError):
    """The specification cannot be carried out. One line."""


@dataclass(frozen=True)
class Preprocessing:
    """A backbone's preprocessing: resize, take the centre crop of (height, width), normalise.

    Attributes:
        height: rows of the image tensor.
        width: columns of the image tensor.
        resize_shortest_edge: scale the image so that its shorter edge has this many pixels.
        resample: `nearest`, `bilinear`, `bicubic` or `lanczos`.
        mean: per channel (R, G, B), in units of 0..1.
        std: per channel (R, G, B), in units of 0..1.
        stretch_to: scale the image to this (height, width) whatever its aspect ratio. Where
            neither this nor `resize_shortest_edge` is given, to the tensor's own: no crop is left.
    """

    height: int
    width: int
    resize_shortest_edge: int | None
    resample: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    stretch_to: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        """Refuse a specification that cannot be carried out.

        Raises:
            PreprocessingError: naming what is wrong.
        """
        if self.resample not in _RESAMPLE:
            raise PreprocessingError(
                f"resample {self.resample!r} is none of {', '.join(_RESAMPLE)}"
            )
        edge, stretched = self.resize_shortest_edge, self.stretch_to
        if edge is not None and stretched is not None:
            raise PreprocessingError("give resize_shortest_edge or stretch_to, not both")
        resized = stretched or ((self.height, self.width) if edge is None else (edge, edge))
        if any(type(side) is not int or side < 1 for side in (self.height, self.width, *resized)):
            raise PreprocessingError("sizes must be whole numbers of pixels, 1 or more")
        if resized[0] < self.height or resized[1] < self.width:
            of = (
                f"{resized[0]} x {resized[1]} px"
                if edge is None
                else f"a shortest edge of {edge} px"
            )
            raise PreprocessingError(f"{of} leaves no {self.height} x {self.width} px crop")
        if not all(math.isfinite(value) for value in (*self.mean, *self.std)) or min(self.std) <= 0:
            raise PreprocessingError("mean and std must be finite, and std positive")

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Preprocessing:
        """Read what `to_dict` wrote.

        Raises:
            PreprocessingError: a field is missing, unknown or invalid.
        """
        try:
            values = dict(fields)
            for name in ("mean", "std"):
                if name in values:
                    red, green, blue = (float(value) for value in values[name])
                    values[name] = (red, green, blue)
            if values.get("stretch_to") is not None:
                height, width = values["stretch_to"]
                values["stretch_to"] = (height, width)
            return cls(**values)
        except PreprocessingError:
            raise
        except (TypeError, ValueError) as error:
            raise PreprocessingError(f"invalid preprocessing: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """The fields, ready for JSON."""
        return asdict(self)

    def __call__(self, image: Image.Image) -> NDArray[np.float32]:
        """Turn an RGB image into the `image` tensor.

        Args:
            image: mode RGB, any size.

        Returns:
            FP32, shape (3, height, width), C-contiguous.

        Raises:
            ImageError: so long and narrow that the resized image would be too large.
        """
        resized = self._resized(image.size)
        if resized[0] * resized[1] > MAX_RESIZED_PIXELS:
            raise ImageError(
                f"the image is too long and narrow: resizing its {image.width} x {image.height} "
                f"pixels to {resized[0]} x {resized[1]} would pass the limit of "
                f"{MAX_RESIZED_PIXELS:,} in all; crop it first"
            )
        if resized != image.size:
            # Not `resize(box=...)` of the crop alone: Pillow orders its two passes by the sizes it
            # is given, and bicubic then differs by several grey levels from resizing the whole.
            image = image.resize(resized, _RESAMPLE[self.resample])
        left = (resized[0] - self.width) // 2
        top = (resized[1] - self.height) // 2
        image = image.crop((left, top, left + self.width, top + self.height))
        # Colour planes first: numpy is several times as fast along rows as along three channels.
        planes = np.asarray(image).transpose(2, 0, 1)  # (3, H, W), 0..255
        std = np.asarray(self.std, dtype=np.float32)[:, np.newaxis, np.newaxis]
        mean = np.asarray(self.mean, dtype=np.float32)[:, np.newaxis, np.newaxis]
        tensor = planes.astype(np.float32, order="C")
        tensor *= 1.0 / (255.0 * std)
        tensor -= mean / std
        return tensor

    def _resized(self, size: tuple[int, int]) -> tuple[int, int]:
        """Width and height of the image before the crop, from its own."""
        if self.resize_shortest_edge is None:
            height, width = self.stretch_to or (self.height, self.width)
            return width, height
        # As transformers and torchvision do: the long edge is truncated, not rounded.
        short, long = sorted(size)
        edge = self.resize_shortest_edge
        stretched = int(edge * long / short)
        return (edge, stretched) if size[0] <= size[1] else (stretched, edge)
