"""`python -m calibration sample | collect | align | fit | live | evaluate | report`."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from bundle.graphs import GraphSet
from bundle.head import LinearHead
from bundle.prints import Looks, among, find_copies
from report.calibration_page import write_calibration
from report.terminal import run
from routing import SIGNALS, Calibration

from . import options as given
from .align import fit_alignment
from .answers import AnswerCache, Progress
from .certify import METHODS, Goal
from .evaluate import check_artifact, evaluate
from .fidelity import Fidelity, FidelityError
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
    taught_groups,
    without_learned,
)
from .images import ImagesError, open_images, write_sample
from .live_artifact import measured
from .live_command import live_command
from .outputs import Made, Outputs, OutputsError, collect, usable, wanted
from .page_data import analysis_data, fit_data
from .record import Fit
from .reference import REFERENCE_IMAGES, with_reference_answers
from .splits import FIT_SHARE, GROUPINGS, SplitError, group_keys, split_by_group
from .tables import print_fit, print_growth
from .token_counts import fit_counts

app = typer.Typer(
    help="Run both rungs offline, fit the score, certify the threshold, show what it is worth.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("live")(live_command)
say = given.BARS.say


@app.command("sample")
def sample_command(
    out: Annotated[Path, typer.Option(help="Folder to write; must be empty or absent.")],
    count: Annotated[int, typer.Option(min=1, help="Number of crops.")] = 600,
    seed: Annotated[int, typer.Option(help="Different seeds are independent draws.")] = 0,
) -> None:
    """Write random crops of shipped photographs, one sub-folder per photograph."""
    write_sample(out, count, seed)
    print(f"wrote {count} crops to {out}")


@app.command("collect")
def collect_command(
    images: given.Images,
    onnx: given.OnnxFolder = given.ONNX,
    out: Annotated[Path, typer.Option(help="File to write.")] = given.OUTPUTS,
    limit: given.Limit = None,
    seed: given.Seed = 1,
    answers: given.AnswersFolder = given.ANSWERS,
    url: given.Url = None,
    tls_ca: given.TlsCa = None,
    tls_cert: given.TlsCert = None,
    tls_key: given.TlsKey = None,
) -> None:
    """Run both rungs over images with ONNX Runtime, or on a server, and store outputs; resumes."""
    graph_set = GraphSet.load(onnx)
    try:
        with given.served(url, graph_set, tls_ca, tls_cert, tls_key) as served:
            cache = AnswerCache(answers, given.source(images, limit, seed), graph_set, served)
            _fill(cache, lambda progress: collect(cache, out, progress))
    except KeyboardInterrupt:
        say("stopped; the same command continues where this one was")
        raise
    pictures = cache.pictures()
    _tell_copies(pictures.hashes, pictures.looks)
    learned = int(among(pictures.hashes, pictures.looks, graph_set.learned()).sum())
    if learned:
        say(f"{_learned(learned)}; nothing is certified on them")
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
    fidelity: given.FidelityKind = None,
    tolerance: given.Tolerance = None,
    relative: given.Relative = False,
    label_threshold: given.LabelThreshold = None,
    signal: Annotated[str, typer.Option(help=f"auto, or one of {', '.join(SIGNALS)}.")] = AUTO,
    group_by: given.GroupBy = GROUPINGS[0],
    test_share: given.TestShare = None,
    require_certificate: Annotated[
        bool, typer.Option("--require-certificate", help="Exit 1 where nothing is certified.")
    ] = False,
    outputs: given.OutputsFile = given.OUTPUTS,
    onnx: given.OnnxFolder = given.ONNX,
    out: Annotated[Path, typer.Option(help="Artifact to write.")] = given.ARTIFACT,
    seed: given.SplitSeed = 0,
    reference_images: Annotated[
        int,
        typer.Option(
            min=0,
            help="Images that travel with the artifact, resized, with their answers, to check a "
            "server by; 0: none.",
        ),
    ] = REFERENCE_IMAGES,
    as_json: given.Json = False,
) -> None:
    """Fit the score, choose a signal and a threshold, certify it, write calibration.json."""
    targets: list[Target] = []
    if max_risk is not None:
        targets.append(Goal(max_risk, confidence, method))
    if escalation_rate is not None:
        targets.append(EscalationRate(escalation_rate))
    if threshold is not None:
        targets.append(Threshold(threshold))
    if len(targets) != 1:
        raise FitError("give one of --max-risk, --escalation-rate and --threshold")
    (target,) = targets
    if require_certificate and not isinstance(target, Goal):
        raise FitError("--require-certificate needs --max-risk")
    graph_set = GraphSet.load(onnx)
    loss = Fidelity.asked(graph_set.task, fidelity, tolerance, relative, label_threshold)
    options = Options(loss, signal, group_by, seed, test_share)
    if not isinstance(target, Goal) and (reason := depends_on_batch(graph_set)) is not None:
        given.BARS.console.print(f"warning: {reason}", style="yellow", highlight=False)
    collected = Outputs.load(outputs)
    stored = _usable(collected, graph_set, group_by)
    left_out = len(collected) - len(stored)
    _tell_copies(stored.hashes, stored.looks)
    try:
        with given.BARS.stage("fit", STEPS) as bar:
            fitted = fit(stored, graph_set, target, options, bar.advance)
    except (FitError, SplitError) as error:
        if not left_out:
            raise
        raise FitError(f"{error}; {_left(left_out)}, and were left out") from None
    fitted = with_reference_answers(fitted, stored, graph_set, reference_images, say)
    fitted.save(out)
    calibration = fitted.calibration
    if as_json:
        content = calibration.to_dict()
        for arrays in ("coefficients", "reference_scores", "score_map"):
            del content[arrays]
        print(json.dumps({"calibration": str(out), **content}))
    else:
        print_fit(calibration)
        print(f"wrote {out}")
    if calibration.certificate is not None and not calibration.certificate["certified"]:
        _say_loudly("NOT CERTIFIED: every image goes to the full rung.")
        if require_certificate:
            raise typer.Exit(1)


@app.command("align")
def align_command(
    outputs: given.OutputsFile = given.OUTPUTS,
    onnx: given.OnnxFolder = given.ONNX,
    out: Annotated[Path, typer.Option(help="File to write.")] = given.FOLDER / "alignment.npz",
    fidelity: given.FidelityKind = None,
    tolerance: given.Tolerance = None,
    relative: given.Relative = False,
    label_threshold: given.LabelThreshold = None,
    share: Annotated[
        float, typer.Option(min=0.05, max=0.95, help="Of the images, to learn from.")
    ] = FIT_SHARE,
    group_by: given.GroupBy = GROUPINGS[0],
    seed: given.SplitSeed = 0,
    as_json: given.Json = False,
) -> None:
    """Fit a map from the cheap rung to the full embedding; bake it with `export align`.

    The images it learns from are the fit images of the aligned rung's calibration. Where it does
    not help on images that it has not learned, it is dropped.
    """
    stored, graph_set = _collected(outputs, onnx, group_by)
    groups = group_keys(stored, group_by)
    shares = {"fit": share, "certify": 1 - share}
    rows = split_by_group(groups, shares, seed, taught_groups(stored, groups))["fit"]
    rung = graph_set.rungs["vit_low"]
    head = LinearHead.read(graph_set.files["vit_low"]) if graph_set.classes else None
    if graph_set.classes and head is None:
        raise FitError("the head reads more than the CLS token; align would not reach it")
    with given.BARS.console.status("aligning"):
        aligned = fit_alignment(
            stored,
            rows,
            np.array(groups),
            (rung.fingerprint, rung.recipe),
            Fidelity.asked(graph_set.task, fidelity, tolerance, relative, label_threshold),
            head,
            seed,
        )
    if aligned.helps:
        aligned.alignment.save(out)
    else:
        out.unlink(missing_ok=True)  # one of before is of other images
    if as_json:
        print(json.dumps({"alignment": str(out) if aligned.helps else None, **aligned.to_dict()}))
        return
    print_growth(aligned)
    if aligned.helps:
        print(f"wrote {out}; bake it in with python -m export align, then collect and fit again")
    else:
        print("an alignment does not help on images that it has not learned: none is written")


@app.command(
    "plan",
    hidden=True,
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def plan_command() -> None:
    """Moved to a package of its own; this line goes with the next release."""
    raise FitError("plan moved: python -m planner plan, with the same options")


@app.command("evaluate")
def evaluate_command(
    images: given.Images,
    calibration: given.ArtifactFile = given.ARTIFACT,
    onnx: given.OnnxFolder = given.ONNX,
    limit: given.Limit = None,
    seed: given.Seed = 2,
    answers: given.AnswersFolder = given.ANSWERS,
    url: given.Url = None,
    tls_ca: given.TlsCa = None,
    tls_cert: given.TlsCert = None,
    tls_key: given.TlsKey = None,
    as_json: given.Json = False,
) -> None:
    """Hold an artifact against new images; exit 1 where they contradict its certificate."""
    artifact, graph_set = Calibration.load(calibration), GraphSet.load(onnx)
    check_artifact(artifact, Made.by(graph_set))  # before images are run through them
    graphs, source = wanted(graph_set), given.source(images, limit, seed)
    with given.served(url, graph_set, tls_ca, tls_cert, tls_key) as served:
        cache = AnswerCache(answers, source, graph_set, served)
        _fill(cache, lambda progress: cache.fill(graphs, progress=progress))
    outputs = Outputs.of(cache.read(graphs), graph_set, cache)
    unlearned = without_learned(outputs, graph_set, _group_by(artifact))
    if len(unlearned) < len(outputs):
        say(f"{_left(len(outputs) - len(unlearned))}; they are left out")
    evaluation = evaluate(artifact, unlearned)
    if as_json:
        print(json.dumps({"images": source.title, **evaluation.to_dict()}))
    else:
        for line in evaluation.lines():
            print(line)
    if evaluation.contradicted:
        raise typer.Exit(1)


@app.command("report")
def report_command(
    calibration: given.ArtifactFile = given.ARTIFACT,
    outputs: given.OutputsFile = given.OUTPUTS,
    onnx: given.OnnxFolder = given.ONNX,
    out: Annotated[Path, typer.Option(help="Page to write.")] = given.FOLDER / "report.html",
    fidelity: given.FidelityKind = None,
    tolerance: given.Tolerance = None,
    relative: given.Relative = False,
    label_threshold: given.LabelThreshold = None,
    as_json: given.Json = False,
) -> None:
    """Write report.html: certificate, risk against escalation, signals, galleries, analysis.

    Before anything is fitted the page holds the analysis alone: how much, and for which images,
    the full rung changes the outcome. --fidelity and what goes with it say what the analysis calls
    a loss; by default it is that of the artifact.
    """
    is_fitted = calibration != given.ARTIFACT or calibration.exists()
    group_by = _group_by(Calibration.load(calibration)) if is_fitted else GROUPINGS[0]
    stored, graph_set = _collected(outputs, onnx, group_by)
    if not len(stored):
        raise OutputsError("no image is left to show; collect others")
    options = (tolerance, label_threshold) != (None, None) or relative
    if is_fitted and options and fidelity is None:
        raise FidelityError("--tolerance, --relative and --label-threshold go with --fidelity")
    fitted = None
    if is_fitted:
        is_live = Calibration.load(calibration).is_live
        fitted = (measured if is_live else Fit.load)(calibration, stored)
    if fitted is None or fidelity is not None:
        loss = Fidelity.asked(stored.task, fidelity, tolerance, relative, label_threshold)
    else:
        loss = Fidelity.of(fitted.calibration)
    with given.BARS.console.status("drawing"):
        source = None
        try:
            source = open_images(stored.source)
        except ImagesError as error:
            say(f"no pictures: {error}")
        shown = None if fitted is None else fit_data(fitted, stored, source, graph_set.labels)
        analysis = analysis_data(stored, loss, source, graph_set.labels)
        counts = [] if fitted is None else fit_counts(fitted, stored, source, graph_set)
        write_calibration(out, shown, analysis, counts)
    if as_json:
        print(json.dumps({"page": str(out), **analysis["found"]}))
    else:
        print(f"wrote {out}")


def _group_by(artifact: Calibration) -> str:
    """What the images of an artifact were grouped by."""
    return str(artifact.data.get("group_by", GROUPINGS[0]))


def _collected(outputs: Path, onnx: Path, group_by: str) -> tuple[Outputs, GraphSet]:
    """Outputs without the images that a graph has learned from, and the graphs they are of."""
    stored, graph_set = Outputs.load(outputs), GraphSet.load(onnx)
    if (difference := stored.made.difference(Made.by(graph_set))) is not None:
        raise OutputsError(f"the outputs are not of these graphs: {difference}; collect again")
    return _usable(stored, graph_set, group_by), graph_set


def _usable(outputs: Outputs, graph_set: GraphSet, group_by: str) -> Outputs:
    """What a fit may use, saying what it may not."""
    kept = usable(outputs, graph_set, group_by)
    if len(kept) < len(outputs):
        say(f"{_left(len(outputs) - len(kept))}; they are left out")
    if kept.taught is not None and (taught := int(kept.taught.sum())):
        say(f"{taught:,} images taught a graph without labels: they are fit images")
    return kept


def _learned(count: int) -> str:
    return f"{count:,} images taught a graph or its head, in this or another form"


def _left(count: int) -> str:
    return f"{_learned(count)}, or are of the group of one that did"


def _fill(cache: AnswerCache, fill: Callable[[Progress], list[str]]) -> None:
    """Fill a cache behind a progress bar, and say which images cannot be used."""
    with given.BARS.stage("collect", len(cache.source)) as bar:
        unreadable = fill(bar.advance)
    for line in unreadable:
        say(f"skipped {line}")
    say(f"answers are kept in {cache.folder} ({cache.size_mib():,.0f} MiB) until you delete it")


def _tell_copies(hashes: Sequence[str], looks: Looks) -> None:
    """Say how many images do not count for themselves."""
    if sentence := find_copies(hashes, looks).sentence:
        say(sentence)


def _say_loudly(line: str) -> None:
    given.BARS.console.print(line, style="bold red")


def main() -> None:
    """Run the command line; a foreseeable error is one line and exit code 2."""
    run(app, given.ERRORS)


if __name__ == "__main__":
    main()
