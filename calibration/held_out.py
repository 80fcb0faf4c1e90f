"""What a calibration is worth on images that chose nothing, each figure with its interval."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest, mannwhitneyu

from routing import Overrides, escalation_mask

from . import metrics
from .outputs import Outputs
from .splits import Rows

FloatVector = NDArray[np.float64]


class HeldOut:
    """The test split, and what can be measured on it.

    Args:
        outputs: of all N images.
        rows: of the test split.
        independent: of `rows`, one of each group.
        groups: of all images; resampling never divides one.
        scores: FP32 (N,), oracle units.
        threshold: oracle units; None: all escalate.
        loss: fidelity loss, BOOL (N,).
        seed: of the resamples.
    """

    def __init__(
        self,
        outputs: Outputs,
        rows: Rows,
        independent: Rows,
        groups: NDArray[Any],
        scores: NDArray[np.float32],
        threshold: float | None,
        loss: NDArray[np.bool_],
        seed: int,
    ) -> None:
        self._outputs, self._rows = outputs, rows
        self._independent = np.searchsorted(rows, independent)
        self._escalated = escalation_mask(scores[rows], threshold, Overrides())
        self._loss = loss[rows]
        self._bootstrap = metrics.Bootstrap(groups[rows], seed)
        self._groups = groups[rows]

    def figures(self) -> dict[str, Any]:
        """Escalation, risk, agreement, and accuracy where labels are known."""
        kept = ~self._escalated
        columns = {"escalation_rate": self._escalated, "risk": kept & self._loss}
        known = np.ones(len(self._rows), dtype=np.bool_)
        low, high = self._classes()
        if low is not None and high is not None:
            columns["agreement_low"] = low == high
            columns["agreement_with_high"] = (low == high) | self._escalated
            truth = self._outputs.labels[self._rows]
            known = truth >= 0
            if known.any():
                columns["accuracy_low"] = low == truth
                columns["accuracy_high"] = high == truth
                columns["accuracy_adaptive"] = np.where(self._escalated, high, low) == truth
        figures: dict[str, Any] = {
            "images": len(self._rows),
            "groups": len(np.unique(self._groups)),
        }
        intervals = {}
        for name, column in columns.items():
            rows = known if name.startswith("accuracy") else np.ones_like(known)

            def figure(
                weights: NDArray[np.float64],
                column: NDArray[np.bool_] = column,
                rows: NDArray[np.bool_] = rows,
            ) -> FloatVector:
                return metrics.mean(weights[:, rows], column[rows])

            figures[name] = metrics.value(figure, len(self._rows))
            intervals[name] = self._bootstrap.interval(figure)
            if figures[name] in (0.0, 1.0):  # all images alike: resampling them shows no doubt
                groups = len(np.unique(self._groups[rows]))
                exact = binomtest(round(figures[name] * groups), groups).proportion_ci(0.95)
                intervals[name] = [float(exact.low), float(exact.high)]
        return {**figures, "intervals": intervals}

    def _classes(self) -> tuple[NDArray[np.intp] | None, NDArray[np.intp] | None]:
        low, high = self._outputs.low.logits, self._outputs.high.logits
        if low is None or high is None:
            return None, None
        return low[self._rows].argmax(axis=1), high[self._rows].argmax(axis=1)

    def signals(
        self,
        values: Mapping[str, FloatVector],
        oracle: FloatVector,
        chosen: str,
        max_risk: float | None,
        costs: Mapping[str, float],
    ) -> dict[str, Any]:
        """Every signal beside random and the oracle."""
        held_out = oracle[self._rows]
        base = float(self._loss.mean())
        table: dict[str, Any] = {
            "random": {
                "auroc": 0.5,
                "auroc_interval": None,
                "spearman": 0.0,
                "spearman_interval": None,
                "needed_escalation": None
                if max_risk is None
                else max(0.0, 1 - max_risk / base if base else 0.0),
                "cv_escalation": None,
            }
        }
        for name, column in {**values, "oracle": oracle}.items():
            ranked = column[self._rows]
            rank_loss = partial(metrics.auroc, values=ranked, loss=self._loss)
            rank_oracle = partial(metrics.spearman, first=ranked, second=held_out)
            table[name] = {
                "auroc": metrics.value(rank_loss, len(ranked)),
                "auroc_interval": self._bootstrap.interval(rank_loss),
                "spearman": metrics.value(rank_oracle, len(ranked)),
                "spearman_interval": self._bootstrap.interval(rank_oracle),
                "needed_escalation": None
                if max_risk is None
                else metrics.needed_escalation(ranked, self._loss, max_risk),
                "cv_escalation": None if max_risk is None else costs.get(name),
            }
        return {
            "needed_for": max_risk,
            "signals": table,
            "no_better_than_random": not self._beats_chance(values[chosen], table[chosen]),
        }

    def _beats_chance(self, values: FloatVector, figures: Mapping[str, Any]) -> bool:
        """Whether losses rank higher than chance would have it, at 2.5 % one-sided.

        The bootstrap alone is too ready to say so where there are few losses, so the rank test on
        independent images must agree (Mann and Whitney 1947).
        """
        interval = figures["auroc_interval"]
        ranked = values[self._rows][self._independent]
        lost = self._loss[self._independent]
        if interval is None or interval[0] <= 0.5 or lost.all() or not lost.any():
            return False
        return bool(
            mannwhitneyu(ranked[lost], ranked[~lost], alternative="greater").pvalue <= 0.025
        )
