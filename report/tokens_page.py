"""`tokens.html`: ways to spend a part of the cost, side by side, and where the tokens went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .figures import INK, OTHERS, Axis, Series, chart
from .page import render
from .token_maps import TokenMap, token_maps

_METHODS = {
    "apt": "patch sizes by entropy",
    "halt": "tokens that halt",
    "tome": "tokens that merge",
    "px": "fewer pixels",
    "depth": "fewer blocks",
}


def write_tokens(path: Path, summary: Mapping[str, Any], maps: Sequence[TokenMap]) -> None:
    """Write the page of what `make tokens` measured.

    Args:
        path: file to write.
        summary: content of its summary.json.
        maps: images with their tokens.
    """
    render(
        path,
        "methods.html.j2",
        summary=summary,
        methods=_METHODS,
        figure_of_rows=_figure(summary["rows"]),
        maps={
            method: token_maps(some)
            for method in _METHODS
            if (some := [one for one in maps if one.kind == method])
        },
    )


def _figure(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """Agreement against cost, a line from each method as it is to the same adapted."""
    series = []
    for number, (method, title) in enumerate(_METHODS.items()):
        some = [row for row in rows if row["method"] == method and row["cost_ratio"] is not None]
        if some:
            costs, agreements = ([row[key] for row in some] for key in ("cost_ratio", "agreement"))
            hollow = [not row["adapted"] for row in some]
            series.append(
                Series(title, costs, agreements, OTHERS[number], "o", "-", size=9, hollow=hollow)
            )
    if not series:
        return None
    series.append(Series("full model", [1.0], [1.0], INK, "s", size=9))
    return chart(
        series,
        Axis("cost of an image, of the full model's", percent=True, limits=(0, 1.1)),
        Axis("agreement with the full model", percent=True),
        size=(8.0, 4.2),
    )
