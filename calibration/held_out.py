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
from .fidelity import Fidelity
from .outputs import Outputs
from .splits import Rows

FloatVector = NDArray[np.float64]


class HeldOut:
    """The test split, and what can be measured on it.

    Args:
        outputs: what the rungs answer for all N images.
        rows: the images of the test split.
        independent: one of `rows` for each group.
        groups: the group of each of N images; resampling never divides one.
        scores: the score of each image, FP32 (N,), oracle units.
        threshold: above which an image escalates, oracle units; None: all escalate.
        loss: fidelity loss of the cheap answers, BOOL (N,).
        high_loss: fidelity loss of the full rung's answers; None: the full rung is the reference.
        seed: draws the resamples.
        fidelity: when an answer is a loss.
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
        high_loss: NDArray[np.bool_] | None,
        seed: int,
        fidelity: Fidelity,
    ) -> None:
        self._outputs, self._rows = outputs, rows
        self._independent = np.searchsorted(rows, independent)
        self._escalated = escalation_mask(scores[rows], threshold, Overrides())
        self._loss = loss[rows]
        self._high_loss = None if high_loss is None else high_loss[rows]
        self._bootstrap = metrics.Bootstrap(groups[rows], seed)
        self._groups = groups[rows]
        self._fidelity = fidelity

    def figures(self) -> dict[str, Any]:
        """Escalation, risk, agreement, and accuracy where labels are known."""
        lost = ~self._escalated & self._loss
        if self._high_loss is not None:
            lost |= self._escalated & self._high_loss
        columns = {"escalation_rate": self._escalated, "risk": lost}
        known = np.ones(len(self._rows), dtype=np.bool_)
        test = self._outputs.rows(self._rows)
        agrees = self._fidelity.agrees(test)
        if agrees is not None:
            columns["agreement_low"] = agrees[0]
            columns["agreement_with_high"] = np.where(self._escalated, agrees[1], agrees[0])
        low, high = test.low.logits, test.high.logits
        if test.task == "classes" and low is not None and high is not None:
            low, high = low.argmax(axis=1), high.argmax(axis=1)
            truth = test.labels
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
        of_high = 0.0 if self._high_loss is None else float(self._high_loss.mean())
        table: dict[str, Any] = {
            "random": {
                "auroc": 0.5,
                "auroc_interval": None,
                "spearman": 0.0,
                "spearman_interval": None,
                "needed_escalation": None
                if max_risk is None or (base > max_risk and of_high > max_risk)
                else max(0.0, (base - max_risk) / (base - of_high) if base > of_high else 0.0),
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
                else _finite(
                    metrics.needed_escalation(ranked, self._loss, max_risk, self._high_loss)
                ),
                "cv_escalation": None if max_risk is None else _finite(costs.get(name)),
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


def _finite(escalation: float | None) -> float | None:
    """None where no escalation is enough."""
    return None if escalation is None or not np.isfinite(escalation) else escalation
