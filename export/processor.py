"""A checkpoint's image processor, as `transformers` loads it, read as an `imaging.Preprocessing`.

The library says what its file means: the size of old files, and the fields that a file leaves out,
differ from class to class.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import AutoImageProcessor, PretrainedConfig
from transformers.image_processing_backends import PilBackend
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.deit.image_processing_pil_deit import DeiTImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from export.errors import UsageError, first_line
from export.static_vit import IMAGENET_MEAN, IMAGENET_STD
from imaging import Preprocessing, PreprocessingError

FILE = "preprocessor_config.json"
RESCALE_FACTOR = 1 / 255
# A processor class that replaces one of these does something that `imaging` does not.
STEPS = ("_preprocess", "resize", "center_crop", "rescale", "normalize")


@dataclass(frozen=True)
class Processor:
    """How a checkpoint wants its images, at any resolution.

    Attributes:
        native_px: side of the image it was trained on, in pixels.
        resized_px: edge of the resized image before the centre crop of `native_px`.
        stretches: both edges are resized to `resized_px`; else the shorter one is.
        resample: as in `Preprocessing`.
        mean: per channel, in units of 0..1.
        std: per channel, in units of 0..1.
        notices: what had to be assumed.
    """

    native_px: int
    resized_px: int
    stretches: bool
    resample: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    notices: tuple[str, ...] = ()

    @classmethod
    def load(cls, model: str, config: PretrainedConfig) -> Processor:
        """Read the processor's file next to a model, or take its family's usual one.

        Args:
            model: directory or hub id.
            config: the model's own configuration.

        Raises:
            UsageError: the file is damaged, or asks for something `imaging` does not do.
        """
        try:
            found = AutoImageProcessor.from_pretrained(
                model, backend="pil", trust_remote_code=False
            )
        except OSError as error:
            if Path(model, FILE).is_file():
                raise UsageError(f"--model {model}: {first_line(error)}") from None
            notice = (
                f"{model} has no {FILE}: using {config.model_type}'s usual preprocessing at "
                f"{config.image_size} px"
            )
            return _read(_usual(config.model_type, config.image_size), (notice,))
        except Exception as error:  # the library raises many types on foreign files
            raise UsageError(
                f"--model {model}: its {FILE} is not supported ({first_line(error)})"
            ) from None
        return _read(found, ())

    def preprocessing(self, px: int) -> Preprocessing:
        """The same preprocessing for another resolution, the crop margin kept in proportion.

        Raises:
            PreprocessingError: the crop is larger than the resized image, or a bad mean or std.
        """
        resized_px = round(px * self.resized_px / self.native_px)
        return Preprocessing(
            height=px,
            width=px,
            resize_shortest_edge=None if self.stretches else resized_px,
            resample=self.resample,
            mean=self.mean,
            std=self.std,
            stretch_to=(resized_px, resized_px) if self.stretches else None,
        )


def _usual(model_type: str, px: int) -> PilBackend:
    """What the published checkpoints of a family use, at another resolution."""
    crop = {
        "crop_size": {"height": px, "width": px},
        "image_mean": IMAGENET_MEAN,
        "image_std": IMAGENET_STD,
    }
    resized_px = round(px * 256 / 224)
    if model_type == "deit":
        return DeiTImageProcessorPil(size={"height": resized_px, "width": resized_px}, **crop)
    if model_type == "dinov2":
        return BitImageProcessorPil(size={"shortest_edge": resized_px}, **crop)
    return ViTImageProcessorPil(size={"height": px, "width": px})


def _read(found: PilBackend, notices: tuple[str, ...]) -> Processor:
    kind = type(found)
    if any(getattr(kind, step, None) is not getattr(PilBackend, step) for step in STEPS):
        raise UsageError(
            f"the image processor {kind.__name__} is not supported; ViT, DeiT, BiT are"
        )
    if not found.do_resize or not found.do_rescale or found.do_pad:
        raise UsageError("a processor that pads, or does not resize and rescale, is not supported")
    if abs(found.rescale_factor - RESCALE_FACTOR) > 1e-6:
        raise UsageError(f"rescale_factor {found.rescale_factor} is not supported; 1/255 is")
    native_px, resized_px, stretches = _geometry(found)
    mean, std = (
        (found.image_mean, found.image_std) if found.do_normalize else ([0.0] * 3, [1.0] * 3)
    )
    try:
        resample = Image.Resampling(found.resample).name.lower()
        processor = Processor(
            native_px, resized_px, stretches, resample, _rgb(mean), _rgb(std), notices
        )
        processor.preprocessing(native_px)
    except (TypeError, ValueError, PreprocessingError) as error:
        raise UsageError(f"the processor's preprocessing is not supported: {error}") from None
    return processor


def _geometry(found: PilBackend) -> tuple[int, int, bool]:
    """(native px, resized px, whether both edges are resized to it)."""
    size, crop = dict(found.size or ()), dict(found.crop_size or ())
    square_px = _square_px(size)
    if not found.do_center_crop:
        if square_px is None:
            raise UsageError(f"size {size} without a centre crop is not supported; a square is")
        return square_px, square_px, True
    native_px = _square_px(crop)
    if native_px is None:
        raise UsageError(f"crop_size {crop} is not supported; a square is")
    if square_px is not None:
        return native_px, square_px, True
    if set(size) != {"shortest_edge"}:
        raise UsageError(f"size {size} is not supported; shortest_edge or a square is")
    return native_px, size["shortest_edge"], False


def _square_px(size: dict[str, int]) -> int | None:
    height = size.get("height")
    return height if size == {"height": height, "width": height} else None


def _rgb(values: Any) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue
