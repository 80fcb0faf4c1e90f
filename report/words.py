"""Numbers and recipes as people read them. Each function is a filter of the templates, too.

Numbers have as many digits as they carry; one that was not measured, `None`, is a dash.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

NONE = "–"
_SPACE = "\N{NO-BREAK SPACE}"
_PRECISIONS = {"int8=static": "int8", "int8": "int8 (dynamic)", "align": "aligned"}


def percent(share: float | None) -> str:
    """A measured share, such as `4.2 %`."""
    return NONE if share is None else f"{100 * share:.1f}{_SPACE}%"


def setting(share: float) -> str:
    """A share that somebody chose, such as `5 %`."""
    return f"{round(100 * share, 10):g}{_SPACE}%"


def count_of(number: int, noun: str) -> str:
    """A number of things, such as `1 image` or `1,200 images`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def amount(value: float | None) -> str:
    """A quantity with about three digits, such as `1,204`, `104`, `31.2` or `0.62`."""
    if value is None:
        return NONE
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:,.{digits}f}"


def milliseconds(value: float | None) -> str:
    """A duration with three digits, such as `6.25 ms`."""
    return NONE if value is None else f"{amount(value)}{_SPACE}ms"


def ratio(value: float | None) -> str:
    """A ratio with two digits after the point."""
    return NONE if value is None else f"{value:.2f}"


def score_texts(scores: Sequence[float], threshold: float | None = None) -> list[str]:
    """Scores, in oracle units, with as many digits, the same number for all, as tell them apart.

    Four digits at least, and so many that each text is on the same side of the threshold as its
    score. Equal scores get equal texts.
    """
    numbers = [float(score) for score in scores]
    finite = sorted({number for number in numbers if math.isfinite(number)})
    # Fewer than four digits tell little, more than 17 no FP64 has.
    for digits in range(4, 17 + 1):
        read = [float(f"{number:.{digits}g}") for number in finite]
        sided = threshold is None or all(
            (number <= threshold) == (text <= threshold)
            for number, text in zip(finite, read, strict=True)
        )
        if sided and len(set(read)) == len(finite):
            break
    return [f"{number:.{digits}g}" for number in numbers]


def fine(value: float | None) -> str:
    """A ratio near 1, whose third digit counts."""
    return NONE if value is None else f"{value:.3f}"


def times(value: float | None) -> str:
    """A speed-up, such as `2.34×`."""
    return NONE if value is None else f"{value:.2f}×"


def interval(ends: tuple[float, float] | None, show: Callable[[float], str] = ratio) -> str:
    """An interval, such as `0.61 to 0.80`; a dash where there is none."""
    return NONE if ends is None else " to ".join(map(show, ends))


def by_image(per_image: Mapping[str, Any]) -> str:
    """A cost that depends on the image, of the full model's: `0.62 (0.41 to 0.88 by image)`.

    Args:
        per_image: of a price, see `perf.prices.Price`.
    """
    cost = per_image["cost_ratio"]
    return f"{ratio(cost['mean'])} ({interval((cost['p5'], cost['p95']))} by image)"


def moment(at: float) -> str:
    """Seconds since 1970 as a moment, such as `2024-05-01 09:30:00 UTC`; a dash if out of reach."""
    try:
        return f"{datetime.fromtimestamp(at, timezone.utc):%Y-%m-%d %H:%M:%S}{_SPACE}UTC"
    except (ValueError, OverflowError, OSError):  # the clock stood wrong by thousands of years
        return NONE


def recipe_words(recipe: str) -> str:
    """How a graph makes itself cheap, such as `112 px, 9 blocks, int8, aligned`.

    A part that is not known stays as it is.
    """
    return ", ".join(map(_part_words, recipe.split(",")))


def _part_words(part: str) -> str:
    name, _, value = part.partition("=")
    if name == "px":
        return f"{value} px"
    if name == "depth":
        return count_of(int(value), "block")
    if name == "tome":
        return f"{count_of(int(value), 'token')} merged per block"
    if name == "apt":
        one, _, other = value.partition("/")
        still = f", still larger ones below {other}" if other else ""
        return f"flat areas in larger patches (below {one} bits{still})"
    if name == "halt":
        about = f" after about {value} {'block' if value == '1' else 'blocks'}" if value else ""
        return f"tokens halt{about}"
    if name == "adapted":
        return f"adapted ({value})"
    return _PRECISIONS.get(part, part)
