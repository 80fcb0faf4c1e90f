"""`px=N` and `depth=K`: the transformer sees a smaller image, or runs its first blocks only.

Positions of a smaller image are interpolated as in Dosovitskiy et al. 2021, "An Image is Worth
16x16 Words", section 3.2. The first K blocks are an early exit whose place is fixed, as the
internal classifiers of Kaya et al. 2019, "Shallow-Deep Networks"; the final normalisation and the
head are the full model's. `align` then fits the map from this depth to what they expect (Belrose et
al. 2023, "the tuned lens"), without which an early exit is rarely worth anything.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from export.families import keep_blocks, tower


def downsample(image: torch.Tensor, px: int) -> torch.Tensor:
    """Shrink (B, 3, H, W) to (B, 3, px, px), antialiased as Pillow's bicubic is.

    One ONNX `Resize` node (opset 18 brought antialiasing). Linear, so it commutes with the
    normalisation already applied.
    """
    if image.shape[-2:] == (px, px):
        return image
    return nn.functional.interpolate(
        image, size=(px, px), mode="bicubic", align_corners=False, antialias=True
    )


def bake_positions(model: PreTrainedModel, px: int) -> PreTrainedModel:
    """A copy of the model whose positions fit one resolution.

    Tables are the library's own interpolation, computed once; the exported graph then holds
    constants instead of a resize of constants. BEiT's biases of relative positions become one
    table for each block and the places in it, DINOv3's rotations their cosines and sines.

    Args:
        model: of a family in `export.families`, with or without its head.
        px: the resolution, a multiple of the patch size.
    """
    baked = copy.deepcopy(model)
    base = tower(baked)
    with torch.no_grad():
        _bake_table(base, px)
        _bake_biases(base, px // int(base.config.patch_size))
        if hasattr(base, "rope_embeddings"):
            base.rope_embeddings = _Rotations(*base.rope_embeddings(torch.zeros(1, 3, px, px)))
    return baked.eval()


def _bake_table(base: Any, px: int) -> None:
    """Absolute positions, of every family but those that have none."""
    embeddings = base.embeddings
    patches = (px // int(base.config.patch_size)) ** 2
    embeddings.image_size = (px, px)  # ViT and its kin compare the input with it
    if hasattr(embeddings, "position_embedding"):  # CLIP and SigLIP, (S + N, D) in an Embedding
        table = embeddings.position_embedding.weight
        special = len(table) - embeddings.num_patches
        tokens = torch.zeros(1, special + patches, table.shape[1])
        fitted = embeddings.interpolate_pos_encoding(tokens, px, px)
        embeddings.position_embedding = _Table(fitted.clone())
        embeddings.image_size = px
    elif getattr(embeddings, "position_embeddings", None) is not None:
        table = embeddings.position_embeddings  # (1, S + N, D), S special tokens: CLS (and DeiT's)
        special = table.shape[1] - embeddings.patch_embeddings.num_patches
        tokens = torch.zeros(1, special + patches, table.shape[2])
        fitted = embeddings.interpolate_pos_encoding(tokens, px, px)
        embeddings.position_embeddings = nn.Parameter(fitted.clone(), requires_grad=False)


def _bake_biases(base: nn.Module, side: int) -> None:
    """The biases of relative positions, of side x side patches, in every module that has some."""
    found = [name for name, part in base.named_modules() if _is_bias(part)]
    index = None
    for name in found:
        part: Any = base.get_submodule(name)
        if index is None:
            # The library remembers it, perhaps from inference mode, which no training takes.
            index = part.generate_relative_position_index((side, side)).clone()
        base.set_submodule(name, _Biases(part((side, side))[0], index))


def _is_bias(module: nn.Module) -> bool:
    return hasattr(module, "relative_position_bias_table")


class _Table(nn.Module):
    """All rows of a table, (1, N, D), whichever are asked for."""

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table)  # `adaptation` trains it

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.table


class _Biases(nn.Module):
    """Biases of attention, (1, heads, N, N), looked up in a table as small as it can be."""

    index: torch.Tensor

    def __init__(self, biases: torch.Tensor, index: torch.Tensor) -> None:
        super().__init__()
        table = torch.zeros(int(index.max()) + 1, len(biases))
        table[index.flatten()] = biases.flatten(1).T
        self.table = nn.Parameter(table)  # `adaptation` trains it
        self.register_buffer("index", index)

    def forward(self, *args: Any, **options: Any) -> torch.Tensor:
        return self.table[self.index].permute(2, 0, 1)[None]


class _Rotations(nn.Module):
    """Cosines and sines of the patches' positions, each (N, head width)."""

    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(self, cos: torch.Tensor, sin: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("cos", cos)
        self.register_buffer("sin", sin)

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.cos, self.sin


def first_blocks(model: PreTrainedModel, depth: int) -> PreTrainedModel:
    """A copy of the model that stops after its first `depth` blocks."""
    shallow = copy.deepcopy(model)
    keep_blocks(shallow, depth)
    return shallow
