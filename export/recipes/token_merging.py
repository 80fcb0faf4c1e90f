"""`tome=R`: each block merges R pairs of similar tokens between its attention and its MLP.

Written from Bolya et al. 2023, "Token Merging: Your ViT But Faster" (ICLR): bipartite soft matching
on the attention's keys, attention in proportion to what a token stands for, averages weighted by
it. How many tokens each block has follows from R alone, so the graph holds no shape that depends
on the image.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from export.families import blocks, family_of, tower
from export.recipes.answering import Answering
from export.recipes.ragged import RaggedBlock, part
from export.recipes.smaller import downsample


class MergingVit(nn.Module):
    """`image` at full resolution to `embedding`, `cls_layers` and, with a head, `logits`.

    The library's weights, run by a forward of our own. CLS, and DeiT's distillation token, are
    never merged. Where two tokens are the best partner to within rounding, two runtimes may merge
    another one and differ for that image.

    Args:
        model: of a family that merges tokens, with or without its head, in eval mode; its position
            table fits `px`.
        px: the resolution that the transformer sees.
        r: pairs that each block merges, at most half of the tokens that may be merged.
        probe: a linear head on the embedding, in place of the model's own.
        unit_length: whether embeddings are scaled to length 1.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        px: int,
        r: int,
        probe: nn.Linear | None,
        unit_length: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.px = px
        self.family = family_of(model)
        self.answering = Answering(model, probe, unit_length)
        special = self.answering.special
        self.blocks = nn.ModuleList(_MergingBlock(block, r, special) for block in blocks(model))

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Run the rung.

        Args:
            image: FP32 (B, 3, H, W), normalised, at the full rung's resolution.

        Returns:
            embedding (B, D), cls_layers (B, L+1, W)[, logits (B, C)]; W is the width of the model,
            which D is, too, but where it projects.
        """
        base = tower(self.model)
        hidden = self.family.tokens(base, downsample(image, self.px))  # (B, N, W)
        sizes = torch.ones_like(hidden[..., :1])  # (B, N, 1), patches that a token stands for
        cls_layers = [hidden[:, 0]]
        for block in self.blocks:
            hidden, sizes = block(hidden, sizes)
            cls_layers.append(hidden[:, 0])
        embedding, logits = self.answering(hidden, sizes)
        return embedding, torch.stack(cls_layers, dim=1), *logits


class _MergingBlock(RaggedBlock):
    """One block that merges tokens between its attention and its MLP.

    Args:
        block: the library's.
        r: pairs to merge.
        special: leading tokens that are never merged.
    """

    def __init__(self, block: Any, r: int, special: int) -> None:
        super().__init__(block)
        self.r = r
        self.special = special

    def forward(  # type: ignore[override]
        self, hidden: torch.Tensor, sizes: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden (B, N, D) and sizes (B, N, 1) to (B, N - P, D) and (B, N - P, 1)."""
        attended, keys = self._attend_in_proportion(self.norm1(hidden), sizes)
        hidden = hidden + self.scale1(attended)
        pairs = min(self.r, (hidden.shape[1] - self.special) // 2)
        if pairs > 0:
            hidden, sizes = merge(hidden, sizes, match(keys, self.special, pairs))
        return hidden + self.scale2(self.mlp(self.norm2(hidden))), sizes

    def _attend_in_proportion(
        self, normed: torch.Tensor, sizes: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the attention answers (B, N, D), and its keys averaged over the heads (B, N, K)."""
        attention = self.attention
        query, key, value = (
            project(normed).unflatten(2, (-1, attention.head_dim)).transpose(1, 2)
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )  # each (B, heads, N, K)
        scale = part(attention, "scaling", "scale")
        likeness = query @ key.transpose(2, 3) * scale  # (B, heads, N, N)
        # A token that stands for s patches draws attention as s tokens would.
        likeness = likeness + sizes.log().transpose(1, 2)[:, None]
        attended = likeness.softmax(dim=3) @ value
        output = part(attention, "o_proj", "out_proj")
        return output(attended.transpose(1, 2).flatten(2)), key.mean(dim=1)


class Matching(NamedTuple):
    """Which tokens become one. Tokens are numbered through the whole batch: image b's from b * N.

    Attributes:
        sources: (B, P) of the tokens that go.
        targets: (B, P) of the token that each joins; several may join the same.
        kept: (B, N - P) of the tokens that stay, ascending.
    """

    sources: torch.Tensor
    targets: torch.Tensor
    kept: torch.Tensor


def match(keys: torch.Tensor, special: int, pairs: int) -> Matching:
    """Bipartite soft matching: every other token looks for the most similar one of the rest.

    Args:
        keys: (B, N, K), what similarity (cosine) is measured on.
        special: leading tokens that take no part.
        pairs: how many of the best pairs to merge, at most half of the other tokens.
    """
    batch, tokens, _ = keys.shape
    unit = nn.functional.normalize(keys[:, special:], dim=-1)
    best, partner = (unit[:, 0::2] @ unit[:, 1::2].transpose(1, 2)).max(dim=2)
    # No runtime promises a sound sort of NaN, and a broken image may spoil no other's answer.
    best = torch.where(best.isnan(), -1.0, best)
    order = _descending(best)
    numbers = torch.arange(batch * tokens, device=keys.device).view(batch, tokens)
    left, right = numbers[:, special::2], numbers[:, special + 1 :: 2]
    staying = left.gather(1, order[:, pairs:])
    # Back in the order of the image: the next matching then finds neighbours on opposite sides,
    # and two tokens of nearly equal rank cannot swap places.
    kept = torch.cat([numbers[:, :special], staying, right], dim=1).sort(dim=1).values
    order = order[:, :pairs]
    return Matching(left.gather(1, order), right.gather(1, partner.gather(1, order)), kept)


def _descending(values: torch.Tensor) -> torch.Tensor:
    """Positions from the largest value to the smallest, of equal ones the first."""
    if torch.compiler.is_exporting():
        # The exporter knows no stable sort, but ONNX's TopK, which this becomes, is one.
        return values.sort(dim=1, descending=True).indices
    return values.sort(dim=1, descending=True, stable=True).indices


def merge(
    hidden: torch.Tensor, sizes: torch.Tensor, matching: Matching
) -> tuple[torch.Tensor, torch.Tensor]:
    """Replace each merged group by its average, weighted by how many patches a token stands for.

    Args:
        hidden: (B, N, D).
        sizes: (B, N, 1), patches per token.
        matching: P pairs.

    Returns:
        hidden (B, N - P, D) and sizes (B, N - P, 1).
    """
    sources, targets, kept = matching
    joins = (kept[:, :, None] == targets[:, None, :]).to(hidden.dtype)  # (B, N - P, P)
    gained = _rows(sizes, sources)
    total = _rows(sizes, kept) + joins @ gained
    # The average as a step from the target towards its sources: one product with the few tokens
    # that move instead of several passes over all.
    moves = _rows(hidden, sources) - _rows(hidden, targets)
    weights = joins * gained.transpose(1, 2) / total
    return _rows(hidden, kept) + weights @ moves, total


def _rows(values: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    # Numbered through the batch, whole rows are copied; runtimes are slower per batch and element.
    return values.flatten(0, 1)[numbers]
