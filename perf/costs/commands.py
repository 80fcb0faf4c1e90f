"""The verbs of `python -m perf` that price parts, such as `scoring` and `serving`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from routing import RungSet

from ..figures import TOO_BUSY
from . import scoring

app = typer.Typer()


@app.command("scoring")
def scoring_command(
    layers: Annotated[int, typer.Option(min=1, help="Transformer blocks L.")] = 12,
    dim: Annotated[int, typer.Option(min=1, help="Embedding size D.")] = 384,
    classes: Annotated[int, typer.Option(min=2, help="Classes C.")] = 21,
) -> None:
    """Time every signal's score as the router computes it, on random outputs."""
    batches = (1, 16)
    with Console(stderr=True).status("timing"):
        columns = [scoring.measure(batch, layers, dim, classes) for batch in batches]
    table = Table(title=f"ms per image, median of {scoring.ROUNDS}; L={layers} D={dim} C={classes}")
    table.add_column("signal")
    for batch in batches:
        table.add_column(f"batch {batch}", justify="right")
    for name in columns[0]:
        table.add_row(name, *(f"{column[name]:.3f}" for column in columns))
    Console().print(table)


@app.command("fitting")
def fitting_command(
    images: Annotated[int, typer.Option(min=100, help="Number of images.")] = 10_000,
    layers: Annotated[int, typer.Option(min=1, help="Transformer blocks L.")] = 12,
    dim: Annotated[int, typer.Option(min=1, help="Embedding size D.")] = 384,
    classes: Annotated[int, typer.Option(min=2, help="Classes C.")] = 21,
) -> None:
    """Time one `calibration fit` with all signals, on made-up outputs."""
    from . import fitting  # here, because scikit-learn takes a second to import

    with Console(stderr=True).status("fitting"):
        cost = fitting.measure(images, layers, dim, classes)
    typer.echo(
        f"{images} images, L={layers} D={dim} C={classes}: {cost.seconds:.1f} s, peak memory "
        f"{cost.peak_gib:.2f} GiB, {cost.peak_before_gib:.2f} GiB of it before the fit"
    )


@app.command("collecting")
def collecting_command(
    onnx: Annotated[Path, typer.Option(help="Folder written by `export rungs`.")] = Path(
        "build/onnx"
    ),
    images: Annotated[str, typer.Option(help="A folder of images, or `sample`.")] = "sample",
    limit: Annotated[int, typer.Option(min=1, help="Number of images.")] = 96,
    rounds: Annotated[int, typer.Option(min=1, help="How often each is timed.")] = 4,
) -> None:
    """Time `calibration collect` beside its two ONNX sessions alone, in turn."""
    from . import collecting  # here, as above

    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("rounds", total=rounds)
        found = collecting.measure(
            RungSet.load(onnx), images, limit, rounds, lambda: progress.advance(task)
        )
    typer.echo(
        f"collect / sessions alone, medians of {rounds} rounds of {limit} images: "
        f"{found.ratio(0):.2f} by the wall clock, {found.ratio(1):.2f} in CPU time"
    )


@app.command("variants")
def variants_command(
    repositories: Annotated[list[Path], typer.Argument(help="Assembled model repositories.")],
    onnx: Annotated[
        Path, typer.Option(help="Folder written by `export rungs`, for the preprocessing.")
    ] = Path("build/onnx"),
    images: Annotated[str, typer.Option(help="A folder of images, or `sample`.")] = "sample",
    limit: Annotated[int, typer.Option(min=1, help="Number of images.")] = 50,
    rounds: Annotated[int, typer.Option(min=1, help="How often each is sent.")] = 4,
) -> None:
    """Serve several repositories side by side and ask them in turn: what a change to one costs."""
    from ..measure.sets import load_pool
    from . import variants

    pool = load_pool(RungSet.load(onnx), images, limit)
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("images", total=rounds * len(pool))
        found = variants.measure(repositories, pool, rounds, lambda: progress.advance(task))
    table = Table(title=f"{rounds * len(pool)} images each, in turn; medians, milliseconds")
    router, ensemble = ("router adds", "ratio"), ("ensemble adds", "ratio of means")
    table.add_column("repository", overflow="fold")  # told apart by the ends of their paths
    for heading in ("cheap rung", *router, *ensemble):
        table.add_column(heading, justify="right")
    for repository, variant in zip(repositories, found, strict=True):
        table.add_row(
            str(repository),
            f"{variant.low_ms:.2f}",
            f"{variant.router_adds_ms:.2f}",
            "–" if variant.disturbed else f"{variant.router_overhead:.3f}",
            f"{variant.ensemble_adds_ms:.2f}",
            "–" if variant.disturbed else f"{variant.ensemble_over_router:.3f}",
        )
    Console().print(table)
    if any(variant.disturbed for variant in found):
        typer.echo(f"–: {TOO_BUSY}, a part took longer than the whole")


