"""`python -m export rungs | align | choose | repository | versions`: from a model to Triton."""

from __future__ import annotations

import json
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from bundle.alignment import Alignment, AlignmentError
from bundle.graphs import GraphsError, GraphSet
from bundle.recipe import Recipe, RecipeError
from bundle.versions import VersionError, Versions, switch
from bundle.versions import drop as drop_version
from export.errors import ExportError, UsageError, first_line
from export.progress import Steps
from export.repository import RepositoryError, assemble
from export.settings import ClientParameters, OnHighFailure, ReferenceCheck, Settings
from export.versions import add_version
from routing import (
    WEIGHTS,
    Calibration,
    CalibrationError,
    ManifestError,
)
from routing.provenance import runtime_words
from routing.reference import reference_words

RECIPE = "RECIPE"

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


class Task(str, Enum):
    """What a head can answer: `routing.TASKS`."""

    CLASSES = "classes"
    LABELS = "labels"
    VALUE = "value"


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
    low: Annotated[
        str | None,
        typer.Option(metavar=RECIPE, help="The cheap rung, such as px=112,int8=static."),
    ] = None,
    high: Annotated[
        str | None,
        typer.Option(metavar=RECIPE, help="The full rung, such as px=224; its px is the image's."),
    ] = None,
    beside: Annotated[
        list[str] | None,
        typer.Option(metavar=RECIPE, help="A graph to measure beside the two; may be repeated."),
    ] = None,
    head: Annotated[
        Head | None, typer.Option(help="Fit this head on --images and bake it into both rungs.")
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="Images to fit the head on, one folder per class.")
    ] = None,
    fit_images: Annotated[
        Path | None,
        typer.Option(help="Images that int8=static learns ranges from (default: --images)."),
    ] = None,
    task: Annotated[
        Task | None,
        typer.Option(
            help="What its own head answers (default: by its config's problem_type and the number "
            "of outputs): one class, independent labels by sigmoid, or a value."
        ),
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Weights of static-vit: safetensors or a torch state dict.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Initial weights of static-vit.")] = 0,
    opset: Annotated[int, typer.Option(help="ONNX opset, 18 to 21.")] = 20,
    rtol: Annotated[float, typer.Option(help="Parity tolerance, relative.")] = 1e-4,
    atol: Annotated[float, typer.Option(help="Parity tolerance, absolute.")] = 1e-4,
    as_json: Annotated[bool, typer.Option("--json", help="Print the record as JSON.")] = False,
) -> None:
    """Export the cheap and the full rung of a model to ONNX, checked against torch.

    A RECIPE is a list of px=N (resolution inside the graph), depth=N (first blocks only), tome=N
    (tokens merged in each block), and int8, int8=static or fp16. Writes a graph for each, as
    full.onnx and px112_int8static.onnx, graphs.json, labels.txt where there are labels, and
    weights.bin where graphs share weights.
    """
    if (head is None) != (images is None):
        raise UsageError("--head linear and --images DIR go together")
    recipes = [None if text is None else Recipe.parse(text) for text in (low, high)]
    # torch and transformers take seconds to import; --help and the checks above do not need them.
    from export.rungs import RungsRequest, export_rungs

    request = RungsRequest(
        model=model,
        out=out,
        low=recipes[0],
        high=recipes[1],
        beside=tuple(Recipe.parse(text) for text in beside or ()),
        probe_images=images,
        fit_images=fit_images,
        task=None if task is None else task.value,
        checkpoint=checkpoint,
        seed=seed,
        opset=opset,
        rtol=rtol,
        atol=atol,
    )
    graphs = export_rungs(request, Steps(Console(stderr=True)))
    if as_json:
        typer.echo(json.dumps(graphs.to_dict(), indent=2, ensure_ascii=False))
    else:
        _print_summary(graphs, out)


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
    instances: Annotated[
        int, typer.Option(min=1, help="Instances of each rung on a CPU; times threads, the cores.")
    ] = 1,
    max_queue: Annotated[
        int, typer.Option(min=1, help="Requests that may wait in front of each model.")
    ] = 64,
    on_high_failure: Annotated[
        OnHighFailure, typer.Option(help="Answer of an image whose full rung failed.")
    ] = OnHighFailure.ERROR,
    high_timeout_ms: Annotated[
        int, typer.Option(min=1, help="How long a call of the full rung may take.")
    ] = 10_000,
    client_parameters: Annotated[
        ClientParameters,
        typer.Option(help="careful: a request may only lower the threshold or ask for high."),
    ] = ClientParameters.CAREFUL,
    degrade_queue_depth: Annotated[
        int,
        typer.Option(
            metavar="IMAGES", help="So many that had to wait raise the threshold; 0: never."
        ),
    ] = 0,
    degrade_threshold: Annotated[
        float | None, typer.Option(help="The highest it is raised to, oracle units.")
    ] = None,
    audit_fraction: Annotated[
        float, typer.Option(help="Share of the images that the full rung checks.")
    ] = 0.0,
    reference_check: Annotated[
        ReferenceCheck,
        typer.Option(
            help="Where the server answers otherwise than the calibration did: warn, or refuse "
            "requests."
        ),
    ] = ReferenceCheck.WARN,
    add: Annotated[
        bool,
        typer.Option(
            "--add-version", help="Add --calibration to the repository at --out, beside what is."
        ),
    ] = False,
    shadow: Annotated[
        float | None,
        typer.Option(help="With it: share of the live images that it scores and does not answer."),
    ] = None,
) -> None:
    """Assemble the model repository that Triton serves.

    An assembled repository at --out is replaced, or gets another version of its router with
    --add-version; anything else there is left alone.
    """
    settings = Settings(
        intra_op_threads=intra_op_threads,
        instances=instances,
        max_queue=max_queue,
        on_high_failure=on_high_failure,
        high_timeout_ms=high_timeout_ms,
        client_parameters=client_parameters,
        degrade_queue_depth=degrade_queue_depth,
        degrade_threshold=degrade_threshold,
        audit_fraction=audit_fraction,
        reference_check=reference_check,
    )
    if add:
        if settings != Settings():
            raise UsageError("--add-version changes the artifact only; assemble for other settings")
        version = add_version(out, calibration, shadow or 0.0)
        rollout = f"python -m server rollout --repository {out}"
        shadowing = f"let it score with {rollout}; " if shadow else ""
        typer.echo(
            f"added router/{version} to {out}; {shadowing}let it answer with {rollout} "
            f"--to {version}"
        )
        return
    if shadow is not None:
        raise UsageError("--shadow goes with --add-version")
    assemble(GraphSet.load(onnx), calibration, out, settings)
    artifact = Calibration.load(calibration)
    answers = reference_words(artifact.reference_answers)
    typer.echo(f"calibrated on {runtime_words(artifact.data.get('runtime'))}; {answers}")
    typer.echo(f"wrote {out}; serve it with python -m server --repository {out}")


