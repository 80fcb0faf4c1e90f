"""Outcomes as a table for people and as JSON for machines."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from .many import Outcome, Summary
from .messages import Prediction, number_or_none


def name_of(index: int, labels: Sequence[str] | None) -> str:
    """A class's label, or `class 7` where none is known."""
    return labels[index] if labels and index < len(labels) else f"class {index}"


def _answer(prediction: Prediction, top: int, labels: Sequence[str] | None) -> Text:
    if prediction.logits is None:
        return Text(f"|embedding| {np.linalg.norm(prediction.embedding):.3f}")
    return Text("\n".join(f"{name_of(i, labels)} {share:.1%}" for i, share in prediction.top(top)))


def _path(prediction: Prediction) -> str:
    if prediction.degraded:
        return "wanted, full rung down"
    return "yes" if prediction.escalated else "no"


def table(outcomes: Sequence[Outcome], top: int, labels: Sequence[str] | None) -> Table:
    """One row per file: its answer, score and path, or its error.

    Args:
        outcomes: one per file.
        top: classes to show per image.
        labels: class names, the name of class i at position i.
    """
    with_head = any(o.prediction and o.prediction.logits is not None for o in outcomes)
    answer = f"top {top}" if with_head and top > 1 else "answer"
    rows = Table("file", answer)
    for column in ("score", "escalated", "latency ms"):
        rows.add_column(column, justify="right", no_wrap=True)
    rows.columns[0].overflow = "fold"  # a cut file name finds no file
    for outcome in outcomes:
        prediction = outcome.prediction
        if prediction is None:
            rows.add_row(Text(str(outcome.file)), Text(str(outcome.error), style="red"))
            continue
        # Four digits would show scores on both sides of a threshold as one number.
        score = "-" if math.isnan(prediction.score) else str(np.float32(prediction.score))
        rows.add_row(
            Text(str(outcome.file)),
            _answer(prediction, top, labels),
            score,
            _path(prediction),
            f"{outcome.latency_ms:.1f}",
        )
    return rows


def summary_line(summary: Summary) -> str:
    """The closing line under the table."""
    line = f"{summary.images} images, {summary.errors} errors"
    if summary.escalation_rate is None:
        return line
    return (
        f"{line}, {summary.escalated} escalated ({summary.escalation_rate:.1%}), "
        f"latency p50 {summary.latency_ms_p50:.1f} ms p95 {summary.latency_ms_p95:.1f} ms, "
        f"{summary.images_per_s:.1f} images/s"
    )


def _classes(
    prediction: Prediction, top: int, labels: Sequence[str] | None
) -> list[dict[str, Any]] | None:
    if prediction.logits is None:
        return None
    known = labels or ()
    return [
        {"class": i, "label": known[i] if i < len(known) else None, "probability": share}
        for i, share in prediction.top(top)
    ]


def _outcome_as_dict(outcome: Outcome, top: int, labels: Sequence[str] | None) -> dict[str, Any]:
    prediction = outcome.prediction
    fields: dict[str, Any] = {"file": str(outcome.file), "error": outcome.error}
    if prediction is None:
        return fields
    return {
        **fields,
        "top": _classes(prediction, top, labels),
        "embedding_norm": float(np.linalg.norm(prediction.embedding)),
        "score": number_or_none(prediction.score),
        "escalated": prediction.escalated,
        "degraded": prediction.degraded,
        "latency_ms": outcome.latency_ms,
    }


def as_dict(
    outcomes: Sequence[Outcome], summary: Summary, top: int, labels: Sequence[str] | None
) -> dict[str, Any]:
    """The same as `table` and `summary_line`, ready for JSON.

    Args:
        outcomes: one per file.
        summary: of the outcomes.
        top: classes to list per image.
        labels: class names, the name of class i at position i.
    """
    return {
        "images": [_outcome_as_dict(outcome, top, labels) for outcome in outcomes],
        "summary": asdict(summary),
    }
