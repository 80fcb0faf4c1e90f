"""`report.html`: a calibration, or before one is made only what the full rung changes.

A report has the certificate first, then what was measured on images that nothing was fitted on, or
cross-fitted, then the images themselves and where their tokens went, then how the two rungs differ
on all images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .figures import GREY, INK, OTHERS, Axis, Rule, Series, chart, histogram, near
from .page import HIGH_COLOUR, LOW_COLOUR, RED, render
from .token_maps import TokenCounts, where_tokens_went
from .words import setting

MAX_POINTS = 2000  # of a scatter: more make the page heavy and the eye no wiser
REFERENCES = ("random", "oracle")  # what signals are held against
_CURVES: dict[str, dict[str, Any]] = {
    "chosen": {"colour": INK, "line": "-", "width": 2.4},
    "random": {"colour": GREY, "line": "--"},
    "oracle": {"colour": GREY, "line": ":", "width": 2},
    "perfect": {"colour": GREY, "line": "-", "width": 0.9},
}


def write_calibration(
    path: Path,
    fit: Mapping[str, Any] | None,
    analysis: Mapping[str, Any],
    tokens: Sequence[TokenCounts] = (),
) -> None:
    """Write the page of what `fit_data` and `analysis_data` of `calibration.page_data` give.

    Without a fit it shows the analysis alone. `tokens` are of the rungs whose images keep tokens of
    their own.
    """
    render(
        path,
        "calibration.html.j2",
        fit=fit,
        fit_figures=None if fit is None else _fit_figures(fit),
        max_points=MAX_POINTS,
        references=REFERENCES,
        analysis=analysis,
        found=analysis["found"],
        figures=_analysis_figures(analysis),
        tokens=where_tokens_went(tokens),
    )


def thinned(count: int) -> NDArray[np.intp]:
    """Which of `count` points a scatter draws: all, or `MAX_POINTS` chosen with seed 0."""
    if count <= MAX_POINTS:
        return np.arange(count)
    return np.sort(np.random.default_rng(0).choice(count, MAX_POINTS, replace=False))


def _fit_figures(fit: Mapping[str, Any]) -> dict[str, str]:
    threshold = fit["threshold_at"]
    rules = [Rule(threshold, "threshold: escalate right of it")] if threshold is not None else []
    return {
        "curve": _curve(fit),
        "scatter": _scatter(fit["scatter"], rules),
    }


def _curve(fit: Mapping[str, Any]) -> str:
    """Risk against escalation for every signal, with the chosen point."""
    test, epsilon = fit["measured"], fit["metrics"]["needed_for"]
    series = []
    for number, curve in enumerate(fit["curves"]):
        look: dict[str, Any] = {"colour": OTHERS[number % len(OTHERS)], "line": "-"}
        look = _CURVES.get(curve["kind"], look)
        series.append(Series(curve["name"], curve["rates"], curve["risks"], **look))
    here = ([test["escalation_rate"]], [test["risk"]])
    series.append(Series("this calibration", *here, HIGH_COLOUR, marker="o", size=10, above=True))
    limit = []
    if epsilon is not None:
        limit = [Rule(epsilon, f"risk limit ε = {setting(epsilon)}", True, RED, "-")]
    top = 1.1 * max(test["base_risk"], epsilon or 0, 1 / test["images"])
    return chart(
        series,
        Axis(f"escalated: share of the {fit['split']} images", percent=True, limits=(0, 1)),
        Axis(f"risk: share of the {fit['split']} images", percent=True, limits=(0, top)),
        limit,
    )


def _scatter(scatter: Mapping[str, Any], rules: Sequence[Rule]) -> str:
    """Predicted against measured change, losses in colour, the threshold as a line."""
    rows = thinned(len(scatter["score"]))
    score, oracle, loss = (scatter[name][rows] for name in ("score", "oracle", "loss"))
    # Losses last: they are the few that must be seen.
    series = [
        Series(name, score[some], oracle[some], colour, "o", size=4, alpha=alpha)
        for name, some, colour, alpha in (
            ("no loss", ~loss, LOW_COLOUR, 0.45),
            ("loss", loss, HIGH_COLOUR, 0.75),
        )
    ]
    return chart(
        series,
        Axis("score: predicted L2 change"),
        Axis("oracle: measured L2 change"),
        near(rules, scatter["score"].tolist()),
        size=(5.6, 3.8),
    )


def _analysis_figures(analysis: Mapping[str, Any]) -> dict[str, str]:
    values = analysis["values"]
    loss = values["loss"]

    def by_loss(name: str, label: str) -> str:
        groups = {"no loss": values[name][~loss], "loss": values[name][loss]}
        return histogram(groups, label)

    return {
        "l2": by_loss("l2", "L2 distance between the two final CLS embeddings"),
        "cosine": by_loss("cosine", "cosine between them"),
        "tenths": _tenths(analysis["found"]["losses"]),
    }


def _tenths(losses: Sequence[Mapping[str, Any]]) -> str:
    """Loss rates of the tenths of the images, from least to most changed."""
    series = []
    shifts = (0.0,) if len(losses) == 1 else (-0.08, 0.08)
    looks = ((HIGH_COLOUR, "o"), (OTHERS[0], "s"))
    for relation, shift, (colour, marker) in zip(losses, shifts, looks, strict=False):
        tenths = relation["tenths"]
        x = [number + shift for number in range(1, len(tenths) + 1)]
        rates = [tenth["losses"] / tenth["images"] for tenth in tenths]
        ends = [tuple(tenth["interval"]) for tenth in tenths]
        series.append(Series(relation["kind"], x, rates, colour, marker, size=5, y_spread=ends))
    uppers = [f"{tenth['upper']:.3g}" for tenth in losses[0]["tenths"]]
    return chart(
        series,
        Axis("largest L2 change of each group", ticks=uppers),
        Axis("share with a loss", percent=True, limits=(0, None)),
        size=(5.6, 3.2),
    )
