"""Fit every signal, choose one and a threshold, and say what both are worth.

Disjoint splits by group. `fit` teaches: an alignment, the ranges of int8, the signals, their scores
and the choice among them; whatever it says of a cascade is said by cross-fitted answers and values,
each by a fit without its image. `certify` tests thresholds, and nothing else sees it. `test`, where
there is one, measures and decides nothing; else the cross-fitted `fit` images measure. The scores
of images that nothing was fitted on are kept as reference for drift.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bundle.graphs import GraphSet
from bundle.prints import among, encode, find_copies
from routing import SIGNALS, Calibration, answer_depends_on_batch
from routing.provenance import RELEASE

from . import certify, metrics
from .coefficients import FOLDS, FitSample, applicable, fit_coefficients, out_of_fold, signal_values
from .fidelity import Fidelity, oracle_l2
from .held_out import HeldOut
from .outputs import Made, Outputs
from .record import Fit, measured_split
from .scoring import fit_score_map, learn_sign, score_spread, threshold_for_rate
from .splits import GROUPINGS, Rows, group_keys, shares_of, split_by_group, with_groups

FloatVector = NDArray[np.float64]

MIN_IMAGES = 30  # fewer would leave ten to fit on
MAX_REFERENCE_SCORES = 2000
AUTO = "auto"
STEPS = FOLDS + 1  # the folds of cross-validation, then all of the fit split


class FitError(ValueError):
    """Nothing can be fitted from these outputs. One line."""


@dataclass(frozen=True)
class EscalationRate:
    """Choose the threshold so that this share of images escalates, 0..1; nothing is certified."""

    escalation_rate: float

    def __post_init__(self) -> None:
        if not 0 <= self.escalation_rate <= 1:
            raise FitError(f"--escalation-rate {self.escalation_rate} is not between 0 and 1")


@dataclass(frozen=True)
class Threshold:
    """Take this threshold, in oracle units; nothing is certified."""

    threshold: float

    def __post_init__(self) -> None:
        if not np.isfinite(self.threshold):
            raise FitError(f"--threshold {self.threshold} is not a finite number")


Target = certify.Goal | EscalationRate | Threshold


@dataclass(frozen=True)
class Options:
    """What `fit` may be told besides its target.

    Attributes:
        fidelity: when a cheap answer is not acceptable.
        signal: a key of `SIGNALS`, or `auto`.
        group_by: see `splits.group_keys`.
        seed: draws the splits, the folds and the resamples.
        test_share: of the images, to measure on and for nothing else; None: as `splits.shares_of`.
    """

    fidelity: Fidelity
    signal: str = AUTO
    group_by: str = "source"
    seed: int = 0
    test_share: float | None = None


def fit(
    outputs: Outputs,
    graph_set: GraphSet,
    target: Target,
    options: Options,
    progress: Callable[[], None] = lambda: None,
    splits: Mapping[str, Rows] | None = None,
) -> Fit:
    """Fit the signals, choose one, and choose or certify the threshold.

    Args:
        outputs: what `collect` found, after `usable`.
        graph_set: the graphs that made them.
        target: how to choose the threshold.
        options: everything else.
        progress: called after each of at most `STEPS` steps of about equal length.
        splits: rows of `fit`, `certify` and perhaps `test` that the caller has drawn by group; by
            default they are drawn here.

    Raises:
        FitError: outputs of other rungs, too few images, a signal that does not apply, or a
            certificate for a graph whose answers depend on the batch.
        SplitError: the images cannot be split.
        FidelityError: the fidelity loss does not apply.
    """
    _check(outputs, graph_set, options)
    reason = depends_on_batch(graph_set)
    if isinstance(target, certify.Goal) and reason is not None:
        raise FitError(f"{reason}; give --escalation-rate or --threshold to go without")
    groups = group_keys(outputs, options.group_by)
    if splits is None:
        certified = isinstance(target, certify.Goal)
        shares = shares_of(groups, certified, options.test_share)
        splits = split_by_group(groups, shares, options.seed, taught_groups(outputs, groups))
    oracle, loss = oracle_l2(outputs), options.fidelity.loss(outputs)
    high_loss = options.fidelity.high_loss(outputs)

    # Images of one group are not independent: where a test needs that, one of each group stands.
    independent = {
        split: certify.one_per_group(np.array(groups), index, options.seed)
        for split, index in splits.items()
    }
    rows = splits["fit"]
    sample = FitSample.of(outputs, options.fidelity, rows, np.array(groups))
    unseen = out_of_fold(sample, options.seed, progress)  # by coefficients that did not learn them
    signs = {key: learn_sign(raw, sample.oracle, sample.loss) for key, raw in unseen.items()}
    ranking = {key: signs[key] * raw for key, raw in unseen.items()}
    certify_rows = independent.get("certify", np.zeros(0, np.intp))
    sample_high_loss = None if high_loss is None else high_loss[rows]
    costs = cross_validated_costs(ranking, sample.loss, sample_high_loss, target, len(certify_rows))
    name = _choose(costs, options.signal)

    coefficients = fit_coefficients(sample, options.seed)
    progress()
    raw = {key: signal_values(key, outputs.low, coefficients[key]) for key in unseen}
    score_map = fit_score_map(unseen[name], sample.oracle, signs[name])
    scores = score_map(raw[name])
    values = {key: signs[key] * raw[key] for key in unseen}
    for key, ranked in ranking.items():
        values[key][rows] = ranked
    fit_scores, certificate, max_risk = score_map(unseen[name]), None, None
    outlook: dict[str, Any] = {}
    scores[rows] = fit_scores
    threshold: float | None
    if isinstance(target, certify.Goal):
        verdict = certify.certify(
            scores[certify_rows],
            loss[certify_rows],
            certify.candidate_thresholds(fit_scores),
            target,
            None if high_loss is None else high_loss[certify_rows],
        )
        threshold, max_risk = verdict.threshold, target.max_risk
        grouped = len(certify_rows) < len(splits["certify"])
        n = len(certify_rows)
        outlook = {
            "outlook": certify.outlook(ranking[name], sample.loss, sample_high_loss, target, n)
        }
        certificate = certify.certificate(
            verdict, target, options.fidelity, name, grouped, outputs.truth_words
        )
    elif isinstance(target, EscalationRate):
        threshold = threshold_for_rate(fit_scores, target.escalation_rate)
    else:
        threshold = target.threshold

    measured_on = measured_split(splits)
    held_out = splits[measured_on]
    test = HeldOut(
        outputs.rows(held_out),
        np.array(groups)[held_out],
        scores[held_out],
        threshold,
        options.fidelity,
        options.seed,
    )
    others = [rows for split, rows in independent.items() if split != "fit"]
    unfitted = np.concatenate(others) if others else np.zeros(0, np.intp)
    copies = find_copies(outputs.hashes, outputs.looks)
    calibration = Calibration(
        backbone=graph_set.backbone,
        rungs=graph_set.rungs,
        image_shape=graph_set.image_shape,
        preprocessing_sha256=graph_set.preprocessing_sha256(),
        imaging_sha256=outputs.made.imaging_sha256,
        embedding_dim=graph_set.embedding_dim,
        layer_dim=graph_set.layer_dim,
        layers=graph_set.low_layers,
        classes=graph_set.classes,
        signal=name,
        coefficients=coefficients[name],
        score_map=score_map,
        threshold=threshold,
        chosen_by={**options.fidelity.to_dict(), **asdict(target), "signal": options.signal},
        certificate=certificate,
        metrics={
            "split": measured_on,
            **test.figures(),
            **test.signals(
                {key: ranked[held_out] for key, ranked in values.items()},
                oracle[held_out],
                name,
                max_risk,
                costs,
                np.searchsorted(held_out, independent[measured_on]),
            ),
            "score_spread": score_spread(scores[held_out], oracle[held_out]),
            **outlook,
        },
        data={
            "source": outputs.title,
            "images": len(outputs),
            "fingerprint": outputs.fingerprint(),
            "seed": options.seed,
            "group_by": options.group_by,
            "splits": {split: len(index) for split, index in splits.items()},
            "runtime": dict(outputs.runtime),
            "release": RELEASE,
            "exported_by": graph_set.release,
            "same_pixels": copies.same_pixels,
            "look_alike": copies.look_alike,
            "image_prints": encode(outputs.hashes, outputs.looks),
        },
        # Where nothing is held out the cross-fitted ones stand for those of other images.
        reference_scores=_thinned(np.sort(scores[unfitted if others else independent["fit"]])),
        reference=graph_set.reference_record,
        task=graph_set.task,
    )
    return Fit(calibration, splits, values, scores, loss, high_loss, unfitted)


def _check(outputs: Outputs, graph_set: GraphSet, options: Options) -> None:
    difference = outputs.made.difference(Made.by(graph_set))
    if difference is not None:
        raise FitError(f"the outputs are not of these graphs: {difference}; collect again")
    learned = among(outputs.hashes, outputs.looks, graph_set.learned())
    if (learned if outputs.taught is None else learned & ~outputs.taught).any():
        raise FitError("some of the images were used to fit a graph; leave them out")
    if len(outputs) < MIN_IMAGES:
        raise FitError(f"{len(outputs)} images are too few to split; collect {MIN_IMAGES} or more")
    if options.signal == AUTO:
        return
    if options.signal not in SIGNALS:
        known = ", ".join((AUTO, *SIGNALS))
        raise FitError(f"--signal {options.signal!r} is unknown; known: {known}")
    if options.signal not in applicable(outputs.low, outputs.task):
        if outputs.task is None:
            raise FitError(
                f"--signal {options.signal} needs logits and {graph_set.backbone} has no head"
            )
        known = ", ".join((AUTO, *applicable(outputs.low, outputs.task)))
        raise FitError(
            f"--signal {options.signal} means nothing for a model that answers {outputs.task}; "
            f"use one of {known}"
        )


def taught_groups(outputs: Outputs, groups: Sequence[str]) -> set[str]:
    """The groups of images that a graph has learned from: all of them belong to the fit split."""
    taught = np.zeros(len(groups), np.bool_) if outputs.taught is None else outputs.taught
    return {groups[row] for row in np.flatnonzero(taught)}


def depends_on_batch(graph_set: GraphSet) -> str | None:
    """Why nothing can be certified with these graphs, and the way out; None where it can."""
    for name, graph in graph_set.playing().items():
        if (reason := answer_depends_on_batch(graph.record.recipe)) is not None:
            return (
                f"{name} is {graph.record.recipe}: {reason}, so nothing can be certified about it; "
                "export it with int8=static"
            )
    return None


def without_learned(outputs: Outputs, graph_set: GraphSet, group_by: str = GROUPINGS[0]) -> Outputs:
    """The outputs without those of images that something in a graph has learned from.

    `int8=static` learns ranges, `align` a map, and `--head linear` a head. On those images, in
    whatever form, and perhaps on others of their groups, a graph answers better than on any other,
    so no artifact is held against them.
    """
    learned = among(outputs.hashes, outputs.looks, graph_set.learned())
    return outputs.rows(np.flatnonzero(~with_groups(learned, outputs, group_by)))


def cross_validated_costs(
    ranking: Mapping[str, FloatVector],
    loss: NDArray[np.bool_],
    high_loss: NDArray[np.bool_] | None,
    target: Target,
    n_certify: int,
) -> dict[str, float]:
    """What each signal costs on images it has not learned; the smallest is best.

    For a certificate the escalation rate at which as few images are lost as the test will allow;
    for an escalation rate the risk at that rate; for a given threshold, which fixes neither, the
    chance that a lost image ranks below another.
    """
    if isinstance(target, certify.Goal):
        allowed = max(certify.allowed_errors(n_certify, target), 0) / max(n_certify, 1)
        return {
            k: metrics.needed_escalation(v, loss, allowed, high_loss) for k, v in ranking.items()
        }
    if isinstance(target, EscalationRate):
        risks = {}
        for name, values in ranking.items():
            rates, risk = metrics.risk_curve(values, loss, high_loss)
            risks[name] = float(risk[rates <= target.escalation_rate + 1e-12][-1])
        return risks
    n = len(loss)
    ranks = {
        k: metrics.value(partial(metrics.auroc, values=v, loss=loss), n) for k, v in ranking.items()
    }
    return {name: 0.0 if rank is None else 1 - rank for name, rank in ranks.items()}


def _choose(costs: Mapping[str, float], signal: str) -> str:
    if signal == AUTO:
        return min(costs, key=lambda name: costs[name])  # a tie goes to the simpler signal
    if signal not in costs:
        raise FitError(
            f"--signal {signal} learns from images with a loss and images without, and there are "
            "too few of either; use --signal auto"
        )
    return signal


def _thinned(ascending: NDArray[np.float32]) -> NDArray[np.float32]:
    if len(ascending) <= MAX_REFERENCE_SCORES:
        return ascending
    places = np.linspace(0, len(ascending) - 1, MAX_REFERENCE_SCORES).round().astype(np.intp)
    kept: NDArray[np.float32] = ascending[places]
    return kept
