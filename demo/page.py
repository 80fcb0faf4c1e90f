"""Draw `index.html`: what stayed cheap, what escalated, what it saved. One self-contained file."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

from perf.figures import TOO_BUSY
from report.page import HIGH_COLOUR, LOW_COLOUR, THUMBNAIL_PX, data_uri
from report.words import recipe_words
from routing import score_texts, threshold_text

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
    order = np.argsort(served.score)
    scores = score_texts(served.score[order].tolist(), threshold)
    cards = [
        {
            "image": _thumbnail(crops[i]),
            "label": labels[served.adaptive[i]],
            "high": labels[served.high[i]],
            "agrees": bool(served.adaptive[i] == served.high[i]),
            "low": labels[served.low[i]],
            "low_agrees": bool(served.low[i] == served.high[i]),
            "score": score,
            "escalated": bool(served.escalated[i]),
        }
        for i, score in zip(order, scores, strict=True)
    ]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True
    )
    html = environment.get_template("page.html.j2").render(
        summary=summary,
        too_busy=TOO_BUSY,
        threshold=None if threshold is None else threshold_text(threshold),
        kept=[card for card in cards if not card["escalated"]],
        escalated=[card for card in reversed(cards) if card["escalated"]],
        histogram=None if threshold is None else _histogram(served, threshold),
        low_colour=LOW_COLOUR,
        high_colour=HIGH_COLOUR,
        report=report,
        plan=None if plan is None else _planned(summary["plan"], plan),
    )
    path.write_text(html)


def _planned(plan: Mapping[str, Any], link: str) -> dict[str, Any]:
    """What the page says of a plan."""
    return {
        "link": link,
        "low": recipe_words(plan["low"]),
        "high": recipe_words(plan["high"]),
        "rows": served_rows(plan),
        "sentences": [speedup_sentence(plan), best_sentence(plan)],
    }


def _thumbnail(data: bytes) -> str:
    image = Image.open(io.BytesIO(data)).convert("RGB")
    image = image.resize((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return data_uri("image/jpeg", buffer.getvalue())


def _histogram(served: Served, threshold: float) -> str:
    figure, axes = plt.subplots(figsize=(8, 2.8))
    bins = np.histogram_bin_edges(served.score, 40)
    right = served.low == served.high
    axes.hist(
        [served.score[right], served.score[~right]],
        bins=bins,
        stacked=True,
        color=[LOW_COLOUR, HIGH_COLOUR],
        label=["cheap answer equals full answer", "cheap answer differs"],
    )
    axes.axvline(threshold, color="black", linestyle="--", label="threshold: escalate to the right")
    axes.set_xlabel("score: predicted change by the full rung (L2)")
    axes.set_ylabel("crops")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    plt.close(figure)
    return data_uri("image/svg+xml", buffer.getvalue())
