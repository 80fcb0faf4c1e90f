"""A ViT or DeiT under timm's key names as a model of `transformers`, weight for weight.

timm itself is never imported: what a model is, is read off the names and shapes of its tensors, and
its number of heads off its width. What both libraries lay out otherwise is rewritten without loss:
a fused `qkv` is cut in three, a layer scale multiplied into the Linear before it, positions that a
table leaves out are zeros. What cannot be said so is refused by the name of its tensor.

Names and numbers are facts about timm 1.0 (vision_transformer.py, deit.py).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from export.errors import UsageError, first_line

Tensors = dict[str, torch.Tensor]
PATCHES = "patch_embed.proj.weight"
MIXED = "mixed_patch."
# A state that APT trained has its class token, and copies of these, under `MIXED` + name.
_COPIES = {
    "patch_embed.proj.weight": "patch_embed.proj.weight",
    "patch_embed.proj.bias": "patch_embed.proj.bias",
    "base_pos_embed": "pos_embed",
}
_UNUSED = "base_mini_pos_embed"
# Words of a name that say how wide the model is. A width has 64 numbers per head, but:
_WIDTHS: dict[str, tuple[int, ...]] = {
    **{"tiny": (192,), "small": (384,), "medium": (512,), "base": (768,), "large": (1024,)},
    **{"huge": (1280,), "giant": (1408, 1536), "gigantic": (1664,), "so400m": (1152,)},
}
_SIXTEEN_HEADS = (1152, 1280, 1408, 1664)
_EPS = 1e-6  # of every LayerNorm but CLIP's
# Tensors that make a model another than a ViT of `transformers`: pattern of a name, what it means.
_FOREIGN = (
    (r"norm_pre\.", "tokens are normalised before the first block, as in CLIP"),
    (r"fc_norm\.", "the head reads the mean of the patch tokens, not the CLS token"),
    (r"attn_pool\.", "the head reads an attention pooling, not the CLS token"),
    (r"pre_logits\.", "there is a layer between the CLS token and the head"),
    (r".*\.(q|k)_norm\.", "queries and keys are normalised"),
    (r".*\.attn\.(norm|inner_attn_ln)\.", "the attention has a norm within"),
    (r".*\.mlp\.(norm|ffn_ln)\.", "the MLP has a norm within"),
    (r".*\.mlp\.(w\d+|fc1_\w)\.", "the MLP is a SwiGLU"),
    (r".*(rel_pos|relative_position)", "positions are relative"),
    (r".*\.attn\.(q|v)_bias", "queries and values have biases and keys none, as in BEiT and EVA"),
    (r".*\.attn\.(q|k|v)_proj\.", "queries, keys and values are projected apart, as in EVA"),
)
_INTO = {"norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.o_proj"}
_INTO_REGISTERS = {**_INTO, "norm1": "norm1", "norm2": "norm2"}


def convert(tensors: Tensors, name: str, config: Mapping[str, Any]) -> PreTrainedModel:
    """The model, in eval mode: ViT, distilled DeiT or DINOv2 with registers, with its head if any.

    Args:
        tensors: by timm's names, FP32.
        name: timm's, such as `vit_base_patch16_224.augreg_in21k_ft_in1k`.
        config: what timm's config.json says, if there is one.

    Raises:
        UsageError: it maps onto none of these; one line that begins with the tensor's name.
    """
    left = {_own_name(key): tensor for key, tensor in tensors.items()}
    left.pop("mask_token", None)  # serves pretraining only
    if "clip" in name and "norm_pre.weight" not in left:
        raise UsageError(f"there is no norm_pre.weight, which {name} has; give its own name")
    shape = _Shape.of(left, name, config)
    model, base = _empty(shape, left, name)
    state: Tensors = {}

    def take(key: str, default: torch.Tensor | None = None) -> torch.Tensor:
        tensor = left.pop(key, default)
        if tensor is None:
            raise UsageError(f"there is no {key}, which {name} has")
        return tensor

    _put_embeddings(state, take, shape)
    into = _INTO_REGISTERS if shape.registers else _INTO
    path = "encoder.layer" if shape.registers else "layers"
    for index in range(shape.depth):
        _put_block(state, take, f"blocks.{index}.", f"{path}.{index}.", into, shape)
    for part in ("weight", "bias"):
        state[f"layernorm.{part}"] = take(f"norm.{part}")
    state = {f"{base}{key}": tensor for key, tensor in state.items()}
    if base:
        _put_heads(state, take, shape)
    if left:
        raise UsageError(f"{sorted(left)[0]} is no tensor of a ViT or DeiT; it maps onto nothing")
    try:
        info = model.load_state_dict(state, strict=False)
    except RuntimeError as error:  # of another shape
        wrong = [line.strip() for line in str(error).splitlines()[1:]] or [first_line(error)]
        raise UsageError(f"its tensors do not fit each other ({wrong[0]})") from None
    absent = [key for key in info.missing_keys if not key.endswith("mask_token")]
    assert not absent and not info.unexpected_keys, (absent, info.unexpected_keys)
    return model.eval()


def split_detail(tensors: Tensors) -> tuple[Tensors, Tensors | None]:
    """Take apart a state that the public code of APT has trained.

    Choudhury et al. 2025, "Accelerating Vision Transformers with Adaptive Patch Sizes"; that code
    itself loses the class token when it loads such a state.

    Args:
        tensors: by timm's names, and by those under `MIXED`, if it is one.

    Returns:
        The ViT's own, and what is added to coarse cells, see `patch_sizes.read_detail`; of any
        other state all of it, and None.

    Raises:
        UsageError: a tensor is missing, left over or of another shape, or two copies differ.
    """
    mixed = {k.removeprefix(MIXED): v for k, v in tensors.items() if k.startswith(MIXED)}
    if not mixed:
        return tensors, None
    own = {key: value for key, value in tensors.items() if not key.startswith(MIXED)}
    mixed.pop(_UNUSED, None)
    if "cls_token" not in mixed:
        raise UsageError(f"there is no {MIXED}cls_token, which a state of APT has")
    own.setdefault("cls_token", mixed["cls_token"])
    for copy, name in {**_COPIES, "cls_token": "cls_token"}.items():
        if (copy in mixed) != (name in own):
            absent = name if copy in mixed else MIXED + copy
            raise UsageError(f"there is no {absent}, which a state of APT has")
        if copy in mixed and not torch.equal(mixed.pop(copy), own[name]):
            raise UsageError(f"{MIXED}{copy} is not the same as {name}, which it is a copy of")
    width = own["cls_token"].shape[-1]
    detail = {
        "patch_attn.weight": (width, width, 2, 2),
        "patch_attn.bias": (width,),
        "zero_conv.weight": (width, width),
        "zero_conv.bias": (width,),
    }
    for key, shape in detail.items():
        if key not in mixed:
            raise UsageError(f"there is no {MIXED}{key}, which a state of APT has")
        if mixed[key].shape != shape:
            found = tuple(mixed[key].shape)
            raise UsageError(f"{MIXED}{key} has the shape {found}; {shape} fits the class token")
    if more := sorted(set(mixed) - set(detail)):
        raise UsageError(f"{MIXED}{more[0]} is no tensor of APT; it maps onto nothing")
    return own, mixed


@dataclass(frozen=True)
class _Shape:
    """What the tensors say of a model; all lengths in numbers but for pixels."""

    width: int
    depth: int
    hidden: int
    patch_px: int
    grid: int
    heads: int
    registers: int
    is_distilled: bool
    has_qkv_bias: bool

    @classmethod
    def of(cls, tensors: Tensors, name: str, config: Mapping[str, Any]) -> _Shape:
        """Raises UsageError where it is no ViT of `transformers`."""
        _refuse_foreign(tensors)
        if "cls_token" not in tensors:
            raise UsageError("there is no cls_token: the model pools its patch tokens")
        pools = [
            part.get("global_pool", "token") for part in (config, config.get("model_args", {}))
        ]
        if pools != ["token", "token"] or "_gap_" in name:
            raise UsageError("the head reads pooled patch tokens (global_pool), not the CLS token")
        if "_rope_" in name:
            raise UsageError("positions are rotary (rope), which no tensor of the file shows")
        needed = ["pos_embed", "norm.weight", "norm.bias"]
        needed += [f"blocks.0.{key}" for key in ("norm1.bias", "attn.qkv.weight")]
        needed += [f"blocks.0.mlp.{key}.weight" for key in ("fc1", "fc2")]
        if missing := [key for key in needed if key not in tensors]:
            raise UsageError(f"there is no {missing[0]}, which a ViT has")
        width, channels, patch_px, patch_width = tensors[PATCHES].shape
        if channels != 3 or patch_px != patch_width:
            raise UsageError(
                f"{PATCHES} takes {channels} channels in patches of {patch_px} x {patch_width} px; "
                "square ones of RGB are supported"
            )
        hidden = tensors["blocks.0.mlp.fc2.weight"].shape[1]
        if tensors["blocks.0.mlp.fc1.weight"].shape[0] != hidden:
            raise UsageError("blocks.0.mlp.fc1.weight is of a SwiGLU, which ViT has not")
        registers = tensors["reg_token"].shape[1] if "reg_token" in tensors else 0
        is_distilled = "dist_token" in tensors
        if registers and is_distilled:
            raise UsageError("there is a reg_token beside a dist_token, which no family has")
        return cls(
            width=width,
            depth=1 + max(int(found[1]) for key in tensors if (found := _block(key))),
            hidden=hidden,
            patch_px=patch_px,
            grid=_grid(tensors["pos_embed"].shape[1], 1 + is_distilled + registers, name, patch_px),
            heads=_heads(name, width, config),
            registers=registers,
            is_distilled=is_distilled,
            has_qkv_bias="blocks.0.attn.qkv.bias" in tensors,
        )


def _refuse_foreign(tensors: Tensors) -> None:
    for key in tensors:
        for pattern, meaning in _FOREIGN:
            if re.match(pattern, key):
                raise UsageError(f"{key}: {meaning}; that maps onto no family that is supported")


def _block(key: str) -> re.Match[str] | None:
    return re.match(r"blocks\.(\d+)\.", key)


def _grid(length: int, special: int, name: str, patch_px: int) -> int:
    """Patches along an edge, of a table that holds all special tokens, the CLS token or none."""
    sides = [math.isqrt(max(0, length - before)) for before in (special, 1, 0)]
    fits = [
        side
        for side, before in zip(sides, (special, 1, 0), strict=True)
        if side and side**2 + before == length
    ]
    named = [int(px) // patch_px for px in re.findall(r"_(\d{2,3})(?=[._]|$)", name)]
    if not fits:
        raise UsageError(f"pos_embed has {length} positions, which make no square of patches")
    return next((side for side in fits if side in named), fits[0])


def _heads(name: str, width: int, config: Mapping[str, Any]) -> int:
    for word, widths in _WIDTHS.items():
        if word in re.split(r"[_.]", name) and width not in widths:
            named = " or ".join(map(str, widths))
            raise UsageError(f"{name} is {named} wide and cls_token {width}; give its own name")
    told = config.get("model_args", {}).get("num_heads")
    heads = told or (16 if width in _SIXTEEN_HEADS else width // 64)
    if not isinstance(heads, int) or heads < 1 or width % heads:
        raise UsageError(
            f"cls_token is {width} wide, of which timm has no model; write its number of heads to "
            f'a config.json beside the file: {{"architecture": "{name}", "model_args": '
            '{"num_heads": N}}'
        )
    return heads


def _own_name(key: str) -> str:
    """A tensor's name in timm, where DeiT III's and DINOv2's own repositories have another."""
    key = re.sub(r"^(blocks\.\d+\.)gamma_([12])$", r"\1ls\2.gamma", key)
    return "reg_token" if key == "register_tokens" else key


