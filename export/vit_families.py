"""What the library's ViT, DeiT and DINOv2 have in common, under one name each."""

from __future__ import annotations

from torch import nn
from transformers import (
    DeiTForImageClassification,
    PreTrainedModel,
    ViTForImageClassification,
)

# Their head is one linear layer on the final CLS token. Dinov2ForImageClassification's also reads
# the mean of the patch tokens, DeiTForImageClassificationWithTeacher is two heads on two tokens.
_CLS_HEADS = (DeiTForImageClassification, ViTForImageClassification)


def base_model(model: PreTrainedModel) -> PreTrainedModel:
    """The model without its head; itself if it has none."""
    return model.base_model


def has_own_head(model: PreTrainedModel) -> bool:
    """Whether the model answers with logits."""
    return base_model(model) is not model


def head_reads_cls_alone(model: PreTrainedModel) -> bool:
    """Whether the model's own head is a linear layer on the final CLS token and nothing else."""
    return isinstance(model, _CLS_HEADS)


def blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The transformer blocks, first to last."""
    base = base_model(model)
    layers: nn.ModuleList = base.encoder.layer if hasattr(base, "encoder") else base.layers
    return layers
