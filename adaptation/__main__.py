"""`python -m adaptation distil`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from bundle.adapted import AdaptedError
from bundle.recipe import Recipe, RecipeError
from calibration import options as given
from calibration.splits import GROUPINGS
from export import options
from export.errors import ExportError
from report.terminal import Bars, run

from .request import BATCH, CACHE, MINUTES, AdaptationError, Request

SAMPLE_CROPS = 1200
ERRORS = (*given.ERRORS, AdaptationError, AdaptedError, ExportError, RecipeError)

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def _root() -> None:
    """Train a cheap graph, without labels, to answer as the full model."""


@app.command("distil")
def distil_command(
    model: Annotated[str, typer.Option(metavar="NAME|PATH|ID", help="As export rungs --model.")],
    recipe: Annotated[
        str, typer.Option(metavar="RECIPE", help="Of the cheap graph, such as px=112.")
    ],
    images: Annotated[str, typer.Option(help="A folder (recursive) without labels, or `sample`.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    px: Annotated[int | None, typer.Option(help="Full resolution (default: the model's).")] = None,
    minutes: Annotated[
        float | None,
        typer.Option(help=f"For training, once the full model answered (default: {MINUTES:g})."),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Instead: times that each image is learned from.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where it was stopped.")] = False,
    head_images: Annotated[
        Path | None, typer.Option(help="Fit a linear head on these, one folder per class.")
    ] = None,
    labels: options.Labels = None,
    prompt: options.Prompt = None,
    checkpoint: options.Checkpoint = None,
    fidelity: given.FidelityKind = None,
    tolerance: given.Tolerance = None,
    group_by: given.GroupBy = GROUPINGS[0],
    limit: Annotated[int | None, typer.Option(min=1, help="At most this many images.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Views in a step.")] = BATCH,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of everything drawn.")] = 0,
    cache: Annotated[
        Path, typer.Option(help="Where the full model's answers are kept for other recipes.")
    ] = CACHE,
    as_json: Annotated[bool, typer.Option("--json", help="Print the record.")] = False,
) -> None:
    """Train all weights of a recipe to answer as the full model does; the images need no labels.

    Writes adapted.safetensors and adapted.json, which python -m export rungs bakes in by the recipe
    adapted=DIR; or nothing where it does not help on images that are held out.
    """
    fitted = None if head_images is None else "--head-images DIR"
    texts = options.texts_of(model, checkpoint, labels, prompt, fitted)
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
    )
    # torch and transformers take seconds to import; --help and the checks above do not need them.
    from export.pretrained import load_backbone
    from export.probe import fit_probe

    from .distil import distil, judged_by

    bars = Bars(Console(stderr=True))
    bars.say(f"load {model}")
    backbone = load_backbone(model, texts, checkpoint=checkpoint)
    asked = judged_by(backbone.task if head_images is None else "classes", fidelity, tolerance)
    if head_images is not None:
        probe = fit_probe(backbone, px or backbone.default_px[1], head_images, bars)
        backbone = backbone.with_probe(probe.linear, probe.labels)
    result = distil(backbone, request, asked, bars)
    if as_json:
        typer.echo(json.dumps(result.about, allow_nan=False))
    for line in result.lines():
        typer.echo(line, err=as_json)


def main() -> None:
    """Run the command line; a foreseeable error is one line and exit code 2."""
    run(app, ERRORS)


if __name__ == "__main__":
    main()
