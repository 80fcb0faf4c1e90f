"""The patch tokens of a model that is running: what training matches beside its outputs.

An image has one embedding but many patches, so that a few hundred images teach more by these, as in
Ranzinger et al. 2024, "AM-RADIO: Agglomerative vision foundation model". Where tokens are merged
there is no patch to match, and nothing is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from export.families import blocks, family_of, tower


class Patches:
    """Reads the tokens that leave the last block, each time the model runs.

    Attributes:
        side: S of their grid, S x S.
        bare: whether the model itself does not normalise them, as BEiT where it pools them first;
            each is then normalised here, without weights: a few large channels would outweigh all
            others, and may be too large for FP16.

    Args:
        model: whose blocks run.
        px: the resolution that they see.
    """

    def __init__(self, model: PreTrainedModel, px: int) -> None:
        config = tower(model).config
        self.side = px // int(config.patch_size)
        norm: nn.Module = getattr(tower(model), family_of(model).norm)
        self.bare = isinstance(norm, nn.Identity)
        self._norm = (
            nn.LayerNorm(config.hidden_size, elementwise_affine=False) if self.bare else norm
        )
        self._tokens: torch.Tensor | None = None
        blocks(model)[-1].register_forward_hook(self._notice)

    def _notice(self, block: nn.Module, inputs: Any, output: Any) -> None:
        self._tokens = output[0] if isinstance(output, tuple) else output

    def take(self, side: int) -> torch.Tensor | None:
        """The normalised patch tokens of the last run, once.

        Args:
            side: of the grid that they are averaged to, where theirs is finer.

        Returns:
            FP32 (B, S, S, W), S at most `side`; None where the model's own blocks did not run.
        """
        tokens, self._tokens = self._tokens, None
        if tokens is None:
            return None
        patches = self._norm(tokens[:, -(self.side**2) :].float())
        grid = patches.unflatten(1, (self.side, self.side))
        return pooled(grid, side)


def pooled(grid: torch.Tensor, side: int) -> torch.Tensor:
    """Patch tokens (B, S, S, W) averaged to a coarser grid (B, side, side, W)."""
    if grid.shape[1] <= side:
        return grid
    planes = functional.adaptive_avg_pool2d(grid.permute(0, 3, 1, 2), side)
    return planes.permute(0, 2, 3, 1)
