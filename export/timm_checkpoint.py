"""Checkpoints of timm: their names, files, hub folders and preprocessing; `timm_vit` converts them.

timm is not imported and need not be installed. A `config.json` that it wrote for a hub is read
where there is one; the rest is known by the model's name.

Names and numbers are facts about timm 1.0 (vision_transformer.py, deit.py, transforms_factory.py).
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from bundle import labels as class_labels
from bundle import manifest
from export.backbones import Backbone
from export.errors import UsageError, first_line
from export.processors import cropped
from export.static_vit import IMAGENET_MEAN, IMAGENET_STD
from export.timm_vit import MIXED, PATCHES, Tensors, convert, split_detail
from imaging import Preprocessing, PreprocessingError

PREFIX = "timm:"
CONFIG = "config.json"
HINT = (
    "timm's own format: download it (hf download ID --local-dir DIR) and give --model DIR, or "
    "--model timm:NAME --checkpoint FILE; timm need not be installed"
)
# Where training scripts keep the state dict; averaged weights first, as timm itself prefers them.
_HOLDERS = ("state_dict_ema", "model_ema", "state_dict", "model")
_WRAPPERS = re.compile(r"((module|model|net|_orig_mod)\.)*")
_NAME = re.compile(r"(vit|deit3?|flexivit)_\w+?(\.[\w-]+)?")
_LEAST_PX_WHOLE = 384  # models this large are shown the whole image
# Mean, std, crop_pct and interpolation of timm's configurations, by the first pattern in the name.
_HALF, _ZERO, _ONE = (0.5,) * 3, (0.0,) * 3, (1.0,) * 3
_USUAL: tuple[tuple[str, tuple[float, ...], tuple[float, ...], float, str], ...] = (
    (r"dinov2|intern300m|^deit3.*in22k", IMAGENET_MEAN, IMAGENET_STD, 1.0, "bicubic"),
    (r"^deit|\.dino$|\.mae$", IMAGENET_MEAN, IMAGENET_STD, 0.9, "bicubic"),
    (r"_miil", _ZERO, _ONE, 0.875, "bilinear"),
    (r"tipsv2", _ZERO, _ONE, 1.0, "bicubic"),
    (r"^flexivit|_plus_", _HALF, _HALF, 0.95, "bicubic"),
    (r"", _HALF, _HALF, 0.9, "bicubic"),
)


def is_timm(model: str) -> bool:
    """Whether `--model` names a timm model, or a folder in timm's hub format."""
    return model.startswith(PREFIX) or _hub_config(Path(model) / CONFIG) is not None


def load(model: str, checkpoint: Path | None) -> Backbone:
    """Convert a checkpoint.

    Args:
        model: `timm:NAME`, such as `timm:vit_base_patch16_224.augreg_in21k_ft_in1k`, or a folder
            with timm's config.json and weights.
        checkpoint: a .safetensors, .bin or .pth file; None for a folder.

    Raises:
        UsageError: it cannot be read, or does not map onto ViT, DeiT or DINOv2 with registers.
    """
    if checkpoint is None and model.startswith(PREFIX):
        raise UsageError(
            f"--model {model} needs --checkpoint FILE, its weights (.safetensors, .bin or .pth); "
            f"or give a folder that holds them beside timm's {CONFIG}"
        )
    if checkpoint is None:
        config = _hub_config(Path(model) / CONFIG) or {}
        tag = config.get("pretrained_cfg", {}).get("tag")
        name = config["architecture"] + (f".{tag}" if tag else "")
        checkpoint = _weights_in(Path(model))
    else:
        name = model.removeprefix(PREFIX).removeprefix("timm/")
        config = _hub_config(checkpoint.parent / CONFIG) or {}
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"--model {PREFIX}{name} is not timm's name of a ViT or DeiT, such as "
            "vit_base_patch16_224 or deit_tiny_patch16_224.fb_in1k"
        )
    tensors, notices = _read(checkpoint)
    try:
        tensors, detail = split_detail(tensors)
        network = convert(tensors, name, config)
        classes = network.config.num_labels if network.base_model is not network else 0
        transform, assumed = _transform(name, network.config.image_size, config)
    except UsageError as error:
        raise UsageError(f"--checkpoint {checkpoint}: {error}") from None
    labels, more = _labels(config, classes)
    if detail is not None:
        more += (f"{checkpoint.name} was trained with patches of several sizes, for apt=BITS",)
    px, patch = network.config.image_size, network.config.patch_size
    return Backbone(
        name=name,
        source={
            "kind": "timm",
            "name": name,
            "file": checkpoint.name,
            "sha256": manifest.sha256_file(checkpoint),
        },
        model=network,
        labels=labels,
        default_px=(max(patch, round(px / 2 / patch) * patch), px),
        preprocessing=transform,
        notices=(*notices, *assumed, *more),
        detail=detail,
    )


def _hub_config(file: Path) -> dict[str, Any] | None:
    """What timm wrote for a hub; None where the file is no such one."""
    try:
        content = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    is_timms = isinstance(content, dict) and isinstance(content.get("architecture"), str)
    parts = [content.get(key, {}) for key in ("pretrained_cfg", "model_args")] if is_timms else []
    return content if is_timms and all(isinstance(part, dict) for part in parts) else None


def _weights_in(folder: Path) -> Path:
    names = ("model.safetensors", "pytorch_model.bin")
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is None:
        raise UsageError(f"--model {folder} has timm's {CONFIG} and neither of {', '.join(names)}")
    return found


