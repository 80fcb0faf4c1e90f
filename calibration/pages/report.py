"""`report.html`: a calibration for people who doubt it, in one self-contained file.

The certificate comes first, then what was measured on the test split, which decided nothing, then
the images themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from report.words import count_of, percent, setting
from routing import SIGNALS, Calibration, threshold_text
from routing.provenance import runtime_words
from routing.reference import reference_words

from ..fidelity import Fidelity
from ..outputs import Outputs
from ..record import FitRecord
from ..source import ImageSource
from . import figures, readings
from .decisions import Decisions, unit_bins
from .galleries import cell_table, galleries, gallery_rows
from .page import Cards, missing_reading, write

_HASH_DIGITS = 12

_AUROC = "AUROC: probability that an image with a loss has the larger value"
_SPEARMAN = "Spearman: rank correlation with the oracle L2"
_METRICS = {
    "escalation_rate": ("escalation", "answered by the full rung"),
    "risk": ("risk", "kept low with a loss, of all images"),
    "agreement_low": ("agreement, low rung", "low rung alone {agrees}"),
    "agreement_with_high": ("agreement, adaptive", "adaptive answer {agrees}"),
    "accuracy_low": ("accuracy, low rung", "low rung alone names the true class, where labelled"),
    "accuracy_adaptive": (
        "accuracy, adaptive",
        "adaptive answer names the true class, where labelled",
    ),
    "accuracy_high": (
        "accuracy, full rung",
        "full rung alone names the true class, where labelled",
    ),
}


_AGREES = {  # by what the model answers
    "classes": "names the {reference}'s class",
    "labels": "gives the {reference}'s set of labels",
    "value": "gives the {reference}'s value within the tolerance",
    None: "",
}


def write_report(
    path: Path,
    calibration: Calibration,
    record: FitRecord,
    outputs: Outputs,
    source: ImageSource | None,
    class_names: tuple[str, ...] | None = None,
) -> None:
    """Write the page.

    Args:
        path: file to write.
        calibration: the artifact.
        record: of the same fit.
        outputs: that it was fitted on.
        source: of the images in the galleries; None where it is no longer there.
        class_names: of the model's classes; without them classes are numbered.
    """
    metrics = calibration.metrics
    epsilon = metrics["needed_for"]
    test = Decisions.of(calibration, record, outputs, record.splits["test"])
    dots, chance, dots_label = _dots(metrics["signals"])
    bins = unit_bins(test.scores, test.oracle)
    rows, words_of_rows = gallery_rows(record.splits)
    shown = Decisions.of(calibration, record, outputs, rows)
    fidelity = Fidelity.of(calibration)
    words = fidelity.words(outputs.truth_words)
    cards = Cards(outputs, source, class_names, fidelity.label_threshold)
    drawn = galleries(shown, rows, cards)
    chosen = metrics["signals"][calibration.signal]
    write(
        path,
        "report.html.j2",
        calibration=calibration,
        epsilon=epsilon,
        fidelity=words,
        reference=outputs.truth_words,
        kept_low=record.high_loss is None,
        verdict=_verdict(calibration),
        measured=_measured(
            metrics, _AGREES[calibration.task].format(reference=outputs.truth_words)
        ),
        images=count_of(metrics["images"], "image"),
        groups=count_of(metrics["groups"], "group"),
        figures={
            "curve": figures.risk_escalation(test, epsilon),
            "dots": figures.dots(dots, calibration.signal, chance, dots_label),
            "scatter": figures.score_against_oracle(test),
            "units": figures.unit_calibration(bins),
            "deltas": figures.deltas(test.oracle, test.loss, "oracle L2"),
        },
        readings={
            "risk": readings.risk(
                test,
                metrics["intervals"]["risk"],
                epsilon,
                grouped=metrics["groups"] < metrics["images"],
            ),
            "curve": readings.curve(test),
            "signals": readings.signals(
                metrics, calibration.signal, calibration.chosen_by.get("signal")
            ),
            "scatter": readings.scatter(test, chosen["spearman"]),
            "units": readings.units(bins),
            "deltas": readings.deltas(test, metrics["signals"]["oracle"]["auroc"]),
            "cells": readings.cells(shown),
        },
        warning=readings.warning(metrics, calibration.signal),
        flat=readings.flat(metrics),
        dots_label=dots_label,
        table=_signal_table(metrics["signals"], calibration.signal),
        gallery_rows=words_of_rows,
        cells=cell_table(shown),
        galleries=drawn,
        missing=missing_reading([card for cell in drawn for card in cell["cards"]]),
        provenance=_provenance(calibration, record, words),
    )


def _verdict(calibration: Calibration) -> dict[str, Any]:
    """The first thing on the page: state, heading, statement, reading and facts."""
    content, threshold = calibration.certificate, calibration.threshold
    shown = "none: always-high" if threshold is None else threshold_text(threshold)
    facts = [("signal", calibration.signal), ("threshold, in units of the oracle L2", shown)]
    if content is None:
        state, heading = "unasked", "No certificate was asked for"
        statement = f"The threshold was chosen by {_goal(calibration)}; nothing is guaranteed."
    else:
        state, heading = "certified", "Certified"
        if not content["certified"]:
            state, heading = "refused", "Not certified: nothing is guaranteed: always-high"
        statement = content["statement"]
        confidence = content["confidence"]
        allowed = content["allowed"]
        facts += [
            ("n: independent certify images", f"{content['n']:,}"),
            ("errors: kept low with a loss", f"{content['errors']:,}"),
            ("errors allowed", "none certifies" if allowed < 0 else f"{allowed:,}"),
            ("ε: limit on the risk", setting(content["epsilon"])),
            ("confidence", "in expectation" if confidence is None else setting(confidence)),
            (f"method: {readings.METHODS[content['method']]}", content["method"]),
        ]
    return {
        "state": state,
        "heading": heading,
        "statement": statement,
        "reading": readings.certificate(content, threshold),
        "facts": facts,
    }


def _goal(calibration: Calibration) -> str:
    """How the threshold was chosen, to be read after "chosen by"."""
    goal = calibration.chosen_by
    if "escalation_rate" in goal:
        return f"an escalation rate of {setting(goal['escalation_rate'])}"
    if "threshold" in goal:
        return f"hand ({threshold_text(goal['threshold'])})"
    confidence = (
        "" if goal["method"] == "crc" else f" with confidence {setting(goal['confidence'])}"
    )
    return f"a risk of at most {setting(goal['max_risk'])}{confidence} ({goal['method']})"


def _measured(metrics: Mapping[str, Any], agrees: str) -> list[dict[str, str]]:
    rows = []
    for key, (name, words) in _METRICS.items():
        if key in metrics:
            interval = metrics["intervals"][key]
            said = words.format(agrees=agrees)
            between = "–" if interval is None else " to ".join(map(percent, interval))
            rows.append(
                {"name": name, "value": percent(metrics[key]), "interval": between, "words": said}
            )
    return rows


def _dots(table: Mapping[str, Any]) -> tuple[list[figures.Dot], float, str]:
    """The rows of the dot chart, what chance gives, and its axis.

    Where no AUROC exists, for want of images with a loss or without, Spearman is drawn.
    """
    key, chance, label = "auroc", 0.5, _AUROC
    if table["oracle"]["auroc"] is None:
        key, chance, label = "spearman", 0.0, _SPEARMAN
    dots = [
        figures.Dot(name, table[name][key], table[name][f"{key}_interval"])
        for name in _order(table, key)
    ]
    return dots, chance, label


def _order(table: Mapping[str, Any], key: str = "auroc") -> list[str]:
    """Signals, best first, then the references."""
    ours = [name for name in table if name not in figures.REFERENCES]
    value = {name: -2.0 if table[name][key] is None else table[name][key] for name in ours}
    return [*sorted(ours, key=lambda name: -value[name]), *figures.REFERENCES]


def _signal_table(table: Mapping[str, Any], chosen: str) -> list[dict[str, str]]:
    def number(value: float | None) -> str:
        return "–" if value is None else f"{value:.2f}"

    def interval(ends: Sequence[float] | None) -> str:
        return "" if ends is None else f"[{ends[0]:.2f}, {ends[1]:.2f}]"

    def share(value: float | None) -> str:
        return "–" if value is None else percent(value)

    kinds = dict.fromkeys(figures.REFERENCES, "reference") | {chosen: "chosen"}
    return [
        {
            "name": name,
            "kind": kinds.get(name, ""),
            "words": figures.REFERENCES.get(name) or SIGNALS[name].summary.replace("->", "→"),
            "auroc": number(table[name]["auroc"]),
            "auroc_interval": interval(table[name]["auroc_interval"]),
            "spearman": number(table[name]["spearman"]),
            "spearman_interval": interval(table[name]["spearman_interval"]),
            "needed": share(table[name]["needed_escalation"]),
            "cross_validated": share(table[name]["cv_escalation"]),
        }
        for name in _order(table)
    ]


def _provenance(calibration: Calibration, record: FitRecord, loss: str) -> list[tuple[str, str]]:
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
        ("calibration.json, SHA-256", f"{record.artifact_sha256[:_HASH_DIGITS]}…"),
        *rungs,
        ("signal", f"{calibration.signal} (asked for: {asked})"),
        ("a loss", f"an answer that {loss}"),
        ("threshold chosen by", _goal(calibration)),
    ]
