"""`halt` and `halt=DEPTH`: tokens that have said enough leave the network, block by block.

Written from Yin et al. 2022, "A-ViT: Adaptive Tokens for Efficient Vision Transformer" (CVPR), and
facts about its public code. After each block the first coordinate of a token, through a logistic
gate, is the share that it has had enough; once the shares of its blocks reach 1 it halts. The class
tokens of the blocks, weighted by their shares, are the answer, so an image whose class token halts
is done. The public code masks what has halted and computes it on; here it is gone, and the answer
is the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from export.families import blocks, family_of, tower
from export.recipes.answering import Answering
from export.recipes.ragged import MASKED, Layout, RaggedBlock
from export.recipes.smaller import downsample

EPSILON = 0.01  # a token halts once its shares are above 1 less this


class Gate(nn.Module):
    """sigmoid(scale * x - centre) of a token's first coordinate; two numbers and no weights.

    Args:
        scale: of the coordinate.
        centre: of the gate; the larger, the later tokens halt.
    """

    scale: torch.Tensor
    centre: torch.Tensor

    def __init__(self, scale: float, centre: float) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(float(scale)))
        self.register_buffer("centre", torch.tensor(float(centre)))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Shares (n,) of tokens (n, W)."""
        return torch.sigmoid(self.scale * tokens[:, 0] - self.centre)


@dataclass(frozen=True, eq=False)
class Halting:
    """What a training looks at of a batch.

    Attributes:
        ponder: mean over the patch tokens of the blocks that each ran through and of what its
            shares lacked to 1 before the last of them; a scalar.
        shares: mean share that patch tokens had enough after each block, (L,); halted ones count
            as 0.
        depth: mean number of blocks that patch tokens ran through, a scalar without gradient.
    """

    ponder: torch.Tensor
    shares: torch.Tensor
    depth: torch.Tensor


class HaltingVit(nn.Module):
    """`image` at full resolution to the outputs of a rung, `tokens` and `patches`.

    The library's weights, run by a forward of our own.

    Attributes:
        counts: how many of its outputs, the last ones, count tokens.
        seen: what a training looks at, of the last batch that ran.

    Args:
        model: of a family whose tokens carry their own positions, with or without a head that reads
            the CLS token alone, in eval mode; its position table fits `px`.
        px: the resolution that the transformer sees.
        gate: of all blocks.
        probe: a linear head on the embedding, in place of the model's own.
        unit_length: whether embeddings are scaled to length 1.
        removes: whether what has halted is gone; else it is masked and computed on, as in the
            public code: tokens of an image that is done go on until they halt by themselves.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        px: int,
        gate: Gate,
        probe: nn.Linear | None,
        unit_length: bool = False,
        removes: bool = True,
    ) -> None:
        super().__init__()
        self.model = model
        self.px = px
        self.own = gate
        self.removes = removes
        self.family = family_of(model)
        self.answering = Answering(model, probe, unit_length)
        self.blocks = nn.ModuleList(RaggedBlock(block) for block in blocks(model))
        self.counts = 2 if removes else 0
        self.seen: Halting | None = None

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Run the rung.

        Args:
            image: FP32 (B, 3, H, W), normalised, at the full rung's resolution.

        Returns:
            embedding (B, D), cls_layers (B, L+1, W), the answer if the class token had halted then,
            [logits (B, C)] and, where what has halted is gone, tokens INT32 (B, L), how many tokens
            ran through each block, and patches INT32 (B, S * S), how many blocks each patch of the
            grid ran through. Blocks after an image was done count for none of its tokens.
        """
        hidden = self.family.tokens(tower(self.model), downsample(image, self.px))
        batch, count, _ = hidden.shape
        numbers = torch.arange(batch, device=hidden.device)
        images = numbers.repeat_interleave(count)
        origin = torch.arange(images.shape[0], device=hidden.device)
        tokens, counts = hidden.flatten(0, 1)[None], torch.full_like(numbers, count)
        reached = torch.zeros_like(tokens[0, :, 0])
        active = torch.ones_like(reached, dtype=torch.bool)
        lived = torch.zeros_like(origin)
        # Of the images that are not done: which they are, their weighted class tokens so far, and
        # the weight that is left. Of all images: the answer.
        rows, answer = numbers, hidden[:, 0]
        mixture, left = torch.zeros_like(answer), torch.ones_like(answer[:, :1])
        cls_layers, alive, watch = [answer], [], _Watch(self, count)
        for number, block in enumerate(self.blocks, start=1):
            layout = Layout.of(images, counts)
            alive.append(counts)
            if not self.removes:
                held = active.view(batch, count)
                layout = layout._replace(mask=torch.where(held, 0.0, MASKED)[:, None, None])
            lived = lived.index_add(0, origin, active.long())
            tokens = block(tokens, layout)
            share = self.own(tokens[0]) if number < len(self.blocks) else torch.ones_like(reached)
            before, reached = reached, reached + (share if self.removes else share * active)
            done = reached > 1 - EPSILON
            watch.block(tokens[0], origin, active, before, done)
            # The class tokens of the images that are not done.
            first = layout.starts[rows]
            cls, now = tokens[0, first], done[first]
            weight = torch.where(now[:, None], left, share[first][:, None])
            mixture, left = mixture + weight * cls, left - weight
            answer = answer.index_copy(0, rows, mixture + left * cls)
            cls_layers.append(answer)
            ended = torch.zeros_like(counts, dtype=torch.bool).index_copy(0, rows, now)
            going = (~now).nonzero()[:, 0]
            rows, mixture, left = rows[going], mixture[going], left[going]
            if not self.removes:
                active = active & ~done
                continue
            kept = (~(done | ended[images])).nonzero()[:, 0]
            tokens, images, origin = tokens[:, kept], images[kept], origin[kept]
            reached, active = reached[kept], active[kept]
            counts = torch.zeros_like(counts).index_add(0, images, torch.ones_like(images))
        embedding, logits = self.answering(answer[:, None], torch.ones_like(answer[:, :1, None]))
        patches = lived.view(batch, count)[:, self.answering.special :]
        layers = torch.stack(cls_layers, dim=1)
        self.seen = watch.seen(patches)
        if not self.removes:
            return embedding, layers, *logits
        ran = torch.stack(alive, dim=1).to(torch.int32)
        return embedding, layers, *logits, ran, patches.to(torch.int32)


