"""What is asked for of an adaptation, and the error of what cannot be had.

Needs no torch, which takes seconds to import.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bundle.fidelity import FidelityLoss
from bundle.recipe import Recipe
from calibration.images import ImageSource
from calibration.splits import GROUPINGS, check_grouping

CACHE = Path("build/teacher-cache")
MINUTES = 15.0
BATCH = 32
VIEWS = 2
LEAST_GROUPS = 50  # below, a tenth of them cannot tell whether anything helped


class AdaptationError(ValueError):
    """The adaptation cannot go on. One line that says what to do."""


@dataclass(frozen=True, eq=False)
class Request:
    """A state to be trained.

    Attributes:
        recipe: of the cheap graph; precision and `align` are the graph's business and left out.
        source: the images to learn from.
        out: folder to write.
        px: resolution of the full model; None: its own.
        minutes: that training may take, without what the full model takes to answer.
        epochs: instead of minutes: how many times each image is learned from.
        places: of the images in the source that may be used; None: all.
        group_by: which images stay together when some are held out, see `splits.group_keys`.
        seed: of crops, flips, order and what is held out.
        cache: folder of what full models answered, kept for other recipes.
        resume: whether to continue what lies in `out`.
        batch: views in a step.
        views: of each image: the image itself, and crops of it.

    Raises:
        AdaptationError: something that is refused whatever the model, too few images among it.
        SplitError: an unknown grouping.
    """

    recipe: Recipe
    source: ImageSource
    out: Path
    px: int | None = None
    minutes: float | None = None
    epochs: int | None = None
    places: Sequence[int] | None = None
    group_by: str = GROUPINGS[0]
    seed: int = 0
    cache: Path = CACHE
    resume: bool = False
    batch: int = BATCH
    views: int = VIEWS

    def __post_init__(self) -> None:
        """Refuse before a model is loaded."""
        check_grouping(self.group_by)
        if self.recipe.adapted is not None:
            raise AdaptationError(f"{self.recipe} is adapted already; adapt the recipe without")
        if self.recipe.precision == "fp16" or self.recipe.precision.startswith("int8"):
            raise AdaptationError(
                f"{self.recipe}: weights are adapted in FP32; leave {self.recipe.precision} out "
                "here and give it to python -m export rungs"
            )
        if self.recipe.align:
            raise AdaptationError(
                f"{self.recipe}: an adapted state is aligned by itself; leave align out here"
            )
        if self.minutes is not None and self.epochs is not None:
            raise AdaptationError("--minutes and --epochs say the same twice; give one of them")
        if self.minutes is not None and not 0 < self.minutes < float("inf"):
            raise AdaptationError(f"--minutes {self.minutes:g} is no time to train in")
        if self.out.exists() and not self.out.is_dir():
            raise AdaptationError(f"--out {self.out} is a file; give a folder")
        if "," in str(self.out):
            raise AdaptationError(f"--out {self.out} has a comma, which ends it in a recipe")
        check_images(self.groups)

    @property
    def rows(self) -> Sequence[int]:
        """Places of the images that may be used."""
        return range(len(self.source)) if self.places is None else self.places

    @property
    def groups(self) -> int:
        """How many groups there are by the images' names; copies can only make them fewer."""
        names = {self.source.names[row] for row in self.rows}
        if self.group_by == "folder":  # as `group_keys`
            names = {name.rpartition("/")[0] for name in names}
        return len(names)

    def at(self, px: int) -> Request:
        """The same request with both resolutions written out.

        Raises:
            AdaptationError: the recipe is the full model's.
        """
        px = self.px or px
        recipe = self.recipe.at(px)
        if recipe == Recipe(px):
            raise AdaptationError(f"{recipe} is the full model itself; give a cheaper recipe")
        return replace(self, px=px, recipe=recipe)


def check_images(groups: int) -> None:
    """Refuse too few images, or too few groups of them.

    Raises:
        AdaptationError: saying how many are needed.
    """
    if groups < LEAST_GROUPS:
        raise AdaptationError(
            f"{groups} images or groups of them are too few to learn from, {LEAST_GROUPS} are "
            "needed; some hundreds are worth the time"
        )


def judged_by(task: str | None, kind: str | None, tolerance: float | None) -> FidelityLoss:
    """When an answer is acceptable; of a value, unless it is said, by the cosine of embeddings.

    Raises:
        FidelityError: it means nothing for what the model answers.
    """
    if task == "value" and kind is None:
        kind = "cosine"
    return FidelityLoss.asked(task, kind, tolerance)
