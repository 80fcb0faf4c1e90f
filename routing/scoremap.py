"""Map a signal's raw value to oracle units: the L2 change that the full rung is predicted to make.

The map is monotone, so it never changes the order in which a signal ranks images; it makes a
threshold mean the same thing whatever the signal. Fitting lives in `calibration`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

FloatVector = NDArray[np.float64]


@dataclass(frozen=True)
class ScoreMap:
    """A piecewise linear, strictly increasing map of `sign * raw`.

    Attributes:
        sign: +1 where a larger raw value means more need to escalate, -1 where a smaller does.
        knots: strictly increasing values of `sign * raw`, at least two.
        values: the predicted oracle at each knot, strictly increasing.
    """

    sign: int
    knots: tuple[float, ...]
    values: tuple[float, ...]

    def __post_init__(self) -> None:
        """Refuse a map that is not strictly monotone.

        Raises:
            ValueError: naming what is wrong.
        """
        if self.sign not in (-1, 1):
            raise ValueError(f"the sign is {self.sign}, it must be 1 or -1")
        if len(self.knots) != len(self.values) or len(self.knots) < 2:
            raise ValueError("knots and values must have the same length, at least 2")
        for name, numbers in (("knots", self.knots), ("values", self.values)):
            if not np.all(np.isfinite(numbers)) or not np.all(np.diff(numbers) > 0):
                raise ValueError(f"the {name} must be finite and strictly increasing")

    def __call__(self, raw: NDArray[np.float64]) -> NDArray[np.float32]:
        """Scores in oracle units, FP32 (B,); beyond the outer knots the outer slopes go on.

        Args:
            raw: a signal's values, FP64 (B,).
        """
        x = self.sign * np.asarray(raw, dtype=np.float64)
        knots, values, slopes = self._arrays
        segment = np.clip(knots.searchsorted(x, side="right") - 1, 0, len(slopes) - 1)
        score = values[segment] + slopes[segment] * (x - knots[segment])
        return np.asarray(score, dtype=np.float32)

    @cached_property
    def _arrays(self) -> tuple[FloatVector, FloatVector, FloatVector]:
        """Knots (K,), values (K,) and the slopes between them (K - 1,), made once."""
        knots, values = np.array(self.knots), np.array(self.values)
        return knots, values, np.diff(values) / np.diff(knots)
