"""Would it pay to decide inside the cheap rung, and skip the rest for images that escalate anyway?

BranchyNet (Teerapittayanon et al. 2016) leaves a network early with an answer; this leaves it early
without one, because the full rung will answer. The cheap rung would be two graphs, split after a
block, and the router would escalate from the CLS tokens of the first.

Nothing has to be built to find out: the prefix's CLS tokens are among the cheap rung's outputs.
Here its signals are fitted on the fit split, cross-validated, and so is the cost of the best rule
of two thresholds that reaches the same risk. Doubts go in the candidate's favour: blocks are taken
to cost the same (merged tokens make the first ones dearer), the additional call of a model is free,
and the best of several signals and many thresholds is taken on the very images that judge it. What
is still not worth a call is not worth building.

Only skipped blocks count as a gain. A rule of two thresholds can also rank better than the late
signal alone, or on so few images seem to, but the late signal has the prefix's tokens as well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from calibration.align import ALPHAS
from calibration.coefficients import FitSample, out_of_fold
from calibration.fidelity import Fidelity
from calibration.metrics import needed_escalation
from calibration.outputs import Outputs
from calibration.scoring import learn_sign
from calibration.splits import Rows
from routing import RungOutputs

from .select import cascade_ms

FloatVector = NDArray[np.float64]
BoolVector = NDArray[np.bool_]

BLS_HOP_MS = 0.7  # measured with tiny tensors; a split rung would hand over all of its tokens
_Rule = tuple[float, str | None, float, float]  # cost, signal, escalated early, escalated at all
_SHARES = np.linspace(0, 1, 201)  # of images that may escalate early


@dataclass(frozen=True)
class Split:
    """The best rule with the cheap rung split after a block.

    Attributes:
        after_block: blocks before the decision.
        blocks: of the cheap rung.
        signal: of the prefix, key of `routing.SIGNALS`; None: no early decision is best.
        escalated_early: share of images that skip the rest of the cheap rung, 0..1.
        escalation_rate: share of images that escalate, early or late, 0..1.
        ms_per_image: expected, without the router and without the additional call.
        gain: share of the cost without early decision that is saved.
        perfect_gain: the same if the prefix named exactly the images that escalate late.
    """

    after_block: int
    blocks: int
    signal: str | None
    escalated_early: float
    escalation_rate: float
    ms_per_image: float
    gain: float
    perfect_gain: float


@dataclass(frozen=True, eq=False)
class _Cascade:
    """A cascade that decides late, on n images it has not learned; `late` is its signal there."""

    late: FloatVector
    loss: BoolVector
    high_loss: BoolVector | None
    allowed_risk: float
    low_ms: float
    high_ms: float

    @property
    def without(self) -> float:
        """Expected cost of an image without early decision."""
        return self.ms(self.late_rate, 0, 0)

    @cached_property
    def late_rate(self) -> float:
        """Share of images that escalate without early decision."""
        return self._needed(self.late)

    def rate(self, early: BoolVector) -> float:
        """Share of images that escalate if these do early, and late as many as the risk asks."""
        needed = self._needed(np.where(early, np.inf, self.late))
        return max(needed, self.late_rate, float(early.mean()))

    def _needed(self, values: FloatVector) -> float:
        needed = needed_escalation(values, self.loss, self.allowed_risk, self.high_loss)
        return min(needed, 1.0)  # where no escalation is enough, all is nearest

    def ms(self, escalation: float, early: float, prefix: float) -> float:
        """Expected cost of an image if a share of them stops after a share of the cheap rung."""
        run = prefix + (1 - prefix) * (1 - early)
        return cascade_ms(self.low_ms * run, self.high_ms, escalation)


def early_decision(
    outputs: Outputs,
    rows: Rows,
    groups: NDArray[np.str_],
    fidelity: Fidelity,
    low_ms: float,
    high_ms: float,
    signal: str,
    allowed_risk: float,
    seed: int,
) -> dict[str, Any]:
    """What deciding inside the cheap rung could save at the same risk, on the fit split.

    Args:
        outputs: of the cascade's graphs, for N images.
        rows: of the fit split.
        groups: of the N images.
        fidelity: when an answer is a loss.
        low_ms: cost of an image in the cheap graph.
        high_ms: cost of an image in the full graph.
        signal: that decides late, key of `routing.SIGNALS`.
        allowed_risk: share of images that may be lost, 0..1.
        seed: of the folds.

    Returns:
        JSON types: `pays`, `verdict` (a sentence), `ms_per_image` and `escalation_rate` without
        early decision, `saved_ms` per image and `hop_ms` per call, `signal`, `allowed_risk`, and
        as in `Split`: each of `splits`, and the `best` of them (None: one block cannot be split).
    """
    assert outputs.low.cls_layers is not None
    blocks, high_loss = outputs.low.cls_layers.shape[1] - 1, fidelity.high_loss(outputs)
    sample = FitSample.of(outputs, fidelity, rows, groups)
    raw = out_of_fold(sample, seed)[signal]
    late = learn_sign(raw, sample.oracle, sample.loss) * raw
    lost = None if high_loss is None else high_loss[rows]
    cascade = _Cascade(late, sample.loss, lost, allowed_risk, low_ms, high_ms)
    splits = [_split(cascade, sample, place, blocks, seed) for place in _places(blocks)]
    best = min(splits, key=lambda split: split.ms_per_image, default=None)
    saved = 0.0 if best is None else cascade.without - best.ms_per_image
    return {
        "pays": saved > BLS_HOP_MS,
        "verdict": _verdict(best, cascade, saved),
        "signal": signal,
        "allowed_risk": allowed_risk,
        "escalation_rate": cascade.late_rate,
        "ms_per_image": cascade.without,
        "saved_ms": saved,
        "hop_ms": BLS_HOP_MS,
        "best": None if best is None else asdict(best),
        "splits": [asdict(split) for split in splits],
    }


def _places(blocks: int) -> list[int]:
    """Where to split: after about a third, a half and two thirds of the blocks."""
    places = {round(blocks / 3), round(blocks / 2), round(blocks * 2 / 3)}
    return sorted(place for place in places if 0 < place < blocks)


def _split(cascade: _Cascade, sample: FitSample, after_block: int, blocks: int, seed: int) -> Split:
    """The cheapest rule over the prefix's signals and the early threshold."""
    prefix = after_block / blocks
    without, late_rate = cascade.without, cascade.late_rate
    best: _Rule = (without, None, 0.0, late_rate)
    for name, values in _prefix_values(cascade, sample, after_block, seed).items():
        for early in _early(values):
            rate, share = cascade.rate(early), float(early.mean())
            found: _Rule = (cascade.ms(rate, share, prefix), name, share, rate)
            best = min(best, found, key=lambda rule: rule[0])
    cost, signal, share, rate = best
    perfect = cascade.ms(late_rate, late_rate, prefix)
    gain, bound = 1 - cost / without, 1 - perfect / without
    return Split(after_block, blocks, signal, share, rate, cost, gain, bound)


