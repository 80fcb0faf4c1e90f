"""Going on with a training that was stopped: only as what it was."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bundle.fidelity import FidelityLoss
from export.backbones import Backbone
from export.errors import first_line
from export.recipes.adapted import sha256_of

from .objective import Objective
from .request import AdaptationError, Request

UNFINISHED = ".unfinished.pt"


def identity_of(
    backbone: Backbone, request: Request, objective: Objective, fidelity: FidelityLoss
) -> dict[str, Any]:
    """What decides what a step does, but for the images: a run is only resumed as what it was."""
    return {
        "recipe": str(request.recipe),
        "teacher": backbone.weights_sha256,
        "image_px": request.px,
        "seed": request.seed,
        "objective": asdict(objective),
        "fidelity": fidelity.to_dict(),
        "head": None if backbone.linear_head is None else sha256_of(backbone.linear_head),
        "views": request.views,
        "batch": request.batch,
        "minutes": request.minutes,
        "epochs": request.epochs,
    }


def unfinished_in(file: Path, identity: Mapping[str, Any]) -> dict[str, Any]:
    """The state of a run that was stopped, its tensors on the CPU.

    Raises:
        AdaptationError: the file is damaged, or of a run with other options.
        OSError: it cannot be read.
    """
    with file.open("rb") as stream:
        try:
            state: dict[str, Any] = torch.load(stream, map_location="cpu", weights_only=True)
            check_same(state, identity, file)
        except AdaptationError:
            raise
        except Exception as error:  # whatever a damaged file makes torch raise
            raise AdaptationError(
                f"{file} is not readable ({first_line(error)}); remove it and begin again"
            ) from None
    return state


def check_same(state: Mapping[str, Any], identity: Mapping[str, Any], file: Path) -> None:
    """Refuse to go on with a run that was another."""
    other = [name for name, value in identity.items() if state["identity"].get(name) != value]
    if other:
        raise AdaptationError(
            f"{file} is of a training with another {', '.join(other)}; give the same command, "
            "or remove it and begin again"
        )
