"""`python -m calibration sample | collect | fit`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from routing import Calibration, RungSet, RungSetError

from .collect import Outputs, OutputsError, collect
from .fit import FitError, Target, fit
from .images import ImagesError, list_folder, read_folder
from .sample import crops, write

app = typer.Typer(
    help="Run both rungs offline, fit the score, choose the threshold.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
console = Console(stderr=True)

OnnxOption = Annotated[Path, typer.Option("--onnx", help="Folder written by `export rungs`.")]
OutputsOption = Annotated[Path, typer.Option("--outputs", help="File written by `collect`.")]
OUTPUTS = Path("build/calibration/outputs.npz")


@app.command("sample")
def sample_command(
    out: Annotated[Path, typer.Option(help="Folder to write; must be empty or absent.")],
    count: Annotated[int, typer.Option(min=1, help="Number of crops.")] = 600,
    seed: Annotated[int, typer.Option(help="Different seeds are independent draws.")] = 0,
) -> None:
    """Write random crops of shipped photographs, one sub-folder per photograph."""
    write(out, count, seed)
    print(f"wrote {count} crops to {out}")


@app.command("collect")
def collect_command(
    images: Annotated[str, typer.Option(help="A folder of images, or `sample`.")],
    onnx: OnnxOption = Path("build/onnx"),
    out: Annotated[Path, typer.Option(help="File to write.")] = OUTPUTS,
    limit: Annotated[
        int | None, typer.Option(min=1, help="At most this many images; `sample`: 600.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the sample crops.")] = 1,
) -> None:
    """Run both rungs over images with ONNX Runtime and store their outputs."""
    rung_set = RungSet.load(onnx)
    if images == "sample":
        total = limit or 600
        stream, source = crops(total, seed), f"sample crops, seed {seed}"
    else:
        folder = Path(images)
        files = list_folder(folder)[:limit]
        total = len(files)
        stream, source = read_folder(folder, files), f"folder {folder.name}"
    columns = (TextColumn("collect"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("collect", total=total)
        outputs, unreadable = collect(
            rung_set, stream, source, lambda count: progress.advance(task, count)
        )
    for line in unreadable:
        console.print(f"skipped {line}", markup=False, highlight=False)
    outputs.save(out)
    print(f"wrote {len(outputs)} images' outputs to {out}")


@app.command("fit")
def fit_command(
    escalation_rate: Annotated[
        float | None, typer.Option(help="Share of images that should escalate, 0 to 1.")
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Threshold in oracle units, instead of a rate.")
    ] = None,
    signal: Annotated[
        str | None, typer.Option(help="Default: margin with a head, else cls_path.")
    ] = None,
    outputs: OutputsOption = OUTPUTS,
    onnx: OnnxOption = Path("build/onnx"),
    out: Annotated[Path, typer.Option(help="Artifact to write.")] = Path(
        "build/calibration/calibration.json"
    ),
    seed: Annotated[int, typer.Option(help="Of the splits.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the metrics as JSON.")] = False,
) -> None:
    """Fit the score and write calibration.json."""
    target = Target(escalation_rate, threshold)
    calibration = fit(Outputs.load(outputs), RungSet.load(onnx), target, signal, seed)
    calibration.save(out)
    if as_json:
        print(json.dumps({"calibration": str(out), **calibration.metrics}))
    else:
        _print_fit(calibration, out)


def _print_fit(calibration: Calibration, out: Path) -> None:
    table = Table(title=f"{calibration.backbone}: signal {calibration.signal}")
    table.add_column("on held-out images")
    table.add_column("value", justify="right")
    for name, value in calibration.metrics.items():
        text = f"{value:.3f}" if isinstance(value, float) else str(value)
        table.add_row(name.replace("_", " "), text)
    table.add_row("threshold (oracle units)", f"{calibration.threshold:.4g}")
    Console().print(table)
    print(f"wrote {out}")


def main() -> None:
    """Run the command line; a foreseeable error is one line and exit code 2."""
    try:
        code = app(standalone_mode=False)
    except typer.TyperException as error:
        message = " ".join(error.format_message().split())
    except (ImagesError, OutputsError, FitError, RungSetError) as error:
        message = str(error)
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
    else:
        sys.exit(code)
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
