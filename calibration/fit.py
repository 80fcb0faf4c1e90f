"""Fit the score and choose the threshold.

Two disjoint splits by group: the score map and the threshold are fitted on the first, and what
both are worth is measured on the second.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr
from sklearn.isotonic import IsotonicRegression
from sklearn.metrics import roc_auc_score

from routing import SIGNALS, Calibration, Overrides, RungSet, ScoreMap, escalation_mask

from .collect import Outputs

FloatVector = NDArray[np.float64]

SPLITS = {"fit": 0.7, "test": 0.3}
MIN_IMAGES = 30  # below this the held-out split has fewer than ten images
MAX_KNOTS = 32


class FitError(ValueError):
    """Nothing can be fitted from these outputs. One line."""


@dataclass(frozen=True)
class Target:
    """How the threshold is to be chosen: exactly one of the two.

    Attributes:
        escalation_rate: share of images that should escalate, 0..1.
        threshold: in oracle units.
    """

    escalation_rate: float | None = None
    threshold: float | None = None

    def __post_init__(self) -> None:
        """Refuse neither, both, or a rate outside 0..1."""
        if (self.escalation_rate is None) == (self.threshold is None):
            raise FitError("give one of --escalation-rate and --threshold")
        if self.escalation_rate is not None and not 0 <= self.escalation_rate <= 1:
            raise FitError(f"--escalation-rate {self.escalation_rate} is not between 0 and 1")
        if self.threshold is not None and not np.isfinite(self.threshold):
            raise FitError(f"--threshold {self.threshold} is not a finite number")


def oracle_l2(outputs: Outputs) -> FloatVector:
    """L2 distance between the two rungs' embeddings, FP64 (N,)."""
    difference = outputs.low.embedding.astype(np.float64) - outputs.high.embedding
    return np.asarray(np.linalg.norm(difference, axis=1))


def disagrees(outputs: Outputs) -> NDArray[np.bool_] | None:
    """Whether the rungs' top-1 classes differ, BOOL (N,); None without a head."""
    if outputs.low.logits is None or outputs.high.logits is None:
        return None
    return np.asarray(outputs.low.logits.argmax(axis=1) != outputs.high.logits.argmax(axis=1))


def split_by_group(groups: tuple[str, ...], seed: int) -> dict[str, NDArray[np.intp]]:
    """Disjoint row indices of each split; a group is never divided.

    Groups are shuffled, then dealt out until each split has its share of the images.
    """
    names, inverse = np.unique(np.array(groups), return_inverse=True)
    order = np.random.default_rng(seed).permutation(len(names))
    rank = np.empty(len(names), dtype=np.intp)
    rank[order] = np.arange(len(names))
    by_rank = np.argsort(rank[inverse], kind="stable")
    sizes = np.bincount(rank[inverse], minlength=len(names)).cumsum()
    splits, start = {}, 0
    share = 0.0
    for name, fraction in SPLITS.items():
        share += fraction
        stop = int(sizes[np.searchsorted(sizes, min(share, 1.0) * len(groups) - 0.5)])
        splits[name] = np.sort(by_rank[start:stop])
        start = stop
    return splits