@torch.inference_mode()
def public_depth(rung: nn.Module, images: torch.Tensor) -> float:
    """Blocks that a patch token runs through, on average, as the public code counts them.

    There tokens go on after their image is done, until they halt by themselves.

    Args:
        rung: a `HaltingVit` or what holds one; it masks from now on.
        images: FP32 (B, 3, H, W), run one by one.
    """
    module = next(part for part in rung.modules() if isinstance(part, HaltingVit))
    module.removes, module.counts, depths = False, 0, list[float]()
    for image in images:
        module(image[None])
        assert module.seen is not None
        depths.append(float(module.seen.depth))
    return sum(depths) / len(depths)


class _Watch:
    """Gathers what a training looks at, while nothing is exported.

    Args:
        rung: that runs.
        count: tokens of an image.
    """

    def __init__(self, rung: HaltingVit, count: int) -> None:
        self._rung, self._count = rung, count
        self._on = not torch.compiler.is_exporting()
        self._shares: list[torch.Tensor] = []
        self._lacking: list[torch.Tensor] = []

    def block(
        self,
        tokens: torch.Tensor,
        origin: torch.Tensor,
        active: torch.Tensor,
        before: torch.Tensor,
        done: torch.Tensor,
    ) -> None:
        """After a block, of tokens (n, W): what their shares are, and lacked where they end."""
        if self._on:
            patch = active & (origin % self._count >= self._rung.answering.special)
            self._shares.append((self._rung.own(tokens) * patch).sum())
            self._lacking.append(((1 - before) * (patch & done)).sum())

    def seen(self, patches: torch.Tensor) -> Halting | None:
        """After all blocks, of how many each patch ran through, (B, S * S)."""
        if not self._on:
            return None
        depth, size = patches.float().mean(), patches.numel()
        ponder = depth + torch.stack(self._lacking).sum() / size
        return Halting(ponder, torch.stack(self._shares) / size, depth)
