"""`python -m export rungs | repository`: torch backbone to checked ONNX rungs to what is served."""

from __future__ import annotations

import json
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from export.errors import ExportError, UsageError, first_line
from export.progress import Steps
from export.repository import RepositoryError, assemble
from routing import CalibrationError, RungSet, RungSetError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


class Head(str, Enum):
    """Heads that can be fitted here."""

    LINEAR = "linear"


@app.callback()
def verbs() -> None:
    """Turn a Vision Transformer into what Triton serves."""


@app.command()
def rungs(
    model: Annotated[
        str,
        typer.Option(
            metavar="NAME|PATH|ID",
            help="static-vit, dinov2-small, a directory that save_pretrained wrote, or a hub id "
            "of a ViT, DeiT or DINOv2.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Directory to write to.")] = Path("build/onnx"),
    low_px: Annotated[
        int | None, typer.Option(help="Resolution of the cheap rung (default: the model's).")
    ] = None,
    high_px: Annotated[
        int | None, typer.Option(help="Resolution of the full rung (default: the model's).")
    ] = None,
    static_px: Annotated[
        str | None,
        typer.Option(
            metavar="PX,PX,...",
            help="Resolutions between the two, exported beside the rungs for perf to measure.",
        ),
    ] = None,
    head: Annotated[
        Head | None, typer.Option(help="Fit this head on --images and bake it into both rungs.")
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="Images to fit the head on, one folder per class.")
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Weights of static-vit: safetensors or a torch state dict.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Initial weights of static-vit.")] = 0,
    opset: Annotated[int, typer.Option(help="ONNX opset, 18 to 21.")] = 18,
    rtol: Annotated[float, typer.Option(help="Parity tolerance, relative.")] = 1e-4,
    atol: Annotated[float, typer.Option(help="Parity tolerance, absolute.")] = 1e-4,
    as_json: Annotated[bool, typer.Option("--json", help="Print the record as JSON.")] = False,
) -> None:
    """Export the cheap and the full rung of a model to ONNX, checked against torch.

    Writes vit_low.onnx, vit_high.onnx, rungs.json and, where there are labels, labels.txt; with
    --static-px 140,168 also static_140.onnx and static_168.onnx.
    """
    if (head is None) != (images is None):
        raise UsageError("--head linear and --images DIR go together")
    resolutions_px = () if static_px is None else _parse_static_px(static_px)
    # torch and transformers take seconds to import; --help and the checks above do not need them.
    from export.rungs import RungsRequest, export_rungs

    request = RungsRequest(
        model=model,
        out=out,
        low_px=low_px,
        high_px=high_px,
        static_px=resolutions_px,
        probe_images=images,
        checkpoint=checkpoint,
        seed=seed,
        opset=opset,
        rtol=rtol,
        atol=atol,
    )
    record = export_rungs(request, Steps(Console(stderr=True)))
    if as_json:
        typer.echo(json.dumps(record, indent=2, ensure_ascii=False))
    else:
        _print_summary(record, out)


@app.command()
def repository(
    onnx: Annotated[Path, typer.Option(help="Folder that `rungs` wrote.")] = Path("build/onnx"),
    calibration: Annotated[
        Path, typer.Option(help="Artifact that `python -m calibration fit` wrote.")
    ] = Path("build/calibration/calibration.json"),
    out: Annotated[Path, typer.Option(help="Directory to write to.")] = Path(
        "build/model_repository"
    ),
    intra_op_threads: Annotated[
        int, typer.Option(min=1, help="CPU threads of each rung; both rungs within the cores.")
    ] = 1,
) -> None:
    """Assemble the model repository that Triton serves.

    An assembled repository at --out is replaced; anything else there is left alone.
    """
    assemble(RungSet.load(onnx), calibration, out, intra_op_threads)
    typer.echo(f"wrote {out}; serve it with python -m server --repository {out}")


def _parse_static_px(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(px) for px in text.split(","))
    except ValueError:
        raise UsageError(
            f"--static-px {text!r} must be whole numbers with commas between, as 140,168,196"
        ) from None


def _print_summary(record: dict[str, Any], out: Path) -> None:
    classes = f", {record['classes']} classes" if record["classes"] else ", no head"
    table = Table(title=f"{record['backbone']}{classes}", caption=f"in {out}")
    for heading in ("rung", "px", "MiB", "worst difference to torch", "file"):
        table.add_column(heading)
    for name, rung in {**record["rungs"], **record["alternatives"]}.items():
        checks = [check for check in record["parity"]["checks"] if check["rung"] == name]
        worst = max(checks, key=lambda check: check["max_abs_diff"])
        size_mib = (out / rung["file"]).stat().st_size / 2**20
        table.add_row(
            name,
            str(rung["px"]),
            f"{size_mib:.1f}",
            f"{worst['max_abs_diff']:.1e} ({worst['output']})",
            rung["file"],
        )
    Console().print(table)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; an error is one line.

    Returns:
        The exit code: 0, 1 where the export itself went wrong, 2 for bad usage, bad input files or
        a path that cannot be used, 130 when interrupted.
    """
    try:
        return app(args=arguments, prog_name="python -m export", standalone_mode=False) or 0
    except typer.TyperException as error:
        message = " ".join(error.format_message().split())
        return _complain(message, 2) if message else 2  # without a verb the help was printed
    except (CalibrationError, RepositoryError, RungSetError, UsageError) as error:
        return _complain(str(error), 2)
    except ExportError as error:
        return _complain(str(error), 1)
    except OSError as error:
        known = error.filename is not None and error.strerror is not None
        return _complain(f"{error.filename}: {error.strerror}" if known else first_line(error), 2)
    except (KeyboardInterrupt, typer.Abort):
        return 130


def _complain(message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
