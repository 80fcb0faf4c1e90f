"""What the library's ViT, DeiT and DINOv2 have in common, under one name each."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel


def base_model(model: PreTrainedModel) -> PreTrainedModel:
    """The model without its head; itself if it has none."""
    return model.base_model


def has_own_head(model: PreTrainedModel) -> bool:
    """Whether the model answers with logits."""
    return base_model(model) is not model


def blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The transformer blocks, first to last."""
    base = base_model(model)
    return base.encoder.layer if hasattr(base, "encoder") else base.layers
