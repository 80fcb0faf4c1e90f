"""`python -m perf install`."""

from __future__ import annotations

import sys

import typer
from rich.console import Console

from .install import PerfAnalyzerError
from .install import install as install_analyzer

app = typer.Typer(
    help="Measure a served adaptive ViT.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback()
def _root() -> None:
    """Measure a served adaptive ViT."""


@app.command()
def install() -> None:
    """Install perf_analyzer beside the virtual environment's packages, unless it is there."""
    with Console(stderr=True).status("installing perf_analyzer (about 60 MB)"):
        analyzer = install_analyzer()
    print(f"perf_analyzer: {analyzer.path}")


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