@app.command("serving")
def serving_command(
    onnx: Annotated[Path, typer.Option(help="Folder written by `export rungs`.")] = Path(
        "build/onnx"
    ),
    images: Annotated[str, typer.Option(help="A folder of images, or `sample`.")] = "sample",
    limit: Annotated[int, typer.Option(min=1, help="Number of images.")] = 32,
    graphs: Annotated[str, typer.Option(help="Names of graphs with commas; all if empty.")] = "",
    instances: Annotated[int, typer.Option(min=1, help="Of each graph.")] = 2,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of each instance.")] = 1,
    batch: Annotated[int, typer.Option(min=1, help="Images per request.")] = 8,
    turns: Annotated[int, typer.Option(min=1, help="How often each is measured.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Time every exported graph as Triton serves it here, the graphs in turn."""
    from .. import prices  # here, as above
    from ..measure.sets import load_pool

    rung_set, served = RungSet.load(onnx), prices.Served(instances, threads, batch, turns)
    names = [name.strip() for name in graphs.split(",") if name.strip()]
    total = prices.steps(rung_set, names, served)
    pool = load_pool(rung_set, images, limit)
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("graphs in turn", total=total)
        found = prices.price(
            rung_set,
            names,
            pool,
            served,
            lambda: progress.advance(task),
            again=lambda words: progress.reset(task, description=words),
        )
    if as_json:
        typer.echo(json.dumps({**asdict(served), "images": len(pool), "graphs": found}, indent=2))
        return
    table = Table(title=f"medians of {turns} turns; {instances} requests in flight; milliseconds")
    table.add_column("graph")
    headings = ("lone request", f"per image, batch {batch}", "server's CPU")
    for heading in (*headings, "cost / vit_high", "by CPU"):
        table.add_column(heading, justify="right")
    for name, entry in found.items():
        ratios = (entry["cost_ratio"], entry["cpu_cost_ratio"])
        table.add_row(
            name,
            *(_median(entry[key], ".2f") for key in ("latency_ms", "ms_per_image")),
            _median(entry["server_cpu_ms"], ".2f"),
            *(_median(None if entry["disturbed"] else ratio, ".3f") for ratio in ratios),
        )
    Console().print(table)
    if prices.disturbed(found):
        typer.echo(f"–: {TOO_BUSY}, clock and CPU time differ by more than 15 %")


def _median(spread: dict[str, Any] | None, how: str) -> str:
    return "–" if spread is None else format(spread["median"], how)


@app.command("sharing")
def sharing_command(
    onnx: Annotated[Path, typer.Option(help="Folder written by `export rungs`.")] = Path(
        "build/onnx"
    ),
    rounds: Annotated[int, typer.Option(min=1, help="How often each is timed.")] = 7,
) -> None:
    """Memory and speed of two rungs with their weights stored once, and without prepacking."""
    from . import sharing  # here, as above

    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("ways, rounds", total=len(sharing.WAYS) + rounds)
        found = sharing.measure_sharing(onnx, rounds, lambda: progress.advance(task))
    table = Table(title="MiB of both processes together; ms of CPU time per image, medians")
    for heading in ("weights", "prepacking", "disk", "idle"):
        table.add_column(heading)
    for batch in sharing.REQUESTS:
        table.add_column(f"PSS, batch {batch}", justify="right")
    for name, batch in found[0].ms_per_image:
        table.add_column(f"{name}, batch {batch}", justify="right")
    for one in found:
        table.add_row(
            "shared" if one.way.shared else "separate",
            "on" if one.way.prepacking else "off",
            *(f"{mib:.0f}" for mib in (one.disk_mib, one.idle_mib, *one.pss_mib.values())),
            *(f"{ms:.1f}" for ms in one.ms_per_image.values()),
        )
    Console().print(table)
