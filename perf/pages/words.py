"""How figures are written: numbers with as many digits as they carry, systems under short names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from calibration.pages.page import percent

MISSING = "not measured"
NONE = "–"

Summary = Mapping[str, Any]
Spread = Mapping[str, Any]  # as `perf.spread.Spread.to_dict` writes it


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
    """A rung's recipe for people: `px=112` is `112 px`, anything else itself."""
    key, _, value = recipe.partition("=")
    return f"{value}\N{NO-BREAK SPACE}px" if key == "px" else recipe


def resolution(system: str) -> int | None:
    """The pixels of a static mid-resolution's name, `static-168`; None for other systems."""
    pixels = system.removeprefix("static-")
    return int(pixels) if pixels != system and pixels.isdigit() else None


def short_name(system: str, summary: Summary) -> str:
    """A system in a few words, for labels and legends."""
    model = summary.get("model") or {}
    if system in ("static-low", "static-high"):
        kind = "cheap rung" if system == "static-low" else "full rung"
        recipe = model.get(system.removeprefix("static-"))
        return f"{kind}, {rung_words(recipe)}" if recipe else kind
    pixels = resolution(system)
    if pixels is not None:
        return f"static {pixels}\N{NO-BREAK SPACE}px"
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


def system_order(system: str) -> tuple[int, int]:
    """Sorts statics from the cheapest resolution to the full rung, then the adaptive ones."""
    first = {"static-low": 0, "static-high": 2, "adaptive-0": 3, "adaptive": 4, "ensemble": 6}
    pixels = resolution(system)
    if pixels is not None:
        return 1, pixels
    asked = system.removeprefix("adaptive-")
    return first.get(system, 5), int(asked) if asked.isdigit() else 0
