"""How well a signal ranks images, and how sure a figure is: pure functions, numpy only.

Everything is computed from weights of the images, so that one vectorised formula gives the value
(all weights one) and its bootstrap distribution (weights drawn by group).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatVector = NDArray[np.float64]
FloatMatrix = NDArray[np.float64]
BoolVector = NDArray[np.bool_]

RESAMPLES = 1000
LEVEL = 0.95
MIN_GROUPS = 10  # fewer resample to much too short intervals
_AT_ONCE = 100  # resamples; bounds the memory to a few arrays of 100 x n


def mean(weights: FloatMatrix, values: NDArray[Any]) -> FloatVector:
    """Weighted mean of `values` (n,) for each row of `weights` (R, n); NaN where all weigh 0."""
    with np.errstate(invalid="ignore"):
        return np.asarray(weights @ values.astype(np.float64) / weights.sum(axis=1))


def auroc(weights: FloatMatrix, values: FloatVector, loss: BoolVector) -> FloatVector:
    """Probability that a lost image has a larger value than another, ties counting half.

    The Mann-Whitney statistic (Hanley and McNeil 1982). NaN where a row of `weights` holds no
    loss or nothing else.
    """
    lost = weights @ loss.astype(np.float64)
    kept = weights.sum(axis=1) - lost
    ranks = (weights * _midranks(weights, values)) @ loss.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((ranks - lost**2 / 2) / (lost * kept))


def spearman(weights: FloatMatrix, first: FloatVector, second: FloatVector) -> FloatVector:
    """Rank correlation (Spearman 1904) for each row of `weights`; NaN where one is constant."""
    total = weights.sum(axis=1, keepdims=True)
    x = _midranks(weights, first) - total / 2  # the weighted mean of mid-ranks is half the total
    y = _midranks(weights, second) - total / 2
    variance = (weights * x**2).sum(axis=1) * (weights * y**2).sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((weights * x * y).sum(axis=1) / np.sqrt(variance))


def _midranks(weights: FloatMatrix, values: FloatVector) -> FloatMatrix:
    """The weight below each value plus half the weight at it, (R, n)."""
    distinct, block = np.unique(values, return_inverse=True)
    order = np.argsort(block, kind="stable")
    starts = np.searchsorted(block[order], np.arange(len(distinct)))
    at = np.add.reduceat(weights[:, order], starts, axis=1)  # (R, distinct values)
    return np.asarray((np.cumsum(at, axis=1) - at / 2)[:, block])


class Bootstrap:
    """Resamples groups (n,) with replacement, the same ones for every figure (Efron 1979)."""

    def __init__(self, groups: NDArray[Any], seed: int) -> None:
        names, self._group = np.unique(groups, return_inverse=True)
        self._groups = len(names)
        self._seed = seed

    @cached_property
    def _counts(self) -> list[NDArray[np.int16]]:
        """How often each resample holds each group: drawing takes as long as a figure does."""
        rng = np.random.default_rng(self._seed)
        share = np.full(self._groups, 1 / self._groups)
        return [
            rng.multinomial(self._groups, share, size=_AT_ONCE).astype(np.int16)
            for _ in range(RESAMPLES // _AT_ONCE)
        ]

    def interval(self, figure: Callable[[FloatMatrix], FloatVector]) -> list[float] | None:
        """The central 95 % of a figure over the resamples.

        None where it is undefined in all of them, or where the groups are too few to resample. The
        figure is a function of weights (R, n) to values (R,), NaN where it is undefined.
        """
        if self._groups < MIN_GROUPS:
            return None
        parts = [figure(counts[:, self._group].astype(np.float64)) for counts in self._counts]
        values = np.concatenate(parts)
        values = values[np.isfinite(values)]
        if not len(values):
            return None
        tail = (1 - LEVEL) / 2
        return [float(v) for v in np.quantile(values, [tail, 1 - tail])]


def value(figure: Callable[[FloatMatrix], FloatVector], n: int) -> float | None:
    """A figure on the images as they are; None where it is undefined."""
    result = float(figure(np.ones((1, n)))[0])
    return result if np.isfinite(result) else None


def risk_curve(
    values: FloatVector, loss: BoolVector, high_loss: BoolVector | None = None
) -> tuple[FloatVector, FloatVector]:
    """Risk at every escalation rate that a threshold on `values` can give.

    Args:
        values: (n,), the largest escalate first.
        loss: BOOL (n,), of the cheap answers.
        high_loss: BOOL (n,), of the escalated answers, where the full rung is not the reference.

    Returns:
        Escalation rates, ascending from 0 to 1, and the risk at each: the share of all images
        that are lost. Images of equal value escalate together.
    """
    order = np.argsort(-values, kind="stable")
    escalated = np.arange(len(values) + 1)
    left = loss.sum() - np.concatenate([[0], np.cumsum(loss[order])])
    if high_loss is not None:
        left = left + np.concatenate([[0], np.cumsum(high_loss[order])])
    ranked = values[order]
    whole = np.concatenate([[True], ranked[1:] < ranked[:-1], [True]])  # no tie is divided
    return escalated[whole] / len(values), left[whole] / len(values)


def needed_escalation(
    values: FloatVector, loss: BoolVector, max_risk: float, high_loss: BoolVector | None = None
) -> float:
    """The lowest escalation rate from which on upwards the risk is at most `max_risk`.

    Infinite where escalating every image is not enough, because escalated images are lost too.
    """
    rates, risks = risk_curve(values, loss, high_loss)
    above = np.flatnonzero(risks > max_risk + 1e-12)
    if not len(above):
        return 0.0
    return float(rates[above[-1] + 1]) if above[-1] + 1 < len(rates) else float("inf")