def _empty(shape: _Shape, tensors: Tensors, name: str) -> tuple[PreTrainedModel, str]:
    """A model of random weights, and what its base model's tensors begin with."""
    has_head = "head.weight" in tensors
    options = {
        "hidden_size": shape.width,
        "num_hidden_layers": shape.depth,
        "num_attention_heads": shape.heads,
        "image_size": shape.grid * shape.patch_px,
        "patch_size": shape.patch_px,
        "layer_norm_eps": _EPS,
        "qkv_bias": shape.has_qkv_bias,
        "hidden_act": "quick_gelu" if "quickgelu" in name else "gelu",
        "num_labels": tensors["head.weight"].shape[0] if has_head else 0,
        "attn_implementation": "eager",
    }
    if shape.registers:
        if shape.hidden % shape.width:
            raise UsageError(
                f"blocks.0.mlp.fc2.weight reads {shape.hidden} numbers; beside a reg_token only a "
                f"multiple of the width, {shape.width}, is supported"
            )
        options["mlp_ratio"] = shape.hidden // shape.width
        config = transformers.Dinov2WithRegistersConfig(
            num_register_tokens=shape.registers, **options
        )
        if has_head:
            return (
                transformers.Dinov2WithRegistersForImageClassification(config),
                "dinov2_with_registers.",
            )
        return transformers.Dinov2WithRegistersModel(config), ""
    options["intermediate_size"] = shape.hidden
    if shape.is_distilled:
        if has_head:
            teacher = transformers.DeiTForImageClassificationWithTeacher
            return teacher(transformers.DeiTConfig(**options)), "deit."
        return transformers.DeiTModel(
            transformers.DeiTConfig(**options), add_pooling_layer=False
        ), ""
    if has_head:
        return transformers.ViTForImageClassification(transformers.ViTConfig(**options)), "vit."
    return transformers.ViTModel(transformers.ViTConfig(**options), add_pooling_layer=False), ""


