"""What can be known before the first export: do the recipes fit the model, are the images enough?

An export of several graphs takes minutes; whatever would fail after it is looked at here first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.align import ALIGN_SHARE
from calibration.certify import Goal, allowed_errors, goal_words, images_needed, too_few
from calibration.splits import CERTIFIED, MIN_GROUPS, SplitError, split_by_group

from .bars import Bars
from .candidates import ALIGN, default_candidates, recipes, written
from .request import Request
from .select import MOST
from .shelf import fit_image_rows
from .subprocesses import PlanError, run_json

Recipe = frozenset[str]


@dataclass(frozen=True)
class Asked:
    """What a plan shall combine, in canonical recipes, each of which the model can be exported by.

    Attributes:
        lows: cheap graphs.
        highs: full graphs; the empty recipe is the full model in FP32.
        beside: graphs to compare with.
        notes: what the user should know about them, one line each.
        task: what the model's logits will mean, see `routing.TASKS`; None: it has none.
    """

    lows: Sequence[Recipe]
    highs: Sequence[Recipe]
    beside: Sequence[Recipe]
    notes: Sequence[str] = ()
    task: str | None = None

    @property
    def aligns(self) -> bool:
        """Whether any graph is to be aligned."""
        return any(ALIGN in recipe for recipe in self.lows)

    @property
    def quantises(self) -> bool:
        """Whether any graph learns its ranges from images."""
        return any("int8=static" in recipe for recipe in (*self.lows, *self.highs, *self.beside))


def check_recipes(request: Request, bars: Bars) -> Asked:
    """Hold every recipe against the model, which is loaded for that and not exported.

    Args:
        request: of the plan.
        bars: where to say what was left out.

    Raises:
        PlanError: naming every recipe that the model cannot be exported by, with the reason.
    """
    named = {
        "--candidates": None if request.candidates is None else recipes(request.candidates),
        "--highs": recipes(request.highs),
        "--beside": recipes(request.beside),
    }
    _check_named(named, request)
    model = _described(named, request, bars)
    canonical = {entry["asked"]: entry["recipe"] for entry in model["recipes"]}
    lows, highs, beside = (
        None if found is None else recipes("; ".join(canonical[written(r)] for r in found))
        for found in named.values()
    )
    notes = []
    if lows is None:
        lows = recipes(
            default_candidates(model["patch_size"], request.px or model["high_px"], model["aligns"])
        )
        if not model["aligns"]:
            notes.append(
                f"the default candidates are tried without {ALIGN}: it does not reach this model's "
                "head, which reads more than the CLS token"
            )
    assert highs is not None and beside is not None
    _check_named({"--candidates": lows, "--highs": highs, "--beside": beside}, request)
    for note in notes:
        bars.say(note)
    task = "classes" if request.head_images else model["task"]
    return Asked(lows, highs, beside, notes, task)


def _check_named(named: Mapping[str, Sequence[Recipe] | None], request: Request) -> None:
    """What is wrong with recipes whatever the model."""
    lows = named["--candidates"]
    if not named["--highs"] or (lows is not None and not lows):
        raise PlanError("a cascade needs a cheap and a full graph; give --candidates and --highs")
    if any(recipe - {ALIGN} <= {f"px={request.px}"} for recipe in lows or ()):
        raise PlanError("--candidates names the full model itself; a cheap graph must be cheaper")
    for option in ("--highs", "--beside"):
        for recipe in named[option] or ():
            if ALIGN in recipe:
                raise PlanError(
                    f"{option} {written(recipe)}: only cheap graphs, those of --candidates, are "
                    f"aligned; leave {ALIGN} out"
                )


def _described(
    named: Mapping[str, Sequence[Recipe] | None], request: Request, bars: Bars
) -> dict[str, Any]:
    """What `export describe` says of the model.

    Raises:
        PlanError: naming every recipe with a problem.
    """
    arguments: list[object] = ["export", "describe", "--model", request.model]
    if request.px is not None:
        arguments += ["--px", request.px]
    if request.head_images is not None:
        arguments += ["--head", "linear"]
    options = {"--px": [frozenset({f"px={request.px}"})] if request.px is not None else []}
    options |= {option: list(found or ()) for option, found in named.items()}
    for text in dict.fromkeys(written(r) for found in options.values() for r in found):
        arguments += ["--recipe", text]
    model = run_json(arguments, bars.say)
    said = {entry["asked"]: entry for entry in model["recipes"]}
    if request.px is not None and (problem := said[f"px={request.px}"]["problem"]):
        raise PlanError(f"--px {request.px}: {problem}")
    found = [
        f"{option} {entry['recipe'] or entry['asked']}: {entry['problem']}"
        for option, asked in options.items()
        for entry in (said[written(recipe)] for recipe in asked)
        if entry["problem"]
    ]
    if found:
        raise PlanError("; ".join(found))
    return model


def check_images(request: Request, asked: Asked, bars: Bars) -> list[str]:
    """Refuse images that are too few for any cascade to be certified, even if none of them is lost.

    The splits are made of the images' names alone, as if every image could be read.

    Args:
        request: of the plan.
        asked: graphs to be combined.
        bars: where to warn.

    Returns:
        Warnings, one line each: of a plan that can only just pass.

    Raises:
        PlanError: how many images there are and how many are needed.
    """
    names = request.source.names
    groups = names
    if request.group_by == "folder":  # as `group_keys`; other groups show when images are read
        groups = tuple(name.rpartition("/")[0] for name in names)
    learned = _teach_the_head(request)
    if asked.quantises:
        learned[fit_image_rows(len(groups))] = True
    try:
        found = certify_groups(groups, learned, asked.aligns, request.seed)
    except SplitError as error:
        raise PlanError(f"{error}; {needed(request, asked)}") from None
    check_certify_images(found, groups, request, asked)
    most = min(MOST, len(asked.lows) * len(asked.highs))
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
    """Refuse a certify split that is too small to certify anything.

    Args:
        found: independent images of the certify split.
        groups: of all images.
        request: of the plan.
        asked: graphs to be combined.

    Raises:
        PlanError: how many images there are and how many are needed.
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
    enough = images_for(request.goal, asked.aligns, asked.quantises)
    without = images_for(request.goal, False, asked.quantises)
    hint = f" (about {without:,} without {ALIGN} in --candidates)" if asked.aligns else ""
    what = "images" if request.group_by != "folder" else "folders of images"
    head = ""
    if teach := int(_teach_the_head(request).sum()):
        head = (
            f"{teach:,} of these {len(request.source):,} images lie below --head-images, teach the "
            "head and are left out; "
        )
        what += " that it does not learn from"
    return (
        f"{head}give about {enough:,} {what}{hint}, or ask for a larger --max-risk or a smaller "
        "--confidence"
    )


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


