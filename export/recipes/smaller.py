"""`px=N` and `depth=K`: the transformer sees a smaller image, or runs its first blocks only.

Positions of a smaller image are interpolated as in Dosovitskiy et al. 2021, "An Image is Worth
16x16 Words", section 3.2. The first K blocks are an early exit whose place is fixed, as the
internal classifiers of Kaya et al. 2019, "Shallow-Deep Networks"; the final normalisation and the
head are the full model's. `align` then fits the map from this depth to what they expect (Belrose et
al. 2023, "the tuned lens"), without which an early exit is rarely worth anything.
"""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import PreTrainedModel


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
    """A copy of the model whose stored position table fits one resolution.

    The table is the library's own interpolation, computed once; the exported graph then holds a
    constant instead of a bicubic resize of constants.

    Args:
        model: a ViT, DeiT or DINOv2, with or without its head.
        px: the resolution, a multiple of the patch size.
    """
    baked = copy.deepcopy(model)
    embeddings = baked.base_model.embeddings
    table = embeddings.position_embeddings  # (1, S + N, D), S special tokens: CLS (and DeiT's)
    special = table.shape[1] - embeddings.patch_embeddings.num_patches
    patches = (px // int(model.config.patch_size)) ** 2
    tokens = torch.zeros(1, special + patches, table.shape[2])
    with torch.no_grad():
        fitted = embeddings.interpolate_pos_encoding(tokens, px, px)
    embeddings.position_embeddings = nn.Parameter(fitted.clone(), requires_grad=False)
    embeddings.image_size = (px, px)  # ViT and DeiT compare the input with it
    return baked.eval()


def blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The transformer blocks of a ViT, DeiT or DINOv2, first to last."""
    base = model.base_model
    layers: nn.ModuleList = base.encoder.layer if hasattr(base, "encoder") else base.layers
    return layers


def first_blocks(model: PreTrainedModel, depth: int) -> PreTrainedModel:
    """A copy of the model that stops after its first `depth` blocks."""
    shallow = copy.deepcopy(model)
    kept, base = blocks(shallow)[:depth], shallow.base_model
    if hasattr(base, "encoder"):
        base.encoder.layer = kept
    else:
        base.layers = kept
    shallow.config.num_hidden_layers = depth
    return shallow
