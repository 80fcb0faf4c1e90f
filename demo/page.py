"""What the demo's page is given: every crop with its answers, and links to the other pages."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from report.demo_page import write_demo
from report.page import thumbnail
from report.words import score_texts
from routing import threshold_text

from .plan_summary import best_sentence, served_rows, speedup_sentence
from .summary import Served


def write_page(
    path: Path,
    summary: dict[str, Any],
    served: Served,
    threshold: float | None,
    crops: Sequence[bytes],
    labels: Sequence[str],
    report: str,
    plan: str | None = None,
) -> None:
    """Write the page.

    Args:
        path: file to write.
        summary: content of summary.json.
        served: the server's answers for the crops.
        threshold: in oracle units; None: every crop escalates, unscored.
        crops: the N encoded test crops.
        labels: class names.
        report: link to the page of the calibration.
        plan: link to the page of the plan, where the cascade was planned.
    """
    right = served.low == served.high

    def card(row: int, score: str) -> dict[str, Any]:
        if served.escalated[row]:
            agrees = bool(right[row])
            said = "cheap agreed" if agrees else f"cheap said {labels[served.low[row]]}"
        else:
            agrees = bool(served.adaptive[row] == served.high[row])
            said = "as full" if agrees else f"full says {labels[served.high[row]]}"
        return {
            "name": labels[served.adaptive[row]],
            "image": thumbnail(Image.open(io.BytesIO(crops[row]))),
            "lines": [f"score {score}", said],
            "right": agrees,
        }

    order = np.argsort(served.score)
    texts = score_texts(served.score[order].tolist(), threshold)
    cards = {int(row): card(row, text) for row, text in zip(order, texts, strict=True)}
    scores = planned = None
    if threshold is not None:
        scores = {"right": served.score[right], "wrong": served.score[~right]}
        scores |= {"threshold": threshold, "text": threshold_text(threshold)}
    if plan is not None:
        found = summary["plan"]
        planned = {
            **{name: found[name] for name in ("low", "high")},
            "rows": served_rows(found),
            "sentences": [speedup_sentence(found), best_sentence(found)],
        }
    kept = [shown for row, shown in cards.items() if not served.escalated[row]]
    escalated = [shown for row, shown in cards.items() if served.escalated[row]][::-1]
    links = {"report": report} | ({} if plan is None else {"plan": plan})
    write_demo(path, summary, kept, escalated, scores, links, planned)
