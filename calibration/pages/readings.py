"""The sentence under each part of the report, computed from its numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from report.words import count_of, percent, setting
from routing import score_texts, threshold_text

from ..outputs import FULL_RUNG
from ..scoring import flat_score
from .decisions import Decisions, UnitBin
from .figures import MAX_POINTS, REFERENCES

METHODS = {
    "ltt": "fixed-sequence testing with the exact binomial tail",
    "crc": "conformal risk control",
}


def certificate(content: Mapping[str, Any] | None, threshold: float | None) -> str:
    """What the certificate rests on, and what it does not say."""
    if content is None:
        return (
            "Nothing was tested: the threshold was chosen without a certificate, so the risk "
            "below is a measurement on the test split, not a promise."
        )
    n, errors, allowed = content["n"], content["errors"], content["allowed"]
    images = f"{count_of(n, 'independent image')} of the certify split (one of each group)"
    got = _got(content.get("reference", FULL_RUNG) == FULL_RUNG)
    if allowed < 0:
        return (
            f"With {images}, no number of errors, not even none, could show a risk of at most "
            f"{setting(content['epsilon'])}: more images are needed."
        )
    if not content["certified"]:
        return (
            f"At the most careful threshold tried, {errors} of {images} {got}, more than the "
            f"{allowed} that would have been allowed."
        )
    mean = (
        "the statement holds on average over repeated calibrations"
        if content["confidence"] is None
        else "such a statement is wrong for at most "
        f"{setting(round(1 - content['confidence'], 12))} of calibrations"
    )
    return (
        f"At the threshold {threshold_text(threshold)}, {errors} of {images} {got}, and up to "
        f"{allowed} were allowed; {mean}, provided that images are drawn as these were."
    )


def _got(full_rung_is_reference: bool) -> str:
    return "were kept low with a loss" if full_rung_is_reference else "got an answer with a loss"


def risk(
    decisions: Decisions,
    interval: Sequence[float] | None,
    epsilon: float | None,
    grouped: bool = False,
) -> str:
    """How the risk measured on the test split stands to its limit.

    Args:
        decisions: about the test split.
        interval: of its risk.
        epsilon: the limit.
        grouped: whether groups hold several images.
    """
    images = count_of(len(decisions), "test image")
    if decisions.escalated.all() and decisions.high_loss is None:
        return f"All {images} escalate, so the risk is 0 by construction and proves nothing."
    lost = int(decisions.lost.sum())
    got = _got(decisions.high_loss is None)
    start = f"{lost} of {images} {got} ({percent(decisions.risk)})"
    if lost == 0:
        return f"{start}; the interval is the exact one of Clopper and Pearson."
    if epsilon is None:
        return f"{start}; no limit on the risk was asked for."
    if grouped or interval is None:
        return (
            f"{start}; the certificate is about one image of each group, which this share of all "
            "images is not."
        )
    limit = f"the limit ε = {setting(epsilon)}"
    if interval[1] <= epsilon:
        return f"{start}; the whole 95 % interval lies within {limit}."
    if decisions.risk <= epsilon:
        return (
            f"{start}, within {limit}; the 95 % interval reaches beyond it, so this split alone "
            "would not prove it."
        )
    if interval[0] <= epsilon:
        return (
            f"{start}, above {limit}; the 95 % interval reaches down to it, so this split does not "
            "contradict it."
        )
    return f"{start}; the whole 95 % interval lies ABOVE {limit}: these images contradict it."


def curve(decisions: Decisions) -> str:
    """What the chosen point gains over chance, and what is left to gain."""
    base, rate = decisions.base_risk, decisions.escalation
    if base == 0 and decisions.high_loss is None:
        return (
            "No test image has a loss: every curve lies at 0, and the figure cannot tell one "
            "signal from another."
        )
    if rate == 1:
        risk = "0" if decisions.high_loss is None else percent(decisions.risk)
        return (
            f"Every test image escalates, so the risk is {risk} whatever the signal; with none "
            f"escalated it would be {percent(base)}."
        )
    if rate == 0:
        return f"No test image escalates, so the risk is that of the low rung: {percent(base)}."
    oracle = decisions.risk_when_ranked_by(decisions.oracle)
    return (
        f"Escalating {percent(rate)} of the test images lowers the risk from {percent(base)} to "
        f"{percent(decisions.risk)}; as many drawn at random would leave "
        f"{percent(decisions.random_risk())}, as many of the largest oracle L2 {percent(oracle)}, "
        f"and perfect knowledge of the loss {percent(decisions.best_risk())}."
    )


def signals(metrics: Mapping[str, Any], chosen: str, asked: str | None) -> str:
    """How well the chosen signal ranks losses, and how it came to be chosen."""
    table = metrics["signals"]
    how = (
        "was named by the user"
        if asked == chosen
        else "was chosen by cross-validation on the fit split; the test split had no say"
    )
    value, interval = table[chosen]["auroc"], table[chosen]["auroc_interval"]
    if value is None:
        return (
            f"AUROC needs both images with a loss and images without, which the test split does "
            f"not have; {chosen} {how}."
        )
    between = "" if interval is None else f" (95 % interval {interval[0]:.2f} to {interval[1]:.2f})"
    aurocs = {name: row["auroc"] for name, row in table.items() if name not in REFERENCES}
    best = max(aurocs, key=lambda name: aurocs[name])
    rank = (
        "no signal does better here"
        if aurocs[best] == value
        else f"the best signal here, {best}, has {aurocs[best]:.2f}"
    )
    return (
        f"Ranked by {chosen}, a test image with a loss comes above one without with probability "
        f"{value:.2f}{between}; {rank}, random has 0.50 and the oracle L2 "
        f"{table['oracle']['auroc']:.2f}. {chosen} {how}."
    )


def warning(metrics: Mapping[str, Any], chosen: str) -> str:
    """The loud line when nothing shows the signal to be better than random; else empty."""
    if not metrics["no_better_than_random"]:
        return ""
    if metrics["signals"][chosen]["auroc"] is None:
        return (
            f"It is unknown whether {chosen} is better than random: the test split lacks images "
            "with a loss, or images without."
        )
    value = metrics["signals"][chosen]["auroc"]
    return (
        f"{chosen} is not shown to be better than random: an AUROC of {value:.2f} on so few images "
        "with a loss, or so near to 0.5, could be chance."
    )


def flat(metrics: Mapping[str, Any]) -> str:
    """The loud line where the score hardly tells images apart; else empty."""
    spread = metrics.get("score_spread")  # artifacts of earlier releases have none
    return flat_score(spread) if spread else ""


def scatter(decisions: Decisions, spearman: float | None) -> str:
    """How the score follows the change, and on which side of the threshold losses lie."""
    order = (
        "Scores or changes are constant here, so neither can follow the other"
        if spearman is None
        else f"Score and measured change have a rank correlation (Spearman) of {spearman:.2f}"
    )
    lost = int(decisions.loss.sum())
    caught = int((decisions.loss & decisions.escalated).sum())
    if decisions.threshold is None:
        side = "there is no threshold, every image escalates"
    elif lost == 0:
        side = "no test image has a loss"
    else:
        side = (
            f"{caught} of {count_of(lost, 'image')} with a loss lie above the threshold of "
            f"{threshold_text(decisions.threshold)}"
        )
    drawn = ""
    if len(decisions) > MAX_POINTS:
        drawn = f" Drawn are {MAX_POINTS:,} of {len(decisions):,} images, by chance (seed 0)."
    return f"{order}; {side}.{drawn}"


def units(bins: Sequence[UnitBin]) -> str:
    """How far predicted and measured change lie apart."""
    images = np.array([b.images for b in bins])
    gaps = np.array([b.score - b.oracle for b in bins])
    mean = float(np.average([b.oracle for b in bins], weights=images))
    gap = float(np.average(np.abs(gaps), weights=images))
    worst = bins[int(np.abs(gaps).argmax())]
    relative = f" ({percent(gap / mean)} of the mean change)" if mean > 0 else ""
    groups = "one bin" if len(bins) == 1 else f"{len(bins)} bins of equal count"
    predicted, measured = score_texts([worst.score, worst.oracle])
    return (
        f"In {groups}, predicted and measured change lie {gap:.3g} apart on average{relative}; "
        f"furthest where {predicted} was predicted and {measured} measured."
    )


def deltas(decisions: Decisions, auroc: float | None) -> str:
    """Whether a large change means a loss."""
    images, lost = len(decisions), int(decisions.loss.sum())
    middle = float(np.median(decisions.oracle))
    start = f"The full rung moves the embedding by {middle:.4g} in the median"
    if lost in (0, images) or auroc is None:
        return f"{start}; {'no' if lost == 0 else 'every'} test image has a loss."
    with_loss = float(np.median(decisions.oracle[decisions.loss]))
    without = float(np.median(decisions.oracle[~decisions.loss]))
    return (
        f"{start}: by {with_loss:.4g} where there is a loss, {without:.4g} where there is none; a "
        f"loss has the larger change with probability {auroc:.2f} (0.5: the size of the change "
        "tells nothing about the loss)."
    )


def cells(decisions: Decisions) -> str:
    """Which losses were caught, and which escalations were needed."""
    lost, escalated = int(decisions.loss.sum()), int(decisions.escalated.sum())
    both = int((decisions.loss & decisions.escalated).sum())
    caught = (
        f"{both} of {lost} images with a loss were escalated ({percent(both / lost)})"
        if lost
        else "No image has a loss"
    )
    needed = (
        f"{both} of {count_of(escalated, 'escalation')} needed it ({percent(both / escalated)})"
        if escalated
        else "no image escalates"
    )
    return f"{caught}; {needed}."
