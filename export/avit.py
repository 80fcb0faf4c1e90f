"""Checkpoints of A-ViT, whose tokens halt by a gate: read strictly, as they were published.

Written from facts about its public code (Yin et al. 2022, "A-ViT: Adaptive Tokens for Efficient
Vision Transformer"). A file is what its training saved: `model`, the weights that are evaluated,
beside averaged ones, an optimiser and arguments. The weights are those of a DeiT under timm's
names. The gate has none: only the file's name says its scale and centre, as `tiny-10-30.pth`.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bundle import manifest
from export.backbones import Backbone
from export.errors import UsageError
from export.request import AVIT_GATES, read_gate
from export.static_vit import IMAGENET_MEAN, IMAGENET_STD
from export.timm_checkpoint import Transform, read_file, vit_weights
from export.timm_vit import convert

_WIDTHS = {"avit-tiny": 192, "avit-small": 384}
_DEPTH, _PATCH, _PX = 12, 16, 224
# A validation image is made 256 px along its shorter edge; mean and std of 0.5, as the public
# code's configuration of the model says, are used nowhere in it.
_TRANSFORM = Transform(IMAGENET_MEAN, IMAGENET_STD, 224 / 256, "bicubic", squashes=False)


def load(model: str, checkpoint: Path | None, gate: tuple[float, float] | None) -> Backbone:
    """Read a published file, or a plain DeiT under the same names.

    Args:
        model: `avit-tiny` or `avit-small`.
        checkpoint: what a training saved, or the weights alone.
        gate: scale and centre; None: the file's name says them.

    Raises:
        UsageError: it cannot be read, no gate is known, or it is not exactly of this model.
    """
    if checkpoint is None:
        raise UsageError(
            f"--model {model} needs --checkpoint FILE, its published weights, such as "
            f"{_published(model)}"
        )
    content = read_file(checkpoint, "model")
    weights, prefix, _ = vit_weights(content, checkpoint, ("model",))
    found = {str(name).removeprefix(prefix): value for name, value in weights.items()}
    if (fault := _fault(model, found)) is not None:
        raise UsageError(f"--checkpoint {checkpoint} is no {model}: {fault}")
    told = "--gate says"
    if gate is None:
        gate, told = _named_gate(model, checkpoint), "its name says; --gate SCALE,CENTRE says other"
    scale, centre = gate
    notices = [f"tokens of {checkpoint.name} halt by sigmoid({scale:g} x - {centre:g}), as {told}"]
    if not _was_trained(content):
        notices.append(
            f"nothing in {checkpoint.name} says that it was trained as an A-ViT: the gate of a "
            "plain DeiT is untrained, so its answers are no longer the DeiT's"
        )
    tensors = {name: value.detach().float() for name, value in found.items()}
    return Backbone(
        name=model,
        source={
            "kind": "avit",
            "name": model,
            "file": checkpoint.name,
            "sha256": manifest.sha256_file(checkpoint),
            "gate": list(gate),
        },
        model=convert(tensors, f"deit_{model.removeprefix('avit-')}_patch16_224", {}),
        labels=None,
        default_px=(_PX // 2, _PX),
        preprocessing=_TRANSFORM,
        notices=tuple(notices),
        gate=gate,
    )


def _published(model: str) -> str:
    scale, centre = AVIT_GATES[model]
    return f"{model.removeprefix('avit-')}-{scale}-{centre}.pth"


def _named_gate(model: str, file: Path) -> tuple[float, float]:
    """Scale and centre by the last two fields of a file's name."""
    gate = read_gate(*file.stem.split("-")[-2:]) if file.stem.count("-") > 1 else None
    if gate is None:
        scale, centre = AVIT_GATES[model]
        raise UsageError(
            f"--model {model}: the name of {file} does not end in its gate's scale and centre, as "
            f"{_published(model)}; give --gate SCALE,CENTRE, for the published {model} --gate "
            f"{scale},{centre}"
        )
    return gate


def _was_trained(content: Any) -> bool:
    """Whether the arguments beside the weights are those of A-ViT's training."""
    arguments = content.get("args")
    if not isinstance(arguments, argparse.Namespace):
        return False
    given = vars(arguments)
    return "ponder_token_scale" in given or str(given.get("model")).startswith("avit")


def _fault(model: str, found: Mapping[str, Any]) -> str | None:
    """Why weights are not exactly the model's, in the middle of a line; None: they are."""
    cls = found.get("cls_token")
    width = cls.shape[-1] if isinstance(cls, torch.Tensor) and cls.ndim else _WIDTHS[model]
    if width != _WIDTHS[model]:
        other = next((name for name, wide in _WIDTHS.items() if wide == width), None)
        hint = "" if other is None else f"; give --model {other}"
        return f"its cls_token is {width} wide and should be {_WIDTHS[model]}{hint}"
    head = found.get("head.bias")
    shapes = _shapes(width, len(head) if isinstance(head, torch.Tensor) and head.ndim else 1000)
    if surplus := [name for name in found if name not in shapes]:
        return f"it has {_some(surplus)}, which A-ViT has not"
    if missing := [name for name in shapes if name not in found]:
        return f"it lacks {_some(missing)}"
    for name, shape in shapes.items():
        value = found[name]
        if not isinstance(value, torch.Tensor):
            return f"its {name} is a {type(value).__name__}, no tensor"
        if value.shape != shape:
            return f"its {name} is {list(value.shape)} and should be {list(shape)}"
    return None


def _some(names: list[str]) -> str:
    more = len(names) - 1
    return names[0] + (f" and {more} more tensor{'s' * (more > 1)}" if more else "")


def _shapes(width: int, classes: int) -> dict[str, tuple[int, ...]]:
    """Of all 152 tensors, by timm's names."""
    pairs: dict[str, tuple[int, ...]] = {
        "patch_embed.proj": (width, 3, _PATCH, _PATCH),
        "norm": (width,),
        "head": (classes, width),
    }
    for block in (f"blocks.{index}." for index in range(_DEPTH)):
        pairs |= {f"{block}norm1": (width,), f"{block}norm2": (width,)}
        pairs |= {f"{block}attn.qkv": (3 * width, width), f"{block}attn.proj": (width, width)}
        pairs |= {f"{block}mlp.fc1": (4 * width, width), f"{block}mlp.fc2": (width, 4 * width)}
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 1 + (_PX // _PATCH) ** 2, width),
    }
    for name, shape in pairs.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes
