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
from .messages import Prediction, Task, number_or_none

UNKNOWN_TASK = Task()


def name_of(index: int, labels: Sequence[str] | None, noun: str = "class") -> str:
    """What an output is called, or `class 7` where no name is known."""
    return labels[index] if labels and index < len(labels) else f"{noun} {index}"


def _answer(prediction: Prediction, top: int, labels: Sequence[str] | None, task: Task) -> Text:
    kind = task.kind_of(prediction)
    if kind is None:
        return Text(f"|embedding| {np.linalg.norm(prediction.embedding):.3f}")
    if kind == "value":
        return Text(_values(prediction, labels))
    if kind == "labels":
        return Text(_label_set(prediction, labels, task))
    return Text("\n".join(f"{name_of(i, labels)} {share:.1%}" for i, share in prediction.top(top)))


def _values(prediction: Prediction, labels: Sequence[str] | None) -> str:
    """A lone value bare where nobody named it, several a line each."""
    assert prediction.logits is not None
    if len(prediction.logits) == 1 and not labels:
        return f"{prediction.logits[0]:.6g}"
    lines = enumerate(prediction.logits)
    return "\n".join(f"{name_of(i, labels, 'value')} {value:.6g}" for i, value in lines)


def _label_set(prediction: Prediction, labels: Sequence[str] | None, task: Task) -> str:
    """All labels that belong to the image, or that none does and which comes nearest."""
    found = prediction.label_set(task.label_threshold)
    if found:
        return "\n".join(f"{name_of(i, labels, 'label')} {share:.1%}" for i, share in found)
    index, share = prediction.probabilities()[0]
    return f"no label ({name_of(index, labels, 'label')} {share:.1%})"


def _path(prediction: Prediction) -> str:
    if prediction.degraded:
        return "wanted, full rung down"
    return "yes" if prediction.escalated else "no"


def table(
    outcomes: Sequence[Outcome],
    top: int,
    labels: Sequence[str] | None,
    task: Task = UNKNOWN_TASK,
) -> Table:
    """One row per file: its answer, score and path, or its error.

    Args:
        outcomes: one per file.
        top: classes to show per image.
        labels: class names, the name of class i at position i.
        task: what the logits mean.
    """
    kinds = {task.kind_of(o.prediction) for o in outcomes if o.prediction}
    answer = f"top {top}" if "classes" in kinds and top > 1 else "answer"
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
            _answer(prediction, top, labels, task),
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


def _answer_as_dict(
    prediction: Prediction, top: int, labels: Sequence[str] | None, task: Task
) -> dict[str, Any]:
    """`top` of classes, beside it None and `labels` or `values` of what has none."""
    kind, known = task.kind_of(prediction), labels or ()

    def name(index: int) -> str | None:
        return known[index] if index < len(known) else None

    if kind == "labels":
        found = prediction.label_set(task.label_threshold)
        inside = [{"index": i, "label": name(i), "probability": share} for i, share in found]
        return {"top": None, "labels": inside}
    if kind == "value":
        assert prediction.logits is not None
        values = enumerate(prediction.logits.tolist())
        return {"top": None, "values": [{"label": name(i), "value": value} for i, value in values]}
    if kind is None:
        return {"top": None}
    return {
        "top": [
            {"class": i, "label": name(i), "probability": share} for i, share in prediction.top(top)
        ]
    }


def _outcome_as_dict(
    outcome: Outcome, top: int, labels: Sequence[str] | None, task: Task
) -> dict[str, Any]:
    prediction = outcome.prediction
    fields: dict[str, Any] = {"file": str(outcome.file), "error": outcome.error}
    if prediction is None:
        return fields
    return {
        **fields,
        **_answer_as_dict(prediction, top, labels, task),
        "embedding_norm": float(np.linalg.norm(prediction.embedding)),
        "score": number_or_none(prediction.score),
        "escalated": prediction.escalated,
        "degraded": prediction.degraded,
        "latency_ms": outcome.latency_ms,
    }


def as_dict(
    outcomes: Sequence[Outcome],
    summary: Summary,
    top: int,
    labels: Sequence[str] | None,
    task: Task = UNKNOWN_TASK,
) -> dict[str, Any]:
    """The same as `table` and `summary_line`, ready for JSON.

    Args:
        outcomes: one per file.
        summary: of the outcomes.
        top: classes to list per image.
        labels: class names, the name of class i at position i.
        task: what the logits mean.
    """
    return {
        "images": [_outcome_as_dict(outcome, top, labels, task) for outcome in outcomes],
        "summary": asdict(summary),
    }
