"""`python -m perf install | scoring | fitting | collecting`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from routing import RungSet

from .analyzer import PerfAnalyzerError
from .analyzer import install as install_analyzer
from .costs import scoring

app = typer.Typer(
    help="Measure a served adaptive ViT, and what its calibration costs.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


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
    from .costs import fitting  # here, because scikit-learn takes a second to import

    with Console(stderr=True).status("fitting"):
        cost = fitting.measure(images, layers, dim, classes)
    print(
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
    from .costs import collecting  # here, as above

    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("rounds", total=rounds)
        found = collecting.measure(
            RungSet.load(onnx), images, limit, rounds, lambda: progress.advance(task)
        )
    print(
        f"collect / sessions alone, medians of {rounds} rounds of {limit} images: "
        f"{found.ratio(0):.2f} by the wall clock, {found.ratio(1):.2f} in CPU time"
    )


def main() -> None:
    """Run the command line; a foreseeable error is one line and exit code 2."""
    try:
        code = app(standalone_mode=False)
    except typer.TyperException as error:
        message = " ".join(error.format_message().split())
    except (PerfAnalyzerError, ValueError) as error:  # every error of ours about input is one
        message = str(error)
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
    else:
        sys.exit(code)
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