def _early(values: FloatVector) -> list[BoolVector]:
    """Which images each early threshold escalates: those above a quantile, or every one."""
    return [values > threshold for threshold in [*np.quantile(values, _SHARES), -np.inf]]


def _prefix_values(
    cascade: _Cascade, sample: FitSample, after_block: int, seed: int
) -> Mapping[str, FloatVector]:
    """What each signal says from the first blocks alone, on images it has not learned.

    It learns what it is for: which images escalate late, and how high the late signal is.
    """
    if cascade.late_rate == 0:
        return {}
    escalates = cascade.late >= np.quantile(cascade.late, 1 - cascade.late_rate)
    prefix = _prefix(sample, after_block, seed)
    target = replace(sample, low=prefix, oracle=cascade.late, loss=escalates)
    found = out_of_fold(target, seed)
    return {name: learn_sign(raw, cascade.late, escalates) * raw for name, raw in found.items()}


def _prefix(sample: FitSample, after_block: int, seed: int) -> RungOutputs:
    """The first blocks as a rung of their own: its logits by a ridge map, as `layer_lens` does.

    The map is cross-fitted: on images it has learned it is too sure of the classes.
    """
    assert sample.low.cls_layers is not None
    cls_layers, logits = sample.low.cls_layers[:, : after_block + 1], sample.low.logits
    token = cls_layers[:, -1]
    if logits is None:
        return RungOutputs(token, cls_layers, None)
    mapped = np.empty_like(logits)
    for train, held_out in sample.folds(seed):
        ridge = make_pipeline(StandardScaler(), RidgeCV(ALPHAS)).fit(token[train], logits[train])
        mapped[held_out] = ridge.predict(token[held_out]).reshape(len(held_out), -1)
    return RungOutputs(token, cls_layers, mapped)


def _verdict(best: Split | None, cascade: _Cascade, saved: float) -> str:
    if best is None:
        return "Not worth it: the cheap rung has one block, and nothing to split."
    if cascade.late_rate == 0:
        return "Not worth it: no image has to escalate, so no block is run in vain."
    bound = f"{best.perfect_gain:.1%} if it knew which images will escalate"
    if best.signal is None:
        return (
            "Not worth it: wherever the rung is split, its CLS tokens tell too little; deciding "
            f"after block {best.after_block} of {best.blocks} would save {bound}."
        )
    what = (
        f"deciding after block {best.after_block} of {best.blocks} saves {saved:.2g} of "
        f"{cascade.without:.3g} ms per image ({best.gain:.1%}; {bound}), and one more call of a "
        f"model costs {BLS_HOP_MS} ms"
    )
    if saved > BLS_HOP_MS:
        return f"Worth building: {what}."
    images = math.floor(BLS_HOP_MS / saved) + 1
    return f"Not worth it: {what}; {images} images would have to share it."
