"""`python -m planner plan | study`."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from statistics import mean, median
from typing import Annotated, Any

import typer
from rich.console import Console

from adaptation.request import AdaptationError
from bundle.adapted import AdaptedError
from bundle.recipe import RecipeError
from calibration import options as given
from calibration.certify import Goal
from calibration.fidelity import Fidelity
from calibration.reference import REFERENCE_IMAGES
from calibration.scoring import flat_score
from calibration.splits import GROUPINGS
from calibration.tables import outlook_lines
from client.errors import ClientError
from export import options
from export.errors import ExportError
from perf.figures import PerfError
from report.plan_page import cascade_marks, mean_words, varying, write_plan
from report.terminal import Bars, run, table
from report.words import by_image
from routing import threshold_text
from server.errors import ServerError

from . import result
from .graphs import without_help
from .plan import Planned, choose_rungs, make_plan
from .request import LATENCY_PERCENTILE, PlanError, Request, recipes
from .simulation import simulated
from .study import designs, study
from .workshop import Workshop

SAMPLE_CROPS = 2400
OUT = Path("build/plan")
CACHE = Path("build/plan-cache")
HIGHS = "fp32; int8=static"

Model = Annotated[str, typer.Option(metavar="NAME|PATH|ID", help="As `export rungs --model`.")]
Images = Annotated[str, typer.Option(help="A folder (recursive), or `sample`.")]
Confidence = Annotated[float, typer.Option(help="Of the certificate.")]
Highs = Annotated[
    str, typer.Option(metavar="RECIPE;...", help="Full graphs; fp32 is the model itself.")
]
HeadImages = Annotated[
    Path | None, typer.Option(help="Fit a linear head on these, one folder per class.")
]
Instances = Annotated[int, typer.Option(min=1, help="Of each graph, as served.")]
Threads = Annotated[int, typer.Option(min=1, help="CPU threads of an instance.")]
Cache = Annotated[Path, typer.Option(help="Where graphs are kept for the next plan.")]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
console = Console(highlight=False, markup=False)
ERRORS = (
    *given.ERRORS,
    *(AdaptationError, AdaptedError, ClientError, ExportError, PerfError, PlanError),
    *(RecipeError, ServerError),
)


@app.callback()
def _root() -> None:
    """Find the cheapest cascade of a model that can be certified."""


@app.command("plan")
def plan_command(
    model: Model,
    images: Images,
    max_risk: Annotated[
        float, typer.Option(help="Largest share of images with an answer other than the full's.")
    ],
    confidence: Confidence = 0.9,
    candidates: Annotated[
        str | None,
        typer.Option(
            metavar="RECIPE;...",
            help="Cheap graphs, semicolons between them (default: int8=static,align at three "
            "resolutions).",
        ),
    ] = None,
    highs: Highs = HIGHS,
    beside: Annotated[
        str, typer.Option(metavar="RECIPE;...", help="Graphs to compare with, as px=168; tome=8.")
    ] = "",
    adapt: Annotated[
        float | None,
        typer.Option(
            metavar="MINUTES",
            help="Train cheap graphs of the shortlist, on half of the images and without labels.",
        ),
    ] = None,
    px: Annotated[int | None, typer.Option(help="Full resolution (default: the model's).")] = None,
    head_images: HeadImages = None,
    labels: options.Labels = None,
    prompt: options.Prompt = None,
    checkpoint: options.Checkpoint = None,
    gate: options.Gate = None,
    latency_budget_ms: Annotated[
        float | None,
        typer.Option(
            help="Most for a lone image that runs through both graphs, without router: the median, "
            f"or of a graph whose cost depends on the image the {LATENCY_PERCENTILE}th percentile."
        ),
    ] = None,
    fidelity: given.FidelityKind = None,
    tolerance: given.Tolerance = None,
    relative: given.Relative = False,
    label_threshold: given.LabelThreshold = None,
    group_by: given.GroupBy = GROUPINGS[0],
    test_share: given.TestShare = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help=f"At most this many images; `sample`: {SAMPLE_CROPS}.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of splits and crops.")] = 0,
    instances: Instances = 2,
    threads: Threads = 1,
    out: Annotated[Path, typer.Option(help="Folder to write.")] = OUT,
    cache: Cache = CACHE,
    answers: given.AnswersFolder = given.ANSWERS,
    reference_images: Annotated[int, typer.Option(min=0, help="As `fit`.")] = REFERENCE_IMAGES,
    require_certificate: Annotated[
        bool, typer.Option("--require-certificate", help="Exit 1 where nothing is chosen.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print plan.json.")] = False,
) -> None:
    """Find the cheapest certified cascade: export, run, price as served, certify, choose.

    Writes plan.json and plan.html and, where something is chosen, onnx/ and calibration.json for
    `python -m export repository`. A RECIPE is a list of px=N, depth=N, tome=N, apt=BITS,
    halt=DEPTH,adapted=DIR, int8=static, fp16 and align.
    """
    fitted = None if head_images is None else "--head-images DIR"
    texts = options.texts_of(model, checkpoint, labels, prompt, fitted)
    request = Request(
        model=model,
        source=given.source(images, limit, seed, SAMPLE_CROPS),
        candidates=None if candidates is None else recipes("--candidates", candidates),
        highs=recipes("--highs", highs),
        beside=recipes("--beside", beside),
        px=px,
        head_images=head_images,
        texts=texts,
        checkpoint=checkpoint,
        gate=options.gate_of(model, gate),
        goal=Goal(max_risk, confidence, "ltt"),
        fidelity=lambda task: Fidelity.asked(task, fidelity, tolerance, relative, label_threshold),
        group_by=group_by,
        latency_budget_ms=latency_budget_ms,
        instances=instances,
        threads=threads,
        seed=seed,
        cache=cache,
        answers=answers,
        out=out,
        reference_images=reference_images,
        test_share=test_share,
        adapt_minutes=adapt,
    )
    bars, workshop = Bars(Console(stderr=True)), Workshop()
    planned = make_plan(request, workshop, bars)
    content = result.to_dict(planned, _notes(planned))
    if planned.chosen is not None:
        choose_rungs(planned, workshop, bars)
    out.mkdir(parents=True, exist_ok=True)
    path, fresh = out / "plan.json", out / ".plan.json"
    fresh.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
    fresh.replace(path)
    chosen = content["chosen"]
    shown = None if chosen is None else threshold_text(chosen["threshold"])
    write_plan(out / "plan.html", content, shown)
    if as_json:
        typer.echo(json.dumps(content))
    else:
        _print(content, request)
        typer.echo(f"wrote {path} and {out / 'plan.html'}")
    if planned.chosen is None and require_certificate:
        raise typer.Exit(1)


@app.command("study")
def study_command(
    model: Model,
    images: Images,
    max_risk: Annotated[list[float], typer.Option(help="To be certified; may be given again.")],
    candidates: Annotated[
        str, typer.Option(metavar="RECIPE;...", help="Cheap graphs, aligned where a design does.")
    ],
    highs: Highs = HIGHS,
    confidence: Confidence = 0.9,
    head_images: HeadImages = None,
    labels: options.Labels = None,
    prompt: options.Prompt = None,
    checkpoint: options.Checkpoint = None,
    gate: options.Gate = None,
    fidelity: given.FidelityKind = None,
    tolerance: given.Tolerance = None,
    relative: given.Relative = False,
    label_threshold: given.LabelThreshold = None,
    group_by: given.GroupBy = GROUPINGS[0],
    instances: Instances = 2,
    threads: Threads = 1,
    divisions: Annotated[int, typer.Option(min=1, help="Random divisions of the images.")] = 12,
    used: Annotated[
        int | None, typer.Option(min=1, help="Images in each division (default: all).")
    ] = None,
    simulate: Annotated[
        bool,
        typer.Option(
            "--simulate",
            help="Plan for 100 to 10,000 images drawn from these, with replacement, instead.",
        ),
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of the first division.")] = 0,
    cache: Cache = CACHE,
    answers: given.AnswersFolder = given.ANSWERS,
    as_json: given.Json = False,
) -> None:
    """Compare ways of dividing images by the certified speed-up over many random divisions."""
    goals = [Goal(risk, confidence, "ltt") for risk in max_risk]
    fitted = None if head_images is None else "--head-images DIR"
    texts = options.texts_of(model, checkpoint, labels, prompt, fitted)
    request = Request(
        model=model,
        source=given.source(images, None, seed, SAMPLE_CROPS),
        candidates=recipes("--candidates", candidates),
        highs=recipes("--highs", highs),
        beside=(),
        px=None,
        head_images=head_images,
        texts=texts,
        checkpoint=checkpoint,
        gate=options.gate_of(model, gate),
        goal=max(goals, key=lambda goal: goal.max_risk),
        fidelity=lambda task: Fidelity.asked(task, fidelity, tolerance, relative, label_threshold),
        group_by=group_by,
        latency_budget_ms=None,
        instances=instances,
        threads=threads,
        seed=seed,
        cache=cache,
        answers=answers,
        out=OUT,
    )
    bars = Bars(Console(stderr=True))
    prepared = study(request, Workshop(), bars)
    seeds = range(seed, seed + divisions)
    found: dict[str, dict[str, list[float]]]
    if simulate:
        found = simulated(prepared, goals, seeds, bars)
    else:
        found = {design.name: {str(goal.max_risk): [] for goal in goals} for design in designs()}
        with bars.stage("divide, plan and certify", divisions * len(found)) as bar:
            for design in designs():
                for division in seeds:
                    speedups = prepared.speedups(design, goals, division, used)
                    for goal, speedup in zip(goals, speedups, strict=True):
                        found[design.name][str(goal.max_risk)].append(speedup)
                    bar.advance()
    if as_json:
        typer.echo(json.dumps({"images": len(prepared.groups), "ms": prepared.ms, **found}))
        return
    rows = [
        (name, *(f"{median(values):.2f}, {mean(values):.2f}" for values in by_risk.values()))
        for name, by_risk in found.items()
    ]
    known = len(prepared.groups)
    title = f"certified speed-up: median, mean of {divisions} divisions of {used or known} images"
    if simulate:
        title = f"true speed-up: median, mean of {divisions} plans of images drawn from {known}"
    console.print(table(title, ("design", *(f"risk {goal.max_risk:g}" for goal in goals)), rows))


def _notes(planned: Planned) -> list[str]:
    recipes = {name: graph.record.recipe for name, graph in planned.graphs.graphs.items()}
    unhelped = [name for name, aligned in planned.aligned.items() if not aligned.helps]
    notes = [*planned.notes, *(without_help(recipes[name]) for name in unhelped)]
    if planned.chosen is not None:
        spread = planned.chosen.fit.calibration.metrics["score_spread"]
        return [*notes, flat] if (flat := flat_score(spread)) else notes
    certified = any(entry.certified for entry in planned.tested)
    reason = "is cheaper than the full model" if certified else "is certified"
    return [*notes, f"no cascade {reason}: keep serving the full model"]


def _print(content: dict[str, Any], request: Request) -> None:
    """The cascades that were tested, then everything about the chosen one.

    A letter stands for each cascade, as on the page: a column of recipes would be cut.
    """
    rows, lines = [], []
    for mark, entry in zip(cascade_marks(content).values(), content["tested"], strict=True):
        figures, certificate = entry["certify"], entry["certificate"]
        lost = f"{certificate['errors']} lost of {certificate['allowed']} allowed"
        rows.append(
            (
                mark,
                entry["signal"],
                f"{figures['escalation_rate']:.1%}",
                "–" if content["disturbed"] else f"{figures['ms_per_image']:.1f}",
                "–" if content["disturbed"] else f"{figures['speedup']:.2f}",
                lost if entry["certified"] else "no",
            )
        )
        lines.append(f"{mark}: {entry['low_recipe']}, then {entry['high_recipe']}")
    if rows:
        headings = ("", "signal", "escalated", "ms/image", "speed-up", "certified")
        title = "cascades that were tested; costs without the router"
        console.print(table(title, headings, rows, left=(0, 1, 5)))
    ran = [entry[key] for entry in content["tested"] for key in ("low", "high")]
    for graph in (content["graphs"][name] for name in varying(content, ran)):
        cost = "depends on the image"  # a ratio may not be believed
        if not content["disturbed"]:
            cost = f"{by_image(graph['per_image'])} of the full model's"
        lines.append(f"{graph['recipe']}: cost of a lone image {cost}")
    lines += [*content["doubts"], *content["notes"]]
    if shown := content["chosen"] or next(iter(content["tested"]), None):
        lines += outlook_lines(shown["outlook"], content["goal"]["max_risk"])
    lines += _chosen(content, request) or [content["outcome"]["sentence"]]
    for line in lines:
        console.print(line, soft_wrap=True)  # a recipe or command that is broken cannot be pasted


def _chosen(content: dict[str, Any], request: Request) -> list[str]:
    """What is to be served, what it promises, what it is worth, and how to go on; perhaps empty."""
    chosen, best = content["chosen"], content["best_alternative"]
    if chosen is None:
        return []
    measured, ratio = chosen["measured"], best["cost_ratio_to_plan"]
    cost, worth = "not believed, see above", ""
    if measured["speedup"] is not None:
        cost = (
            f"{measured['ms_per_image']:.2f} ms per image without the router, "
            f"{measured['speedup']:.2f} times less than the full model{mean_words(content, chosen)}"
        )
        worth = f": it costs {ratio:.2f} times as much as the cascade"
        if ratio < 1:
            worth = f": it WINS: it costs {ratio:.2f} of the cascade, though nothing is certified"
    command = [
        *("python", "-m", "export", "repository", "--onnx", request.out / "onnx"),
        *("--calibration", request.out / "calibration.json", "--instances", request.instances),
    ]
    if request.threads > 1:
        command += ["--intra-op-threads", request.threads]
    return [
        "",
        "chosen",
        f"  cheap graph: {chosen['low_recipe']}{_adapted(content, chosen['low'])}",
        f"  full graph:  {chosen['high_recipe']}{_adapted(content, chosen['high'])}",
        f"  signal:      {chosen['signal']}",
        f"  threshold:   {threshold_text(chosen['threshold'])}; images with a larger score go to "
        "the full graph",
        f"  escalated:   {measured['escalation_rate']:.1%} of "
        f"{content['images'][content['measured_on']]} {content['measured_on']} images, "
        f"{chosen['certify']['escalation_rate']:.1%} of the certify split",
        f"  cost:        {cost}; {measured['acceptable']:.1%} of the answers are acceptable",
        f"  against:     {best['recipe']}, the best single graph that agrees as often "
        f"({best['agreement']:.1%}){worth}",
        f"  certificate: {chosen['certificate']['statement']}",
        f"next: {shlex.join(map(str, command))}",
    ]


def _adapted(content: dict[str, Any], name: str) -> str:
    """In how many minutes and to how many images a graph was adapted; empty: it was not."""
    if (found := content["graphs"][name]["adapted"]) is None:
        return ""
    took = "" if found["minutes"] is None else f" in {found['minutes']:.1f} minutes"
    return f" (adapted{took} to {found['images']:,} images)"


def main() -> None:
    """Run the command line; a foreseeable error is one line and exit code 2."""
    run(app, ERRORS)


if __name__ == "__main__":
    main()
