"""`python -m export rungs | align | repository | versions`: from a model to Triton."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from bundle.alignment import Alignment, AlignmentError
from bundle.fidelity import FidelityError, FidelityLoss
from bundle.graphs import GraphsError, GraphSet
from bundle.recipe import Recipe, RecipeError
from bundle.versions import VersionError, Versions, switch
from bundle.versions import drop as drop_version
from export.errors import ExportError, UsageError
from export.live import AUDIT_FLOOR, live_artifact
from export.repository import MAX_BATCH_SIZE, RepositoryError, RepositorySettings, assemble
from export.request import DEFAULT_ATOL, DEFAULT_OPSET, DEFAULT_RTOL, GraphsRequest
from export.versions import add_version
from report.terminal import Bars, run, table
from routing import WEIGHTS, Calibration, CalibrationError, ManifestError
from routing.fidelity import KINDS
from routing.provenance import runtime_words
from routing.reference import reference_words

RECIPE = "RECIPE"
ARTIFACT = Path("build/calibration/calibration.json")
CONFIDENCE = 0.9
ERRORS = (
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
    (tokens merged in each block), and int8, int8=static or fp16. Writes a graph for each, as
    full.onnx and px112_int8static.onnx, graphs.json, labels.txt where there are labels, and
    weights.bin where graphs share weights.
    """
    if (head is None) != (images is None):
        raise UsageError("--head linear and --images DIR go together")
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
    graphs = export_graphs(load_backbone(model), request, bars)
    if as_json:
        typer.echo(json.dumps(graphs.to_dict(), indent=2, ensure_ascii=False))
    else:
        _print_summary(graphs, out)


