"""Where markers with numbers stand, wherever one of the places that are tried is free."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

APART = 0.55  # of the sum of two sizes: how far their centres are from each other at the least
_STEPS = [(0.0, 0.0)] + [  # in points: upwards first, then around, then further away
    (float(distance * np.cos(angle)), float(distance * np.sin(angle)))
    for distance in (15, 21, 28, 38, 50, 64, 80)
    for angle in np.pi / 2 + np.linspace(0, 2 * np.pi, 12, endpoint=False)
]


def steps_aside(centres: NDArray[np.float64], sizes: Sequence[float]) -> list[tuple[float, float]]:
    """How far each of n markers steps aside from its place; the first ones have the first choice.

    Centres, (n, 2), widths and steps are in points; a step is to the right and upwards. Where no
    step of those tried is free, a marker stays where it is.
    """
    taken: list[NDArray[np.float64]] = []
    steps = []
    for centre, size in zip(centres, sizes, strict=True):

        def is_free(
            step: tuple[float, float], centre: NDArray[np.float64] = centre, size: float = size
        ) -> bool:
            return all(
                np.hypot(*(centre + step - other)) > APART * (size + width)
                for other, width in zip(taken, sizes, strict=False)
            )

        step = next(filter(is_free, _STEPS), (0.0, 0.0))
        taken.append(centre + step)
        steps.append(step)
    return steps
