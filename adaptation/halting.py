"""What makes tokens halt: a gate that begins informed, and what keeps it near its depth.

The ponder loss and the distributional prior are those of Yin et al. 2022, "A-ViT: Adaptive Tokens
for Efficient Vision Transformer" (CVPR), of patch tokens alone. Neither they nor the distance to
the full model's answers tell the gate **which** token to halt: no gradient passes from an answer to
the tokens that are gone. Instead of from scratch, training begins with a first coordinate that
knows: ridge regression fits, block by block, the row of the MLP's last layer that writes it, so
that it grows where the full model's CLS token will look least in its later blocks. Weights change,
none is added. Adapting from there, the network learns to answer from the tokens that are left,
while the centre of the gate follows the depth that is asked for.
"""

from __future__ import annotations

import math
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import nn

from export.families import tower
from export.recipes.adapted import AdaptedRung
from export.recipes.halting import EPSILON, Halting, HaltingVit
from export.recipes.ragged import Layout, RaggedBlock, part
from export.recipes.smaller import downsample

PONDER = 5e-4  # weight of the ponder loss, that of the public code
PRIOR = 0.1  # weight of the divergence
SPREAD = 1.0  # of the prior, in blocks
IMAGES = 24  # that the first coordinate is fitted on
MOST_DEPTH = 1.05  # of the depth that was asked for: a state that halts later is not it
# How far the first coordinate of a CLS token is below the mean, in spreads; its spread is that of
# all coordinates, so that what reads all of them is little disturbed.
CLS = -6.0
_STEEPNESS = 4.0  # the gate is open by sigmoid(4) a spread above its centre
_FIRST_SPREAD = 1.5  # in blocks, of the depths at which patch tokens halt to begin with
_FOLLOWS = 0.2  # how much of a block too few or too many moves the centre in a step
_ROWS = 2500  # tokens that a fit sees
_RIDGE = 1e-3
_CLS_WEIGHT = 200.0  # in the fit, of one CLS token


def halting_of(student: AdaptedRung) -> HaltingVit | None:
    """The rung of a student whose tokens halt; None: they do not."""
    return student.rung if isinstance(student.rung, HaltingVit) else None


def penalty(seen: Halting, depth: float) -> torch.Tensor:
    """The ponder loss and the prior of one batch, a scalar.

    The prior is the divergence of the mean shares, normalised over the blocks, from a normal
    distribution around the depth that is asked for; shares are clamped as in the public code.
    """
    numbers = torch.arange(1, len(seen.shares) + 1, device=seen.shares.device)
    wanted = torch.softmax(-0.5 * ((numbers - depth) / SPREAD) ** 2, dim=0)
    found = (seen.shares / seen.shares.sum().clamp(min=1e-6)).clamp(0.01, 0.99)
    prior = nn.functional.kl_div(found.log(), wanted, reduction="sum")
    return PONDER * seen.ponder + PRIOR * prior


@torch.no_grad()
def begin(rung: HaltingVit, images: torch.Tensor, depth: float, seed: int) -> None:
    """Fit the first coordinate, and set the gate, so that tokens halt at a depth on average.

    Args:
        rung: as it came from the full model; its weights change.
        images: FP32 (B, 3, H, W), to learn from.
        depth: blocks that a patch token shall run through.
        seed: of the tokens that a fit sees.
    """
    pixels = downsample(images, rung.px)
    plain, wanted, spread = _importance(rung, pixels, depth)
    batch, count = wanted.shape
    special = rung.answering.special
    scale = _STEEPNESS / spread
    rung.own.scale.fill_(scale)
    rung.own.centre.fill_(0.0)
    numbers = torch.arange(batch, device=images.device)
    layout = Layout.of(numbers.repeat_interleave(count), torch.full_like(numbers, count))
    tokens = rung.family.tokens(tower(rung.model), pixels).flatten(0, 1)[None]
    reached = torch.zeros_like(wanted[:, special:])
    rng = np.random.default_rng(seed)
    for number, block in enumerate(rung.blocks, start=1):
        assert isinstance(block, RaggedBlock)
        last = number == len(rung.blocks)
        goal = plain if last else spread * wanted  # at the end as if nothing had been written
        fitted = _Fitted.of(block, tokens, layout)
        fitted.fit(goal.flatten(), count, rng)
        tokens = fitted.tokens()
        if last:
            break
        first = tokens[0, :, 0].view(batch, count)[:, special:]
        share = 0.5 * (1 + math.erf((number - depth) / _FIRST_SPREAD / math.sqrt(2)))
        shift = _shift(first, reached, scale, share)
        fitted.move(shift)
        tokens = fitted.tokens()
        reached = reached + torch.sigmoid(scale * (first + shift))
    _settle(rung, images, depth)


@torch.no_grad()
def follow(rung: HaltingVit, depth: float) -> None:
    """Move the centre of the gate a little, by how deep the tokens of the last batch ran."""
    if rung.seen is not None:
        rung.own.centre += _FOLLOWS * (depth - float(rung.seen.depth))


def _settle(rung: HaltingVit, images: torch.Tensor, depth: float) -> None:
    """Set the centre of the gate so that tokens of images run through so many blocks on average."""
    low, high = -10 * _STEEPNESS, 10 * _STEEPNESS
    for _ in range(10):
        rung.own.centre.fill_((low + high) / 2)
        rung(images)
        if rung.seen is not None and float(rung.seen.depth) < depth:
            low = float(rung.own.centre)
        else:
            high = float(rung.own.centre)


