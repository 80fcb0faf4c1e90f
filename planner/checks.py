"""What can be known before the first export: do the recipes fit the model, are the images enough?

An export of several graphs takes minutes; whatever would fail after it is looked at here first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from bundle.adapted import Adapted, AdaptedError
from bundle.prints import joined
from bundle.recipe import Recipe
from calibration.certify import Goal, allowed_errors, goal_words, images_needed, too_few
from calibration.fit import MIN_IMAGES
from calibration.splits import MIN_GROUPS, SplitError, shares_of, split_by_group
from export.errors import UsageError
from report.terminal import Bars

from . import adapting
from .request import PlanError, Recipes, Request, default_candidates
from .select import MOST

if TYPE_CHECKING:  # torch takes seconds to import, and the workshop brings it
    from export.backbones import Backbone


@dataclass(frozen=True)
class Asked:
    """What a plan shall combine: recipes with their resolution, by which the model can be exported.

    Attributes:
        full: the full model in FP32, which certificates are about.
        lows: cheap graphs.
        highs: full graphs, `full` perhaps among them.
        beside: graphs to compare with.
        notes: what the user should know about them, one line each.
        task: what the model's logits will mean, see `routing.TASKS`; None: it has none.
        states: the adapted states that recipes name, by the keys that stand for them there.
    """

    full: Recipe
    lows: Recipes
    highs: Recipes
    beside: Recipes
    notes: Sequence[str] = ()
    task: str | None = None
    states: Mapping[str, Adapted] = field(default_factory=dict)

    @property
    def exported(self) -> Recipes:
        """The graphs to export besides `full`, without alignments, each once."""
        found = (replace(r, align=False) for r in (*self.lows, *self.highs, *self.beside))
        return tuple(recipe for recipe in dict.fromkeys(found) if recipe != self.full)

    @property
    def learned(self) -> str:
        """Prints of the images that the states have learned from, which have no other part."""
        prints = ""
        for state in self.states.values():
            prints = joined(prints, state.image_prints)
        return prints


def check_recipes(request: Request, backbone: Backbone, bars: Bars) -> Asked:
    """Hold every recipe against the model; nothing is exported.

    Raises:
        PlanError: naming every recipe that the model cannot be exported by, with the reason.
    """
    px = request.px or backbone.default_px[1]
    try:
        backbone.check_px(px)
    except UsageError as error:
        raise PlanError(f"--px {px}: {error}") from None
    # A head that is fitted here reads the CLS token alone, whatever the model's own reads.
    fits_head = request.head_images is not None
    reaches = fits_head or backbone.aligns
    lows, notes = request.candidates, list[str]()
    if lows is None:
        lows = default_candidates(backbone.patch_size, px, reaches)
        if not reaches:
            notes.append(
                "the default candidates are tried without align: it does not reach this model's "
                "head, which reads more than the CLS token"
            )
            bars.say(notes[0])
    if not lows or not request.highs:
        raise PlanError("a cascade needs a cheap and a full graph; give --candidates and --highs")
    at_px: list[Recipes] = []
    problems: list[str] = []
    options = ("--candidates", "--highs", "--beside")
    for option, recipes in zip(options, (lows, request.highs, request.beside), strict=True):
        found: list[Recipe] = []
        for recipe in recipes:
            known = recipe.at(px)
            try:
                (backbone.to_be_probed() if fits_head else backbone).check(recipe, px)
                backbone, known = backbone.knowing(recipe, px)
            except (UsageError, AdaptedError) as error:
                problems.append(f"{option} {recipe}: {error}")
            if known in found:
                problems.append(f"{recipe} is named more than once; once is enough")
            found.append(known)
        at_px.append(tuple(found))
    full = Recipe(px)
    if any(replace(recipe, align=False) == full for recipe in at_px[0]):
        problems.append("--candidates names the full model itself; a cheap graph must be cheaper")
    problems += adapting.problems(request, at_px[0], full)
    if problems:
        raise PlanError("; ".join(problems))
    lows, highs, beside = at_px
    notes += map(adapting.described, backbone.adapted.values())
    task = "classes" if fits_head else backbone.task
    return Asked(full, lows, highs, beside, notes, task, backbone.adapted)


def check_images(request: Request, asked: Asked, bars: Bars) -> list[str]:
    """Refuse images that are too few for any cascade to be certified, even if none of them is lost.

    The splits are made of the images' names alone, as if every image could be read.

    Returns:
        Warnings, one line each, that were said too: of a plan that can only just pass.

    Raises:
        PlanError: how many images there are and how many are needed.
    """
    names = request.source.names
    groups = names
    if request.group_by == "folder":  # as `group_keys`; other groups show when images are read
        groups = tuple(name.rpartition("/")[0] for name in names)
    rest = tuple(groups[row] for row in np.flatnonzero(~_teach_the_head(request)))
    try:
        found = certify_groups(rest, request.test_share, request.seed, _adapts(request))
    except SplitError as error:
        raise PlanError(f"{error}; {needed(request, asked)}") from None
    check_certify_images(found, groups, request, asked)
    lows = len(asked.lows) * (2 if _adapts(request) else 1)  # as they are, and adapted
    most = min(MOST, lows * len(asked.highs))
    goal = replace(request.goal, choices=choices_for(found, request.goal, most))
    allowed = allowed_errors(found, goal)
    if goal.choices == most and allowed > 0:
        return []
    tests = "one cascade" if goal.choices == 1 else f"{goal.choices} cascades"
    warning = (
        f"{_counted(groups)} are only just enough: of {found} certify images {allowed} may be lost "
        f"if {goal_words(goal)} is to be proved of {tests}; more images leave more room"
    )
    bars.say(warning)
    return [warning]


def check_certify_images(found: int, groups: Sequence[str], request: Request, asked: Asked) -> None:
    """Refuse a certify split of `found` independent images, of the images of all these groups.

    Raises:
        PlanError: where nothing can be certified: how many images there are, how many are needed.
    """
    if found < images_needed(request.goal):
        raise PlanError(
            f"{_counted(groups)} are too few: {goal_words(request.goal)} "
            f"{too_few(request.goal, found)}; {needed(request, asked)}"
        )


def _counted(groups: Sequence[str]) -> str:
    independent = len(set(groups))
    grouped = f" in {independent:,} groups" if independent < len(groups) else ""
    return f"{len(groups):,} images{grouped}"


def needed(request: Request, asked: Asked) -> str:
    """What to do about too few images."""
    enough = images_for(request.goal, request.test_share, _adapts(request))
    what = "images" if request.group_by != "folder" else "folders of images"
    head = ""
    if teach := int(_teach_the_head(request).sum()):
        head = (
            f"{teach:,} of these {len(request.source):,} images lie below --head-images, teach the "
            "head and are left out; "
        )
        what += " that it does not learn from"
    elif asked.states:
        what += " that no adapted candidate has learned from"
    otherwise = "or ask for a larger --max-risk or a smaller --confidence"
    if _adapts(request):
        head += f"--adapt takes {adapting.SHARE:.0%} of them; "
        otherwise = f"leave --adapt out, {otherwise}"
    return f"{head}give about {enough:,} {what}, {otherwise}"


def _adapts(request: Request) -> bool:
    return request.adapt_minutes is not None


def _teach_the_head(request: Request) -> NDArray[np.bool_]:
    """Which images are files below `--head-images`, BOOL (N,).

    Copies that lie elsewhere are found once the head is fitted, by `graphs.json`.
    """
    names, folder = request.source.names, Path(request.source.spec)
    if request.head_images is None or not folder.is_dir():  # crops of the sample are no files
        return np.zeros(len(names), np.bool_)
    head = request.head_images.resolve()
    return np.array([(folder / name).resolve().is_relative_to(head) for name in names], np.bool_)


def choices_for(certify_images: int, goal: Goal, most: int) -> int:
    """How many cascades, at most `most`, may be tested so that each of them could pass; or one."""
    for choices in range(most, 1, -1):
        if images_needed(replace(goal, choices=choices)) <= certify_images:
            return choices
    return 1


def images_for(goal: Goal, test_share: float | None = None, adapts: bool = False) -> int:
    """How many images of as many groups it takes so that a cascade can be certified."""

    def suffice(count: int) -> bool:
        groups = tuple(f"{row:09d}" for row in range(count))
        try:
            return certify_groups(groups, test_share, 0, adapts) >= images_needed(goal)
        except SplitError:
            return False

    few, many = 0, MIN_GROUPS
    while not suffice(many):
        few, many = many, 2 * many
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (few, middle) if suffice(middle) else (middle, many)
    return many


def certify_groups(
    groups: Sequence[str], test_share: float | None, seed: int, adapts: bool = False
) -> int:
    """How many groups the certify split has if every image can be read; see `Parts.divide`.

    With `adapts` a part of the images is set aside first.

    Raises:
        SplitError: too few images or groups to split.
    """
    if adapts:
        _, rest = adapting.set_aside(groups, seed)
        groups = [groups[row] for row in rest]
    check_count(len(groups))
    shares = shares_of(groups, test=test_share)
    rows = split_by_group(tuple(groups), shares, seed)["certify"]
    return len({groups[row] for row in rows})


def check_count(images: int) -> None:
    """Refuse fewer images than `fit` takes.

    Raises:
        SplitError: saying how many those are.
    """
    if images < MIN_IMAGES:
        raise SplitError(f"{images} images are too few to split, {MIN_IMAGES} are needed")
