"""`python -m adaptation distil | study`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from bundle.adapted import AdaptedError
from bundle.recipe import Recipe, RecipeError
from calibration import options as given
from calibration.images import open_images
from calibration.splits import GROUPINGS
from export import options
from export.errors import ExportError
from export.request import Texts
from report.terminal import Bars, run, table

from .request import BATCH, CACHE, MINUTES, VIEWS, AdaptationError, Request, judged_by

if TYPE_CHECKING:  # torch takes seconds to import
    from bundle.fidelity import FidelityLoss
    from export.backbones import Backbone

SAMPLE_CROPS = 1200
ERRORS = (*given.ERRORS, AdaptationError, AdaptedError, ExportError, RecipeError)

Model = Annotated[str, typer.Option(metavar="NAME|PATH|ID", help="As export rungs --model.")]
Images = Annotated[
    str, typer.Option(help="A folder (recursive) to learn from, without labels, or `sample`.")
]
Px = Annotated[int | None, typer.Option(help="Full resolution (default: the model's).")]
HeadImages = Annotated[
    Path | None, typer.Option(help="Fit a linear head on these, one folder per class.")
]
Epochs = Annotated[
    int | None, typer.Option(min=1, help="Instead: times that each image is learned from.")
]
Batch = Annotated[int, typer.Option(min=1, help="Views in a step.")]
Views = Annotated[
    int, typer.Option(min=1, help="Of each image to learn from: itself, and crops of it.")
]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of everything drawn.")]
Cache = Annotated[
    Path, typer.Option(help="Where the full model's answers are kept for other recipes.")
]

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def _root() -> None:
    """Train a cheap graph, without labels, to answer as the full model."""


@app.command("distil")
def distil_command(
    model: Model,
    recipe: Annotated[
        str, typer.Option(metavar="RECIPE", help="Of the cheap graph, such as px=112.")
    ],
    images: Images,
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    px: Px = None,
    minutes: Annotated[
        float | None,
        typer.Option(help=f"For training, once the full model answered (default: {MINUTES:g})."),
    ] = None,
    epochs: Epochs = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where it was stopped.")] = False,
    head_images: HeadImages = None,
    labels: options.Labels = None,
    prompt: options.Prompt = None,
    checkpoint: options.Checkpoint = None,
    gate: options.Gate = None,
    fidelity: given.FidelityKind = None,
    tolerance: given.Tolerance = None,
    group_by: given.GroupBy = GROUPINGS[0],
    limit: Annotated[int | None, typer.Option(min=1, help="At most this many images.")] = None,
    batch: Batch = BATCH,
    views: Views = VIEWS,
    seed: Seed = 0,
    cache: Cache = CACHE,
    as_json: Annotated[bool, typer.Option("--json", help="Print the record.")] = False,
) -> None:
    """Train all weights of a recipe to answer as the full model does; the images need no labels.

    Writes adapted.safetensors and adapted.json, which python -m export rungs bakes in by the recipe
    adapted=DIR; or nothing where it does not help on images that are held out.
    """
    fitted = None if head_images is None else "--head-images DIR"
    texts = options.texts_of(model, checkpoint, labels, prompt, fitted)
    halting = options.gate_of(model, gate)
    request = Request(
        recipe=Recipe.parse(recipe),
        source=given.source(images, limit, seed, SAMPLE_CROPS),
        out=out,
        px=px,
        minutes=minutes,
        epochs=epochs,
        group_by=group_by,
        seed=seed,
        cache=cache,
        resume=resume,
        batch=batch,
        views=views,
    )
    from .distil import distil
    from .resuming import UNFINISHED

    bars = Bars(Console(stderr=True))
    backbone, asked, _ = _loaded(
        model, texts, checkpoint, halting, head_images, px, fidelity, tolerance, bars
    )
    try:
        result = distil(backbone, request, asked, bars)
    except KeyboardInterrupt:
        if (out / UNFINISHED).is_file():
            bars.say("the same command with --resume goes on")
        raise
    if as_json:
        typer.echo(json.dumps(result.about, allow_nan=False))
    for line in result.lines():
        typer.echo(line, err=as_json)


@app.command("study")
def study_command(
    model: Model,
    recipes: Annotated[
        str, typer.Option("--recipes", metavar="RECIPE;...", help="Cheap graphs, as px=84; px=112.")
    ],
    images: Images,
    test: Annotated[Path, typer.Option(help="A folder of other images, to judge by.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    px: Px = None,
    minutes: Annotated[
        float | None,
        typer.Option(
            help="For all trainings together, once the full model answered (default: 25)."
        ),
    ] = None,
    epochs: Epochs = None,
    head_images: HeadImages = None,
    labels: options.Labels = None,
    prompt: options.Prompt = None,
    checkpoint: options.Checkpoint = None,
    gate: options.Gate = None,
    fidelity: given.FidelityKind = None,
    tolerance: given.Tolerance = None,
    group_by: given.GroupBy = GROUPINGS[0],
    batch: Batch = BATCH,
    views: Views = VIEWS,
    seed: Seed = 0,
    cache: Cache = CACHE,
) -> None:
    """Compare cheap graphs as they are, aligned, adapted and both, by how many images they learn.

    Judged on test images that no part has seen. Writes summary.json and the adapted states.
    """
    fitted = None if head_images is None else "--head-images DIR"
    texts = options.texts_of(model, checkpoint, labels, prompt, fitted)
    halting = options.gate_of(model, gate)
    found = [Recipe.parse(text) for text in recipes.split(";")]
    request = Request(
        recipe=found[0],
        source=given.source(images, None, seed, SAMPLE_CROPS),
        out=out / "states",
        px=px,
        minutes=minutes,
        epochs=epochs,
        group_by=group_by,
        seed=seed,
        cache=cache,
        batch=batch,
        views=views,
    )
    judged = open_images(str(test))
    from .study import Subject, study, to_dict

    bars = Bars(Console(stderr=True))
    backbone, asked, prints = _loaded(
        model, texts, checkpoint, halting, head_images, px, fidelity, tolerance, bars
    )
    subject = Subject(backbone, found, judged, request, asked, prints)
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for row in study(subject, bars):
        rows.append(row)
        text = json.dumps(to_dict(rows), indent=2, allow_nan=False)
        (out / ".summary.json").write_text(text + "\n")
        (out / ".summary.json").replace(out / "summary.json")
    headings = ("recipe", "state", "images", "agree", "for 5 %", "for 2 %", "minutes")
    title = f"on {rows[0].test_images} test images; escalation needed for a risk of 5 and of 2 %"
    shown = [
        (
            *(row.recipe, row.state, f"{row.train_images:,}", f"{row.agreement:.3f}"),
            *(
                "–" if share is None else f"{share:.0%}"
                for share in (row.needed_at_5, row.needed_at_2)
            ),
            f"{row.minutes:.1f}" if row.minutes else "",
        )
        for row in rows
    ]
    Console(highlight=False, markup=False).print(table(title, headings, shown, left=(0, 1)))
    typer.echo(f"wrote {out / 'summary.json'}")


def _loaded(
    model: str,
    texts: Texts | None,
    checkpoint: Path | None,
    gate: tuple[float, float] | None,
    head_images: Path | None,
    px: int | None,
    fidelity: str | None,
    tolerance: float | None,
    bars: Bars,
) -> tuple[Backbone, FidelityLoss, str]:
    """The model with its head, when an answer is acceptable, and prints of the head's images."""
    # torch and transformers take seconds to import; --help and other checks do not need them.
    from export.pretrained import load_backbone
    from export.probe import fit_probe

    bars.say(f"load {model}")
    backbone = load_backbone(model, texts, checkpoint, gate)
    asked = judged_by(backbone.task if head_images is None else "classes", fidelity, tolerance)
    if head_images is not None:
        probe = fit_probe(backbone, px or backbone.default_px[1], head_images, bars)
        return backbone.with_probe(probe.linear, probe.labels), asked, probe.prints
    return backbone, asked, ""


def main() -> None:
    """Run the command line; a foreseeable error is one line and exit code 2."""
    run(app, ERRORS)


if __name__ == "__main__":
    main()