def fit_score_map(
    raw: FloatVector, oracle: FloatVector, loss: NDArray[np.bool_] | None
) -> ScoreMap:
    """Learn the sign and the monotone map from a signal to the oracle.

    The sign makes larger scores mean more need to escalate: judged by the fidelity loss where
    there is one, because a small change that moves the answer matters more than a large one that
    does not; by the oracle itself otherwise. The map is isotonic regression (Barlow et al. 1972)
    over equal-count bins, drawn through the centres of its flat blocks: it predicts the same
    change on average, and it keeps the signal's order within a block.
    """
    if loss is not None and 0 < loss.sum() < len(loss):
        sign = 1 if roc_auc_score(loss, raw) >= 0.5 else -1
    else:
        sign = -1 if np.ptp(raw) > 0 and spearmanr(raw, oracle).statistic < 0 else 1
    x = sign * raw
    bins = np.array_split(np.argsort(x, kind="stable"), min(MAX_KNOTS, max(2, len(x) // 8)))
    knots = np.array([x[rows].mean() for rows in bins])
    means = np.array([oracle[rows].mean() for rows in bins])
    distinct = np.append(np.diff(knots) > 1e-12, True)  # a constant signal has one knot
    knots, means = knots[distinct], means[distinct]
    if len(knots) < 2:
        knots, means = np.array([knots[0] - 1, knots[0] + 1]), np.repeat(oracle.mean(), 2)
    values = IsotonicRegression().fit_transform(knots, means)
    blocks = np.unique(values, return_inverse=True)[1]
    if blocks[-1] == 0:  # the signal says nothing about the oracle: keep its order, barely tilted
        tilt = 1e-3 * max(float(oracle.std()), 1e-6)
        values = values + tilt * np.linspace(0, 1, len(values))
    else:
        knots = np.array([knots[blocks == block].mean() for block in range(blocks[-1] + 1)])
        values = np.unique(values)
    return ScoreMap(sign, tuple(knots.tolist()), tuple(values.tolist()))


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


def fit(
    outputs: Outputs, rung_set: RungSet, target: Target, signal: str | None = None, seed: int = 0
) -> Calibration:
    """Fit a signal's score map and choose the threshold.

    Args:
        outputs: from `collect`.
        rung_set: the rungs that made them.
        target: how to choose the threshold.
        signal: a key of `SIGNALS`; by default `margin` for a model with a head, else `cls_path`.
        seed: of the split.

    Raises:
        FitError: outputs of other rungs, too few images, or a signal that does not apply.
    """
    if outputs.rung_hashes != {name: rung.sha256 for name, rung in rung_set.rungs.items()}:
        raise FitError("the outputs were collected with other ONNX files; collect again")
    if len(outputs) < MIN_IMAGES:
        raise FitError(f"{len(outputs)} images are too few to split; collect {MIN_IMAGES} or more")
    name = signal or ("margin" if rung_set.classes is not None else "cls_path")
    if name not in SIGNALS:
        raise FitError(f"--signal {name!r} is unknown; known: {', '.join(SIGNALS)}")
    if SIGNALS[name].needs_logits and rung_set.classes is None:
        raise FitError(f"--signal {name} needs logits and {rung_set.backbone} has no head")

    splits = split_by_group(outputs.groups, seed)
    if not all(len(index) for index in splits.values()):
        raise FitError("too few groups to make two splits; collect images from more sources")
    raw = SIGNALS[name].compute(outputs.low, {})
    oracle, loss = oracle_l2(outputs), disagrees(outputs)
    rows = splits["fit"]
    score_map = fit_score_map(raw[rows], oracle[rows], None if loss is None else loss[rows])
    scores = score_map(raw)
    if target.threshold is None:
        assert target.escalation_rate is not None  # Target holds exactly one
        threshold = threshold_for_rate(scores[rows], target.escalation_rate)
        chosen_by = {"escalation_rate": target.escalation_rate}
    else:
        threshold = target.threshold
        chosen_by = {"threshold": target.threshold}
    return Calibration(
        backbone=rung_set.backbone,
        rungs=rung_set.rungs,
        image_shape=rung_set.image_shape,
        embedding_dim=rung_set.embedding_dim,
        layers=rung_set.layers,
        classes=rung_set.classes,
        signal=name,
        score_map=score_map,
        threshold=threshold,
        chosen_by=chosen_by,
        metrics=held_out_metrics(outputs, scores, threshold, splits["test"]),
        data={
            "source": outputs.source,
            "images": len(outputs),
            "fingerprint": outputs.fingerprint(),
            "seed": seed,
            "splits": {split: len(index) for split, index in splits.items()},
        },
    )


def held_out_metrics(
    outputs: Outputs, scores: NDArray[np.float32], threshold: float, rows: NDArray[np.intp]
) -> Mapping[str, float | int]:
    """What the threshold does on images that chose nothing.

    Returns:
        `images` and `escalation_rate`; with a head also `agreement_with_high` and
        `agreement_low`; with labels `accuracy_low`, `accuracy_high`, `accuracy_adaptive`.
    """
    escalated = escalation_mask(scores[rows], threshold, Overrides())
    metrics: dict[str, float | int] = {
        "images": len(rows),
        "escalation_rate": float(escalated.mean()),
    }
    loss = disagrees(outputs)
    if loss is None or outputs.low.logits is None or outputs.high.logits is None:
        return metrics
    metrics["agreement_low"] = float(1 - loss[rows].mean())
    metrics["agreement_with_high"] = float(1 - (loss[rows] & ~escalated).mean())
    known = outputs.labels[rows] >= 0
    if known.any():
        truth = outputs.labels[rows][known]
        low = outputs.low.logits[rows][known].argmax(axis=1)
        high = outputs.high.logits[rows][known].argmax(axis=1)
        adaptive = np.where(escalated[known], high, low)
        for rung, answer in (("low", low), ("high", high), ("adaptive", adaptive)):
            metrics[f"accuracy_{rung}"] = float((answer == truth).mean())
    return metrics
