"""What is said of a live certificate: the artifact that serves a threshold, and the page's data."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bundle.fidelity import FidelityLoss
from bundle.prints import find_copies
from routing import Calibration
from routing.calibration import FULL_RUNG, LIVE
from routing.manifest import sha256_file

from .anytime import images_needed, log_wealth
from .certify import one_per_group
from .fidelity import Fidelity, oracle_l2
from .held_out import HeldOut
from .live_state import STRETCH, State
from .outputs import Outputs
from .record import Fit
from .scoring import score_spread
from .splits import group_keys


def artifact_of(
    state: State, artifact: Calibration, threshold: float | None, audit_share: float
) -> Calibration:
    """The artifact that serves a threshold.

    Args:
        state: what is known.
        artifact: that answers now, or another with the score to serve.
        threshold: certified, in the score's units; None: every image escalates.
        audit_share: of the images that both rungs are to answer, 0..1.
    """
    test = state.test()
    kept, lost = (0, 0) if test is None else test.counts(threshold)
    ordinal = state.served.ordinal + (threshold != state.served.threshold)
    loss, certified = FidelityLoss.of(artifact), threshold is not None
    images = max(state.images, 1)
    figures = {
        "split": LIVE,
        "images": state.images,
        "escalation_rate": 1 - kept / images,
        "risk": lost / images,
    }
    return replace(
        artifact,
        threshold=threshold,
        chosen_by={**artifact.chosen_by, "audit_share": audit_share},
        certificate={
            "certified": certified,
            "method": LIVE,
            "epsilon": state.epsilon,
            "confidence": state.confidence,
            **loss.to_dict(),
            "signal": artifact.signal,
            "n": state.images,
            "errors": lost,
            "reference": FULL_RUNG,
            "test": state.number,
            "share_of_delta": state.delta / (1 - state.confidence),
            "alarm": replace(state.served, ordinal=ordinal).alarm,
            "window": [_day(at) for at in state.window],
            "statement": _statement(state, loss, lost) if certified else missing(state),
        },
        metrics=figures if certified else {},
        data={**artifact.data, "images": state.images, "audited": state.audited},
        reference_scores=np.sort(np.array(state.scores if certified else [], np.float32)),
    )


def _statement(state: State, loss: FidelityLoss, lost: int) -> str:
    first, last = (_day(at) for at in state.window)
    return (
        f"With confidence {100 * state.confidence:g} %, at whatever moment one looks, at most "
        f"{100 * state.epsilon:g} % of images like those audited, requested without parameters "
        f"and not marked degraded, get an answer that {loss.words(FULL_RUNG)}. Of "
        f"{state.images:,} images of live traffic that both rungs answered between {first} and "
        f"{last}, {lost} would."
    )


def missing(state: State) -> str:
    """Why nothing is certified yet, and how many audited images that takes at least."""
    test, least = state.test(), images_needed(state.epsilon, state.delta)
    if test is None:
        left = STRETCH - len(state.stretch)
        return (
            f"every image escalates; {left} more are to teach the score's range, then at least "
            f"{least} to certify"
        )
    left = max(least - test.images, 0)
    more = f"at least {left} more are needed" if left else "too many are lost so far"
    return f"every image escalates; nothing is certified in this test, {more}"


def page_data(state: State, version: int, artifact: Calibration) -> dict[str, Any]:
    """What the page shows of a state and the version that answers, as `report.live_page` has it."""
    test, certificate = state.test(), artifact.certificate or {}
    evidence = []
    if test is not None and test.images:
        wealth = log_wealth(test.images, test.lost, test.epsilon) / np.log(10)
        rows = zip(test.thresholds, test.escalation(), test.lost, wealth, strict=True)
        evidence = [
            {
                "threshold": float(threshold),
                "escalation": float(escalation),
                "lost": int(lost),
                "n": test.images,
                "log10_wealth": float(log10_wealth),
                "certified": row < test.certified,
            }
            for row, (threshold, escalation, lost, log10_wealth) in enumerate(rows)
        ]
    certified = artifact.threshold is not None
    return {
        "backbone": artifact.backbone,
        "certified": certified,
        "statement": certificate["statement"] if certified else missing(state),
        "goal": {
            "epsilon": state.epsilon,
            "confidence": state.confidence,
            "answer": f"an answer that {FidelityLoss.of(artifact).words(FULL_RUNG)}",
        },
        "served": {
            "version": version,
            "threshold": artifact.threshold,
            "audit_share": state.served.audit_share,
        },
        "now": {"audited": state.audited, **state.figures()},
        "points": state.points,
        "evidence": evidence,
        "needed": float(-np.log10(state.delta)),
        "tests": {"number": state.number, "share": state.delta / (1 - state.confidence)},
        "events": state.events,
        "ignored": {"other": state.other, "damaged": state.damaged},
        "served_figures": None,
    }


def measured(file: Path, outputs: Outputs) -> Fit:
    """What a live artifact decides about collected images, none of which it has learned from.

    Args:
        file: the artifact.
        outputs: of its graphs.

    Returns:
        All of the images as a test split, so that the calibration's page can show them.
    """
    calibration = Calibration.load(file)
    fidelity, groups = Fidelity.of(calibration), np.array(group_keys(outputs, "source"))
    scores, oracle = calibration.score(outputs.low), oracle_l2(outputs)
    values = {calibration.signal: scores.astype(np.float64)}
    held_out = HeldOut(outputs, groups, scores, calibration.threshold, fidelity, 0)
    rows, copies = np.arange(len(outputs)), find_copies(outputs.hashes, outputs.looks)
    metrics = {
        "split": "test",
        **held_out.figures(),
        **held_out.signals(
            values,
            oracle,
            calibration.signal,
            calibration.chosen_by["max_risk"],
            {},
            one_per_group(groups, rows, 0),
        ),
        "score_spread": score_spread(scores, oracle),
    }
    data = {
        **calibration.data,
        "source": f"live traffic; shown: {outputs.title}",
        "splits": {"test": len(outputs)},
        "fingerprint": outputs.fingerprint(),
        "runtime": dict(outputs.runtime),
        "same_pixels": copies.same_pixels,
        "look_alike": copies.look_alike,
    }
    shown = replace(calibration, metrics=metrics, data=data)
    loss = fidelity.loss(outputs)
    return Fit(shown, {"test": rows}, values, scores, loss, artifact_sha256=sha256_file(file))


def _day(at: float) -> str:
    """A time for people, in UTC."""
    try:
        return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(at))
    except (ValueError, OverflowError, OSError):  # a clock that jumped far
        return "an unknown time"
