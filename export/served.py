"""What is served of a model that has more: its image tower, whole and without anything random."""

from __future__ import annotations

import torch
from torch import nn
from transformers import (
    BeitForMaskedImageModeling,
    CLIPModel,
    CLIPVisionModelWithProjection,
    PreTrainedModel,
    SiglipModel,
    ViTConfig,
    ViTMAEModel,
    ViTModel,
)


def served(network: PreTrainedModel) -> PreTrainedModel:
    """A model of images alone that computes what the given one computes of an image.

    Args:
        network: as the library loaded it.

    Returns:
        The same model, or for CLIP its tower with the projection, for SigLIP its tower, for MAE its
        encoder as the ViT it is, which masks nothing, and for a BEiT that predicts masked patches
        its encoder with the normalisation before that head.
    """
    if isinstance(network, CLIPModel):
        return _clip(network)
    if isinstance(network, SiglipModel):
        tower: PreTrainedModel = network.vision_model
        return tower
    if isinstance(network, ViTMAEModel):
        return _mae(network)
    if isinstance(network, BeitForMaskedImageModeling):
        beit: PreTrainedModel = network.beit
        beit.layernorm = nn.Sequential(beit.layernorm, network.layernorm)
        return beit
    return network


def _clip(network: CLIPModel) -> PreTrainedModel:
    config = network.vision_model.config
    config.projection_dim = network.projection_dim
    with torch.device("meta"):
        found = CLIPVisionModelWithProjection(config)
    found.vision_model = network.vision_model
    found.visual_projection = network.visual_projection
    return found


def _mae(network: ViTMAEModel) -> PreTrainedModel:
    fields = network.config.to_dict()
    known = ViTConfig().to_dict().keys() & fields.keys() - {"model_type", "architectures"}
    config = ViTConfig(**{name: fields[name] for name in known})
    config._attn_implementation = "eager"
    found = ViTModel(config, add_pooling_layer=False)
    found.load_state_dict(network.state_dict())
    return found
