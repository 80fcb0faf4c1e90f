"""The demo's page: what stayed cheap, what escalated, what it saved. One self-contained file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .figures import INK, Rule, histogram, near
from .page import render
from .token_maps import TokenCounts, where_tokens_went


def write_demo(
    path: Path,
    summary: Mapping[str, Any],
    kept: Sequence[Mapping[str, Any]],
    escalated: Sequence[Mapping[str, Any]],
    scores: Mapping[str, Any] | None,
    links: Mapping[str, str],
    planned: Mapping[str, Any] | None = None,
    tokens: Sequence[TokenCounts] = (),
) -> None:
    """Write the page.

    Args:
        path: file to write.
        summary: content of the demo's summary.json.
        kept: cards of the crops that stayed cheap, in the order in which they are shown; `right`
            says whether the full answer is the same.
        escalated: cards of the crops that escalated; `right` says whether the cheap answer was the
            same.
        scores: of every crop, those whose cheap answer is `right` and those where it is `wrong`,
            the `threshold`, and its `text`; None where no crop is scored.
        links: addresses of the `report` of the calibration and, of a plan, of the `plan`.
        planned: of a plan, the `rows` of everything that was served, and `sentences` about them.
        tokens: of the rungs whose images keep tokens of their own.
    """
    drawn, rules = None, []
    if scores is not None:
        rule = Rule(scores["threshold"], "threshold: escalate to the right", colour=INK)
        rules = near([rule], [*scores["right"], *scores["wrong"]])
        drawn = histogram(
            {"cheap answer equals full answer": scores["right"], "differs": scores["wrong"]},
            "score: predicted change by the full rung (L2)",
            "crops",
            rules,
            size=(8.0, 2.6),
        )
    render(
        path,
        "demo.html.j2",
        summary=summary,
        kept=kept,
        escalated=escalated,
        histogram=drawn,
        threshold=None if scores is None else scores["text"],
        is_threshold_drawn=bool(rules),
        links=links,
        plan=planned,
        tokens=where_tokens_went(tokens),
    )
