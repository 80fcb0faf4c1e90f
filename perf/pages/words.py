"""How figures are written: numbers with as many digits as they carry, systems under short names."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from report.words import percent, recipe_words

MISSING = "not measured"
NONE = "–"
NOT_BELIEVED = "not believed"

Summary = Mapping[str, Any]
Spread = Mapping[str, Any]  # as `perf.figures.Spread.to_dict` writes it


def amount(value: float | None) -> str:
    """Three digits or so: `1,204`, `104`, `31.2`, `0.62`."""
    if value is None:
        return NONE
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:,.{digits}f}"


def ratio(value: float) -> str:
    """Two digits after the point."""
    return f"{value:.2f}"


def times(value: float) -> str:
    """A speed-up, e.g. `2.34×`."""
    return f"{value:.2f}×"


def fine(value: float) -> str:
    """A ratio near 1, where the third digit counts."""
    return f"{value:.3f}"


def share(value: float | None) -> str:
    """A measured share, or a dash."""
    return NONE if value is None else percent(value)


def middle(spread: Spread | None, show: Callable[[float], str] = amount) -> str:
    """The median of a spread, or a dash."""
    return NONE if spread is None else show(spread["median"])


def between(spread: Spread | None, show: Callable[[float], str] = amount) -> str:
    """From the smallest to the largest run; empty where there is one run or none."""
    if spread is None or spread["runs"] < 2:
        return ""
    return f"{show(spread['min'])} to {show(spread['max'])}"


@dataclass(frozen=True)
class Cell:
    """A figure and the range of its runs; the range is empty where there is none."""

    value: str
    range: str = ""

    @classmethod
    def of(cls, spread: Spread | None, show: Callable[[float], str] = amount) -> Cell:
        """From a spread, or a dash."""
        return cls(middle(spread, show), between(spread, show))


def rung_words(recipe: str) -> str:
    """A rung's recipe for people, as `recipe_words`, a number never parted from its px."""
    return recipe_words(recipe).replace(" px", "\N{NO-BREAK SPACE}px")


def resolution(system: str) -> int | None:
    """The pixels of a static mid-resolution's name, `static-168`; None for other systems."""
    pixels = system.removeprefix("static-")
    return int(pixels) if pixels != system and pixels.isdigit() else None


def recipe_of(system: str, summary: Summary) -> str | None:
    """The recipe of a static system; None where one is not recorded or there is none.

    An alternative's stands in its name: `static-112-int8static` is `px=112,int8=static`.
    """
    if not system.startswith("static-"):
        return None
    slug = system.removeprefix("static-")
    model = summary.get("model") or {}
    if slug == "high":
        return model.get("reference") or model.get("high")
    if slug in ("low", "escalation"):
        return model.get("low" if slug == "low" else "high")
    return ",".join(_part(piece) for piece in slug.split("-"))


def _part(piece: str) -> str:
    if piece.isdigit():
        return f"px={piece}"
    return re.sub(r"^(depth|tome|int8)(\w+)$", r"\1=\2", piece)


def cheaper_ways(system: str, summary: Summary) -> dict[str, str] | None:
    """What a static system does to be cheaper than the full model.

    Returns:
        The parts of its recipe by name, `{"tome": "8"}`, empty for the full model; None where its
        recipe is not known.
    """
    recipe = recipe_of(system, summary)
    if recipe is None:
        return None
    model = summary.get("model") or {}
    full = ("fp32", "full", f"px={model['image_shape'][1]}" if model else "")
    parts = (part.partition("=") for part in recipe.split(",") if part not in full)
    return {name: value for name, _, value in parts}


def short_name(system: str, summary: Summary) -> str:
    """A system in a few words, for labels and legends."""
    recipe = recipe_of(system, summary)
    has_reference = "reference" in (summary.get("model") or {})
    kinds = {
        "static-low": "cheap rung",
        "static-high": "full model" if has_reference else "full rung",
        "static-escalation": "full rung",
    }
    if system in kinds:
        return f"{kinds[system]}, {rung_words(recipe)}" if recipe else kinds[system]
    if recipe is not None:
        return f"static {rung_words(recipe)}"
    names = {
        "adaptive": "adaptive",
        "adaptive-0": "adaptive, never escalating",
        "adaptive-100": "adaptive, always escalating",
        "ensemble": "adaptive from image bytes",
    }
    asked = system.removeprefix("adaptive-")
    return names.get(system) or (
        f"adaptive, asked for {asked}\N{NO-BREAK SPACE}%" if asked.isdigit() else system
    )


def judged(summary: Summary) -> dict[str, Mapping[str, Any]]:
    """The systems whose agreement and cost were both measured."""
    answers = summary.get("answers") or {}
    return {
        name: answer
        for name, answer in answers.items()
        if answer.get("agreement_with_high") is not None and answer.get("cost_ratio") is not None
    }


def system_order(system: str) -> tuple[int, str]:
    """Sorts statics from the cheap rung over the alternatives to the full one, then adaptive."""
    first = {"static-low": 0, "static-high": 2, "adaptive-0": 3, "adaptive": 4, "ensemble": 6}
    other = 1 if system.startswith("static-") else 5
    by_number = re.sub(r"\d+", lambda digits: digits[0].zfill(6), system)
    return first.get(system, other), by_number