def _importance(
    rung: HaltingVit, pixels: torch.Tensor, depth: float
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """The first coordinate at the end of the plain model, and what it shall say, both (B, N).

    In spreads: how little the CLS token looks at a token in the blocks from half the depth on. And
    the spread: the median over the blocks of what all coordinates of their tokens spread by.
    """
    spreads = []
    tokens = rung.family.tokens(tower(rung.model), pixels)
    looked = torch.zeros_like(tokens[:, :, 0])
    for number, block in enumerate(rung.blocks, start=1):
        assert isinstance(block, RaggedBlock)
        if number > depth / 2:
            looked = looked + _looks(block, tokens)
        batch, count, _ = tokens.shape
        numbers = torch.arange(batch, device=tokens.device)
        layout = Layout.of(numbers.repeat_interleave(count), torch.full_like(numbers, count))
        tokens = block(tokens.flatten(0, 1)[None], layout)[0].view_as(tokens)
        spreads.append(float(tokens.std()))
    little = -looked.clamp(min=1e-9).log()
    patches = little[:, rung.answering.special :]
    wanted = (little - patches.mean()) / patches.std().clamp(min=1e-6)
    wanted[:, 0] = CLS
    return tokens[:, :, 0], wanted, median(spreads)


def _looks(block: RaggedBlock, tokens: torch.Tensor) -> torch.Tensor:
    """How much the CLS tokens of (B, N, W) attend to each token, (B, N), of all heads together."""
    attention, normed = block.attention, block.norm1(tokens)
    query, key = (
        project(rows).unflatten(2, (-1, attention.head_dim)).transpose(1, 2)
        for project, rows in ((attention.q_proj, normed[:, :1]), (attention.k_proj, normed))
    )
    likeness = query @ key.transpose(2, 3) * part(attention, "scaling", "scale")
    return torch.as_tensor(likeness.softmax(dim=3).sum(dim=(1, 2)))


class _Fitted:
    """One block over tokens, and the row of its MLP that writes their first coordinate.

    Args:
        linear: the MLP's last layer.
        scale: by which what the row writes is multiplied.
        inputs: of that layer, FP32 (n, M).
        before: the tokens that the MLP's output is added to, (1, n, W).
        others: that output as it is, (1, n, W).
    """

    def __init__(
        self,
        linear: nn.Linear,
        scale: float,
        inputs: torch.Tensor,
        before: torch.Tensor,
        others: torch.Tensor,
    ) -> None:
        self.linear, self.scale, self.inputs = linear, scale, inputs
        self.before, self.others = before, others

    @classmethod
    def of(cls, block: RaggedBlock, tokens: torch.Tensor, layout: Layout) -> _Fitted:
        """Run a block on tokens (1, n, W)."""
        linear = [found for found in block.mlp.modules() if isinstance(found, nn.Linear)][-1]
        inputs: list[torch.Tensor] = []

        def notice(module: nn.Module, args: Any, output: Any) -> None:
            inputs.append(args[0][0])

        before = tokens + block.scale1(block.attend(block.norm1(tokens), layout))
        hook = linear.register_forward_hook(notice)
        output = block.scale2(block.mlp(block.norm2(before)))
        hook.remove()
        scale = float(block.scale2(torch.ones_like(output[0, :1]))[0, 0])
        return cls(linear, scale, inputs[0], before, output)

    def fit(self, wanted: torch.Tensor, count: int, rng: np.random.Generator) -> None:
        """Let the first coordinate (n,) be nearly what is wanted; every `count`-th token is CLS."""
        some = rng.permutation(len(wanted))[:_ROWS]
        rows = np.unique(np.concatenate([some, np.arange(0, len(wanted), count)]))
        inputs = self.inputs[rows].double().cpu()
        inputs = torch.cat([inputs, torch.ones_like(inputs[:, :1])], dim=1)
        lacking = (wanted - self.before[0, :, 0])[rows].double().cpu() / self.scale
        weights = torch.ones(len(rows), 1, dtype=torch.float64)
        weights[torch.from_numpy(rows % count == 0)] = _CLS_WEIGHT
        gram = inputs.T @ (inputs * weights)
        ridge = _RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
        ridge[-1, -1] = 0.0  # the bias
        factor = torch.linalg.cholesky(gram + ridge)
        found = torch.cholesky_solve(inputs.T @ (lacking[:, None] * weights), factor)[:, 0]
        self.linear.weight[0] = found[:-1].to(self.linear.weight)
        self.linear.bias[0] = found[-1].to(self.linear.weight)

    def move(self, shift: float) -> None:
        """Add to the first coordinate of all tokens."""
        self.linear.bias[0] += shift / self.scale

    def tokens(self) -> torch.Tensor:
        """What the block answers, (1, n, W), by the row as it is now."""
        answered = self.before + self.others
        written = self.inputs @ self.linear.weight[0] + self.linear.bias[0]
        answered[0, :, 0] = self.before[0, :, 0] + self.scale * written
        return answered


def _shift(first: torch.Tensor, reached: torch.Tensor, scale: float, share: float) -> float:
    """What to add to first coordinates so that a share of the tokens has halted after the block."""
    low, high = -200 / scale, 200 / scale
    for _ in range(40):
        shift = (low + high) / 2
        halted = reached + torch.sigmoid(scale * (first + shift)) > 1 - EPSILON
        if float(halted.float().mean()) < share:
            low = shift
        else:
            high = shift
    return (low + high) / 2
