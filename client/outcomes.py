"""Many files asked about at once, and their outcomes: figures, a table for people, JSON."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from .core import BlockingCore
from .errors import ClientError
from .files import shown as file_name
from .messages import Prediction, Task


@dataclass(frozen=True)
class Outcome:
    """What became of one file: a prediction, or an error in one line; the other is None.

    `latency_ms` is from sending the bytes to having read the answer, with all tries.
    """

    file: Path
    prediction: Prediction | None
    error: str | None
    latency_ms: float


def ask(
    client: BlockingCore,
    files: Sequence[Path],
    concurrency: int,
    done: Callable[[], None],
    **options: Any,
) -> list[Outcome]:
    """Ask about files, one image per request, so many requests in flight.

    Args:
        client: left open.
        files: images.
        concurrency: requests in flight, at least 1.
        done: called after each file.
        options: of `infer`, the same for every file.

    Returns:
        One outcome per file, in the order of `files`. A refused file does not stop the rest; Ctrl-C
        does, leaves out those that are not answered yet, and closes the client.
    """

    def ask_one(file: Path) -> Outcome:
        prediction, error, started = None, None, time.perf_counter()
        try:
            image = file.read_bytes()
            started = time.perf_counter()
            (prediction,) = client.infer([image], **options)
        except OSError as failure:
            error = f"cannot read it: {failure.strerror}"
        except ClientError as failure:
            error = str(failure)
        return Outcome(file, prediction, error, (time.perf_counter() - started) * 1e3)

    with ThreadPoolExecutor(concurrency) as pool:
        futures = [pool.submit(ask_one, file) for file in files]
        try:
            for _ in as_completed(futures):
                done()
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            futures = [future for future in futures if future.done() and not future.cancelled()]
            client.close()  # which ends the requests in flight, so that nobody waits for them
    return [future.result() for future in futures]


def summarise(outcomes: Sequence[Outcome], wall_s: float) -> dict[str, Any]:
    """Figures over one outcome per file; of the answers None where no file was answered.

    Args:
        outcomes: of all files.
        wall_s: seconds from the first request to the last answer.
    """
    answers = [outcome.prediction for outcome in outcomes if outcome.prediction]
    latencies = [outcome.latency_ms for outcome in outcomes if outcome.prediction]
    escalated = sum(answer.escalated for answer in answers)
    p50, p95 = map(float, np.percentile(latencies, [50, 95])) if answers else (None, None)
    return {
        "images": len(outcomes),
        "errors": len(outcomes) - len(answers),
        "escalated": escalated,
        "escalation_rate": escalated / len(answers) if answers else None,
        "latency_ms_p50": p50,
        "latency_ms_p95": p95,
        "images_per_s": len(answers) / wall_s if answers else None,
    }


def sentence(summary: Mapping[str, Any]) -> str:
    """The figures in one line."""
    line = "{images} images, {errors} errors"
    if summary["escalation_rate"] is not None:
        line += (
            ", {escalated} escalated ({escalation_rate:.1%}), latency p50 {latency_ms_p50:.1f} ms "
            "p95 {latency_ms_p95:.1f} ms, {images_per_s:.1f} images/s"
        )
    return line.format(**summary)


@dataclass(frozen=True)
class Shown:
    """What is shown of an answer: `top` classes; `labels` names output i at position i."""

    task: Task = Task()
    top: int = 5
    labels: Sequence[str] = ()

    def outputs(self, prediction: Prediction) -> tuple[str | None, list[tuple[int, float]]]:
        """The task's kind, and the outputs to show: index and value, or probability in 0..1."""
        kind = self.task.kind_of(prediction)
        if kind == "classes":
            return kind, prediction.top(self.top)
        if kind == "labels":
            return kind, prediction.label_set(self.task.label_threshold)
        return kind, [] if prediction.logits is None else [*enumerate(prediction.logits.tolist())]

    def as_text(self, prediction: Prediction) -> str:
        """One line for each output that is shown."""
        kind, outputs = self.outputs(prediction)
        if kind is None:
            return f"|embedding| {np.linalg.norm(prediction.embedding):.3f}"
        if kind == "value":
            if len(outputs) == 1 and not self.labels:
                return f"{outputs[0][1]:.6g}"
            return "\n".join(f"{self.name(i) or f'value {i}'} {value:.6g}" for i, value in outputs)
        noun = "label" if kind == "labels" else "class"
        nearest = outputs or prediction.probabilities()[:1]
        lines = (f"{self.name(i) or f'{noun} {i}'} {share:.1%}" for i, share in nearest)
        return "\n".join(lines) if outputs else f"no label ({next(lines)})"

    def as_dict(self, prediction: Prediction) -> dict[str, Any]:
        """`top` of classes; None for what has none, which has `labels` or `values` beside it."""
        kind, outputs = self.outputs(prediction)
        named = [(index, self.name(index), number) for index, number in outputs]
        if kind == "value":
            return {"top": None, "values": [{"label": name, "value": v} for _, name, v in named]}
        index_key = "index" if kind == "labels" else "class"
        shares = [{index_key: i, "label": name, "probability": p} for i, name, p in named]
        if kind == "labels":
            return {"top": None, "labels": shares}
        return {"top": shares if kind == "classes" else None}

    def name(self, index: int) -> str | None:
        """Of an output; None where nobody gave it one."""
        return self.labels[index] if index < len(self.labels) else None


def table(outcomes: Sequence[Outcome], shown: Shown) -> Table:
    """One row per file: its answer, score and path, or its error."""
    kinds = {shown.task.kind_of(o.prediction) for o in outcomes if o.prediction}
    rows = Table("file", f"top {shown.top}" if "classes" in kinds and shown.top > 1 else "answer")
    for column in ("score", "escalated", "latency ms"):
        rows.add_column(column, justify="right", no_wrap=True)
    rows.columns[0].overflow = "fold"  # a cut file name finds no file
    for outcome in outcomes:
        prediction = outcome.prediction
        if prediction is None:
            rows.add_row(Text(file_name(outcome.file)), Text(str(outcome.error), style="red"))
            continue
        path = "yes" if prediction.escalated else "no"
        rows.add_row(
            Text(file_name(outcome.file)),
            Text(shown.as_text(prediction)),
            # Four digits would show scores on both sides of a threshold as one number.
            "-" if math.isnan(prediction.score) else str(np.float32(prediction.score)),
            "wanted, full rung down" if prediction.degraded else path,
            f"{outcome.latency_ms:.1f}",
        )
    return rows


def as_dict(outcome: Outcome, shown: Shown) -> dict[str, Any]:
    """What the table says of a file, ready for JSON."""
    fields: dict[str, Any] = {"file": file_name(outcome.file), "error": outcome.error}
    prediction = outcome.prediction
    if prediction is None:
        return fields
    return {
        **fields,
        **shown.as_dict(prediction),
        "embedding_norm": float(np.linalg.norm(prediction.embedding)),
        "score": prediction.score if math.isfinite(prediction.score) else None,
        "escalated": prediction.escalated,
        "degraded": prediction.degraded,
        "latency_ms": outcome.latency_ms,
    }
