"""`depth=K`: the first K blocks only, an early exit whose place is fixed.

As the internal classifiers of Kaya et al. 2019, "Shallow-Deep Networks". The final normalisation
and the head are the full model's; `align` then fits the map from this depth to what they expect
(Belrose et al. 2023, "the tuned lens"), without which an early exit is rarely worth anything.
"""

from __future__ import annotations

import copy

from torch import nn
from transformers import PreTrainedModel

from export.errors import UsageError
from export.vit_families import base_model, blocks


def first_blocks(model: PreTrainedModel, depth: int) -> PreTrainedModel:
    """A copy of the model that stops after its first blocks.

    Args:
        model: a ViT, DeiT or DINOv2, with or without its head.
        depth: how many blocks to keep.

    Raises:
        UsageError: not between 1 and one less than the model has.
    """
    check_depth(depth, len(blocks(model)))
    shallow = copy.deepcopy(model)
    base = base_model(shallow)
    kept = nn.ModuleList(blocks(shallow)[:depth])
    if hasattr(base, "encoder"):
        base.encoder.layer = kept
    else:
        base.layers = kept
    shallow.config.num_hidden_layers = depth
    return shallow


def check_depth(depth: int, total: int) -> None:
    """Refuse a depth that is no part of a model.

    Args:
        depth: how many blocks to keep.
        total: how many the model has.

    Raises:
        UsageError: not between 1 and one less than the model has.
    """
    if not 1 <= depth < total:
        raise UsageError(
            f"depth={depth} must be between 1 and {total - 1}; the model has {total} blocks"
        )
