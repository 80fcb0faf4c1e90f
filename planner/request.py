"""What a user asks the planner for, and the error of what cannot be had."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bundle.recipe import Recipe, RecipeError
from calibration.certify import Goal
from calibration.fidelity import Fidelity
from calibration.images import ImageSource
from calibration.reference import REFERENCE_IMAGES
from export.request import Texts
from routing import answer_depends_on_batch

Recipes = tuple[Recipe, ...]
LATENCY_PERCENTILE = 95  # over images, of a graph that takes longer for one than for another
SHARES_OF_PX = (0.5, 0.4375, 0.375)


class PlanError(ValueError):
    """The planner cannot go on. One line that says what to do."""


@dataclass(frozen=True)
class Request:
    """A plan to be made.

    Attributes:
        model: as `export rungs --model`.
        source: the images.
        candidates: recipes of cheap graphs; None: `default_candidates`.
        highs: recipes of full graphs.
        beside: recipes of graphs to compare with.
        px: the full resolution; None: the model's own.
        head_images: one folder per class, to fit a linear head on; None: of texts, or the model's.
        goal: what to certify.
        fidelity: when an answer is a loss, by the model's task; a FidelityError where it means
            nothing for that.
        group_by: see `splits.group_keys`.
        test_share: of the images, to measure on alone; None: as `splits.shares_of`.
        latency_budget_ms: the most that an image may take that runs through both graphs, one
            request in flight, without the router, at the `LATENCY_PERCENTILE`-th percentile of a
            graph whose cost depends on the image; None: anything.
        instances: of each graph, as they will be served.
        threads: of each instance.
        seed: of the splits.
        cache: folder of exported graphs, kept for the next plan.
        answers: folder of what graphs answered, shared with `collect`.
        out: folder of the result.
        reference_images: how many images travel with the artifact, see `reference`.
        texts: labels in words, of which the model gets a zero-shot head; None: it has another.
        checkpoint: the weights of `timm:NAME` or of an A-ViT; None: the model has its own.
        gate: scale and centre of an A-ViT; None: the checkpoint's name says them.
        adapt_minutes: that training cheap graphs may take, together; None: none is trained.
    """

    model: str
    source: ImageSource
    candidates: Recipes | None
    highs: Recipes
    beside: Recipes
    px: int | None
    head_images: Path | None
    goal: Goal
    fidelity: Callable[[str | None], Fidelity]
    group_by: str
    latency_budget_ms: float | None
    instances: int
    threads: int
    seed: int
    cache: Path
    answers: Path
    out: Path
    reference_images: int = REFERENCE_IMAGES
    test_share: float | None = None
    texts: Texts | None = None
    checkpoint: Path | None = None
    gate: tuple[float, float] | None = None
    adapt_minutes: float | None = None


def recipes(option: str, text: str) -> Recipes:
    """Read recipes with semicolons between them.

    Args:
        option: that holds them, for messages.
        text: what the user wrote.

    Raises:
        PlanError: no recipe, one that no certificate can be about, or one that is aligned and
            not a cheap graph's.
    """
    found: list[Recipe] = []
    for part in filter(None, map(str.strip, text.split(";"))):
        try:
            recipe = Recipe.parse(part)
        except RecipeError as error:
            raise PlanError(f"{option} {part}: {error}") from None
        if (reason := answer_depends_on_batch(str(recipe))) is not None:
            raise PlanError(
                f"{recipe}: {reason}, so nothing about it can be certified; use int8=static"
            )
        if recipe.align and option != "--candidates":
            raise PlanError(
                f"{option} {recipe}: only cheap graphs, those of --candidates, are aligned; leave "
                "align out"
            )
        found.append(recipe)
    return tuple(found)


def default_candidates(patch_size: int, px: int, aligns: bool) -> Recipes:
    """Cheap graphs worth trying where the user names none: fewer pixels, int8, aligned.

    Args:
        patch_size: of the model, in pixels.
        px: its full resolution.
        aligns: whether an alignment reaches its head; else they are not aligned.
    """
    sizes = (max(1, round(share * px / patch_size)) * patch_size for share in SHARES_OF_PX)
    return tuple(
        Recipe(size, precision="int8=static", align=aligns)
        for size in dict.fromkeys(sizes)
        if size < px
    )
