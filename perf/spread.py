"""A figure that was measured several times."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Spread:
    """One value per run, in the order of the runs.

    Attributes:
        values: at least one.
    """

    values: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.values:
            raise ValueError("a spread needs at least one value")

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """From any sequence of numbers."""
        return cls(tuple(float(value) for value in values))

    @property
    def median(self) -> float:
        """Median over the runs."""
        return statistics.median(self.values)

    @property
    def min(self) -> float:
        """Smallest of the runs."""
        return min(self.values)

    @property
    def max(self) -> float:
        """Largest of the runs."""
        return max(self.values)

    def to_dict(self) -> dict[str, Any]:
        """As it stands in summary.json; `runs` is their number."""
        return {
            "median": self.median,
            "min": self.min,
            "max": self.max,
            "runs": len(self.values),
            "values": list(self.values),
        }