def images_for(goal: Goal, aligns: bool, quantises: bool) -> int:
    """How many images of as many groups it takes so that a cascade can be certified.

    Args:
        goal: to be proved.
        aligns: whether some of them teach an alignment.
        quantises: whether some of them teach `int8=static` its ranges.
    """

    def suffice(count: int) -> bool:
        learned = np.zeros(count, np.bool_)
        if quantises:
            learned[fit_image_rows(count)] = True
        names = tuple(f"{row:09d}" for row in range(count))
        try:
            return certify_groups(names, learned, aligns, 0) >= images_needed(goal)
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
    groups: Sequence[str], learned: NDArray[np.bool_], aligns: bool, seed: int
) -> int:
    """How many groups the certify split has if every image can be read; see `answers.divide`.

    Args:
        groups: of all images.
        learned: which of them teach a graph before anything is divided, BOOL (N,).
        aligns: whether some teach an alignment.
        seed: of the splits.

    Raises:
        SplitError: too few groups to split.
    """
    taught = learned.copy()
    if aligns:
        shares = {ALIGN: ALIGN_SHARE, "rest": 1 - ALIGN_SHARE}
        taught[split_by_group(tuple(groups), shares, seed)[ALIGN]] = True
    rest = tuple(groups[row] for row in np.flatnonzero(~taught))
    return len({rest[row] for row in split_by_group(rest, CERTIFIED, seed)["certify"]})
