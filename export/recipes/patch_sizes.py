"""`apt=BITS` and `apt=BITS/BITS`: flat areas of an image become one token each.

Written from Choudhury et al. 2025, "Accelerating Vision Transformers with Adaptive Patch Sizes",
and facts about its public code. The entropy of the gray values decides, in bits, coarsest cells
first. A coarse cell is the patch embedding of its area made smaller, with a table of positions of
its own grid. `adaptation` trains besides what the paper adds: the cell's patches in full detail
through a convolution and a linear map that starts at zero, so that without training nothing of it
is in the graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from export.families import blocks, family_of, tower
from export.recipes.answering import Answering
from export.recipes.ragged import Layout, RaggedBlock, part
from export.recipes.smaller import downsample

BINS = 512
# Of red, green and blue in gray; their sum is 0.9999, so that white is 254.97.
GRAY = (0.2989, 0.5870, 0.1140)


class Cells(nn.Module):
    """What coarse cells need beside the model's own weights.

    Attributes:
        tables: one for each coarse scale, FP32 (1, M * M, W), positions of its M x M cells.
        merge: four patches in full detail to one cell, one scale at a time; None: left out.
        zero: what of that is added; zero before training; None: left out.

    Args:
        tables: as the attribute.
        detail: whether `merge` and `zero` are there.
    """

    def __init__(self, tables: Sequence[torch.Tensor], detail: bool) -> None:
        super().__init__()
        self.tables = nn.ParameterList(table.clone() for table in tables)
        self.merge: nn.Conv2d | None = None
        self.zero: nn.Linear | None = None
        if detail:
            width = tables[0].shape[2]
            self.merge = nn.Conv2d(width, width, kernel_size=2, stride=2)
            self.zero = nn.Linear(width, width)
            for weight in (self.merge.weight, self.merge.bias, self.zero.weight, self.zero.bias):
                nn.init.zeros_(weight)  # type: ignore[arg-type]
            with torch.no_grad():  # the mean of the four
                self.merge.weight += torch.eye(width)[:, :, None, None] / 4

    def detailed(self, grid: torch.Tensor, scale: int) -> torch.Tensor:
        """What the detail adds to the cells of a scale.

        Args:
            grid: FP32 (B, W, S, S), embedded patches without positions.
            scale: 1 for cells of 2 x 2 patches, 2 for 4 x 4.

        Returns:
            FP32 (B, M * M, W).
        """
        assert self.merge is not None and self.zero is not None
        for _ in range(scale):
            grid = self.merge(grid)
        return torch.as_tensor(self.zero(grid.flatten(2).transpose(1, 2)))


class PatchSizesVit(nn.Module):
    """`image` at full resolution to the outputs of a rung, `tokens` and `patches`.

    The library's weights, run by a forward of our own.

    Attributes:
        counts: how many of its outputs, the last ones, count tokens.

    Args:
        model: of a family whose tokens carry their own positions, with or without its head, in eval
            mode; its position table fits `px`.
        px: the resolution that the transformer sees.
        bits: entropies below which a cell of 2 x 2 patches, and perhaps one of 4 x 4, is one token.
        scaling: mean and standard deviation that the image was normalised by, three each.
        cells: what coarse cells need.
        probe: a linear head on the embedding, in place of the model's own.
        unit_length: whether embeddings are scaled to length 1.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(
        self,
        model: PreTrainedModel,
        px: int,
        bits: Sequence[float],
        scaling: tuple[Sequence[float], Sequence[float]],
        cells: Cells,
        probe: nn.Linear | None,
        unit_length: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.px = px
        self.bits = tuple(bits)
        self.own = cells
        self.counts = 2
        self.family = family_of(model)
        self.answering = Answering(model, probe, unit_length)
        self.blocks = nn.ModuleList(RaggedBlock(block) for block in blocks(model))
        self.patch_px = int(tower(model).config.patch_size)
        for name, values in zip(("mean", "std"), scaling, strict=True):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Run the rung.

        Args:
            image: FP32 (B, 3, H, W), normalised, at the full rung's resolution.

        Returns:
            embedding (B, D), cls_layers (B, L+1, W)[, logits (B, C)], tokens INT32 (B, 1), how many
            the blocks see, and patches INT32 (B, S * S), the side of the cell that each patch of
            the grid is in, in patches: 1, 2 or 4.
        """
        pixels = downsample(image, self.px)
        sides = self.sides(pixels)  # (B, S, S)
        candidates, wanted, sizes = self._candidates(pixels, sides)
        kept = wanted.flatten().nonzero()[:, 0]
        counts = wanted.sum(dim=1)
        layout = Layout.of(kept // wanted.shape[1], counts)
        tokens = candidates.flatten(0, 1)[kept][None]
        cls_layers = [tokens[0, layout.starts]]
        for block in self.blocks:
            tokens = block(tokens, layout)
            cls_layers.append(tokens[0, layout.starts])
        stand_for = sizes[kept % wanted.shape[1]][layout.padded]
        stand_for = torch.where(layout.mask[:, 0, 0] == 0, stand_for, 0.0)
        embedding, logits = self.answering(tokens[0, layout.padded], stand_for[..., None])
        seen = counts[:, None].to(torch.int32)
        layers = torch.stack(cls_layers, dim=1)
        return embedding, layers, *logits, seen, sides.flatten(1).to(torch.int32)

    def extra_repr(self) -> str:
        """What no weight of it shows."""
        return f"px={self.px}, bits={self.bits}"

    def sides(self, pixels: torch.Tensor) -> torch.Tensor:
        """The side of the cell that each patch is in, INT64 (B, S, S), of (B, 3, px, px)."""
        bins = bins_of(pixels * self.std + self.mean)
        side = self.px // self.patch_px
        sides = torch.ones_like(bins[:, :: self.patch_px, :: self.patch_px])
        histograms = _histograms(bins, 2 * self.patch_px)  # (B, M, M, BINS)
        for scale, most in enumerate(self.bits, start=1):
            if scale > 1:
                histograms = _four_in_one(histograms)
            flat = entropy(histograms) < most
            cell = 2**scale
            grown = flat.repeat_interleave(cell, dim=1).repeat_interleave(cell, dim=2)
            sides = torch.where(grown, cell, sides)
        return sides.view(-1, side, side)

    def _candidates(
        self, pixels: torch.Tensor, sides: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """All tokens that there may be, special ones first, then scale by scale.

        Returns:
            FP32 (B, P, W); BOOL (B, P), which there are; FP32 (P,), the patches each stands for.
        """
        base = tower(self.model)
        project = _projection(base)
        hidden = self.family.tokens(base, pixels)
        special = torch.ones_like(hidden[:, : self.answering.special, 0], dtype=torch.bool)
        tokens, wanted = [hidden], [special, (sides == 1).flatten(1)]
        sizes = [torch.ones(hidden.shape[1], device=hidden.device)]
        for scale, table in enumerate(self.own.tables, start=1):
            cell = 2**scale
            coarse = project(_smaller(pixels, cell)).flatten(2).transpose(1, 2) + table
            if self.own.zero is not None:
                coarse = coarse + self.own.detailed(project(pixels), scale)
            tokens.append(self.family.entering(base, coarse))
            wanted.append((sides[:, ::cell, ::cell] == cell).flatten(1))
            sizes.append(torch.full_like(table[0, :, 0], cell**2))
        return torch.cat(tokens, dim=1), torch.cat(wanted, dim=1), torch.cat(sizes)


def bins_of(pixels: torch.Tensor) -> torch.Tensor:
    """The bin of each pixel's gray value, INT64 (B, H, W), of pixels from 0 to 1, (B, 3, H, W).

    Gray is of whole levels, as in the picture itself; of a smaller one, as if it had been stored.
    The order of sums, of product and of quotient counts: another one moves some values by a bin.
    """
    red, green, blue = (pixels * 255).round().clamp(0, 255).unbind(dim=1)
    gray = red * GRAY[0] + green * GRAY[1] + blue * GRAY[2]
    # Both ends: a value that is no number becomes any integer, and would be no bin.
    return (gray * BINS / 255).long().clamp(0, BINS - 1)


def entropy(histograms: torch.Tensor) -> torch.Tensor:
    """Shannon's entropy in bits, (...), of how often each bin is there, (..., BINS)."""
    shares = histograms / histograms.sum(dim=-1, keepdim=True)
    # The public code adds 1e-10, which exporters take for nothing; what it is for is this.
    return -(shares * shares.clamp(min=1e-10).log2()).sum(dim=-1)


def _four_in_one(histograms: torch.Tensor) -> torch.Tensor:
    """Those of cells of twice the side, (B, M, M, BINS) to (B, M / 2, M / 2, BINS)."""
    rows = histograms[:, 0::2] + histograms[:, 1::2]
    return rows[:, :, 0::2] + rows[:, :, 1::2]


def _histograms(bins: torch.Tensor, cell_px: int) -> torch.Tensor:
    """How often each bin is in each cell, FP32 (B, M, M, BINS), of bins INT64 (B, px, px)."""
    batch, px, _ = bins.shape
    cells = px // cell_px
    place = torch.arange(px, device=bins.device) // cell_px
    image = torch.arange(batch, device=bins.device)[:, None, None]
    where = ((image * cells + place[:, None]) * cells + place) * BINS + bins
    empty = torch.zeros(batch * cells * cells * BINS, device=bins.device)
    ones = torch.ones_like(where.flatten(), dtype=empty.dtype)
    return empty.scatter_add(0, where.flatten(), ones).view(batch, cells, cells, BINS)


def _smaller(pixels: torch.Tensor, factor: int) -> torch.Tensor:
    """Bilinear, without antialiasing: the mean of the four central pixels of each square."""
    edge = factor // 2 - 1
    top, bottom = pixels[:, :, edge::factor], pixels[:, :, edge + 1 :: factor]
    rows = top + bottom
    return (rows[..., edge::factor] + rows[..., edge + 1 :: factor]) / 4


def _projection(base: nn.Module) -> nn.Module:
    """The convolution that embeds patches."""
    embeddings: nn.Module = base.embeddings  # type: ignore[assignment]
    inner = getattr(embeddings, "patch_embeddings", None)
    found: nn.Module = part(embeddings, "patch_embedding") if inner is None else inner.projection
    return found


def cell_tables(model: PreTrainedModel, side: int, scales: int) -> list[torch.Tensor]:
    """Positions of the cells of each coarse scale, FP32 (1, M * M, W), by the model's own table.

    Args:
        model: with the table that it was trained with.
        side: patches along an edge.
        scales: how many coarse ones.
    """
    embeddings = tower(model).embeddings
    table = getattr(embeddings, "position_embeddings", None)
    if table is None:
        table = embeddings.position_embedding.weight[None]
        patches = int(embeddings.num_patches)
    else:
        patches = int(embeddings.patch_embeddings.num_patches)
    special = table.shape[1] - patches
    grid = int(patches**0.5)
    planes = table.detach()[:, special:].unflatten(1, (grid, grid)).permute(0, 3, 1, 2)
    return [
        functional.interpolate(
            planes.float(), size=(side // 2**scale,) * 2, mode="bicubic", antialias=True
        )
        .flatten(2)
        .transpose(1, 2)
        for scale in range(1, scales + 1)
    ]


def read_detail(cells: Cells, tensors: Mapping[str, torch.Tensor]) -> Cells:
    """Take the weights of a state in the public layout; returns the cells.

    Args:
        cells: with `merge` and `zero`.
        tensors: `patch_attn.weight`, `patch_attn.bias`, `zero_conv.weight` and `zero_conv.bias`.
    """
    names = {"merge": "patch_attn", "zero": "zero_conv"}
    state = {
        f"{own}.{kind}": tensors[f"{public}.{kind}"]
        for own, public in names.items()
        for kind in ("weight", "bias")
    }
    cells.load_state_dict(state, strict=False)
    return cells
