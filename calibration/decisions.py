"""What an artifact decides about some images, and what the report's page says of that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from routing import Overrides, escalation_mask

from . import metrics
from .fidelity import oracle_l2
from .outputs import Outputs
from .record import Fit
from .splits import Rows

FloatVector = NDArray[np.float64]
BoolVector = NDArray[np.bool_]


@dataclass(frozen=True)
class Decisions:
    """n images and what the artifact decides about them.

    Attributes:
        threshold: in oracle units; None: all escalate.
        scores: of the chosen signal, in oracle units, (n,).
        oracle: L2 distance between the rungs' embeddings, (n,).
        loss: fidelity loss of the cheap answers, BOOL (n,).
        high_loss: of the full rung's answers; None: the full rung is the reference.
        escalated: BOOL (n,).
        values: every signal's values, larger meaning more need to escalate, (n,) each. Those of
            the chosen signal are its scores, whose FP32 decides.
    """

    signal: str
    threshold: float | None
    scores: FloatVector
    oracle: FloatVector
    loss: BoolVector
    escalated: BoolVector
    values: Mapping[str, FloatVector]
    high_loss: BoolVector | None = None

    @classmethod
    def of(cls, fitted: Fit, outputs: Outputs, rows: Rows) -> Decisions:
        """What a fit decides about the images in `rows` of its outputs."""
        calibration, scores = fitted.calibration, fitted.scores[rows]
        values = {name: values[rows] for name, values in fitted.values.items()}
        return cls(
            signal=calibration.signal,
            threshold=calibration.threshold,
            scores=scores.astype(np.float64),
            oracle=oracle_l2(outputs)[rows],
            loss=fitted.loss[rows],
            escalated=escalation_mask(scores, calibration.threshold, Overrides()),
            values={**values, calibration.signal: scores.astype(np.float64)},
            high_loss=None if fitted.high_loss is None else fitted.high_loss[rows],
        )

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def base_risk(self) -> float:
        """The risk with nothing escalated: the share of losses."""
        return float(self.loss.mean())

    @property
    def escalation(self) -> float:
        """The share of images that escalate."""
        return float(self.escalated.mean())

    @property
    def risk(self) -> float:
        """The share of all images whose answer is a loss."""
        return float(self.lost.mean())

    @property
    def lost(self) -> BoolVector:
        """Which images' answers are losses: kept low, or escalated to a rung that loses them."""
        kept = self.loss & ~self.escalated
        return kept if self.high_loss is None else kept | (self.high_loss & self.escalated)

    def risk_when_ranked_by(self, values: FloatVector) -> float:
        """The risk if as many images escalated, those of largest `values`.

        Where that many would divide images of equal value, chance chooses among them and the risk
        is the expected one.
        """
        rates, risks = metrics.risk_curve(values, self.loss, self.high_loss)
        return float(np.interp(self.escalation, rates, risks))

    def random_risk(self) -> float:
        """The expected risk if as many images escalated, drawn at random."""
        of_high = 0.0 if self.high_loss is None else float(self.high_loss.mean())
        return self.base_risk * (1 - self.escalation) + of_high * self.escalation

    def best_risk(self) -> float:
        """The risk if as many images escalated, those that gain by it first."""
        of_high = np.zeros(len(self)) if self.high_loss is None else self.high_loss
        return self.risk_when_ranked_by(self.loss.astype(np.float64) - of_high)

    def cells(self) -> dict[str, NDArray[np.intp]]:
        """Positions of the images in each cell of decision against loss."""
        kept = ~self.escalated
        return {
            "kept_right": np.flatnonzero(kept & ~self.loss),
            "kept_wrong": np.flatnonzero(kept & self.loss),
            "escalated_needed": np.flatnonzero(self.escalated & self.loss),
            "escalated_in_vain": np.flatnonzero(self.escalated & ~self.loss),
        }


def risk_case(
    decisions: Decisions, interval: Sequence[float] | None, epsilon: float | None, grouped: bool
) -> str:
    """How the risk measured on the test split stands to its limit `epsilon`.

    `interval` is the 95 % interval of that risk; `grouped` says whether some group holds several
    images.

    Returns:
        `by_construction` where every image escalates and the full rung is the reference;
        `none_lost`; `no_limit`; `grouped` where the limit is about another share; else where the
        limit lies: `within` has the whole interval below it, `reaches_beyond` and `reaches_down`
        have it inside the interval, above or below the measured risk, `contradicts` below all.
    """
    if decisions.escalated.all() and decisions.high_loss is None:
        return "by_construction"
    if not decisions.lost.any():
        return "none_lost"
    if epsilon is None:
        return "no_limit"
    if grouped or interval is None:
        return "grouped"
    if interval[1] <= epsilon:
        return "within"
    if decisions.risk <= epsilon:
        return "reaches_beyond"
    return "reaches_down" if interval[0] <= epsilon else "contradicts"


def curve_case(decisions: Decisions) -> str:
    """What the curve of risk against escalation can show.

    Returns:
        `no_loss` where no image can lose, `all` or `none` where that many escalate, else `some`.
    """
    if decisions.base_risk == 0 and decisions.high_loss is None:
        return "no_loss"
    return {1.0: "all", 0.0: "none"}.get(decisions.escalation, "some")
