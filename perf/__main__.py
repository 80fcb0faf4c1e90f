"""`python -m perf run | compare | original | variants | table | install | scoring | ...`."""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from client import ClientError
from server import ServerError

from .analyzer import install as install_analyzer
from .costs.commands import app as costs_app
from .figures import TOO_BUSY, PerfError, doubts_of, load_of

app = typer.Typer(
    help="Measure a served adaptive ViT, and what its calibration costs.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(costs_app)


@app.callback(invoke_without_command=True)
def _root(context: typer.Context) -> None:
    """Measure a served adaptive ViT, and what its calibration costs."""
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
    images: Annotated[str, typer.Option(help="A folder of images, or `sample`.")] = "sample",
    suite: Annotated[
        SuiteName, typer.Option(help="Minutes: quick 3, full 30, on two cores.")
    ] = SuiteName.QUICK,
    seed: Annotated[int, typer.Option(min=0, help="Which sample crops.")] = 21,
    sets: Annotated[
        str, typer.Option(help="Sets of images, mixed always among them.")
    ] = "easy,hard,mixed",
    onnx: Annotated[Path, typer.Option(help="Folder that `export rungs` wrote.")] = Path(
        "build/onnx"
    ),
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
    from .measure.suites import SUITES  # here, because scipy and matplotlib take seconds to import
    from .run import Options, measure

    if http_url is not None and url is None:
        raise PerfError("--http-url belongs to --url")
    options = Options(
        images=images,
        seed=seed,
        suite=SUITES[suite.value],
        sets=_set_names(sets),
        onnx=onnx,
        calibration=calibration,
        repository=repository,
        url=url,
        http_url=http_url,
        out=out,
    )
    record = measure(options, Console(stderr=True))
    _print_verdict(record.summary)
    print(f"took {record.summary['seconds']:.0f} s; open {record.report_path}")


def _set_names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    unknown = sorted(set(names) - {"easy", "hard", "mixed"})
    if unknown or "mixed" not in names:
        raise PerfError(f"--sets {text!r}: give mixed, and easy or hard beside it, with commas")
    return names


def _print_verdict(summary: dict[str, Any]) -> None:
    """The figures; of a load whose figures cannot be true that the machine was too busy."""
    doubts: dict[str | None, list[str]]
    doubts = {load: doubts_of(summary, load) for load in ("c1", "saturated")}
    table = Table(title="one request in flight, the systems in turn on the same images")
    for heading in ("system", "agreement", "escalated", "ms", "cost / static high"):
        table.add_column(heading, justify="left" if heading == "system" else "right")
    for answer in summary["answers"].values():
        table.add_row(
            answer["title"],
            f"{answer['agreement_with_high']:.1%}",
            f"{answer['escalation_rate']:.1%}",
            f"{answer['cost_ms']['median']:.1f}",
            "–" if doubts["c1"] else f"{answer['cost_ratio']['median']:.2f}",
        )
    Console().print(table)
    figures = Table("figure", "median", "min", "max", "runs")
    for name, value in summary.items():
        if isinstance(value, dict) and "median" in value and not doubts.get(load_of(name)):
            low, middle, high = (f"{value[key]:.3f}" for key in ("min", "median", "max"))
            figures.add_row(name, middle, low, high, str(value["runs"]))
    Console().print(figures)
    for load, words in (("c1", "one request in flight"), ("saturated", "saturated")):
        if doubts[load]:
            print(f"{words}: {TOO_BUSY} ({'; '.join(doubts[load])})")


@app.command()
def compare(
    before: Annotated[Path, typer.Argument(help="summary.json of one run, or its folder.")],
    after: Annotated[Path, typer.Argument(help="summary.json of another.")],
) -> None:
    """Say what changed between two runs beyond their noise."""
    from .comparable import warnings
    from .compare import compare as compare_summaries
    from .compare import load_summary, render

    first, second = load_summary(before), load_summary(after)
    for part in render(compare_summaries(first, second), warnings(first, second)):
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


def main() -> None:
    """Run the command line; a foreseeable error is one line and exit code 2."""
    try:
        code = app(standalone_mode=False)
    except typer.TyperException as error:
        message = " ".join(error.format_message().split())
    except (ClientError, ServerError, ValueError) as error:  # every error about input is one
        message = " ".join(str(error).split())
    except OSError as error:
        message = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    else:
        sys.exit(code)
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
