"""Transformer blocks over images that keep different numbers of tokens, as `apt` and `halt` do.

The tokens of all images stand one after another, (1, n, W), without padding: every product with
weights costs what there is. Attention alone is among the tokens of one image; for it the images are
padded to the longest, and what is padding is masked. An image's answer so depends on its batch
mates by rounding only. Written with MatMul, Softmax and Gather: fused attention kernels end the
process, or fail, on a batch without tokens. Padding everything instead costs more
(docs/performance.md).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

# Far below any likeness: its exponential is exactly 0. FP16 can hold it.
MASKED = -6e4


class Layout(NamedTuple):
    """Where the tokens of B images lie among the n of all of them.

    Attributes:
        images: INT64 (n,), ascending, the image of each token.
        starts: INT64 (B,), the place of each image's first token.
        counts: INT64 (B,), how many tokens each image has; perhaps none.
        padded: INT64 (B, T), the token at each place of the padded images; where there is none, the
            image's own first, or any if it has none: numbers that are none spoil no other image.
        mask: FP32 (B, 1, 1, T), added to likenesses: 0 where there is a token.
        back: INT64 (n,), the place of each token among the B * T of the padded images.
    """

    images: torch.Tensor
    starts: torch.Tensor
    counts: torch.Tensor
    padded: torch.Tensor
    mask: torch.Tensor
    back: torch.Tensor

    @classmethod
    def of(cls, images: torch.Tensor, counts: torch.Tensor) -> Layout:
        """The layout of tokens by their images.

        Args:
            images: INT64 (n,), ascending.
            counts: INT64 (B,), how many each image has.
        """
        starts = counts.cumsum(0) - counts
        longest = counts.max()
        places = torch.arange(longest.item(), device=counts.device)
        held = places < counts[:, None]
        last = images.shape[0] - 1
        padded = (starts[:, None] + torch.where(held, places, 0)).clamp(max=last)
        mask = torch.where(held, 0.0, MASKED)[:, None, None]
        tokens = torch.arange(images.shape[0], device=counts.device)
        back = images * longest + tokens - starts[images]
        return cls(images, starts, counts, padded, mask, back)


class RaggedBlock(nn.Module):
    """One block of the library, its parts called in the block's own order, without padding.

    Args:
        block: the library's.
    """

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.attention: Any = part(block, "attention", "self_attn")
        self.mlp = block.mlp
        self.norm1 = part(block, "norm1", "layernorm_before", "layer_norm1")
        self.norm2 = part(block, "norm2", "layernorm_after", "layer_norm2")
        self.scale1 = getattr(block, "layer_scale1", nn.Identity())  # DINOv2's
        self.scale2 = getattr(block, "layer_scale2", nn.Identity())

    def forward(self, tokens: torch.Tensor, layout: Layout) -> torch.Tensor:
        """Tokens (1, n, W) to (1, n, W)."""
        tokens = tokens + self.scale1(self.attend(self.norm1(tokens), layout))
        return torch.as_tensor(tokens + self.scale2(self.mlp(self.norm2(tokens))))

    def attend(self, normed: torch.Tensor, layout: Layout) -> torch.Tensor:
        """What the attention answers, (1, n, W)."""
        attention = self.attention
        query, key, value = (
            project(normed)[0][layout.padded].unflatten(2, (-1, attention.head_dim)).transpose(1, 2)
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )  # each (B, heads, T, K)
        likeness = query @ key.transpose(2, 3) * part(attention, "scaling", "scale") + layout.mask
        attended = (likeness.softmax(dim=3) @ value).transpose(1, 2)
        output = part(attention, "o_proj", "out_proj")
        return torch.as_tensor(output(attended.flatten(0, 1).flatten(1)[layout.back][None]))


def part(module: nn.Module, *names: str) -> Any:
    """What a module has by one of these names."""
    return next(getattr(module, name) for name in names if hasattr(module, name))
