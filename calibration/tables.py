"""What `python -m calibration` prints on stdout for people."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from routing import Calibration, threshold_text

from .align import Aligned
from .scoring import flat_score

console = Console(highlight=False, markup=False)


def print_fit(calibration: Calibration) -> None:
    """What a fit is worth on held-out images, every signal, and the certificate."""
    metrics = calibration.metrics
    table = Table(title=f"{metrics['images']} held-out images, signal {calibration.signal}")
    for column in ("", "value", "95 % interval"):
        table.add_column(column, justify="left" if not column else "right")
    for name, interval in metrics["intervals"].items():
        between = "" if interval is None else f"{interval[0]:.1%} to {interval[1]:.1%}"
        table.add_row(name.replace("_", " "), f"{metrics[name]:.1%}", between)
    console.print(table)
    table = Table(title="signals, larger is better but for the last column")
    for column in ("signal", "AUROC", "Spearman", "escalation needed"):
        table.add_column(column, justify="left" if column == "signal" else "right")
    for name, figures in metrics["signals"].items():
        style = "bold" if name == calibration.signal else None
        auroc, rank, needed = (figures[key] for key in ("auroc", "spearman", "needed_escalation"))
        table.add_row(
            name,
            *("" if figure is None else f"{figure:.2f}" for figure in (auroc, rank)),
            "" if needed is None else f"{needed:.0%}",
            style=style,
        )
    console.print(table)
    if metrics["no_better_than_random"]:
        console.print(f"{calibration.signal} is not shown to rank losses better than random")
    flat = flat_score(metrics["score_spread"])
    if flat:
        console.print(flat)
    if calibration.threshold is not None:
        threshold = threshold_text(calibration.threshold)
        console.print(f"threshold {threshold}: images with a larger score go to the full rung")
    certificate = calibration.certificate
    console.print("nothing is certified" if certificate is None else certificate["statement"])


def print_growth(aligned: Aligned) -> None:
    """What an alignment is worth on held-out images, by the number it was fitted on."""
    table = Table(title="images held out, by images aligned on")
    for column in ("images", "acceptable answers", "mean cosine"):
        table.add_column(column, justify="right")
    for point in aligned.growth:
        images = str(point.images) if point.images else "not aligned"
        table.add_row(images, f"{point.acceptable:.1%}", f"{point.cosine:.4f}")
    console.print(table)


def print_rows(title: str, rows: Sequence[tuple[str, ...]]) -> None:
    """Rows of text under a title."""
    table = Table(title=title, show_header=False)
    for row in rows:
        table.add_row(*row)
    console.print(table)
