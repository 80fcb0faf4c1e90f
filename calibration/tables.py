"""What `python -m calibration` prints on stdout for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console

from report.terminal import table
from routing import Calibration, threshold_text

from .align import Aligned
from .scoring import flat_score

console = Console(highlight=False, markup=False)


def print_fit(calibration: Calibration) -> None:
    """What a fit is worth on held-out images, every signal, and the certificate."""
    metrics = calibration.metrics
    rows = [
        (
            name.replace("_", " "),
            f"{metrics[name]:.1%}",
            "" if ends is None else f"{ends[0]:.1%} to {ends[1]:.1%}",
        )
        for name, ends in metrics["intervals"].items()
    ]
    measured = "test images" if metrics["split"] == "test" else "fit images, cross-fitted"
    title = f"{metrics['images']} {measured}, signal {calibration.signal}"
    console.print(table(title, ("", "value", "95 % interval"), rows))
    signals = metrics["signals"]
    rows = []
    for name, figures in signals.items():
        auroc, rank, needed = (figures[key] for key in ("auroc", "spearman", "needed_escalation"))
        shown = ("" if figure is None else f"{figure:.2f}" for figure in (auroc, rank))
        rows.append((name, *shown, "" if needed is None else f"{needed:.0%}"))
    title = "signals, larger is better but for the last column"
    headings = ("signal", "AUROC", "Spearman", "escalation needed")
    console.print(table(title, headings, rows, bold=[list(signals).index(calibration.signal)]))
    if metrics["no_better_than_random"]:
        console.print(f"{calibration.signal} is not shown to rank losses better than random")
    if flat := flat_score(metrics["score_spread"]):
        console.print(flat)
    if (outlook := metrics.get("outlook")) is not None:
        for line in outlook_lines(outlook, metrics["needed_for"]):
            console.print(line)
    if calibration.threshold is not None:
        threshold = threshold_text(calibration.threshold)
        console.print(f"threshold {threshold}: images with a larger score go to the full rung")
    certificate = calibration.certificate
    console.print("nothing is certified" if certificate is None else certificate["statement"])


def outlook_lines(outlook: Mapping[str, Any], max_risk: float) -> list[str]:
    """What more certify images would buy, and what risk these could prove, in words."""
    here, *more = outlook["images"]

    def share(found: Mapping[str, Any]) -> str:
        escalation = found["escalation"]
        return "all" if escalation is None else f"{escalation:.0%}"

    least = outlook["least_risk"]
    proves = "none below 50 %" if least is None else f"{least:.1%}"
    steps = ", ".join(f"{share(found)} with {found['n']:,}" for found in more)
    return [
        f"to expect at a risk of {max_risk:.2%}: {share(here)} escalated with these {here['n']:,} "
        f"certify images; {steps}",
        f"the least risk that these {here['n']:,} could certify: {proves}",
    ]


def print_growth(aligned: Aligned) -> None:
    """What an alignment is worth on held-out images, by the number it was fitted on."""
    rows = [
        (str(at.images or "not aligned"), f"{at.acceptable:.1%}", f"{at.cosine:.4f}")
        for at in aligned.growth
    ]
    headings = ("images", "acceptable answers", "mean cosine")
    title = "images held out, by images aligned on"
    console.print(table(title, headings, rows, left=()))