@app.command("versions")
def versions_command(
    repository: Annotated[Path, typer.Option(help="An assembled repository.")] = Path(
        "build/model_repository"
    ),
    live: Annotated[
        int | None, typer.Option(metavar="N", help="Let this version of the router answer.")
    ] = None,
    drop: Annotated[
        int | None, typer.Option(metavar="N", help="Remove this version, which must not answer.")
    ] = None,
) -> None:
    """Print which versions of the router a repository serves; change them where no server runs.

    For a running server, python -m server rollout --to N does what --live does, and loads it.
    """
    if live is not None:
        switch(repository, live)
    if drop is not None:
        drop_version(repository, drop)
    versions = Versions.load(repository)
    typer.echo(versions.sentence)
    if versions.warning:
        typer.echo(f"warning: {versions.warning}", err=True)


@app.command("align")
def align_command(
    onnx: Annotated[Path, typer.Option(help="Folder that `rungs` wrote.")] = Path("build/onnx"),
    alignment: Annotated[
        Path, typer.Option(help="File that `python -m calibration align` wrote.")
    ] = Path("build/calibration/alignment.npz"),
    graph: Annotated[
        str | None, typer.Option(metavar="NAME", help="Default: the graph that is the cheap rung.")
    ] = None,
) -> None:
    """Bake a fitted alignment into a cheap graph; collect and fit again afterwards.

    The aligned graph, NAME_align, becomes the cheap rung; the one without stays beside it.
    """
    from export.align import align

    graphs = GraphSet.load(onnx)
    name = graphs.low.name if graph is None else graph
    made = align(graphs, name, Alignment.load(alignment))
    made.cast(f"{name}_align", made.high.name).save(onnx)
    typer.echo(f"wrote {name}_align in {onnx}, which is the cheap rung now")


@app.command("choose")
def choose_command(
    onnx: Annotated[Path, typer.Option(help="Folder that `rungs` wrote.")],
    low: Annotated[str, typer.Option(metavar="NAME", help="The graph that is the cheap rung.")],
    high: Annotated[str, typer.Option(metavar="NAME", help="The graph that is the full rung.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    beside: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="A graph to lie beside them; may be repeated (default: all)."
        ),
    ] = None,
) -> None:
    """Let two graphs that were exported together be the rungs, in another folder."""
    if out.resolve() == onnx.resolve():
        raise UsageError(f"--out {out} holds the graphs to choose from; give another folder")
    GraphSet.load(onnx).cast(low, high).place(out, beside)
    typer.echo(f"wrote {out}")


def _head_words(graphs: GraphSet) -> str:
    count, task = graphs.classes, graphs.task
    if task is None:
        return "no head"
    if task == "classes":
        return f"{count} classes"
    return f"{count} {task.removesuffix('s')}{'' if count == 1 else 's'}"


def _print_summary(graphs: GraphSet, out: Path) -> None:
    table = Table(title=f"{graphs.backbone}, {_head_words(graphs)}", caption=f"in {out}")
    table.add_column("graph", no_wrap=True)  # its file is this and .onnx
    table.add_column("recipe", overflow="fold")  # a cut one could not be asked for again
    for heading in ("MiB", "difference to torch", "cosine to full"):
        table.add_column(heading)
    for name, graph in graphs.graphs.items():
        worst = max((check["max_abs_diff"] for check in graph.notes["checks"]), default=None)
        table.add_row(
            name,
            graph.record.recipe,
            f"{graph.file.stat().st_size / 2**20:.1f}",
            "" if worst is None else f"{worst:.1e}",
            f"{graph.notes['fidelity']['cosine_mean']:.4f}",
        )
    if (out / WEIGHTS).exists():
        size_mib = (out / WEIGHTS).stat().st_size / 2**20
        table.add_row(WEIGHTS, "what they share", f"{size_mib:.1f}")
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
    except (
        AlignmentError,
        CalibrationError,
        ManifestError,
        RecipeError,
        RepositoryError,
        GraphsError,
        UsageError,
        VersionError,
    ) as error:
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