def _put_embeddings(state: Tensors, take: Any, shape: _Shape) -> None:
    """Patches, special tokens and positions; a table that leaves tokens out gives them zeros."""
    to = "embeddings."
    bias = torch.zeros(shape.width)
    state[f"{to}patch_embeddings.projection.weight"] = take(PATCHES)
    state[f"{to}patch_embeddings.projection.bias"] = take("patch_embed.proj.bias", bias)
    cls, table = take("cls_token"), take("pos_embed")  # (1, 1, D), (1, special + N, D)
    special = table.shape[1] - shape.grid**2
    mine, patches = table[:, :special], table[:, special:]
    zeros = torch.zeros(1, 1 + shape.is_distilled + shape.registers - special, shape.width)
    mine = torch.cat([mine, zeros], dim=1)
    state[f"{to}cls_token"] = cls
    if shape.registers:
        # Registers get no positions there: theirs is added to them.
        state[f"{to}register_tokens"] = take("reg_token") + mine[:, 1:]
        mine = mine[:, :1]
    if shape.is_distilled:
        state[f"{to}distillation_token"] = take("dist_token")
    state[f"{to}position_embeddings"] = torch.cat([mine, patches], dim=1)


def _put_block(
    state: Tensors, take: Any, source: str, to: str, into: Mapping[str, str], shape: _Shape
) -> None:
    """One block; a layer scale goes into the Linear whose output it multiplies."""
    for part in ("weight", "bias"):
        if part == "weight" or shape.has_qkv_bias:
            fused = take(f"{source}attn.qkv.{part}")  # (3 D, D) or (3 D,)
            for letter, own in zip("qkv", fused.chunk(3), strict=True):
                state[f"{to}attention.{letter}_proj.{part}"] = own
        for norm in ("norm1", "norm2"):
            state[f"{to}{into[norm]}.{part}"] = take(f"{source}{norm}.{part}")
        state[f"{to}mlp.fc1.{part}"] = take(f"{source}mlp.fc1.{part}")
    ones = torch.ones(shape.width)
    for scale, linear, name in (
        ("ls1", "attn.proj", into["attn.proj"]),
        ("ls2", "mlp.fc2", "mlp.fc2"),
    ):
        gamma = take(f"{source}{scale}.gamma", ones)
        state[f"{to}{name}.weight"] = gamma[:, None] * take(f"{source}{linear}.weight")
        state[f"{to}{name}.bias"] = gamma * take(f"{source}{linear}.bias")
        if shape.registers:
            state[f"{to}layer_scale{scale[-1]}.lambda1"] = ones


def _put_heads(state: Tensors, take: Any, shape: _Shape) -> None:
    names = {"head": "classifier"}
    if shape.is_distilled:
        names = {"head": "cls_classifier", "head_dist": "distillation_classifier"}
    for source, to in names.items():
        weight = take(f"{source}.weight")  # (C, D)
        if shape.registers:  # its head reads the mean of the patch tokens, too
            weight = torch.cat([weight, torch.zeros_like(weight)], dim=1)
        state[f"{to}.weight"] = weight
        state[f"{to}.bias"] = take(f"{source}.bias", torch.zeros(len(weight)))
