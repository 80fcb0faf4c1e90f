"""How a checkpoint wants its images: its processor's file, or its family's usual preprocessing.

The library says what a checkpoint's image processor means: the size of old files, and the fields
that a file leaves out, differ from class to class.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import AutoImageProcessor, PretrainedConfig
from transformers.image_processing_backends import PilBackend
from transformers.models.beit.image_processing_pil_beit import BeitImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from export.errors import UsageError, first_line
from export.families import FAMILIES, IMAGENET, vision_config
from imaging import Preprocessing, PreprocessingError

FILE = "preprocessor_config.json"
NESTED = "processor_config.json"  # of a processor of images and texts, since transformers 5
RESCALE_FACTOR = 1 / 255
# A processor class that replaces one of these does something that `imaging` does not; BEiT's only
# adds what it does to maps of segments.
STEPS = ("_preprocess", "resize", "center_crop", "rescale", "normalize")
KNOWN = (PilBackend, BeitImageProcessorPil)


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
        vision, file = vision_config(config), _file(model)
        if file is not None and (fault := _fault(Path(model, file))) is not None:
            raise UsageError(f"--model {model}: its {file} is not a valid JSON file ({fault})")
        try:
            found = _found(model)
        except OSError as error:
            if file is not None:
                raise UsageError(f"--model {model}: {file}: {first_line(error)}") from None
            family, px = FAMILIES[vision.model_type], int(vision.image_size)
            notice = (
                f"{model} has no {FILE}: using the usual preprocessing of {family.title} at {px} px"
            )
            return _read(family.usual(px), px, (notice,))
        except Exception as error:  # the library raises many types on foreign files
            raise UsageError(
                f"--model {model}: its {file or FILE} is not supported ({first_line(error)})"
            ) from None
        try:
            return _read(found, int(vision.image_size), ())
        except UsageError as error:
            raise UsageError(f"--model {model}: its {file or FILE}: {error}") from None

    def preprocessing(self, px: int) -> Preprocessing:
        """The same preprocessing for another resolution, the crop margin kept in proportion.

        Raises:
            PreprocessingError: the crop is larger than the resized image, or a bad mean or std.
        """
        resized_px = round(px * self.resized_px / self.native_px)
        return cropped(px, resized_px, self.stretches, self.resample, self.mean, self.std)


def _found(model: str) -> PilBackend:
    """The processor that a checkpoint's file describes, of its class that needs no torchvision."""
    fields, _ = PilBackend.get_image_processor_dict(model)
    if str(fields.get("image_processor_type")).startswith("DINOv3ViT"):
        # It has no such class. Its own resizes what is rescaled: no grey level is rounded between.
        return ViTImageProcessorPil(**{**IMAGENET, **fields})
    found: PilBackend = AutoImageProcessor.from_pretrained(
        model, backend="pil", trust_remote_code=False
    )
    return found


def _file(model: str) -> str | None:
    """The name of the file that describes a folder's processor; None: there is none, or a hub."""
    nested = Path(model, NESTED)
    with contextlib.suppress(OSError, ValueError, RecursionError):
        content = json.loads(nested.read_text("utf-8"))
        if isinstance(content, dict) and "image_processor" in content:
            return NESTED  # it counts before the other
    return FILE if Path(model, FILE).is_file() else None


def _fault(file: Path) -> str | None:
    """Why a file holds no fields; None: it does."""
    try:
        content = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        return first_line(error)
    return None if isinstance(content, dict) else f"it holds a {type(content).__name__}"


def _read(found: PilBackend, image_px: int, notices: tuple[str, ...]) -> Processor:
    """What a processor does; `image_px` is the size of the model's images."""
    kind = type(found)
    known = all(any(_same(kind, other, step) for other in KNOWN) for step in STEPS)
    if not known:
        raise UsageError(
            f"the image processor {kind.__name__} is not supported; ViT, DeiT, BiT, BEiT, CLIP, "
            "SigLIP and DINOv3 are"
        )
    if not found.do_rescale or found.do_pad:
        raise UsageError(
            "a processor that pads, or does not rescale by 1/255, is not supported; correct "
            "do_pad and do_rescale there"
        )
    if abs(found.rescale_factor - RESCALE_FACTOR) > 1e-6:
        raise UsageError(f"rescale_factor {found.rescale_factor} is not supported; 1/255 is")
    if found.do_resize:
        native_px, resized_px, stretches = _geometry(found)
    elif found.do_center_crop:
        raise UsageError(
            "do_resize false with a centre crop is not supported; say do_resize true and the size "
            "to resize to"
        )
    else:
        native_px, resized_px, stretches = image_px, image_px, True
        notices += (
            f"do_resize is false in {FILE}: images of {image_px} px are taken as they are, others "
            f"are resized to {image_px} px; say do_resize true and a size there for anything else",
        )
    try:
        resample = Image.Resampling(found.resample).name.lower()
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        if found.do_normalize:
            mean, std = _rgb(found.image_mean), _rgb(found.image_std)
        processor = Processor(native_px, resized_px, stretches, resample, mean, std, notices)
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


def _same(kind: type, other: type, step: str) -> bool:
    return getattr(kind, step, None) is getattr(other, step)


def _rgb(values: Any) -> tuple[float, float, float]:
    """One number for each channel; one number alone is that of all three."""
    values = [values] * 3 if isinstance(values, int | float) else values
    numbers = [float(value) for value in values]
    if len(numbers) != 3:
        raise ValueError(f"{values} are not three numbers, one for each of red, green and blue")
    return numbers[0], numbers[1], numbers[2]


def cropped(
    px: int,
    resized_px: int,
    stretches: bool,
    resample: str,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
) -> Preprocessing:
    """A square from the middle of the resized image.

    Args:
        px: its side.
        resized_px: of the shorter edge, or of both where the image is stretched.
        stretches: whether it is.
        resample: as in `Preprocessing`, like `mean` and `std`.
        mean: per channel.
        std: per channel.

    Raises:
        PreprocessingError: the crop is larger than the resized image, or a bad mean or std.
    """
    return Preprocessing(
        height=px,
        width=px,
        resize_shortest_edge=None if stretches else resized_px,
        resample=resample,
        mean=mean,
        std=std,
        stretch_to=(resized_px, resized_px) if stretches else None,
    )
