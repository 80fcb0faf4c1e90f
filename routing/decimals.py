"""Thresholds and scores as text for people, exact enough that the text decides as the number does.

A score lies on one side of the threshold; a text of four digits may lie on the other, and a
threshold typed back from such a text would send other images to the full rung.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

_LEAST, _MOST = 4, 17  # significant digits: fewer tell little, more than 17 no FP64 has


def threshold_text(threshold: float) -> str:
    """The shortest text that reads back as this very FP64 number, without `.0`."""
    text = repr(float(threshold))
    return text.removesuffix(".0")


def score_texts(scores: Sequence[float], threshold: float | None = None) -> list[str]:
    """Scores with as many digits, the same number for all, as tell them apart, and four at least.

    Args:
        scores: n of them, in oracle units; equal ones get equal texts.
        threshold: that the texts must be on the same side of as their scores.
    """
    numbers = [float(score) for score in scores]
    finite = sorted({number for number in numbers if math.isfinite(number)})
    for digits in range(_LEAST, _MOST + 1):
        read = [float(f"{number:.{digits}g}") for number in finite]
        sided = threshold is None or all(
            (number <= threshold) == (text <= threshold)
            for number, text in zip(finite, read, strict=True)
        )
        if sided and len(set(read)) == len(finite):
            break
    return [f"{number:.{digits}g}" for number in numbers]
