"""A recipe in words: what a graph does to be cheaper than the full model, as users write it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

PRECISIONS = ("fp32", "fp16", "int8", "int8=static")
_NUMBERS = ("px", "depth", "tome")
MOST_BITS = 9.0  # entropy of a cell by 512 bins
KNOWN = (
    "px=N, depth=N, tome=N, apt=BITS, apt=BITS/BITS, halt, halt=DEPTH, adapted=DIR, int8, "
    "int8=static, fp16, fp32 and align"
)


class RecipeError(ValueError):
    """A recipe that cannot be read. One line that says which part."""


@dataclass(frozen=True)
class Recipe:
    """How a graph makes itself cheap; its parts compose.

    Attributes:
        px: side of the square image the transformer itself sees; None: the model's full one.
        depth: transformer blocks that run, the first ones; None: all.
        tome: tokens merged in each block.
        apt: entropy in bits below which a cell of 2 x 2 patches becomes one token, and perhaps that
            below which a cell of 4 x 4 does; empty: every patch is a token.
        halt: blocks that a token runs through on average, which the gate was trained for; 0: tokens
            halt by the gate that the model itself came with; None: no token halts.
        adapted: the folder of a state that `python -m adaptation distil` wrote; in the recipe of a
            graph the first digits of the SHA-256 of its weights, see `bundle.adapted`. None: the
            weights are the model's own.
        precision: one of `PRECISIONS`.
        align: whether a fitted map takes its CLS tokens to the full model's embedding.
    """

    px: int | None = None
    depth: int | None = None
    tome: int = 0
    apt: tuple[float, ...] = ()
    halt: float | None = None
    adapted: str | None = None
    precision: str = "fp32"
    align: bool = False

    @classmethod
    def parse(cls, text: str) -> Recipe:
        """Read a recipe such as `px=112,tome=4,int8=static,align`, its parts in any order.

        Raises:
            RecipeError: a part that is unknown, no such number, or said twice.
        """
        fields: dict[str, Any] = {}
        found: Any
        for part in text.split(","):
            name, _, value = (word.strip() for word in part.partition("="))
            part = "".join(part.split())
            if part in PRECISIONS:
                name, found = "precision", part
            elif part == "align":
                found = True
            elif name in _NUMBERS:
                found = _number(part, "".join(value.split()))
            elif name == "apt":
                found = _bits(part, "".join(value.split()))
            elif part == "halt":
                found = 0.0
            elif name == "halt":
                found = _decimal(value)
                if found is None or not 0 < found < math.inf:
                    raise RecipeError(f"{part!r} in a recipe must be blocks, as halt=8")
            elif name == "adapted" and value:
                found = value  # a folder's name may hold spaces, but no comma
            else:
                raise RecipeError(f"recipe {text!r}: {part!r} is unknown; known are {KNOWN}")
            if name in fields:
                raise RecipeError(f"recipe {text!r} says its {name} twice; once is enough")
            fields[name] = found
        return cls(**fields)

    @property
    def varies(self) -> bool:
        """Whether images keep tokens of their own, so that one costs more than another."""
        return bool(self.apt) or self.halt is not None

    def at(self, px: int) -> Recipe:
        """The same recipe, its resolution written out: its own, or this one."""
        return self if self.px is not None else replace(self, px=px)

    def slug(self, full_px: int) -> str:
        """A short name for files and models: `full`, `apt5p5`, `px112_int8static_align`."""
        numbers = {"depth": self.depth or 0, "tome": self.tome}
        parts = [f"px{self.px}"] if self.px not in (None, full_px) else []
        parts += [f"{name}{value}" for name, value in numbers.items() if value]
        parts += ["apt" + "-".join(_text(bits) for bits in self.apt)] if self.apt else []
        parts += ["halt" + _text(self.halt or None)] if self.halt is not None else []
        parts = [part.replace(".", "p") for part in parts]
        parts += [f"adapted{self.adapted}"] if self.adapted else []
        parts += [self.precision.replace("=", "")] if self.precision != "fp32" else []
        parts += ["align"] if self.align else []
        return "_".join(parts) or "full"

    def __str__(self) -> str:
        """The canonical text: parts in the order in which they are applied."""
        parts = [f"px={self.px}"] if self.px is not None else []
        parts += [f"depth={self.depth}"] if self.depth is not None else []
        parts += [f"tome={self.tome}"] if self.tome else []
        parts += ["apt=" + "/".join(_text(bits) for bits in self.apt)] if self.apt else []
        if self.halt is not None:
            parts += [f"halt={_text(self.halt)}" if self.halt else "halt"]
        parts += [f"adapted={self.adapted}"] if self.adapted else []
        parts += [self.precision] if self.precision != "fp32" else []
        parts += ["align"] if self.align else []
        return ",".join(parts) or "fp32"


def _number(part: str, value: str) -> int:
    if not value.isdecimal():
        raise RecipeError(f"{part!r} in a recipe must be a whole number, as px=112")
    return int(value)


def _decimal(value: str) -> float | None:
    try:
        return float(value)
    except ValueError:
        return None


def _bits(part: str, value: str) -> tuple[float, ...]:
    found = [_decimal(one) for one in value.split("/")]
    if len(found) > 2 or any(bits is None or not 0 <= bits <= MOST_BITS for bits in found):
        raise RecipeError(
            f"{part!r} in a recipe must be one or two numbers of bits from 0 to {MOST_BITS:g}, as "
            "apt=5.5 or apt=5.75/4"
        )
    return tuple(bits for bits in found if bits is not None)


def _text(number: float | None) -> str:
    """A number as short as can be; nothing where there is none."""
    return "" if number is None else repr(number).removesuffix(".0")
