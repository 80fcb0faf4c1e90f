"""The report's galleries: images by what was decided about them, and whether that was right."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from report.words import count_of, percent
from routing import score_texts

from ..splits import Rows
from .decisions import Decisions
from .page import GALLERY, HIGH_COLOUR, LOW_COLOUR, Cards

MIN_ROWS = 100  # below, some cell of the galleries is nearly always empty

_CELLS = {
    "kept_right": ("Kept low and right", LOW_COLOUR, "the full rung was saved at no loss"),
    "kept_wrong": ("Kept low and wrong", LOW_COLOUR, "this share is the risk on these images"),
    "escalated_needed": ("Escalated and needed", HIGH_COLOUR, "the full rung averted a loss"),
    "escalated_in_vain": (
        "Escalated in vain",
        HIGH_COLOUR,
        "the low answer would have been acceptable",
    ),
}


def gallery_rows(splits: Mapping[str, Rows]) -> tuple[Rows, str]:
    """Which images the galleries are drawn from, and a sentence that says so."""
    test = splits["test"]
    if len(test) >= MIN_ROWS or "certify" not in splits:
        return test, f"Test split, {count_of(len(test), 'image')}."
    rows = np.sort(np.concatenate([splits["certify"], test]))
    return rows, (
        f"Certify and test split together, {count_of(len(rows), 'image')}: the test split's "
        f"{len(test)} are too few to look at. The certify images tested the threshold, so these "
        "counts may flatter it."
    )


def cell_table(decisions: Decisions) -> list[dict[str, Any]]:
    """Counts of decision against loss, with their sums."""
    count = {name: len(rows) for name, rows in decisions.cells().items()}
    table = {
        "kept low": [count["kept_right"], count["kept_wrong"]],
        "escalated": [count["escalated_in_vain"], count["escalated_needed"]],
    }
    table["all"] = [sum(column) for column in zip(*table.values(), strict=True)]
    return [
        {
            "name": name,
            "counts": [f"{n:,} ({percent(n / len(decisions))})" for n in (*row, sum(row))],
        }
        for name, row in table.items()
    ]


def galleries(decisions: Decisions, rows: Rows, cards: Cards) -> list[dict[str, Any]]:
    """The gallery of each cell.

    Args:
        decisions: about the images in `rows`.
        rows: of the outputs that `cards` were made of.
        cards: makes an image's card.
    """
    filled = []
    for key, members in decisions.cells().items():
        name, colour, meaning = _CELLS[key]
        drawn = _drawn(members, decisions)
        scores = score_texts(decisions.scores[drawn].tolist(), decisions.threshold)
        reading = f"{len(members):,} of {count_of(len(decisions), 'image')}"
        reading += f" ({percent(len(members) / len(decisions))})"
        reading += f": {meaning}." if len(members) else "."
        if len(drawn) < len(members):
            reading += f" Shown are {len(drawn)}, drawn by chance (seed 0)."
        if len(drawn) > 1:
            reading += " Lowest score first."
        filled.append(
            {
                "name": name,
                "colour": colour,
                "count": f"{len(members):,}",
                "cards": [
                    cards(int(rows[i]), f"score {score}")
                    for i, score in zip(drawn, scores, strict=True)
                ],
                "reading": reading,
            }
        )
    return filled


def _drawn(members: NDArray[np.intp], decisions: Decisions) -> NDArray[np.intp]:
    """At most `GALLERY` of the members, by chance rather than the nicest, in order of score."""
    if len(members) > GALLERY:
        members = np.random.default_rng(0).choice(members, GALLERY, replace=False)
    return members[np.argsort(decisions.scores[members], kind="stable")]
