"""`python -m calibration sample | collect | analyse | align | fit | evaluate | report`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich import progress as bars
from rich.console import Console

from bundle.graphs import GraphsError, GraphSet
from bundle.prints import Looks, among, find_copies
from imaging import PreprocessingError
from report.calibration_page import write_calibration
from routing import SIGNALS, Calibration, CalibrationError

from .align import ALIGN_SHARE, fit_alignment
from .answers import AnswerCache, Progress
from .certify import METHODS, CertifyError, Goal
from .chunks import AnswersError
from .evaluate import EvaluateError, check_artifact, evaluate
from .fidelity import KINDS, Fidelity, FidelityError
from .fit import (
    AUTO,
    STEPS,
    EscalationRate,
    FitError,
    Options,
    Target,
    Threshold,
    depends_on_batch,
    fit,
    without_learned,
)
from .head import LinearHead
from .images import open_images
from .outputs import Made, Outputs, OutputsError, asked, collect
from .page_data import analysis_data, fit_data
from .record import FitRecord, record_path
from .reference import REFERENCE_IMAGES, with_reference_answers
from .sample import write
from .served import ServedError, ServedRungs, credentials
from .source import ImagesError, ImageSource
from .splits import GROUPINGS, SplitError, group_keys, split_by_group
from .tables import print_analysis, print_fit, print_growth

app = typer.Typer(
    help="Run both rungs offline, fit the score, certify the threshold, show what it is worth.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
console = Console(stderr=True)

FOLDER = Path("build/calibration")
ImagesOption = Annotated[
    str, typer.Option(help="A folder (recursive), a tiny-imagenet-200 tree, or `sample`.")
]
LimitOption = Annotated[
    int | None, typer.Option(min=1, help="At most this many images, evenly spread; `sample`: 1200.")
]
SeedOption = Annotated[int, typer.Option(help="Of the sample crops.")]
OnnxOption = Annotated[Path, typer.Option("--onnx", help="Folder written by `export rungs`.")]
AnswersOption = Annotated[
    Path, typer.Option(help="Where graphs' answers are kept, for this command and others.")
]
OutputsOption = Annotated[Path, typer.Option("--outputs", help="File written by `collect`.")]
ArtifactOption = Annotated[Path, typer.Option("--calibration", help="File written by `fit`.")]
FidelityOption = Annotated[
    str | None,
    typer.Option(
        metavar="|".join(KINDS),
        help="When a cheap answer is a loss: another class, another set of labels, a value too far "
        "off, or a cosine too small. Default: top1 of classes, labels of independent labels, "
        "cosine without a head; of a value there is none.",
    ),
]
ToleranceOption = Annotated[
    float | None,
    typer.Option(
        help="With cosine: a cosine below 1 - tolerance is a loss (default: 0.1). With value: a "
        "larger difference is one."
    ),
]
RelativeOption = Annotated[
    bool, typer.Option("--relative", help="With value: the tolerance is a share of the value.")
]
LabelThresholdOption = Annotated[
    float | None,
    typer.Option(
        help="With labels: from which probability on a label is in the set (default: 0.5)."
    ),
]
GroupByOption = Annotated[
    str,
    typer.Option(
        metavar="|".join(GROUPINGS),
        help="Images of one group stay in one split: of one source file, folder or content.",
    ),
]
SplitSeedOption = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of the splits.")]
UrlOption = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT",
        help="Ask the rungs of the server whose gRPC port this is, instead of running them here; "
        "--onnx is what its repository was assembled from.",
    ),
]
TlsCaOption = Annotated[
    Path | None,
    typer.Option(help="With --url: over TLS, to a server whose certificate this one vouches for."),
]
TlsCertOption = Annotated[
    Path | None, typer.Option(help="With it: certificate to show to a server that asks for one.")
]
TlsKeyOption = Annotated[Path | None, typer.Option(help="Its private key.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
ONNX = Path("build/onnx")
ANSWERS = Path("build/answers")
OUTPUTS = FOLDER / "outputs.json"
ARTIFACT = FOLDER / "calibration.json"
SAMPLE_CROPS = 1200


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
    images: ImagesOption,
    onnx: OnnxOption = ONNX,
    out: Annotated[Path, typer.Option(help="File to write.")] = OUTPUTS,
    limit: LimitOption = None,
    seed: SeedOption = 1,
    answers: AnswersOption = ANSWERS,
    url: UrlOption = None,
    tls_ca: TlsCaOption = None,
    tls_cert: TlsCertOption = None,
    tls_key: TlsKeyOption = None,
) -> None:
    """Run both rungs over images with ONNX Runtime, or on a server, and store outputs; resumes."""
    rung_set = GraphSet.load(onnx)
    try:
        with _served(url, rung_set, tls_ca, tls_cert, tls_key) as served:
            cache = AnswerCache(answers, _open(images, limit, seed), rung_set, served)
            _show(cache, lambda progress: collect(cache, out, progress))
    except KeyboardInterrupt:
        console.print("stopped; the same command continues where this one was")
        raise
    pictures = cache.pictures()
    _tell_copies(pictures.hashes, pictures.looks)
    learned = int(among(pictures.hashes, pictures.looks, rung_set.learned()).sum())
    if learned:
        console.print(f"{_learned(learned)}; fit leaves them out", highlight=False)
    print(f"wrote {out}")


@app.command("analyse")
def analyse_command(
    outputs: OutputsOption = OUTPUTS,
    onnx: OnnxOption = ONNX,
    out: Annotated[Path, typer.Option(help="Page to write.")] = FOLDER / "analysis.html",
    fidelity: FidelityOption = None,
    tolerance: ToleranceOption = None,
    relative: RelativeOption = False,
    label_threshold: LabelThresholdOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show how much, and for which images, the full rung changes the outcome."""
    stored, rung_set = Outputs.load(outputs), GraphSet.load(onnx)
    _check_collected(stored, rung_set)
    stored = _unlearned(stored, rung_set)
    if not len(stored):
        raise OutputsError("no image is left to analyse; collect others")
    with console.status("analysing"):
        asked = Fidelity.asked(stored.task, fidelity, tolerance, relative, label_threshold)
        analysis = analysis_data(stored, asked, _source_of(stored), rung_set.labels)
        write_calibration(out, None, analysis)
    if as_json:
        print(json.dumps({"page": str(out), **analysis["found"]}))
        return
    print_analysis(analysis["found"])
    print(f"wrote {out}")


@app.command("fit")
def fit_command(
    max_risk: Annotated[
        float | None,
        typer.Option(help="Certify: largest share of images kept low with a loss, e.g. 0.05."),
    ] = None,
    confidence: Annotated[float, typer.Option(help="Of the certificate; ltt only.")] = 0.9,
    method: Annotated[
        str,
        typer.Option(
            metavar="|".join(METHODS), help="Certificate with high probability, or on average."
        ),
    ] = "ltt",
    escalation_rate: Annotated[
        float | None, typer.Option(help="Instead: share of images to escalate, 0 to 1.")
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Instead: threshold in oracle units.")
    ] = None,
    fidelity: FidelityOption = None,
    tolerance: ToleranceOption = None,
    relative: RelativeOption = False,
    label_threshold: LabelThresholdOption = None,
    signal: Annotated[str, typer.Option(help=f"auto, or one of {', '.join(SIGNALS)}.")] = AUTO,
    group_by: GroupByOption = GROUPINGS[0],
    require_certificate: Annotated[
        bool, typer.Option("--require-certificate", help="Exit 1 where nothing is certified.")
    ] = False,
    outputs: OutputsOption = OUTPUTS,
    onnx: OnnxOption = ONNX,
    out: Annotated[Path, typer.Option(help="Artifact to write.")] = ARTIFACT,
    seed: SplitSeedOption = 0,
    reference_images: Annotated[
        int,
        typer.Option(
            min=0,
            help="Images that travel with the artifact, resized, with their answers, to check a "
            "server by; 0: none.",
        ),
    ] = REFERENCE_IMAGES,
    as_json: JsonOption = False,
) -> None:
    """Fit the score, choose a signal and a threshold, certify it, write calibration.json."""
    target = _target(max_risk, confidence, method, escalation_rate, threshold)
    if require_certificate and not isinstance(target, Goal):
        raise FitError("--require-certificate needs --max-risk")
    rung_set = GraphSet.load(onnx)
    asked = Fidelity.asked(rung_set.task, fidelity, tolerance, relative, label_threshold)
    options = Options(asked, signal, group_by, seed)
    if not isinstance(target, Goal) and (reason := depends_on_batch(rung_set)) is not None:
        console.print(f"warning: {reason}", style="yellow", highlight=False)
    collected = Outputs.load(outputs)
    stored = _unlearned(collected, rung_set)
    left_out = len(collected) - len(stored)
    _tell_copies(stored.hashes, stored.looks)
    with bars.Progress(console=console) as bar:
        task = bar.add_task("fit", total=STEPS)
        try:
            fitted = fit(stored, rung_set, target, options, lambda: bar.advance(task))
        except (FitError, SplitError) as error:
            if not left_out:
                raise
            raise FitError(f"{error}; {_learned(left_out)}, and were left out") from None
        bar.update(task, completed=STEPS)
    fitted = with_reference_answers(fitted, stored, rung_set, reference_images, _say)
    fitted.save(out)
    calibration = fitted.calibration
    if as_json:
        print(json.dumps({"calibration": str(out), **_without_arrays(calibration)}))
    else:
        print_fit(calibration)
        print(f"wrote {out}")
    if calibration.certificate is not None and not calibration.certificate["certified"]:
        console.print("NOT CERTIFIED: every image goes to the full rung.", style="bold red")
        if require_certificate:
            raise typer.Exit(1)


@app.command("align")
def align_command(
    outputs: OutputsOption = OUTPUTS,
    onnx: OnnxOption = ONNX,
    out: Annotated[Path, typer.Option(help="File to write.")] = FOLDER / "alignment.npz",
    fidelity: FidelityOption = None,
    tolerance: ToleranceOption = None,
    relative: RelativeOption = False,
    label_threshold: LabelThresholdOption = None,
    share: Annotated[
        float, typer.Option(min=0.05, max=0.95, help="Of the images, to learn from.")
    ] = ALIGN_SHARE,
    group_by: GroupByOption = GROUPINGS[0],
    seed: SplitSeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Fit a map from the cheap rung to the full embedding; bake it with `export align`.

    The images it learns from are left out when the aligned rung is calibrated.
    """
    stored, rung_set = Outputs.load(outputs), GraphSet.load(onnx)
    _check_collected(stored, rung_set)
    stored = _unlearned(stored, rung_set)
    groups = group_keys(stored, group_by)
    rows = split_by_group(groups, {"align": share, "rest": 1 - share}, seed)["align"]
    rung = rung_set.rungs["vit_low"]
    head = LinearHead.read(rung_set.files["vit_low"]) if rung_set.classes else None
    if rung_set.classes and head is None:
        raise FitError("the head reads more than the CLS token; align would not reach it")
    with console.status("aligning"):
        aligned = fit_alignment(
            stored,
            rows,
            np.array(groups),
            (rung.fingerprint, rung.recipe),
            Fidelity.asked(rung_set.task, fidelity, tolerance, relative, label_threshold),
            head,
            seed,
        )
    aligned.alignment.save(out)
    if as_json:
        print(json.dumps({"alignment": str(out), **aligned.to_dict()}))
    else:
        print_growth(aligned)
        print(f"wrote {out}; bake it in with python -m export align, then collect and fit again")
    if not aligned.helps:
        console.print("On held-out images the alignment does not help: leave it out.", style="red")


@app.command(
    "plan",
    hidden=True,
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def plan_command() -> None:
    """Moved to a package of its own; this line goes with the next release."""
    print("error: plan moved: python -m planner plan, with the same options", file=sys.stderr)
    raise typer.Exit(2)


@app.command("evaluate")
def evaluate_command(
    images: ImagesOption,
    calibration: ArtifactOption = ARTIFACT,
    onnx: OnnxOption = ONNX,
    limit: LimitOption = None,
    seed: SeedOption = 2,
    answers: AnswersOption = ANSWERS,
    url: UrlOption = None,
    tls_ca: TlsCaOption = None,
    tls_cert: TlsCertOption = None,
    tls_key: TlsKeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Hold an artifact against new images; exit 1 where they contradict its certificate."""
    artifact, rung_set = Calibration.load(calibration), GraphSet.load(onnx)
    check_artifact(artifact, Made.by(rung_set))  # before images are run through them
    wanted, source = asked(rung_set), _open(images, limit, seed)
    with _served(url, rung_set, tls_ca, tls_cert, tls_key) as served:
        cache = AnswerCache(answers, source, rung_set, served)
        _show(cache, lambda progress: cache.fill(wanted, progress=progress))
    outputs = Outputs.of(cache.read(wanted), rung_set, cache)
    evaluation = evaluate(artifact, _unlearned(outputs, rung_set))
    if as_json:
        print(json.dumps({"images": source.title, **evaluation.to_dict()}))
    else:
        for line in evaluation.lines():
            print(line)
    if evaluation.contradicted:
        raise typer.Exit(1)


@app.command("report")
def report_command(
    calibration: ArtifactOption = ARTIFACT,
    outputs: OutputsOption = OUTPUTS,
    onnx: OnnxOption = ONNX,
    out: Annotated[Path, typer.Option(help="Page to write.")] = FOLDER / "report.html",
) -> None:
    """Write report.html: certificate, risk against escalation, signals, galleries, analysis."""
    artifact, rung_set = Calibration.load(calibration), GraphSet.load(onnx)
    stored = without_learned(Outputs.load(outputs), rung_set)
    record = FitRecord.load(record_path(calibration), stored, calibration)
    with console.status("drawing"):
        source = _source_of(stored)
        fit = fit_data(artifact, record, stored, source, rung_set.labels)
        analysis = analysis_data(stored, Fidelity.of(artifact), source, rung_set.labels)
        write_calibration(out, fit, analysis)
    print(f"wrote {out}")


def _check_collected(outputs: Outputs, rung_set: GraphSet) -> None:
    difference = outputs.made.difference(Made.by(rung_set))
    if difference is not None:
        raise OutputsError(f"the outputs are not of these graphs: {difference}; collect again")


def _unlearned(outputs: Outputs, rung_set: GraphSet) -> Outputs:
    """Without the images that a graph has learned from, and saying so."""
    kept = without_learned(outputs, rung_set)
    if len(kept) < len(outputs):
        left_out = _learned(len(outputs) - len(kept))
        console.print(f"{left_out}; they are left out", highlight=False)
    return kept


def _open(images: str, limit: int | None, seed: int) -> ImageSource:
    if images == "sample":
        return open_images(f"sample:{seed}", limit or SAMPLE_CROPS)
    return open_images(images, limit)


def _source_of(outputs: Outputs) -> ImageSource | None:
    """Where the outputs' images came from; None where that is gone."""
    try:
        return open_images(outputs.source)
    except ImagesError as error:
        console.print(f"no pictures: {error}", markup=False, highlight=False)
        return None


@contextmanager
def _served(
    url: str | None, rung_set: GraphSet, ca: Path | None, certificate: Path | None, key: Path | None
) -> Iterator[ServedRungs | None]:
    """The rungs of the server at a URL; None where there is no URL."""
    secrets = credentials(ca, certificate, key)
    if url is None:
        if ca is not None:
            raise ServedError("--tls-ca is for a server; give its --url")
        yield None
        return
    with ServedRungs(url, rung_set, secrets) as served:
        if rung_set.reference_record is not None:
            _say("the reference is another graph than the full rung, is not served, and runs here")
        yield served


def _show(cache: AnswerCache, fill: Callable[[Progress], list[str]]) -> None:
    """Fill a cache behind a progress bar, and say which images cannot be used."""
    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TimeRemainingColumn(),
    )
    with bars.Progress(*columns, console=console) as progress:
        task = progress.add_task("collect", total=len(cache.source))

        def show(count: int, resumed: bool) -> None:
            progress.advance(task, count)
            if resumed:  # those took no time, so they must not enter the estimate
                done = progress.tasks[task].completed
                progress.reset(task, description="collect (resumed)", completed=int(done))

        unreadable = fill(show)
    for line in unreadable:
        _say(f"skipped {line}")
    _say(f"answers are kept in {cache.folder} ({cache.size_mib():,.0f} MiB) until you delete it")


def _say(line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def _tell_copies(hashes: Sequence[str], looks: Looks) -> None:
    """Say how many images do not count for themselves."""
    sentence = find_copies(hashes, looks).sentence
    if sentence:
        console.print(sentence, highlight=False)


def _learned(count: int) -> str:
    return f"{count:,} images taught a graph or its head, in this or another form"


def _target(
    max_risk: float | None,
    confidence: float,
    method: str,
    escalation_rate: float | None,
    threshold: float | None,
) -> Target:
    given = [value for value in (max_risk, escalation_rate, threshold) if value is not None]
    if len(given) != 1:
        raise FitError("give one of --max-risk, --escalation-rate and --threshold")
    if max_risk is not None:
        return Goal(max_risk, confidence, method)
    if escalation_rate is not None:
        return EscalationRate(escalation_rate)
    return Threshold(given[0])


def _without_arrays(calibration: Calibration) -> dict[str, Any]:
    content = calibration.to_dict()
    del content["coefficients"], content["reference_scores"], content["score_map"]
    return content


def main() -> None:
    """Run the command line; a foreseeable error is one line and exit code 2."""
    try:
        code = app(standalone_mode=False)
    except typer.TyperException as error:
        message = " ".join(error.format_message().split()) + " (--help tells more)"
    except (
        AnswersError,
        CalibrationError,
        CertifyError,
        EvaluateError,
        FidelityError,
        FitError,
        ImagesError,
        OutputsError,
        PreprocessingError,
        GraphsError,
        ServedError,
        SplitError,
    ) as error:
        message = str(error)
    except OSError as error:
        message = f"{error.filename}: {error.strerror}"
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
    else:
        sys.exit(code)
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
