"""Options by which commands, the planner's too, name a model's weights and its head of texts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from export.errors import UsageError
from export.request import Texts

Checkpoint = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Weights of --model timm:NAME (.safetensors, .bin or .pth)."),
]
Labels = Annotated[
    str | None,
    typer.Option(
        metavar="TEXT|FILE",
        help='Zero-shot head of CLIP or SigLIP: labels as "cat,dog", or a file, one a line.',
    ),
]
Prompt = Annotated[
    str | None,
    typer.Option(metavar="TEXT", help='Sentence around a label (default: as "a photo of a {}.").'),
]


def texts_of(
    model: str,
    checkpoint: Path | None,
    labels: str | None,
    prompt: str | None,
    fitted: str | None,
) -> Texts | None:
    """Hold what names a model and its head against each other, before anything is loaded.

    Args:
        model: what `--model` holds, as the next three.
        checkpoint: weights of a model that has none of its own.
        labels: of a head of texts.
        prompt: the sentence around a label.
        fitted: the option that asks for a head fitted on images; None: it was not given.

    Returns:
        The head of texts; None where no labels are given.

    Raises:
        UsageError: options that exclude or need each other, and as `Texts.read`.
    """
    if checkpoint is not None and not model.startswith("timm:"):
        raise UsageError("--checkpoint FILE goes with --model timm:NAME, which says what it is")
    if fitted is not None and labels is not None:
        raise UsageError(f"{fitted} and --labels are two heads; give one")
    if prompt is not None and labels is None:
        raise UsageError("--prompt is the sentence around --labels; give those, too")
    return None if labels is None else Texts.read(labels, prompt)
