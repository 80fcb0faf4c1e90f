"""`px=N`: the transformer sees a smaller image, shrunk inside the graph.

Positions are interpolated as in Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words", section
3.2.
"""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import PreTrainedModel

from export.vit_families import base_model


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
    embeddings = base_model(baked).embeddings
    table = embeddings.position_embeddings  # (1, S + N, D), S special tokens: CLS (and DeiT's)
    special = table.shape[1] - embeddings.patch_embeddings.num_patches
    patches = (px // int(model.config.patch_size)) ** 2
    tokens = torch.zeros(1, special + patches, table.shape[2])
    with torch.no_grad():
        fitted = embeddings.interpolate_pos_encoding(tokens, px, px)
    embeddings.position_embeddings = nn.Parameter(fitted.clone(), requires_grad=False)
    embeddings.image_size = (px, px)  # ViT and DeiT compare the input with it
    return baked.eval()
