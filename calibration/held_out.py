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
    """n images that chose nothing, and what can be measured on them.

    Args:
        outputs: what the rungs answer for them.
        groups: the group of each image, (n,); resampling never divides one.
        scores: FP32 (n,), oracle units.
        threshold: above which an image escalates, oracle units; None: all escalate.
        fidelity: when an answer is a loss.
        seed: draws the resamples.

    Attributes:
        escalated: BOOL (n,).
        lost: which images get an answer that is a loss, BOOL (n,): kept low, or escalated to a full
            rung that is not the reference.
    """

    def __init__(
        self,
        outputs: Outputs,
        groups: NDArray[Any],
        scores: NDArray[np.float32],
        threshold: float | None,
        fidelity: Fidelity,
        seed: int,
    ) -> None:
        self._outputs, self._groups, self._fidelity = outputs, groups, fidelity
        self._loss, self._high_loss = fidelity.loss(outputs), fidelity.high_loss(outputs)
        self._bootstrap = metrics.Bootstrap(groups, seed)
        self.escalated = escalation_mask(scores, threshold, Overrides())
        self.lost = ~self.escalated & self._loss
        if self._high_loss is not None:
            self.lost |= self.escalated & self._high_loss

    def figures(self) -> dict[str, Any]:
        """Escalation, risk, agreement, and accuracy where labels are known."""
        columns = {"escalation_rate": self.escalated, "risk": self.lost}
        test, known = self._outputs, np.ones(len(self._outputs), np.bool_)
        agrees = self._fidelity.agrees(test)
        if agrees is not None:
            columns["agreement_low"] = agrees[0]
            columns["agreement_with_high"] = np.where(self.escalated, agrees[1], agrees[0])
        low, high = test.low.logits, test.high.logits
        if test.task == "classes" and low is not None and high is not None:
            low, high = low.argmax(axis=1), high.argmax(axis=1)
            truth = test.labels
            known = truth >= 0
            if known.any():
                columns["accuracy_low"] = low == truth
                columns["accuracy_high"] = high == truth
                columns["accuracy_adaptive"] = np.where(self.escalated, high, low) == truth
        figures: dict[str, Any] = {"images": len(test), "groups": len(np.unique(self._groups))}
        intervals = {}
        for name, column in columns.items():
            rows = known if name.startswith("accuracy") else np.ones_like(known)

            def figure(
                weights: NDArray[np.float64],
                column: NDArray[np.bool_] = column,
                rows: NDArray[np.bool_] = rows,
            ) -> FloatVector:
                return metrics.mean(weights[:, rows], column[rows])

            figures[name] = metrics.value(figure, len(test))
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
        independent: Rows,
    ) -> dict[str, Any]:
        """Every signal beside random and the oracle; `independent` has one row of each group."""
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
        for name, ranked in {**values, "oracle": oracle}.items():
            rank_loss = partial(metrics.auroc, values=ranked, loss=self._loss)
            rank_oracle = partial(metrics.spearman, first=ranked, second=oracle)
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
        # The bootstrap alone is too ready to say that losses rank higher than chance would have it
        # where there are few of them, so the rank test on independent images must agree, at 2.5 %
        # one-sided (Mann and Whitney 1947).
        interval = table[chosen]["auroc_interval"]
        ranked, lost = values[chosen][independent], self._loss[independent]
        beats_chance = interval is not None and interval[0] > 0.5 and 0 < lost.sum() < len(lost)
        if beats_chance:
            test = mannwhitneyu(ranked[lost], ranked[~lost], alternative="greater")
            beats_chance = bool(test.pvalue <= 0.025)
        return {
            "needed_for": max_risk,
            "signals": table,
            "no_better_than_random": not beats_chance,
        }


def _finite(escalation: float | None) -> float | None:
    """None where no escalation is enough."""
    return None if escalation is None or not np.isfinite(escalation) else escalation
