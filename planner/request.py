"""What a user asks the planner for, and the error of what cannot be had."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bundle.recipe import Recipe
from calibration.certify import Goal
from calibration.fidelity import Fidelity
from calibration.images import ImageSource
from calibration.reference import REFERENCE_IMAGES


class PlanError(ValueError):
    """The planner cannot go on. One line that says what to do."""


@dataclass(frozen=True)
class Request:
    """A plan to be made.

    Attributes:
        model: as `export rungs --model`.
        source: the images.
        candidates: recipes of cheap graphs; None: those of `candidates.default_candidates`.
        highs: recipes of full graphs.
        beside: recipes of graphs to compare with.
        px: the full resolution; None: the model's own.
        head_images: one folder per class, to fit a linear head on; None: the model's own head.
        goal: what to certify.
        fidelity: when an answer is a loss; None: what the model's task has by itself, with the
            three settings below.
        tolerance: as `fidelity.Fidelity.asked`.
        relative: as `fidelity.Fidelity.asked`.
        label_threshold: as `fidelity.Fidelity.asked`.
        group_by: see `splits.group_keys`.
        latency_budget_ms: the most that an image may take that runs through both graphs, one
            request in flight, without the router; None: anything.
        instances: of each graph, as they will be served.
        threads: of each instance.
        seed: of the splits.
        cache: folder of exported graphs, kept for the next plan.
        answers: folder of what graphs answered, shared with `collect`.
        out: folder of the result.
        reference_images: how many images travel with the artifact, see `reference`.
    """

    model: str
    source: ImageSource
    candidates: tuple[Recipe, ...] | None
    highs: tuple[Recipe, ...]
    beside: tuple[Recipe, ...]
    px: int | None
    head_images: Path | None
    goal: Goal
    fidelity: Fidelity | None
    tolerance: float | None
    group_by: str
    latency_budget_ms: float | None
    instances: int
    threads: int
    seed: int
    cache: Path
    answers: Path
    out: Path
    relative: bool = False
    label_threshold: float | None = None
    reference_images: int = REFERENCE_IMAGES
