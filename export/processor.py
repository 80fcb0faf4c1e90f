"""A checkpoint's `preprocessor_config.json`, read as an `imaging.Preprocessing`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image
from transformers import PretrainedConfig
from transformers.image_processing_base import ImageProcessingMixin

from export.errors import UsageError
from imaging import Preprocessing

RESCALE_FACTOR = 1 / 255

# What transformers' own processor class does where the file leaves a field out. DINOv2 uses
# BitImageProcessor; these are the values that all published DINOv2 files hold.
DEFAULTS: dict[str, dict[str, Any]] = {
    "vit": {
        "size": {"height": 224, "width": 224},
        "resample": Image.Resampling.BILINEAR,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    },
    "deit": {
        "size": {"shortest_edge": 256},
        "do_center_crop": True,
        "crop_size": {"height": 224, "width": 224},
        "resample": Image.Resampling.BICUBIC,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    },
    "dinov2": {
        "size": {"shortest_edge": 256},
        "do_center_crop": True,
        "crop_size": {"height": 224, "width": 224},
        "resample": Image.Resampling.BICUBIC,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    },
}


@dataclass(frozen=True)
class Processor:
    """How a checkpoint wants its images, at any resolution.

    Attributes:
        native_px: side of the image it was trained on, in pixels.
        shortest_edge: of the resized image before the centre crop of `native_px`; None to stretch
            the image to the square.
        resample: as in `Preprocessing`.
        mean: per channel, in units of 0..1.
        std: per channel, in units of 0..1.
        notices: what had to be assumed.
    """

    native_px: int
    shortest_edge: int | None
    resample: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    notices: tuple[str, ...] = ()

    @classmethod
    def load(cls, model: str, config: PretrainedConfig) -> Processor:
        """Read the processor's file next to a model, or take its family's defaults.

        Args:
            model: directory or hub id.
            config: the model's own configuration.

        Raises:
            UsageError: the file asks for something `imaging` does not do.
        """
        defaults = DEFAULTS[config.model_type]
        try:
            fields, _ = ImageProcessingMixin.get_image_processor_dict(model)
        except OSError:
            notice = (
                f"{model} has no preprocessor_config.json: using {config.model_type}'s usual "
                f"preprocessing at {config.image_size} px"
            )
            return _parse(_at_native_px(defaults, config.image_size), defaults, (notice,))
        return _parse(fields, defaults, ())

    def preprocessing(self, px: int) -> Preprocessing:
        """The same preprocessing for another resolution, the crop margin kept in proportion."""
        edge = self.shortest_edge
        return Preprocessing(
            height=px,
            width=px,
            resize_shortest_edge=None if edge is None else round(px * edge / self.native_px),
            resample=self.resample,
            mean=self.mean,
            std=self.std,
        )


def _at_native_px(defaults: Mapping[str, Any], px: int) -> dict[str, Any]:
    if "crop_size" not in defaults:
        return {"size": {"height": px, "width": px}}
    edge = round(px * defaults["size"]["shortest_edge"] / defaults["crop_size"]["height"])
    return {"size": {"shortest_edge": edge}, "crop_size": {"height": px, "width": px}}


def _parse(
    fields: Mapping[str, Any], defaults: Mapping[str, Any], notices: tuple[str, ...]
) -> Processor:
    given = {**defaults, **{name: value for name, value in fields.items() if value is not None}}
    if not given.get("do_resize", True) or not given.get("do_rescale", True):
        raise UsageError("the processor neither resizes nor rescales; that is not supported")
    if abs(given.get("rescale_factor", RESCALE_FACTOR) - RESCALE_FACTOR) > 1e-6:
        raise UsageError(f"rescale_factor {given['rescale_factor']} is not supported; 1/255 is")
    native_px, edge, notice = _geometry(given)
    normalised = given.get("do_normalize", True)
    mean, std = (given["image_mean"], given["image_std"]) if normalised else ([0.0] * 3, [1.0] * 3)
    try:
        resample = Image.Resampling(given["resample"]).name.lower()
        processor = Processor(
            native_px,
            edge,
            resample,
            _rgb(mean),
            _rgb(std),
            notices + ((notice,) if notice else ()),
        )
        processor.preprocessing(native_px)
    except (TypeError, ValueError) as error:
        raise UsageError(f"the processor's preprocessing is not supported: {error}") from None
    return processor


def _geometry(given: Mapping[str, Any]) -> tuple[int, int | None, str | None]:
    """(native px, shortest edge or None to stretch, notice)."""
    size = given["size"]
    if isinstance(size, int):  # files of 2021 to 2022
        size = {"shortest_edge": size} if given.get("do_center_crop") else _square(size)
    stretched = _square_px(size)
    if not given.get("do_center_crop"):
        if stretched is None:
            raise UsageError(f"size {size} without a centre crop is not supported; a square is")
        return stretched, None, None
    crop = given["crop_size"]
    native_px = _square_px(_square(crop) if isinstance(crop, int) else crop)
    if native_px is None:
        raise UsageError(f"crop_size {crop} is not supported; a square is")
    if "shortest_edge" in size:
        return native_px, int(size["shortest_edge"]), None
    if stretched is None:
        raise UsageError(f"size {size} is not supported; shortest_edge or a square is")
    # DeiT's file since 2022. Its training resized the shortest edge (Touvron et al. 2020, the
    # paper's code), and for a square image the two are the same.
    notice = (
        f"the processor stretches to {stretched} x {stretched} px before its centre crop; resizing "
        f"the shortest edge to {stretched} px instead, which keeps the aspect ratio"
    )
    return native_px, stretched, notice


def _square(px: int) -> dict[str, int]:
    return {"height": px, "width": px}


def _square_px(size: Mapping[str, int]) -> int | None:
    height, width = size.get("height"), size.get("width")
    return int(height) if height and height == width else None


def _rgb(values: Any) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue
