"""Where the tokens of an image went, drawn over the picture, as HTML that any page may hold.

After the figures of two papers: the cells of Choudhury et al. 2025, "Accelerating Vision
Transformers with Adaptive Patch Sizes", and the depths of Yin et al. 2022, "A-ViT: Adaptive Tokens
for Efficient Vision Transformer".
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .figures import histogram
from .page import HIGH_COLOUR, LOW_COLOUR, data_uri, filled
from .words import count_of, setting

_PICTURE_PX = 256  # of the longer edge, as embedded
_SHADES = {"apt": LOW_COLOUR, "halt": HIGH_COLOUR}
# Opacity of the shade over a cell, by its side; and over a patch that ran through all blocks.
_COARSE, _DEEPEST = {1: 0.0, 2: 0.3, 4: 0.6}, 0.85
_MEASURED = {"apt": "tokens of an image", "halt": "blocks that a token of an image ran through"}
_CELLS = {1: "one token for each patch", 2: "for 2 × 2 patches", 4: "for 4 × 4"}


@dataclass(frozen=True, eq=False)
class TokenMap:
    """One image, and what a graph's outputs `tokens` and `patches` say of it.

    Attributes:
        kind: `apt` or `halt`.
        picture: as the graph sees it, resized and cropped: UINT8 (H, W, 3), or an encoded image.
        tokens: of `apt` how many there are, (1,); of `halt` how many ran through each block, (L,).
        patches: one whole number for each of the S * S patches, in reading order: of `apt` the side
            of the cell that it is in, 1, 2 or 4; of `halt` how many blocks it ran through.
        caption: what the image is called.
    """

    kind: str
    picture: NDArray[np.uint8] | bytes
    tokens: NDArray[Any]
    patches: NDArray[Any]
    caption: str

    def __post_init__(self) -> None:
        """Refuse what cannot be drawn.

        Raises:
            ValueError: an unknown kind, patches that fill no square, or a number no patch can have.
        """
        if self.kind not in _SHADES:
            raise ValueError(f"kind {self.kind!r} is none of {', '.join(_SHADES)}")
        if not self.patches.size or self.side**2 != self.patches.size:
            raise ValueError(f"{self.patches.size} patches fill no square")
        known = list(_COARSE) if self.kind == "apt" else range(self.blocks + 1)
        if strange := set(self.counts()) - set(known):
            raise ValueError(f"no patch of {self.kind} can be {min(strange)}")

    @property
    def side(self) -> int:
        """S, the number of patches along an edge."""
        return math.isqrt(self.patches.size)

    @property
    def blocks(self) -> int:
        """L of `halt`; 1 of `apt`."""
        return int(self.tokens.size)

    @property
    def grid(self) -> NDArray[Any]:
        """The patches, (S, S)."""
        return self.patches.reshape(self.side, self.side)

    @property
    def all_tokens(self) -> int:
        """Of `apt`, how many tokens there would be if each patch were one."""
        cells = sum(n // cell**2 for cell, n in self.counts().items())
        # Special tokens, such as CLS, are in no cell; every image has the same.
        return int(self.tokens.flat[0]) - cells + int(self.patches.size)

    def counts(self) -> dict[int, int]:
        """How many patches have each number that there is."""
        values, counts = np.unique(self.patches, return_counts=True)
        return dict(zip(values.tolist(), counts.tolist(), strict=True))

    def sentence(self) -> str:
        """How many tokens there are, or how far they went."""
        if self.kind == "halt":
            mean = float(self.tokens.sum() / self.tokens.flat[0])
            return f"tokens ran through {mean:.1f} of {self.blocks} blocks on average"
        tokens, most = int(self.tokens.flat[0]), self.all_tokens
        return f"{tokens:,} of {most:,} tokens ({setting(round(tokens / most, 2))})"

    def details(self) -> str:
        """How many cells there are of each size, or patches of each depth."""
        if self.kind == "halt":
            found = (f"patches through {depth}: {n}" for depth, n in self.counts().items())
        else:
            found = (
                f"{count_of(n // cell**2, 'cell')} of {cell} × {cell}"
                for cell, n in self.counts().items()
            )
        return ", ".join(found)

    def opacity(self, value: int) -> float:
        """Of the shade over a patch that has this number."""
        return _COARSE[value] if self.kind == "apt" else round(_DEEPEST * value / self.blocks, 3)

    def area(self, value: int) -> str:
        """The path around all patches that have this number, a patch being 1 x 1."""
        path, edge = "", np.zeros((self.side, 1), np.int8)
        steps = np.diff((self.grid == value).astype(np.int8), axis=1, prepend=edge, append=edge)
        for y, row in enumerate(steps):
            for left, right in zip((row > 0).nonzero()[0], (row < 0).nonzero()[0], strict=True):
                path += f"M{left} {y}H{right}v1H{left}z"
        return path

    def borders(self) -> str:
        """The path around every cell of `apt`; empty of `halt`."""
        if self.kind == "halt":
            return ""
        return "".join(
            f"M{x} {y}h{cell}v{cell}h-{cell}z"
            for (y, x), cell in np.ndenumerate(self.grid)
            if y % cell == x % cell == 0
        )

    def image(self) -> str:
        """The picture, small, as the address of an embedded file."""
        if isinstance(self.picture, bytes):
            image = Image.open(io.BytesIO(self.picture)).convert("RGB")
        else:
            image = Image.fromarray(self.picture).convert("RGB")
        image.thumbnail((_PICTURE_PX, _PICTURE_PX))
        if self.kind == "halt":  # pale and gray: its own colours would be read as depths
            image = Image.blend(image.convert("L"), Image.new("L", image.size, 255), 0.5)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=80)
        return data_uri("image/jpeg", buffer.getvalue())


@dataclass(frozen=True, eq=False)
class TokenCounts:
    """How many tokens one rung keeps of each of some images.

    Attributes:
        rung: what the page calls it.
        recipe: of its graph.
        images: what the images are, in words.
        groups: the output `tokens` of the images, INT32 (n, 1 or L), by what became of them.
        maps: some of the images, at least one.
    """

    rung: str
    recipe: str
    images: str
    groups: Mapping[str, NDArray[Any]]
    maps: Sequence[TokenMap]

    @property
    def kind(self) -> str:
        """`apt` or `halt`."""
        return self.maps[0].kind

    @property
    def most(self) -> int:
        """The most there can be of `values`."""
        return self.maps[0].blocks if self.kind == "halt" else self.maps[0].all_tokens

    @property
    def values(self) -> dict[str, NDArray[np.float64]]:
        """Tokens of each image, or the mean of the blocks that they ran through, by group."""
        halts = self.kind == "halt"
        return {
            name: tokens.sum(axis=1) / (tokens[:, 0] if halts else 1.0)
            for name, tokens in self.groups.items()
        }

    def figure(self) -> str:
        """How often each number of tokens occurs, as the address of an embedded file."""
        values = {name: values.tolist() for name, values in self.values.items()}
        return histogram(values, _MEASURED[self.kind], size=(5.6, 2.4))


def where_tokens_went(counts: Sequence[TokenCounts]) -> str:
    """The part of a page about the rungs whose images keep tokens of their own, as HTML.

    Empty where there is no such rung; it needs the styles of `base.html.j2`.
    """
    rungs = [(one, np.concatenate(list(one.values.values()))) for one in counts]
    return filled("token_counts.html.j2", rungs=rungs, token_maps=token_maps) if rungs else ""


def token_maps(maps: Sequence[TokenMap]) -> str:
    """Draw pictures with their tokens over them, and what the shades mean.

    Returns:
        HTML for a page of `base.html.j2`, whose styles it needs; no script, no other file.
    """
    kinds = sorted({(one.kind, one.blocks) for one in maps})
    legends = [
        (_SHADES[kind], _legend([one for one in maps if (one.kind, one.blocks) == (kind, blocks)]))
        for kind, blocks in kinds
    ]
    return filled("tokens.html.j2", maps=maps, legends=legends, shades=_SHADES)


def _legend(maps: Sequence[TokenMap]) -> list[tuple[float, str]]:
    """The opacity and the meaning of every number that patches of one kind have."""
    one, values = maps[0], sorted({value for one in maps for value in one.counts()})
    if one.kind == "apt":
        return [(one.opacity(value), _CELLS[value]) for value in values]
    first = f"{values[0]} of {one.blocks} blocks"
    return [(one.opacity(value), str(value) if n else first) for n, value in enumerate(values)]