def _read(file: Path) -> tuple[Tensors, tuple[str, ...]]:
    """The tensors of a checkpoint by timm's names, in FP32, and what to say of them."""
    found, prefix, holder = vit_weights(read_file(file), file, _HOLDERS)
    notices = (f"{file.name} holds averaged weights ({holder}), which are taken",)
    return {
        name.removeprefix(prefix): tensor.detach().float()
        for name, tensor in found.items()
        if str(name).startswith(prefix) and isinstance(tensor, torch.Tensor)
    }, notices if holder.endswith("ema") else ()


def read_file(file: Path, holder: str = "state_dict") -> Any:
    """What a .safetensors file holds, or one that torch.save wrote; no code in it is run.

    Args:
        file: to read.
        holder: the name under which its weights usually lie, for messages.

    Raises:
        UsageError: there is no such file, or it holds more than weights and arguments.
    """
    if not file.is_file():
        raise UsageError(f"--checkpoint {file}: no such file")
    try:
        if file.suffix == ".safetensors":
            return safetensors.torch.load_file(file)
        # Training scripts of timm and DeiT keep their arguments beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # both libraries raise many types on foreign files
        reason = first_line(error)
        how = "give a .safetensors file, or a state dict that torch.save wrote"
        if stranger := re.search(r"GLOBAL (\S+) was not an allowed", str(error)):
            reason = f"it holds a {stranger[1]}, which would be run"
            how += (
                '; where you trust it: python -c "import torch; torch.save(torch.load('
                f"'{file}', 'cpu', weights_only=False)['{holder}'], 'weights.pth')\""
            )
        raise UsageError(f"--checkpoint {file} cannot be read ({reason}); {how}") from None


def vit_weights(
    content: Any, file: Path, holders: Sequence[str]
) -> tuple[Mapping[str, Any], str, str]:
    """Find the weights of a ViT in what a checkpoint holds.

    Args:
        content: of the file.
        file: for messages.
        holders: names under which the weights may lie, the first that is there; else `content`
            itself holds them.

    Returns:
        The weights, what all their names begin with, and where they lie, empty for `content`.

    Raises:
        UsageError: they are not a ViT's under timm's names.
    """
    there = content if isinstance(content, Mapping) else {}
    holder = next((name for name in holders if isinstance(there.get(name), Mapping)), "")
    found = there[holder] if holder else there
    names = [str(name) for name in found]
    ends = [name for name in names if name.endswith(PATCHES) and MIXED not in name]
    first = next(iter(ends), "")
    prefix = first.removesuffix(PATCHES)
    if not first or not _WRAPPERS.fullmatch(prefix):
        raise UsageError(
            f"--checkpoint {file} has no {PATCHES}, as a ViT of timm has; it holds "
            f"{', '.join(names[:3]) or 'no tensors'}"
        )
    return found, prefix, holder


def _labels(
    config: Mapping[str, Any], classes: int
) -> tuple[tuple[str, ...] | None, tuple[str, ...]]:
    """One label per class, None where the file names none, and what to say of them."""
    given = config.get("pretrained_cfg", {}).get("label_names") or config.get("label_names")
    if not isinstance(given, list) or not classes or len(given) != classes:
        return None, ()
    return class_labels.distinct(given)


@dataclass(frozen=True)
class Transform:
    """timm's evaluation transform at any resolution.

    Attributes:
        mean: per channel, in units of 0..1.
        std: per channel, in units of 0..1.
        crop_pct: side of the centre crop, of the resized image's.
        interpolation: as `Preprocessing.resample`.
        squashes: whether both edges are resized to that; else the shorter one is.
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    crop_pct: float
    interpolation: str
    squashes: bool

    def __call__(self, px: int) -> Preprocessing:
        """Raises PreprocessingError for figures that mean nothing."""
        resized_px = math.floor(px / self.crop_pct)
        return cropped(px, resized_px, self.squashes, self.interpolation, self.mean, self.std)


def _transform(name: str, px: int, config: Mapping[str, Any]) -> tuple[Transform, tuple[str, ...]]:
    """How images are made ready: what config.json says, else what timm has for the name."""
    told = config.get("pretrained_cfg", {})
    mean, std, crop_pct, interpolation = next(
        usual[1:] for usual in _USUAL if re.search(usual[0], name)
    )
    usual: dict[str, Any] = {
        "mean": mean,
        "std": std,
        "crop_pct": 1.0 if px >= _LEAST_PX_WHOLE else crop_pct,
        "interpolation": interpolation,
        "crop_mode": "center",
    }
    given = {key: told.get(key) or value for key, value in usual.items()}
    if given["crop_mode"] not in ("center", "squash"):
        raise UsageError(f"its {CONFIG} has crop_mode {given['crop_mode']}; center or squash are")
    try:
        red, green, blue = (float(value) for value in given["mean"])
        r, g, b = (float(value) for value in given["std"])
        transform = Transform(
            mean=(red, green, blue),
            std=(r, g, b),
            crop_pct=float(given["crop_pct"]),
            interpolation=str(given["interpolation"]),
            squashes=given["crop_mode"] == "squash",
        )
        transform(px)
    except (TypeError, ValueError, ZeroDivisionError, PreprocessingError) as error:
        raise UsageError(f"its {CONFIG} gives a preprocessing that is none: {error}") from None
    assumed = sorted(key for key in usual if key != "crop_mode" and not told.get(key))
    if not assumed:
        return transform, ()
    shown = ", ".join(f"{key} {given[key]}" for key in assumed)
    return transform, (f"no {CONFIG} of timm says {', '.join(assumed)}: by its name, {shown}",)
