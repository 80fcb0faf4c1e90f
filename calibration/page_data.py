"""What the calibration's page shows, as plain data: `report.calibration_page` writes it down."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from report.page import GALLERY
from report.words import score_texts, setting
from routing import SIGNALS, Calibration, threshold_text
from routing.provenance import runtime_words
from routing.reference import reference_words

from . import metrics
from .analyse import analyse
from .cards import Cards
from .decisions import Decisions, curve_case, risk_case
from .fidelity import Fidelity, oracle_cosine, oracle_l2
from .images import ImageSource
from .outputs import Outputs
from .record import Fit, measured_split
from .scoring import flat_score
from .splits import Rows

MIN_ROWS = 100  # below, some cell of the galleries is nearly always empty
REFERENCES = {  # what signals are held against
    "random": "chance",
    "oracle": "the measured change, known once both rungs have run",
}
_HASH_DIGITS = 12
_AGREES = {  # by what the model answers
    "classes": "names the {}'s class",
    "labels": "gives the {}'s set of labels",
    "value": "gives the {}'s value within the tolerance",
    None: "",
}


def fit_data(
    fitted: Fit,
    outputs: Outputs,
    source: ImageSource | None,
    class_names: tuple[str, ...] | None = None,
) -> dict[str, Any]:
    """What the page says of a fit: its certificate, what was measured, and its galleries.

    The outputs are those that it was fitted on; `source` and `class_names` are as `Cards` has them.
    """
    calibration, found = fitted.calibration, fitted.calibration.metrics
    fidelity, reference = Fidelity.of(calibration), outputs.truth_words
    split = measured_split(fitted.splits)
    test = Decisions.of(fitted, outputs, fitted.splits[split])
    threshold = calibration.threshold
    return {
        "backbone": calibration.backbone,
        "source": calibration.data["source"],
        "reference": reference,
        "kept_low": fitted.high_loss is None,
        "certificate": calibration.certificate,
        "chosen_by": _chosen_by(calibration),
        "threshold": None if threshold is None else threshold_text(threshold),
        "signal": calibration.signal,
        "asked": calibration.chosen_by.get("signal"),
        "loss": fidelity.words(reference),
        "agrees": _AGREES[calibration.task].format(reference),
        "metrics": found,
        "split": split,
        "signals": _signals(found["signals"]),
        "warnings": _warnings(found, calibration.signal, split),
        "measured": _measured(test, found),
        "curves": _curves(test),
        "scatter": {"score": test.scores, "oracle": test.oracle, "loss": test.loss},
        "threshold_at": threshold,
        "cells": _cells(
            fitted,
            outputs,
            Cards(outputs, source, class_names, fidelity.label_threshold),
        ),
        "provenance": _provenance(fitted, fidelity.words(reference)),
    }


def analysis_data(
    outputs: Outputs,
    fidelity: Fidelity,
    source: ImageSource | None,
    class_names: tuple[str, ...] | None = None,
) -> dict[str, Any]:
    """What the page says of the change between the rungs: `analyse`, and what it is drawn from.

    `source` and `class_names` are as `Cards` has them.

    Raises:
        FidelityError: the fidelity loss does not apply.
    """
    analysis = analyse(outputs, fidelity)
    cards = Cards(outputs, source, class_names, fidelity.label_threshold)
    oracle, cosine, loss = oracle_l2(outputs), oracle_cosine(outputs), fidelity.loss(outputs)
    ends = {
        name: {
            "cards": [cards(row) for row in analysis[name]],
            "least": float(oracle[analysis[name]].min()),
            "largest": float(oracle[analysis[name]].max()),
            "losses": int(loss[analysis[name]].sum()),
        }
        for name in ("most", "least")
    }
    return {
        "found": analysis,
        "values": {"l2": oracle, "cosine": cosine, "loss": loss},
        "below": int((cosine < 1 - analysis["tolerance"]).sum()),
        "ends": ends,
        "fingerprint": outputs.fingerprint(),
        "rungs": dict(outputs.made.graphs),
    }


def _chosen_by(calibration: Calibration) -> str:
    """How the threshold was chosen, to be read after "chosen by"."""
    goal = calibration.chosen_by
    if "escalation_rate" in goal:
        return f"an escalation rate of {setting(goal['escalation_rate'])}"
    if "threshold" in goal:
        return f"hand ({threshold_text(goal['threshold'])})"
    sure = "" if goal["method"] == "crc" else f" with confidence {setting(goal['confidence'])}"
    return f"a risk of at most {setting(goal['max_risk'])}{sure} ({goal['method']})"


def _signals(table: Mapping[str, Any]) -> dict[str, str]:
    """What each signal is, the best first, then what signals are held against."""

    def auroc(name: str) -> float:
        value = table[name]["auroc"]
        value = table[name]["spearman"] if value is None else value
        return -2.0 if value is None else float(value)

    ours = sorted((name for name in table if name not in REFERENCES), key=auroc, reverse=True)
    return {name: SIGNALS[name].summary.replace("->", "→") for name in ours} | REFERENCES


def _warnings(found: Mapping[str, Any], chosen: str, split: str) -> list[str]:
    """The loud lines: a signal that may be random, a score that hardly tells images apart."""
    warnings = []
    auroc = found["signals"][chosen]["auroc"]
    if found["no_better_than_random"] and auroc is None:
        warnings.append(
            f"It is unknown whether {chosen} is better than random: the {split} split lacks images "
            "with a loss, or images without."
        )
    elif found["no_better_than_random"]:
        warnings.append(
            f"{chosen} is not shown to be better than random: an AUROC of {auroc:.2f} on so few "
            "images with a loss, or so near to 0.5, could be chance."
        )
    spread = found.get("score_spread")  # artifacts of earlier releases have none
    flat = flat_score(spread) if spread else ""
    return [*warnings, flat] if flat else warnings


def _measured(test: Decisions, found: Mapping[str, Any]) -> dict[str, Any]:
    """What was decided about the images that measure, and which case each caption is."""

    def median(rows: NDArray[np.bool_]) -> float | None:
        return float(np.median(test.oracle[rows])) if rows.any() else None

    interval, grouped = found["intervals"]["risk"], found["groups"] < found["images"]
    return {
        "images": len(test),
        "losses": int(test.loss.sum()),
        "lost": int(test.lost.sum()),
        "escalated": int(test.escalated.sum()),
        "both": int((test.loss & test.escalated).sum()),
        "base_risk": test.base_risk,
        "risk": test.risk,
        "escalation_rate": test.escalation,
        "random_risk": test.random_risk(),
        "oracle_risk": test.risk_when_ranked_by(test.oracle),
        "perfect_risk": test.best_risk(),
        "median_with_loss": median(test.loss),
        "median_without": median(~test.loss),
        "risk_case": risk_case(test, interval, found["needed_for"], grouped),
        "curve_case": curve_case(test),
    }


def _curves(test: Decisions) -> list[dict[str, Any]]:
    """Risk against escalation: of every signal, the chosen one last, then of the references."""
    ordered = [*sorted(set(test.values) - {test.signal}), test.signal]
    ranked = [(name, "signal", test.values[name]) for name in ordered]
    ranked[-1] = (f"{test.signal} (chosen)", "chosen", test.values[test.signal])
    ranked += [
        ("random", "random", np.zeros(len(test))),
        ("oracle L2", "oracle", test.oracle),
        ("perfect knowledge of the loss", "perfect", test.loss.astype(np.float64)),
    ]
    curves = []
    for name, kind, values in ranked:
        rates, risks = metrics.risk_curve(values, test.loss, test.high_loss)
        curves.append({"name": name, "kind": kind, "rates": rates, "risks": risks})
    return curves


def _cells(fitted: Fit, outputs: Outputs, cards: Cards) -> dict[str, Any]:
    """The galleries: images by what was decided about them, and whether that was right."""
    measured = measured_split(fitted.splits)
    splits = [measured]
    if len(fitted.splits[measured]) < MIN_ROWS and "certify" in fitted.splits:
        splits = ["certify", measured]
    rows: Rows = np.sort(np.concatenate([fitted.splits[name] for name in splits]))
    shown = Decisions.of(fitted, outputs, rows)
    cells = {}
    for name, members in shown.cells().items():
        drawn = members
        if len(members) > GALLERY:  # by chance rather than the nicest
            drawn = np.random.default_rng(0).choice(members, GALLERY, replace=False)
        drawn = drawn[np.argsort(shown.scores[drawn], kind="stable")]
        scores = score_texts(shown.scores[drawn].tolist(), shown.threshold)
        cells[name] = {
            "count": len(members),
            "cards": [
                cards(int(rows[i]), f"score {score}")
                for i, score in zip(drawn, scores, strict=True)
            ],
        }
    few = len(fitted.splits[measured])
    return {"splits": splits, "images": len(shown), "measured": few, "cells": cells}


def _provenance(fitted: Fit, loss: str) -> list[tuple[str, str]]:
    calibration = fitted.calibration
    data = calibration.data
    splits = ", ".join(f"{name} {size:,}" for name, size in data["splits"].items())
    rungs = [
        (
            f"{name}: resolution, recipe, SHA-256",
            f"{rung.px} px, {rung.recipe}, {rung.sha256[:_HASH_DIGITS]}…",
        )
        for name, rung in calibration.rungs.items()
    ]
    asked = calibration.chosen_by.get("signal", calibration.signal)
    return [
        ("images", f"{data['source']}: {data['images']:,}"),
        ("splits", f"{splits}; seed {data['seed']}, never dividing a group"),
        ("grouped by", data["group_by"]),
        (
            "copies: of equal pixels; re-encoded, resized or mirrored",
            f"{data['same_pixels']:,}; {data['look_alike']:,}; each picture counts once",
        ),
        ("images' fingerprint", f"{data['fingerprint'][:_HASH_DIGITS]}…"),
        ("answers of", runtime_words(data.get("runtime"))),
        ("reference answers", reference_words(calibration.reference_answers)),
        (
            "releases",
            f"exported by {data.get('exported_by') or 'one that is not recorded'}, "
            f"fitted by {data.get('release') or 'one that is not recorded'}",
        ),
        ("calibration.json, SHA-256", f"{fitted.artifact_sha256[:_HASH_DIGITS]}…"),
        *rungs,
        ("signal", f"{calibration.signal} (asked for: {asked})"),
        ("a loss", f"an answer that {loss}"),
        ("threshold chosen by", _chosen_by(calibration)),
    ]
