"""Which image plays which part, and what graphs answer for those of one part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bundle.graphs import GraphSet
from bundle.prints import among, find_copies
from calibration.align import ALIGN_SHARE
from calibration.answers import AnswerCache, Wanted
from calibration.chunks import Answered
from calibration.fidelity import Fidelity
from calibration.images import ImagesError
from calibration.outputs import Outputs
from calibration.splits import CERTIFIED, Rows, group_keys, split_by_group
from report.terminal import Bar, Bars

from .request import PlanError, Request


@dataclass(frozen=True, eq=False)
class Parts:
    """The parts of all images that can be read.

    Attributes:
        full: what the full model answers for each of them.
        align: positions among those, of images that taught a graph or judged an alignment.
        rest: positions among those, of fit, certify and test together.
        splits: positions within `rest`.
        groups: of `rest`.
    """

    full: Answered
    align: Rows
    rest: Rows
    splits: Mapping[str, Rows]
    groups: NDArray[np.str_]

    def rows(self, positions: Rows) -> list[int]:
        """Places in the source of the images at these positions."""
        return [int(row) for row in self.full.pictures.places[positions]]


def divide(request: Request, cache: AnswerCache, learned: str, aligns: bool, bars: Bars) -> Parts:
    """Give each image its part, once the full model has answered all of them.

    Args:
        request: of the plan.
        cache: of answers.
        learned: prints of the images that the graphs were exported with.
        aligns: whether images are needed to align on.
        bars: where to show progress.

    Raises:
        ImagesError: too many images cannot be read.
        SplitError: the images are too few to divide.
    """
    full = [Wanted(cache.graphs.reference)]
    with bars.stage("the full model answers every image", len(request.source)) as bar:
        for line in cache.fill(full, None, bar.advance):
            bars.say(f"left out: {line}")
    answered = cache.read(full)
    pictures = answered.pictures
    taught = among(pictures.hashes, pictures.looks, learned)
    if taught.any():
        bars.say(f"{taught.sum()} images taught a graph or its head: nothing is certified on them")
    copies = find_copies(pictures.hashes, pictures.looks)
    if len(copies):
        bars.say(copies.sentence)
    if aligns:
        shares = {"align": ALIGN_SHARE, "rest": 1 - ALIGN_SHARE}
        groups = group_keys(pictures, request.group_by)
        taught[split_by_group(groups, shares, request.seed)["align"]] = True
    return _parts(request, answered, taught, None)


def give_back(parts: Parts, request: Request, learned: str) -> Parts:
    """Let the images play a part again that only alignments which are not served have seen.

    Whether those alignments help was judged by these images, so they may not test what is served
    instead: all of them go to the fit split, and certify and test have others, in their full share.

    Args:
        parts: with images to align on.
        request: of the plan.
        learned: prints of the images that the graphs were exported with.
    """
    pictures = parts.full.pictures
    taught = among(pictures.hashes, pictures.looks, learned)
    return _parts(request, parts.full, taught, set(parts.align.tolist()))


def _parts(
    request: Request, answered: Answered, taught: NDArray[np.bool_], tried: set[int] | None
) -> Parts:
    """Split those that taught nothing; groups with an image of `tried` all go to fit."""
    rest = np.flatnonzero(~taught)
    # As `fit` will see them: a group whose first image was taught is called by another.
    groups = group_keys(answered.pictures.only(rest), request.group_by)
    seen = {group for i, group in zip(rest.tolist(), groups, strict=True) if i in (tried or ())}
    splits = split_by_group(groups, CERTIFIED, request.seed, seen)
    return Parts(answered, np.flatnonzero(taught), rest, splits, np.array(groups))


def answers(asked: Sequence[Wanted], cache: AnswerCache, rows: list[int], bars: Bars) -> Answered:
    """What graphs answer for these images of the source.

    Raises:
        PlanError: a graph overflows on some of them.
    """
    names = ", ".join(item.graph.name for item in asked)
    with bars.stage(f"{names} answer {len(rows):,} images", len(asked) * len(rows)) as bar:
        for item in asked:  # one session at a time
            _fill(cache, item, rows, bar)
    found = cache.read(asked, rows)
    if len(found.pictures) == len(rows):
        return found
    for item in asked:
        if lost := len(rows) - len(cache.read([item], rows).pictures):
            raise PlanError(
                f"{item.graph.name} ({item.graph.recipe}) overflows on {lost} images; leave it out"
            )
    raise PlanError("images changed while the plan was made; make it anew")


def _fill(cache: AnswerCache, item: Wanted, rows: list[int], bar: Bar) -> None:
    try:
        cache.fill([item], rows, bar.advance)
    except ImagesError as error:  # the full model answered these images, so they can be read
        raise PlanError(
            f"{item.graph.name} ({item.graph.recipe}) overflows on too many images; leave it out "
            f"({error})"
        ) from error


def outputs_to_align_on(
    name: str, graphs: GraphSet, learned: str, cache: AnswerCache, parts: Parts, bars: Bars
) -> Outputs:
    """What a graph and the full model answer for the images to align on.

    Not for those that ranges or a head were learned from: on them a graph answers better than on
    others, and whether an alignment helps is judged by these images.

    Args:
        name: of the graph without alignment.
        graphs: of the plan.
        learned: prints of the images that the graphs were exported with.
        cache: of answers.
        parts: of the images.
        bars: where to show progress.
    """
    pictures = parts.full.pictures.only(parts.align)
    rows = parts.rows(parts.align[~among(pictures.hashes, pictures.looks, learned)])
    full = graphs.reference
    found = answers([Wanted(graphs.graphs[name], True), Wanted(full)], cache, rows, bars)
    return Outputs.of(found, graphs.cast(name, full.name), cache)


def agreements(
    names: Sequence[str],
    graphs: GraphSet,
    cache: AnswerCache,
    parts: Parts,
    fidelity: Fidelity,
    bars: Bars,
) -> dict[str, float]:
    """Share of test images without a loss if one graph answers alone, by its name.

    Args:
        names: of the graphs, the full model among them.
        graphs: of the plan.
        cache: of answers.
        parts: of the images.
        fidelity: when an answer is a loss.
        bars: where to show progress.
    """
    asked = [Wanted(graphs.graphs[name]) for name in names]
    found = answers(asked, cache, parts.rows(parts.rest[parts.splits["test"]]), bars)
    alone = {name: graphs.cast(name, graphs.reference.name) for name in names}
    return {
        name: float(1 - fidelity.loss(Outputs.of(found, cast, cache)).mean())
        for name, cast in alone.items()
    }
