"""`python -m perf install | scoring`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from . import scoring
from .install import PerfAnalyzerError
from .install import install as install_analyzer

app = typer.Typer(
    help="Measure a served adaptive ViT.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback(invoke_without_command=True)
def _root(context: typer.Context) -> None:
    """Measure a served adaptive ViT."""
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


def main() -> None:
    """Run the command line; a foreseeable error is one line and exit code 2."""
    try:
        code = app(standalone_mode=False)
    except typer.TyperException as error:
        message = " ".join(error.format_message().split())
    except PerfAnalyzerError as error:
        message = str(error)
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
    else:
        sys.exit(code)
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
