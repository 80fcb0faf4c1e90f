"""`python -m export repository`: assemble what Triton serves, or add a version of its router."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import Annotated, Literal

import typer

from bundle.fidelity import FidelityLoss
from bundle.graphs import GraphSet
from bundle.placing import working_folder
from export.errors import UsageError
from export.live import AUDIT_FLOOR, live_artifact
from export.repository import MAX_BATCH_SIZE, RepositorySettings, assemble
from export.versions import add_version
from routing import Calibration
from routing.fidelity import KINDS
from routing.provenance import runtime_words
from routing.reference import reference_words

ARTIFACT = Path("build/calibration/calibration.json")
CONFIDENCE = 0.9


def repository_command(
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
    typer.echo(f"wrote {out}; serve it with python -m server --repository {quote(str(out))}")


def _assemble_live(
    graphs: GraphSet, first: Calibration, out: Path, settings: RepositorySettings
) -> None:
    with working_folder("live") as folder:
        first.save(folder / "calibration.json")
        assemble(graphs, folder / "calibration.json", out, settings)
    to_serve = f"--repository {quote(str(out))}"
    typer.echo(
        f"wrote {out}; serve it with python -m server {to_serve} --allow-reload, and "
        f"certify with python -m calibration live {to_serve}"
    )


def _add_version(out: Path, calibration: Path, shadow: float) -> None:
    version = add_version(out, calibration, shadow)
    rollout = f"python -m server rollout --repository {quote(str(out))}"
    shadowing = f"let it score with {rollout}; " if shadow else ""
    typer.echo(
        f"added router/{version} to {out}; {shadowing}let it answer with {rollout} --to {version}"
    )
