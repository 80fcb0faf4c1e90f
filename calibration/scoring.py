"""From a signal's raw values to oracle units: the sign and the monotone map."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr
from sklearn.isotonic import IsotonicRegression
from sklearn.metrics import roc_auc_score

from routing import ScoreMap

FloatVector = NDArray[np.float64]
MAX_KNOTS = 32
FAINT = 1e-3  # of the bins' spread
FLAT = 0.05  # of the oracle's spread: a signal that correlates with it by 0.05 spans about as much


def learn_sign(raw: FloatVector, oracle: FloatVector, loss: NDArray[np.bool_]) -> int:
    """+1 where a larger raw value means more need to escalate, -1 where a smaller does.

    Judged by the fidelity loss, because a small change that moves the answer matters more than a
    large one that does not; by the oracle where no image, or every image, is a loss.
    """
    if 0 < loss.sum() < len(loss):
        return 1 if roc_auc_score(loss, raw) >= 0.5 else -1
    varied = np.ptp(raw) > 0 and np.ptp(oracle) > 0
    return -1 if varied and spearmanr(raw, oracle).statistic < 0 else 1


def fit_score_map(raw: FloatVector, oracle: FloatVector, sign: int) -> ScoreMap:
    """Learn the monotone map from a signal to the oracle.

    Isotonic regression (Barlow et al. 1972) over equal-count bins, drawn through the centres of
    its flat blocks, so that the signal's order within a block is kept.
    """
    x = sign * raw
    bins = np.array_split(np.argsort(x, kind="stable"), min(MAX_KNOTS, max(2, len(x) // 8)))
    knots = np.array([x[rows].mean() for rows in bins])
    means = np.array([oracle[rows].mean() for rows in bins])
    counts = np.array([len(rows) for rows in bins], dtype=np.float64)
    same = np.cumsum(np.append(0, np.diff(knots) > 1e-12))  # tied values fill several bins
    knots, means, counts = _pooled(same, knots, means, counts)
    if len(knots) < 2:
        knots, means = np.array([knots[0] - 1, knots[0] + 1]), np.repeat(means, 2)
        counts = np.ones(2)
    values = IsotonicRegression().fit_transform(knots, means, sample_weight=counts)
    # Blocks that FP32 would hardly tell apart are one.
    rises = np.diff(values) > FAINT * max(float(np.ptp(means)), 1e-12)
    blocks = np.cumsum(np.append(0, rises))
    if blocks[-1] == 0:  # the signal says nothing about the oracle: keep its order, barely tilted
        tilt = 1e-3 * max(
            float(oracle.std()), 0.1 * abs(float(oracle.mean())), 1e-6
        )  # seen in FP32
        values = values + tilt * np.linspace(0, 1, len(values))
    else:
        knots, values, _ = _pooled(blocks, knots, values, counts)
    return ScoreMap(sign, tuple(knots.tolist()), tuple(values.tolist()))


def score_spread(scores: NDArray[np.floating[Any]], oracle: FloatVector) -> dict[str, float]:
    """How far n images lie apart by their score and by what it predicts, both in oracle units.

    The score has not learned them.

    Returns:
        `score` and `oracle`, the width of the middle 90 % of each, oracle units, and `tied`, the
        share of the images that have the most frequent score.
    """
    low, high = np.quantile(scores, [0.05, 0.95])
    least, most = np.quantile(oracle, [0.05, 0.95])
    counts = np.unique(scores, return_counts=True)[1]
    return {
        "score": float(high) - float(low),
        "oracle": float(most - least),
        "tied": float(counts.max() / len(scores)),
    }


def flat_score(spread: Mapping[str, float]) -> str:
    """A sentence where the score hardly tells images apart, by its `score_spread`; else empty."""
    start = "The score hardly tells images apart"
    if spread["tied"] > 0.5:
        return f"{start}: {spread['tied']:.0%} of the images share one value."
    if spread["score"] < FLAT * spread["oracle"]:
        return (
            f"{start}: the middle 90 % of the images span {spread['score']:.2g} of predicted "
            f"change, where full cost makes changes that span {spread['oracle']:.2g}."
        )
    return ""


def _pooled(
    blocks: NDArray[np.intp], knots: FloatVector, values: FloatVector, counts: FloatVector
) -> tuple[FloatVector, FloatVector, FloatVector]:
    """Mean knot, mean value and count of each block 0, 1, ..., weighted by the counts."""
    totals: FloatVector = np.bincount(blocks, counts).astype(np.float64)
    mean_knots = np.bincount(blocks, knots * counts) / totals
    return mean_knots, np.bincount(blocks, values * counts) / totals, totals


def threshold_for_rate(scores: NDArray[np.float32], rate: float) -> float:
    """The threshold above which the nearest whole number of images to `rate` escalates.

    It lies midway between two scores, so that the last bit of a score decides nothing. Tied
    scores can make the rate unreachable; fewer images escalate then.
    """
    ordered = np.sort(scores.astype(np.float64))[::-1]
    count = round(rate * len(ordered))
    gap = max(float(ordered[0] - ordered[-1]), 1e-6) / len(ordered)
    if count == 0:
        return float(ordered[0] + gap)
    if count == len(ordered):
        return float(ordered[-1] - gap)
    return float((ordered[count - 1] + ordered[count]) / 2)
