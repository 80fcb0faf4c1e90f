"""The verb `plan` of `python -m calibration`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..certify import Goal
from ..fidelity import KINDS, Fidelity
from ..images import open_images
from ..pages.plan import write_plan
from ..reference import REFERENCE_IMAGES
from ..source import ImageSource
from ..splits import GROUPINGS
from . import result
from .bars import Bars
from .early import early_decision
from .plan import Planned, choose_rungs, make_plan
from .request import Request

SAMPLE_CROPS = 2400

console = Console(highlight=False, markup=False)


def plan_command(
    model: Annotated[str, typer.Option(metavar="NAME|PATH|ID", help="As `export rungs --model`.")],
    images: Annotated[str, typer.Option(help="A folder (recursive), or `sample`.")],
    max_risk: Annotated[
        float, typer.Option(help="Largest share of images with an answer other than the full's.")
    ],
    confidence: Annotated[float, typer.Option(help="Of the certificate.")] = 0.9,
    candidates: Annotated[
        str | None,
        typer.Option(
            metavar="RECIPE;...",
            help="Cheap graphs, semicolons between them (default: int8=static,align at three "
            "resolutions).",
        ),
    ] = None,
    highs: Annotated[
        str, typer.Option(metavar="RECIPE;...", help="Full graphs; fp32 is the model itself.")
    ] = "fp32; int8=static",
    beside: Annotated[
        str, typer.Option(metavar="RECIPE;...", help="Graphs to compare with, as px=168; tome=8.")
    ] = "",
    px: Annotated[int | None, typer.Option(help="Full resolution (default: the model's).")] = None,
    head_images: Annotated[
        Path | None, typer.Option(help="Fit a linear head on these, one folder per class.")
    ] = None,
    latency_budget_ms: Annotated[
        float | None,
        typer.Option(help="Most for a lone image that runs through both graphs, without router."),
    ] = None,
    fidelity: Annotated[
        str | None,
        typer.Option(metavar="|".join(KINDS), help="As `fit`; default: top1 with a head."),
    ] = None,
    tolerance: Annotated[float, typer.Option(help="As `fit`.")] = 0.1,
    group_by: Annotated[
        str, typer.Option(metavar="|".join(GROUPINGS), help="As `fit`.")
    ] = GROUPINGS[0],
    limit: Annotated[
        int | None, typer.Option(min=1, help=f"At most this many images; `sample`: {SAMPLE_CROPS}.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of splits and crops.")] = 0,
    instances: Annotated[int, typer.Option(min=1, help="Of each graph, as served.")] = 2,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of an instance.")] = 1,
    out: Annotated[Path, typer.Option(help="Folder to write.")] = Path("build/plan"),
    cache: Annotated[
        Path, typer.Option(help="Where graphs and their answers are kept for the next plan.")
    ] = Path("build/plan-cache"),
    reference_images: Annotated[int, typer.Option(min=0, help="As `fit`.")] = REFERENCE_IMAGES,
    require_certificate: Annotated[
        bool, typer.Option("--require-certificate", help="Exit 1 where nothing is chosen.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print plan.json.")] = False,
) -> None:
    """Find the cheapest certified cascade: export, run, price as served, certify, choose.

    Writes plan.json and plan.html and, where something is chosen, onnx/ and calibration.json for
    `python -m export repository`. A RECIPE is a list of px=N, depth=N, tome=N, int8=static, fp16
    and align.
    """
    request = Request(
        model=model,
        images=images,
        source=_open(images, limit, seed),
        candidates=candidates,
        highs=highs,
        beside=beside,
        px=px,
        head_images=head_images,
        goal=Goal(max_risk, confidence, "ltt"),
        fidelity=None if fidelity is None else Fidelity(fidelity, tolerance),
        tolerance=Fidelity("cosine", tolerance).tolerance,
        group_by=group_by,
        latency_budget_ms=latency_budget_ms,
        instances=instances,
        threads=threads,
        seed=seed,
        cache=cache,
        out=out,
        reference_images=reference_images,
    )
    bars = Bars(Console(stderr=True))
    planned = make_plan(request, bars)
    content = result.to_dict(planned, _early(planned), _notes(planned))
    if planned.chosen is not None:
        choose_rungs(planned, bars)
    path = result.write(content, out)
    write_plan(out / "plan.html", content)
    if as_json:
        typer.echo(json.dumps(content))
    else:
        _print(content)
        typer.echo(f"wrote {path} and {out / 'plan.html'}")
    if planned.chosen is None and require_certificate:
        raise typer.Exit(1)


def _open(images: str, limit: int | None, seed: int) -> ImageSource:
    if images == "sample":
        return open_images(f"sample:{seed}", limit or SAMPLE_CROPS)
    return open_images(images, limit)


def _early(planned: Planned) -> dict[str, Any] | None:
    chosen = planned.chosen
    if chosen is None:
        return None
    low, high = chosen.candidate.low, chosen.candidate.high
    certificate = chosen.fit.calibration.certificate or {}
    return early_decision(
        planned.pairs[low, high],
        planned.parts.splits["fit"],
        planned.parts.groups,
        planned.fidelity,
        planned.ms[low],
        planned.ms[high],
        chosen.candidate.signal,
        certificate["allowed"] / certificate["n"],
        planned.request.seed,
    )


def _notes(planned: Planned) -> list[str]:
    notes = [
        f"{name}: its alignment does not help on held-out images"
        for name, aligned in planned.aligned.items()
        if not aligned.helps
    ]
    if planned.chosen is None:
        certified = any(entry.certified for entry in planned.tested)
        reason = "is cheaper than the full model" if certified else "is certified"
        notes.append(f"no cascade {reason}: keep serving the full model")
    return notes


def _print(content: dict[str, Any]) -> None:
    table = Table(title="cascades that were tested; costs without the router")
    for column in ("cheap", "full", "signal", "escalated", "ms/image", "speed-up", "certified"):
        table.add_column(column)
    for entry in content["tested"]:
        figures, certificate = entry["certify"], entry["certificate"]
        table.add_row(
            entry["low_recipe"],
            entry["high_recipe"],
            entry["signal"],
            f"{figures['escalation_rate']:.1%}",
            f"{figures['ms_per_image']:.1f}",
            f"{figures['speedup']:.2f}",
            f"{certificate['errors']} lost of {certificate['allowed']} allowed"
            if entry["certified"]
            else "no",
        )
    console.print(table)
    for line in content["notes"]:
        console.print(line)
    if content["chosen"] is not None:
        console.print(content["chosen"]["certificate"]["statement"])
