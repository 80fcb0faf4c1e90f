"""`python -m perf run | compare | original | variants | table | install | scoring | ...`."""

from __future__ import annotations

import json
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from bundle.graphs import GraphSet
from client import ClientError
from report import terminal
from report.words import by_image
from server import ServerError

from .analyzer_install import install as install_analyzer
from .figures import TOO_BUSY, PerfError, doubts_of, load_of

Onnx = Annotated[Path, typer.Option(help="Folder that `export rungs` wrote.")]
Images = Annotated[str, typer.Option(help="A folder of images, or `sample`.")]

app = typer.Typer(
    help="Measure a served adaptive ViT, and what its graphs cost.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback(invoke_without_command=True)
def _root(context: typer.Context) -> None:
    """Measure a served adaptive ViT, and what its graphs cost."""
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(2)


@app.command()
def install() -> None:
    """Install perf_analyzer beside the virtual environment's packages, unless it is there."""
    with Console(stderr=True).status("installing perf_analyzer (about 60 MB)"):
        analyzer = install_analyzer()
    print(f"perf_analyzer: {analyzer.path}")


class SuiteName(str, Enum):
    """How much to measure."""

    QUICK = "quick"
    FULL = "full"


@app.command()
def run(
    images: Images = "sample",
    suite: Annotated[
        SuiteName, typer.Option(help="Minutes: quick 3, full 30, on two cores.")
    ] = SuiteName.QUICK,
    onnx: Onnx = Path("build/onnx"),
    calibration: Annotated[
        Path, typer.Option(help="Artifact that `calibration fit` wrote.")
    ] = Path("build/calibration/calibration.json"),
    repository: Annotated[
        Path, typer.Option(help="Model repository that `export repository` wrote.")
    ] = Path("build/model_repository"),
    url: Annotated[
        str | None,
        typer.Option(help="gRPC HOST:PORT of a running server, instead of starting one."),
    ] = None,
    http_url: Annotated[
        str | None, typer.Option(help="Its HTTP HOST:PORT; without it HTTP is left out.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder to write to.")] = Path("build/perf"),
) -> None:
    """Measure latency, throughput and memory beside the alternatives, and write a report.

    Ctrl-C keeps what was measured, from the first table on.
    """
    from .run import Options, measure
    from .suites import SUITES  # here, because scipy and matplotlib take seconds to import

    if http_url is not None and url is None:
        raise PerfError("--http-url belongs to --url")
    how = (images, SUITES[suite.value], onnx, calibration, repository)
    options = Options(*how, url, http_url, out)
    record = measure(options, Console(stderr=True))
    _print_verdict(record.summary)
    print(f"took {record.summary['seconds']:.0f} s; open {record.report_path}")


def _print_verdict(summary: dict[str, Any]) -> None:
    """The figures; of a load whose figures cannot be true that the machine was too busy."""
    doubts: dict[str | None, list[str]]
    doubts = {load: doubts_of(summary, load) for load in ("c1", "saturated")}
    rows = [
        (
            answer["title"],
            f"{answer['agreement_with_high']:.1%}",
            f"{answer['escalation_rate']:.1%}",
            f"{answer['cost_ms']['median']:.1f}",
            "–" if doubts["c1"] else f"{answer['cost_ratio']['median']:.2f}",
        )
        for answer in summary["answers"].values()
    ]
    title = "one request in flight, the systems in turn on the same images"
    headings = ("system", "agreement", "escalated", "ms", "cost / static high")
    Console().print(terminal.table(title, headings, rows))
    figures = [
        (name, *(f"{value[key]:.3f}" for key in ("median", "min", "max")), str(value["runs"]))
        for name, value in summary.items()
        if isinstance(value, dict) and "median" in value and not doubts.get(load_of(name))
    ]
    Console().print(terminal.table("", ("figure", "median", "min", "max", "runs"), figures))
    for load, words in (("c1", "one request in flight"), ("saturated", "saturated")):
        if doubts[load]:
            print(f"{words}: {TOO_BUSY} ({'; '.join(doubts[load])})")


@app.command()
def compare(
    before: Annotated[Path, typer.Argument(help="summary.json of one run, or its folder.")],
    after: Annotated[Path, typer.Argument(help="summary.json of another.")],
) -> None:
    """Say what changed between two runs beyond their noise."""
    from . import compare as runs

    first, second = runs.load_summary(before), runs.load_summary(after)
    for part in runs.render(runs.compare(first, second), runs.warnings(first, second)):
        Console().print(part)


@app.command("original")
def original_command(
    build: Annotated[
        Path, typer.Option(help="Folder with onnx/, calibration.json and model_repository/.")
    ] = Path("build/original"),
    images: Annotated[int, typer.Option(min=1, help="Number of sample crops.")] = 2000,
    out: Annotated[Path | None, typer.Option(help="File to write.")] = None,
) -> None:
    """Repeat the tables of the research script this project began with: `make original`."""
    from .original import run_original

    run_original(build, out or build / "original.json", images)


@app.command()
def table(
    results: Annotated[Path, typer.Option(help="Folder of committed summaries.")] = Path(
        "perf/results"
    ),
    readme: Annotated[
        Path | None, typer.Option(help="Put the table between the marks of this file instead.")
    ] = None,
) -> None:
    """Print README's table of results, or put it into README.md."""
    from .results_table import results_table, update_readme

    if readme is None:
        print(results_table(results))
    else:
        print(f"{readme}: {'changed' if update_readme(readme, results) else 'as it was'}")


@app.command()
def scoring(
    layers: Annotated[int, typer.Option(min=1, help="Transformer blocks L.")] = 12,
    dim: Annotated[int, typer.Option(min=1, help="Embedding size D.")] = 384,
    classes: Annotated[int, typer.Option(min=2, help="Classes C.")] = 21,
) -> None:
    """Time every signal's score as the router computes it, on random outputs."""
    from .attribution import SIGNAL_ROUNDS, all_signals

    batches = (1, 16)
    with Console(stderr=True).status("timing"):
        columns = [all_signals(batch, layers, dim, classes) for batch in batches]
    title = f"ms per image, median of {SIGNAL_ROUNDS}; L={layers} D={dim} C={classes}"
    rows = [(name, *(f"{column[name]:.3f}" for column in columns)) for name in columns[0]]
    headings = ("signal", *(f"batch {batch}" for batch in batches))
    Console().print(terminal.table(title, headings, rows))


@app.command("variants")
def variants_command(
    repositories: Annotated[list[Path], typer.Argument(help="Assembled model repositories.")],
    onnx: Onnx = Path("build/onnx"),
    images: Images = "sample",
    limit: Annotated[int, typer.Option(min=1, help="Number of images.")] = 50,
    rounds: Annotated[int, typer.Option(min=1, help="How often each is sent.")] = 4,
) -> None:
    """Serve several repositories side by side and ask them in turn: what a change to one costs."""
    from . import variants
    from .images import load_pool

    bars = terminal.Bars(Console(stderr=True))
    pool = load_pool(GraphSet.load(onnx), images, limit, stage=bars.stage)
    if pool.note:
        bars.say(pool.note)
    requests = rounds * len(pool) * len(repositories) * len(variants.SYSTEMS)
    with bars.stage("requests in turn", requests) as bar:
        found = variants.measure(repositories, pool, rounds, bar.advance)
    rows = [
        (
            str(repository),  # told apart by the ends of their paths
            f"{variant.low_ms:.2f}",
            f"{variant.router_adds_ms:.2f}",
            "–" if variant.disturbed else f"{variant.router_overhead:.3f}",
            f"{variant.ensemble_adds_ms:.2f}",
            "–" if variant.disturbed else f"{variant.ensemble_over_router:.3f}",
        )
        for repository, variant in zip(repositories, found, strict=True)
    ]
    title = f"{rounds * len(pool)} images each, in turn; medians, milliseconds"
    headings = ("repository", "cheap rung", "router adds", "ratio", "ensemble adds")
    Console().print(terminal.table(title, (*headings, "ratio of means"), rows))
    if any(variant.disturbed for variant in found):
        typer.echo(f"–: {TOO_BUSY}, a part took longer than the whole")


@app.command()
def serving(
    onnx: Onnx = Path("build/onnx"),
    images: Images = "sample",
    limit: Annotated[int, typer.Option(min=1, help="Number of images.")] = 32,
    graphs: Annotated[str, typer.Option(help="Names of graphs with commas; all if empty.")] = "",
    instances: Annotated[int, typer.Option(min=1, help="Of each graph.")] = 2,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of each instance.")] = 1,
    batch: Annotated[int, typer.Option(min=1, help="Images per request.")] = 8,
    turns: Annotated[int, typer.Option(min=1, help="How often each is measured.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Time every exported graph as Triton serves it here, the graphs in turn."""
    from . import prices
    from .images import load_pool

    graph_set, served = GraphSet.load(onnx), prices.Served(instances, threads, batch, turns)
    names = [name.strip() for name in graphs.split(",") if name.strip()]
    bars = terminal.Bars(Console(stderr=True))
    pool = load_pool(graph_set, images, limit, stage=bars.stage)
    if pool.note:
        bars.say(pool.note)
    found = prices.price(graph_set, names, pool, served, bars)
    if as_json:
        typer.echo(json.dumps({**asdict(served), "images": len(pool), "graphs": found}, indent=2))
        return
    rows = []
    for name, entry in found.items():
        plain = (entry[key] for key in ("latency_ms", "ms_per_image", "server_cpu_ms"))
        ratios = (entry["cost_ratio"], entry["cpu_cost_ratio"])
        believed = (None if entry["disturbed"] else ratio for ratio in ratios)
        cells = [_median(spread, ".2f") for spread in plain]
        rows.append((name, *cells, *(_median(ratio, ".3f") for ratio in believed)))
    title = f"medians of {turns} turns; {instances} requests in flight; milliseconds"
    headings = ("graph", "lone request", f"per image, batch {batch}", "server's CPU")
    Console().print(terminal.table(title, (*headings, "cost / full model", "by CPU"), rows))
    for name, entry in found.items():
        if (own := entry["per_image"]) is not None:
            typer.echo(f"{name}: {_by_image(own, entry['disturbed'])}")
    if prices.disturbed(found):
        typer.echo(f"–: {TOO_BUSY}, clock and CPU time differ by more than 15 %")


def _by_image(own: dict[str, Any], disturbed: bool) -> str:
    """A line on lone requests to a graph whose cost depends on the image."""
    cost = "–" if disturbed else f"{by_image(own)} of the full model's cost"
    latency = "{p50:.2f} ms, at the 95th percentile {p95:.2f} ms".format_map(own["latency_ms"])
    line = f"a lone image, of {own['images']}: {cost}; {latency}"
    if own["tokens"] is None:
        return line
    return line + "; {mean:.1f} tokens ({min:g} to {max:g})".format_map(own["tokens"])


def _median(spread: dict[str, Any] | None, how: str) -> str:
    return "–" if spread is None else format(spread["median"], how)


def main() -> None:
    """Run the command line; a foreseeable error is one line and exit code 2."""
    terminal.run(app, (ClientError, ServerError, ValueError))


if __name__ == "__main__":
    main()
