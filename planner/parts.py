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
from report.terminal import Bars

from .request import PlanError, Request
from .select import Pair


@dataclass(frozen=True, eq=False)
class Parts:
    """The parts of all images that can be read.

    Attributes:
        request: of the plan.
        cache: of what graphs answer.
        learned: prints of the images that the graphs were exported with.
        full: what the full model answers for each of them.
        align: positions among those, of images that taught a graph or judged an alignment.
        rest: positions among those, of fit, certify and test together.
        splits: positions within `rest`.
        groups: of `rest`.
    """

    request: Request
    cache: AnswerCache
    learned: str
    full: Answered
    align: Rows
    rest: Rows
    splits: Mapping[str, Rows]
    groups: NDArray[np.str_]

    @classmethod
    def divide(
        cls, request: Request, cache: AnswerCache, learned: str, aligns: bool, bars: Bars
    ) -> Parts:
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
            bars.say(f"{taught.sum()} images taught a graph or its head: none is certified on")
        copies = find_copies(pictures.hashes, pictures.looks)
        if len(copies):
            bars.say(copies.sentence)
        if aligns:
            shares = {"align": ALIGN_SHARE, "rest": 1 - ALIGN_SHARE}
            groups = group_keys(pictures, request.group_by)
            taught[split_by_group(groups, shares, request.seed)["align"]] = True
        return cls._of(request, cache, learned, answered, taught, set())

    def give_back(self) -> Parts:
        """Let the images play a part again that only alignments which are not served have seen.

        Whether those alignments help was judged by these images, so they may not test what is
        served instead: all of them go to the fit split, and certify and test have others, in their
        full share.
        """
        pictures = self.full.pictures
        taught = among(pictures.hashes, pictures.looks, self.learned)
        tried = set(self.align.tolist())
        return self._of(self.request, self.cache, self.learned, self.full, taught, tried)

    @classmethod
    def _of(
        cls,
        request: Request,
        cache: AnswerCache,
        learned: str,
        answered: Answered,
        taught: NDArray[np.bool_],
        tried: set[int],
    ) -> Parts:
        """Split those that taught nothing; groups with an image of `tried` all go to fit."""
        rest = np.flatnonzero(~taught)
        # As `fit` will see them: a group whose first image was taught is called by another.
        groups = group_keys(answered.pictures.only(rest), request.group_by)
        seen = {group for i, group in zip(rest.tolist(), groups, strict=True) if i in tried}
        splits = split_by_group(groups, CERTIFIED, request.seed, seen)
        align = np.flatnonzero(taught)
        return cls(request, cache, learned, answered, align, rest, splits, np.array(groups))

    def rows(self, positions: Rows) -> list[int]:
        """Places in the source of the images at these positions."""
        return [int(row) for row in self.full.pictures.places[positions]]

    def outputs_to_align_on(self, name: str, graphs: GraphSet, bars: Bars) -> Outputs:
        """What a graph without alignment and the full model answer for the images to align on.

        Not for those that ranges or a head were learned from: on them a graph answers better than
        on others, and whether an alignment helps is judged by these images.
        """
        pictures = self.full.pictures.only(self.align)
        new = ~among(pictures.hashes, pictures.looks, self.learned)
        full = graphs.reference
        asked = [Wanted(graphs.graphs[name], True), Wanted(full)]
        found = self._answers(asked, self.rows(self.align[new]), bars)
        return Outputs.of(found, graphs.cast(name, full.name), self.cache)

    def outputs_of_pairs(
        self, lows: Sequence[str], highs: Sequence[str], graphs: GraphSet, bars: Bars
    ) -> dict[Pair, Outputs]:
        """What every two graphs, and the full model where it is neither, answer for the rest."""
        full = dict.fromkeys([*highs, graphs.reference.name])
        asked = [Wanted(graphs.graphs[name], True) for name in lows]
        asked += [Wanted(graphs.graphs[name]) for name in full if name not in lows]
        found = self._answers(asked, self.rows(self.rest), bars)
        return {
            (low, high): Outputs.of(found, graphs.cast(low, high), self.cache)
            for low in lows
            for high in highs
        }

    def agreements(
        self, names: Sequence[str], graphs: GraphSet, fidelity: Fidelity, bars: Bars
    ) -> dict[str, float]:
        """Share of test images without a loss if a graph alone answers, by its name.

        The full model must be among the names.
        """
        asked = [Wanted(graphs.graphs[name]) for name in names]
        found = self._answers(asked, self.rows(self.rest[self.splits["test"]]), bars)
        alone = {name: graphs.cast(name, graphs.reference.name) for name in names}
        return {
            name: float(1 - fidelity.loss(Outputs.of(found, cast, self.cache)).mean())
            for name, cast in alone.items()
        }

    def _answers(self, asked: Sequence[Wanted], rows: list[int], bars: Bars) -> Answered:
        """What graphs answer for these images of the source.

        Raises:
            PlanError: a graph overflows on some of them.
        """
        names = ", ".join(item.graph.name for item in asked)
        with bars.stage(f"{names} answer {len(rows):,} images", len(asked) * len(rows)) as bar:
            for item in asked:  # one session at a time
                try:
                    self.cache.fill([item], rows, bar.advance)
                except ImagesError as error:  # the full model answered these: they can be read
                    raise PlanError(f"{_overflows(item)} too many images ({error})") from error
        found = self.cache.read(asked, rows)
        if len(found.pictures) == len(rows):
            return found
        for item in asked:
            if lost := len(rows) - len(self.cache.read([item], rows).pictures):
                raise PlanError(f"{_overflows(item)} {lost} images")
        raise PlanError("images changed while the plan was made; make it anew")


def _overflows(item: Wanted) -> str:
    return f"leave {item.graph.name} ({item.graph.recipe}) out: it overflows on"
