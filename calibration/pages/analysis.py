"""`analysis.html`: the analysis with its figures and the images at both ends."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from report.words import count_of, percent

from ..analyse import QUANTILES, Analysis, LossRelation
from ..fidelity import oracle_cosine, oracle_l2
from ..outputs import Outputs
from ..source import ImageSource
from . import figures
from .page import Cards, missing_reading, write


def write_analysis(
    path: Path,
    analysis: Analysis,
    outputs: Outputs,
    source: ImageSource | None,
    class_names: tuple[str, ...] | None = None,
) -> None:
    """Write the page.

    Args:
        path: file to write.
        analysis: of the outputs.
        outputs: of both rungs.
        source: of the images in the galleries; None where it is no longer there.
        class_names: of the model's classes; without them classes are numbered.
    """
    oracle, cosine = oracle_l2(outputs), oracle_cosine(outputs)
    main = analysis.losses[0]
    loss = analysis.fidelity.loss(outputs)
    cards = Cards(outputs, source, class_names, analysis.fidelity.label_threshold)
    galleries = [
        {
            "name": name,
            "cards": [cards(row) for row in rows],
            "reading": extreme_reading(oracle[list(rows)], loss[list(rows)], main),
        }
        for name, rows in (
            ("Where the full rung matters most", analysis.most),
            ("Where it matters least", analysis.least),
        )
    ]
    write(
        path,
        "analysis.html.j2",
        analysis=analysis,
        main=main,
        quantiles=QUANTILES,
        images=count_of(len(outputs), "image"),
        figures={
            "l2": figures.deltas(oracle, loss, "L2 distance between the two final CLS embeddings"),
            "cosine": figures.deltas(cosine, loss, "cosine between them"),
            "tenths": figures.loss_by_tenth(
                {
                    relation.kind: [
                        figures.Dot(f"{tenth.upper:.3g}", tenth.rate, tenth.interval)
                        for tenth in relation.tenths
                    ]
                    for relation in analysis.losses
                }
            ),
        },
        readings={
            "l2": l2_reading(analysis),
            "cosine": cosine_reading(analysis, int((cosine < 1 - analysis.tolerance).sum())),
            "tenths": " ".join(tenths_reading(relation) for relation in analysis.losses),
            "spearman": spearman_reading(analysis),
        },
        galleries=galleries,
        missing=missing_reading([card for gallery in galleries for card in gallery["cards"]]),
        rungs=outputs.rung_hashes,
        fingerprint=outputs.fingerprint(),
    )


def l2_reading(analysis: Analysis) -> str:
    """How large the change is, and how unequal."""
    half, most = analysis.l2.quantiles[50], analysis.l2.quantiles[95]
    times = f", {most / half:.1f} times the median" if half > 0 else ""
    return (
        f"Half of the {count_of(analysis.images, 'image')} change by {half:.4g} or less, and the "
        f"most changed 5 % by {most:.4g} or more{times}."
    )


def cosine_reading(analysis: Analysis, below: int) -> str:
    """How far embeddings turn, and how many beyond the tolerance."""
    return (
        f"Half of the images have a cosine of {analysis.cosine.quantiles[50]:.3f} or more; {below} "
        f"of {analysis.images} ({percent(below / analysis.images)}) lie below "
        f"{1 - analysis.tolerance:g}."
    )


def tenths_reading(relation: LossRelation) -> str:
    """Whether a large change means a loss."""
    if relation.auroc is None:
        every = "No image gets" if relation.rate == 0 else "Every image gets"
        return f"{every} a low answer that {relation.words}."
    least, most = relation.tenths[0], relation.tenths[-1]
    ends = relation.auroc_interval
    between = "" if ends is None else f", 95 % interval {ends[0]:.2f} to {ends[1]:.2f}"
    return (
        f"The low answer {relation.words} for {percent(relation.rate)} of the images: "
        f"{percent(least.rate)} of the group that changes least, {percent(most.rate)} of the one "
        f"that changes most (AUROC {relation.auroc:.2f}{between})."
    )


def spearman_reading(analysis: Analysis) -> str:
    """Which label-free quantity follows the change most closely, the cosine set aside."""
    others = {n: v for n, v in analysis.spearman.items() if n != "cosine" and v is not None}
    if not others:
        return "The change, or everything it is compared with, is constant here."
    best = max(others, key=lambda name: abs(others[name]))
    return (
        f"Beside the cosine, which needs both rungs as the L2 does, {best} goes with it most "
        f"closely ({others[best]:.2f})."
    )


def extreme_reading(oracle: Sequence[float], loss: np.ndarray, relation: LossRelation) -> str:
    """What the images of a gallery have in common."""
    return (
        f"These {count_of(len(oracle), 'image')} change by {min(oracle):.4g} to {max(oracle):.4g}; "
        f"for {int(loss.sum())} of them the low answer {relation.words}."
    )
