"""`python -m export rungs | align | repository | versions`: from a model to Triton."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from bundle.adapted import AdaptedError
from bundle.alignment import Alignment, AlignmentError
from bundle.fidelity import FidelityError
from bundle.graphs import GraphsError, GraphSet
from bundle.recipe import Recipe, RecipeError
from bundle.versions import VersionError, Versions, switch
from bundle.versions import drop as drop_version
from export import options
from export.errors import ExportError, UsageError
from export.repository import RepositoryError
from export.repository_command import repository_command
from export.request import DEFAULT_ATOL, DEFAULT_OPSET, DEFAULT_RTOL, GraphsRequest
from report.terminal import Bars, run, table
from routing import WEIGHTS, CalibrationError, ManifestError

RECIPE = "RECIPE"
ERRORS = (
    AdaptedError,
    AlignmentError,
    CalibrationError,
    ExportError,
    FidelityError,
    GraphsError,
    ManifestError,
    RecipeError,
    RepositoryError,
    VersionError,
)

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def verbs() -> None:
    """Turn a Vision Transformer into what Triton serves."""


@app.command()
def rungs(
    model: Annotated[
        str,
        typer.Option(
            metavar="NAME|PATH|ID",
            help="static-vit, dinov2-small, or a directory that save_pretrained wrote or a hub id: "
            "of ViT, DeiT, DINOv2, DINOv3, CLIP, SigLIP, BEiT and their kin (see README); "
            "timm:NAME, avit-tiny or avit-small with --checkpoint.",
        ),
    ],
    checkpoint: options.Checkpoint = None,
    gate: options.Gate = None,
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
        Literal["linear"] | None,
        typer.Option(help="Fit this head on --images and bake it into both rungs."),
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="Images to fit the head on, one folder per class.")
    ] = None,
    fit_images: Annotated[
        Path | None,
        typer.Option(help="Images that int8=static learns ranges from (default: --images)."),
    ] = None,
    labels: options.Labels = None,
    prompt: options.Prompt = None,
    task: Annotated[
        Literal["classes", "labels", "value"] | None,
        typer.Option(
            help="What its own head answers (default: by its config's problem_type and the number "
            "of outputs): one class, independent labels by sigmoid, or a value."
        ),
    ] = None,
    # 18 is the first whose Resize antialiases; older Triton images load none above 21.
    opset: Annotated[int, typer.Option(min=18, max=21, help="ONNX opset.")] = DEFAULT_OPSET,
    rtol: Annotated[float, typer.Option(min=0, help="Parity tolerance, relative.")] = DEFAULT_RTOL,
    atol: Annotated[float, typer.Option(min=0, help="Parity tolerance, absolute.")] = DEFAULT_ATOL,
    as_json: Annotated[bool, typer.Option("--json", help="Print the record as JSON.")] = False,
) -> None:
    """Export the cheap and the full rung of a model to ONNX, checked against torch.

    A RECIPE is a list of px=N (resolution inside the graph), depth=N (first blocks only), tome=N
    (tokens merged in each block), adapted=DIR (weights that python -m adaptation distil trained),
    and int8, int8=static or fp16. Writes a graph for each, as full.onnx and px112_int8static.onnx,
    graphs.json, labels.txt where there are labels, and weights.bin where graphs share weights.
    """
    if (head is None) != (images is None):
        raise UsageError("--head linear and --images DIR go together")
    fitted = None if head is None else "--head linear"
    texts = options.texts_of(model, checkpoint, labels, prompt, fitted)
    halting = options.gate_of(model, gate)
    recipes = [None if text is None else Recipe.parse(text) for text in (low, high)]
    request = GraphsRequest(
        out=out,
        low=recipes[0],
        high=recipes[1],
        beside=tuple(Recipe.parse(text) for text in beside or ()),
        head_images=images,
        fit_images=fit_images,
        task=task,
        opset=opset,
        rtol=rtol,
        atol=atol,
    )
    # torch and transformers take seconds to import; --help and the checks above do not need them.
    from export.graphs import export_graphs
    from export.pretrained import load_backbone

    bars = Bars(Console(stderr=True))
    bars.say(f"load {model}")
    backbone = load_backbone(model, texts, checkpoint, halting)
    graphs = export_graphs(backbone, request, bars)
    if as_json:
        typer.echo(json.dumps(graphs.to_dict(), indent=2, ensure_ascii=False))
    else:
        _print_summary(graphs, out)


app.command("repository")(repository_command)


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


def _print_summary(graphs: GraphSet, out: Path) -> None:
    rows = []
    for name, graph in graphs.graphs.items():
        worst = max((check["max_abs_diff"] for check in graph.notes["checks"]), default=None)
        rows.append(
            (
                name,
                graph.record.recipe,
                f"{graph.file.stat().st_size / 2**20:.1f}",
                "" if worst is None else f"{worst:.1e}",
                f"{graph.notes['fidelity']['cosine_mean']:.4f}",
            )
        )
    if (out / WEIGHTS).exists():
        size_mib = (out / WEIGHTS).stat().st_size / 2**20
        rows.append((WEIGHTS, "what they share", f"{size_mib:.1f}", "", ""))
    headings = ("graph", "recipe", "MiB", "difference to torch", "cosine to full")
    head = "no head" if graphs.task is None else f"{graphs.task} ({graphs.classes} outputs)"
    title = f"{graphs.backbone}, {head}, in {out}"
    shown = table(title, headings, rows, left=(0, 1))
    shown.columns[0].no_wrap = True  # a file is named so
    Console().print(shown)


def main() -> None:
    """Run the command line; a foreseeable error is one line and exit code 2."""
    run(app, ERRORS)


if __name__ == "__main__":
    main()
