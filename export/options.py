"""Options by which commands, the planner's too, name a model's weights and its head of texts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from export.errors import UsageError
from export.request import AVIT_GATES, Texts, read_gate

Checkpoint = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Weights of --model timm:NAME, avit-tiny or avit-small (.safetensors, .bin or .pth).",
    ),
]
Gate = Annotated[
    str | None,
    typer.Option(
        metavar="SCALE,CENTRE",
        help="By which tokens of avit-tiny and avit-small halt (default: as the name of "
        "--checkpoint ends, such as tiny-10-30.pth).",
    ),
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
    if checkpoint is not None and not model.startswith("timm:") and model not in AVIT_GATES:
        raise UsageError(
            f"--checkpoint FILE goes with --model timm:NAME, {' or '.join(AVIT_GATES)}, which says "
            "what it is"
        )
    if fitted is not None and labels is not None:
        raise UsageError(f"{fitted} and --labels are two heads; give one")
    if prompt is not None and labels is None:
        raise UsageError("--prompt is the sentence around --labels; give those, too")
    return None if labels is None else Texts.read(labels, prompt)


def gate_of(model: str, gate: str | None) -> tuple[float, float] | None:
    """Read `--gate`, before anything is loaded.

    Args:
        model: what `--model` holds.
        gate: what `--gate` holds; None: it was not given.

    Returns:
        Scale and centre; None where it was not given.

    Raises:
        UsageError: it is no gate, or the model has none.
    """
    if gate is None:
        return None
    if model not in AVIT_GATES:
        raise UsageError(f"--gate goes with --model {' or '.join(AVIT_GATES)}; {model} has none")
    found = read_gate(*gate.split(","))
    if found is None:
        raise UsageError(f"--gate {gate!r} is no scale above 0 and a centre, as --gate 10,30")
    return found