@app.command()
def repository(
    onnx: Annotated[Path, typer.Option(help="Folder that `rungs` wrote.")] = Path("build/onnx"),
    calibration: Annotated[
        Path | None,
        typer.Option(
            help=f"Artifact that `python -m calibration fit` wrote (default: {ARTIFACT})."
        ),
    ] = None,
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
        Literal["error", "low"], typer.Option(help="Answer of an image whose full rung failed.")
    ] = "error",
    high_timeout_ms: Annotated[
        int, typer.Option(min=1, help="How long a call of the full rung may take.")
    ] = 10_000,
    client_parameters: Annotated[
        Literal["careful", "any"],
        typer.Option(help="careful: a request may only lower the threshold or ask for high."),
    ] = "careful",
    degrade_queue_depth: Annotated[
        int,
        typer.Option(
            min=0,
            max=MAX_BATCH_SIZE,
            metavar="IMAGES",
            help="So many that had to wait raise the threshold; 0: never.",
        ),
    ] = 0,
    degrade_threshold: Annotated[
        float | None, typer.Option(help="The highest it is raised to, oracle units.")
    ] = None,
    audit_fraction: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the images that the full rung checks.")
    ] = 0.0,
    reference_check: Annotated[
        Literal["off", "warn", "refuse"],
        typer.Option(
            help="Where the server answers otherwise than the calibration did: warn, or refuse "
            "requests."
        ),
    ] = "warn",
    live: Annotated[
        bool,
        typer.Option(
            "--live",
            help="Without --calibration: start with the full rung for every image, and let live "
            "traffic certify a threshold (python -m calibration live).",
        ),
    ] = False,
    max_risk: Annotated[
        float | None,
        typer.Option(help="With --live: largest share of images kept low with a loss, e.g. 0.05."),
    ] = None,
    confidence: Annotated[
        float, typer.Option(help="With --live: of all it ever certifies.")
    ] = CONFIDENCE,
    fidelity: Annotated[
        str | None,
        typer.Option(
            metavar="|".join(KINDS), help="With --live: when a cheap answer is a loss, as in fit."
        ),
    ] = None,
    tolerance: Annotated[float | None, typer.Option(help="Of --fidelity cosine or value.")] = None,
    relative: Annotated[bool, typer.Option("--relative", help="Of --fidelity value.")] = False,
    label_threshold: Annotated[float | None, typer.Option(help="Of --fidelity labels.")] = None,
    audit_floor: Annotated[
        float,
        typer.Option(
            help="With --live: share of the images that both rungs go on answering in the end."
        ),
    ] = AUDIT_FLOOR,
    live_folder: Annotated[
        Path | None,
        typer.Option(
            help="With --live: where evidence is written (default: beside --out, as NAME.live)."
        ),
    ] = None,
    add: Annotated[
        bool,
        typer.Option(
            "--add-version", help="Add --calibration to the repository at --out, beside what is."
        ),
    ] = False,
    shadow: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, help="With it: share of live images that it scores and does not answer."
        ),
    ] = None,
) -> None:
    """Assemble the model repository that Triton serves.

    An assembled repository at --out is replaced, or gets another version of its router with
    --add-version; anything else there is left alone.
    """
    settings = RepositorySettings(
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
        live_folder="" if live_folder is None else str(live_folder.resolve()),
    )
    if live:
        if add or shadow is not None:
            raise UsageError("--live assembles a repository; --add-version and --shadow change one")
        if calibration is not None:
            raise UsageError("--live starts without a calibration, and --calibration names one")
        if max_risk is None:
            raise UsageError("--live needs --max-risk, such as 0.05")
        if live_folder is not None and live_folder.resolve().is_relative_to(out.resolve()):
            raise UsageError(
                "--live-folder lies in --out, which holds what its manifest lists only"
            )
        graphs = GraphSet.load(onnx)
        loss = FidelityLoss.asked(graphs.task, fidelity, tolerance, relative, label_threshold)
        first = live_artifact(graphs, loss, max_risk, confidence, audit_floor)
        _assemble_live(graphs, first, out, settings)
        return
    for option, is_given in {
        "--max-risk": max_risk is not None,
        "--confidence": confidence != CONFIDENCE,
        "--fidelity": fidelity is not None,
        "--tolerance": tolerance is not None,
        "--relative": relative,
        "--label-threshold": label_threshold is not None,
        "--audit-floor": audit_floor != AUDIT_FLOOR,
    }.items():
        if is_given:
            raise UsageError(f"{option} goes with --live; an artifact has been given its own")
    calibration = calibration or ARTIFACT
    if add:
        if settings != RepositorySettings():
            raise UsageError("--add-version changes the artifact only; assemble for other settings")
        _add_version(out, calibration, shadow or 0.0)
    elif shadow is not None:
        raise UsageError("--shadow goes with --add-version")
    else:
        _assemble(GraphSet.load(onnx), calibration, out, settings)


def _assemble(graphs: GraphSet, calibration: Path, out: Path, settings: RepositorySettings) -> None:
    assemble(graphs, calibration, out, settings)
    artifact = Calibration.load(calibration)
    answers = reference_words(artifact.reference_answers)
    typer.echo(f"calibrated on {runtime_words(artifact.data.get('runtime'))}; {answers}")
    typer.echo(f"wrote {out}; serve it with python -m server --repository {out}")


def _assemble_live(
    graphs: GraphSet, first: Calibration, out: Path, settings: RepositorySettings
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        first.save(Path(folder) / "calibration.json")
        assemble(graphs, Path(folder) / "calibration.json", out, settings)
    typer.echo(
        f"wrote {out}; serve it with python -m server --repository {out} --allow-reload, and "
        f"certify with python -m calibration live --repository {out}"
    )


def _add_version(out: Path, calibration: Path, shadow: float) -> None:
    version = add_version(out, calibration, shadow)
    rollout = f"python -m server rollout --repository {out}"
    shadowing = f"let it score with {rollout}; " if shadow else ""
    typer.echo(
        f"added router/{version} to {out}; {shadowing}let it answer with {rollout} --to {version}"
    )


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
