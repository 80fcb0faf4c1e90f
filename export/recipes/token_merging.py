"""`tome=R`: each block merges R pairs of similar tokens between its attention and its MLP.

Written from Bolya et al. 2023, "Token Merging: Your ViT But Faster" (ICLR): bipartite soft matching
on the attention's keys, attention in proportion to what a token stands for, averages weighted by
it. How many tokens each block has follows from R alone, so the graph holds no shape that depends
on the image.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.deit.modeling_deit import DeiTLayer
from transformers.models.dinov2.modeling_dinov2 import Dinov2ForImageClassification, Dinov2Layer
from transformers.models.vit.modeling_vit import ViTLayer

from export.errors import UsageError
from export.vit_families import base_model, blocks


def merge_tokens(model: PreTrainedModel, r: int) -> PreTrainedModel:
    """A copy of the model whose blocks merge tokens.

    CLS, and DeiT's distillation token, are never merged. A block merges at most half of the other
    tokens, as in the paper, however large r is; `token_counts` says what is left. Where two tokens
    are the best partner to within rounding, two runtimes may merge another one and differ for that
    image.

    Args:
        model: a ViT, DeiT or DINOv2, with or without its head, in eval mode with eager attention.
        r: pairs that each block merges; 0 leaves the model as it is.

    Raises:
        UsageError: r is negative.
    """
    _check(r)
    merging = copy.deepcopy(model)
    if r == 0:
        return merging
    base = base_model(merging)
    special = 1 + hasattr(base.embeddings, "distillation_token")
    for block in blocks(merging):
        block.__class__ = _MERGING[type(block)]
        block.r, block.special = r, special
    base.register_forward_pre_hook(_start, with_kwargs=True)
    if isinstance(merging, Dinov2ForImageClassification):
        base.register_forward_hook(_weigh_patches, with_kwargs=True)
    return merging


def token_counts(tokens: int, special: int, layers: int, r: int) -> list[int]:
    """How many tokens are left after each block.

    Args:
        tokens: before the first block, special ones included.
        special: those that are never merged: CLS, and DeiT's distillation token.
        layers: number of blocks.
        r: pairs that each block merges, as for `merge_tokens`.

    Raises:
        UsageError: r is negative.
    """
    _check(r)
    counts = []
    for _ in range(layers):
        tokens -= _pairs(tokens, special, r)
        counts.append(tokens)
    return counts


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
    numbers = torch.arange(batch * tokens).view(batch, tokens)
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


@dataclass
class _Sizes:
    """Travels through one forward: (B, N, 1) patches per token; None while it is one each."""

    value: torch.Tensor | None = None


class _MergingBlock:
    """Mixed into a block of ViT or DeiT, whose parts it calls in the block's own order."""

    r: int
    special: int

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: None = None, *, sizes: _Sizes, **_: Any
    ) -> torch.Tensor:
        """One block, (B, N, D) to (B, N - P, D)."""
        # A token that stands for s patches draws attention as s tokens would.
        bias = None if sizes.value is None else sizes.value.log()[:, None].transpose(2, 3)
        hidden, keys = self.attend(hidden_states, bias)
        pairs = _pairs(hidden.shape[1], self.special, self.r)
        if pairs > 0:
            before = torch.ones_like(hidden[..., :1]) if sizes.value is None else sizes.value
            hidden, sizes.value = merge(hidden, before, match(keys, self.special, pairs))
        return self.transform(hidden)

    def attend(
        self, hidden: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        attended, keys = _attend(self.attention, self.layernorm_before(hidden), bias)
        return hidden + attended, keys

    def transform(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.mlp(self.layernorm_after(hidden))


class _MergingDinov2Block(_MergingBlock):
    def attend(
        self, hidden: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        attended, keys = _attend(self.attention, self.norm1(hidden), bias)
        return hidden + self.layer_scale1(attended), keys

    def transform(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.layer_scale2(self.mlp(self.norm2(hidden)))


_MIXINS = {ViTLayer: _MergingBlock, DeiTLayer: _MergingBlock, Dinov2Layer: _MergingDinov2Block}
# Subclasses, so that the library still knows the blocks whose outputs are its hidden states.
_MERGING = {kind: type(f"Merging{kind.__name__}", (_MIXINS[kind], kind), {}) for kind in _MIXINS}


def _attend(
    attention: nn.Module, normed: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the attention answers (B, N, D), and its keys averaged over the heads (B, N, K)."""
    keys: list[torch.Tensor] = []
    # Read where they arise: computed a second time they would cost a product, or its weight its
    # place among the graph's constants.
    with attention.k_proj.register_forward_hook(lambda *call: keys.append(call[-1])):
        attended, _ = attention(normed, bias)
    return attended, keys[0].unflatten(2, (-1, attention.head_dim)).mean(dim=2)


def _start(
    base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    # The library hands keyword arguments on to every block.
    return args, {**kwargs, "sizes": _Sizes()}


def _weigh_patches(
    base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> Any:
    """Scale the patch tokens so that their mean, which the head takes, counts every patch once."""
    sizes = kwargs["sizes"].value
    if sizes is None:  # too few patches to merge any
        return output
    special = blocks(base)[0].special
    patches = sizes[:, special:]
    share = patches * patches.shape[1] / patches.sum(dim=1, keepdim=True)  # (B, N, 1)
    tokens = output.last_hidden_state
    weighed = [tokens[:, :special], tokens[:, special:] * share]
    output.last_hidden_state = torch.cat(weighed, dim=1)
    return output


def _pairs(tokens: int, special: int, r: int) -> int:
    return min(r, (tokens - special) // 2)


def _check(r: int) -> None:
    if r < 0:
        raise UsageError(f"tome={r} must be at least 0; 8 is a good start for 256 patches")
