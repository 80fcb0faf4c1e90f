"""Which image plays which part, and what graphs answer for those of one part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bundle.graphs import GraphSet
from bundle.prints import among, encode, find_copies
from calibration.answers import AnswerCache, Wanted
from calibration.certify import one_per_group
from calibration.chunks import Answered
from calibration.fidelity import Fidelity
from calibration.images import ImagesError
from calibration.outputs import Outputs, usable
from calibration.record import measured_split
from calibration.splits import Rows, group_keys, shares_of, split_by_group, with_groups
from report.terminal import Bars

from .adapting import set_aside
from .request import PlanError, Request
from .select import Pair


@dataclass(frozen=True, eq=False)
class Parts:
    """The parts of all images that can be read, but for those that heads and weights learned from.

    Attributes:
        request: of the plan.
        cache: of what graphs answer.
        places: of the n images in the source.
        splits: positions among them of `fit`, `certify` and perhaps `test`.
        groups: of the n images.
        set_aside: places in the source of the images that weights will be adapted to; nothing else
            sees them, and none of the n images is like one of them.
    """

    request: Request
    cache: AnswerCache
    places: NDArray[np.int64]
    splits: Mapping[str, Rows]
    groups: NDArray[np.str_]
    set_aside: Sequence[int] = ()

    @classmethod
    def divide(
        cls, request: Request, cache: AnswerCache, head: str, states: str, bars: Bars
    ) -> Parts:
        """Give each image its part, once the full model has answered all of them.

        Args:
            request: of the plan.
            cache: of answers.
            head: prints of the images that a head was fitted on.
            states: prints of the images that weights of candidates were adapted to.
            bars: where to show progress.

        Raises:
            ImagesError: too many images cannot be read.
            SplitError: the images are too few to divide.
        """
        full = [Wanted(cache.graphs.reference)]
        with bars.stage("the full model answers every image", len(request.source)) as bar:
            for line in cache.fill(full, None, bar.advance):
                bars.say(f"left out: {line}")
        pictures = cache.read(full).pictures
        for prints, taught in ((head, "the head"), (states, "an adapted graph its weights")):
            known = among(pictures.hashes, pictures.looks, prints)
            known = with_groups(known, pictures, request.group_by)
            if known.any():
                bars.say(
                    f"{known.sum()} images, or others of their group, taught {taught} and are left "
                    "out"
                )
                pictures = pictures.only(np.flatnonzero(~known))
        if sentence := find_copies(pictures.hashes, pictures.looks).sentence:
            bars.say(sentence)
        groups, aside = group_keys(pictures, request.group_by), list[int]()
        if request.adapt_minutes is not None:
            chosen, others = set_aside(groups, request.seed)
            learned = pictures.only(chosen)
            prints = encode(learned.hashes, learned.looks)
            others = others[~among(pictures.hashes, pictures.looks, prints)[others]]
            pictures, groups = pictures.only(others), tuple(groups[row] for row in others)
            aside = [int(place) for place in learned.places]
        splits = split_by_group(groups, shares_of(groups, test=request.test_share), request.seed)
        return cls(request, cache, pictures.places, splits, np.array(groups), aside)

    @property
    def measured(self) -> str:
        """The split that figures are of."""
        return measured_split(self.splits)

    @property
    def certify_images(self) -> int:
        """Independent images of the certify split."""
        return len(one_per_group(self.groups, self.splits["certify"], self.request.seed))

    def rows(self, split: str | None = None) -> list[int]:
        """Places in the source of the images of a split; None: of all."""
        places = self.places if split is None else self.places[self.splits[split]]
        return [int(place) for place in places]

    def outputs(
        self, low: str, highs: Sequence[str], graphs: GraphSet, split: str | None, bars: Bars
    ) -> dict[Pair, Outputs]:
        """What a cheap graph, full graphs and the full model answer for a split; None: for all.

        An aligned graph's answers for fit images are cross-fitted, see `outputs.usable`.
        """
        asked = [Wanted(graphs.graphs[low], True)]
        asked += [
            Wanted(graphs.graphs[name])
            for name in dict.fromkeys([*highs, graphs.reference.name])
            if name != low
        ]
        answered = self._answers(asked, self.rows(split), bars)
        casts = {(low, high): graphs.cast(low, high) for high in highs}
        return {
            pair: usable(Outputs.of(answered, cast, self.cache), cast)
            for pair, cast in casts.items()
        }

    def agreements(
        self, names: Sequence[str], graphs: GraphSet, fidelity: Fidelity, bars: Bars
    ) -> dict[str, float]:
        """Share of the images that measure without a loss if a graph alone answers, by its name."""
        full = graphs.reference
        asked = [Wanted(graphs.graphs[name]) for name in dict.fromkeys([*names, full.name])]
        found = self._answers(asked, self.rows(self.measured), bars)
        alone = {name: graphs.cast(name, full.name) for name in names}
        return {
            name: float(1 - fidelity.loss(usable(Outputs.of(found, cast, self.cache), cast)).mean())
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
