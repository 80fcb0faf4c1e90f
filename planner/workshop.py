"""What makes and prices graphs for the planner: `export` and `perf`, called as functions.

Torch is imported when a model is loaded, once and in some seconds; whatever can be refused before
is refused at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptation.request import Request as Lesson
from bundle.alignment import Alignment
from bundle.fidelity import FidelityLoss
from bundle.graphs import GraphSet
from calibration.images import ImageSource
from export.request import GraphsRequest, spread
from imaging import ImageError, Preprocessing, decode
from perf.images import Pool
from report.terminal import Bars

from .request import Request

if TYPE_CHECKING:
    from adaptation.result import Result
    from export.backbones import Backbone

PRICED_IMAGES = 32
Prices = Mapping[str, Mapping[str, Any]]  # by the graph's name, as `perf.prices.price` returns them


class Workshop:
    """What the planner has others do; tests hand in another."""

    def load(self, request: Request) -> Backbone:
        """The model, with its head of texts where one is asked for."""
        from export.pretrained import load_backbone

        return load_backbone(request.model, request.texts, request.checkpoint, request.gate)

    def export(self, backbone: Backbone, request: GraphsRequest, bars: Bars) -> GraphSet:
        """Graphs of a loaded model, each checked against it."""
        from export.graphs import export_graphs

        return export_graphs(backbone, request, bars)

    def align(self, graphs: GraphSet, name: str, alignment: Alignment) -> GraphSet:
        """Bake an alignment into the graph of that name; the aligned one lies beside it."""
        from export.align import align

        return align(graphs, name, alignment)

    def adapt(
        self,
        backbone: Backbone,
        graphs: GraphSet,
        lesson: Lesson,
        fidelity: FidelityLoss,
        bars: Bars,
    ) -> Result:
        """Train a recipe of a loaded model, or go on where that was stopped.

        A head that was fitted for the graphs is what the answers are judged by.
        """
        from adaptation.distil import distil
        from adaptation.resuming import UNFINISHED
        from export.probe import earlier_probe

        if graphs.fitted_on:
            probe = earlier_probe(graphs)
            backbone = backbone.with_probe(probe.linear, probe.labels)
        lesson = replace(lesson, resume=(lesson.out / UNFINISHED).is_file())
        return distil(backbone, lesson, fidelity, bars)

    def share(self, graphs: GraphSet, folder: Path) -> GraphSet:
        """Store once what graphs in a folder share."""
        from export.shared_weights import share

        return share(graphs, folder)

    def price(
        self,
        graphs: GraphSet,
        names: Sequence[str],
        request: Request,
        rows: Sequence[int],
        bars: Bars,
    ) -> Prices:
        """What these graphs cost as Triton serves them here, twice where the machine was busy.

        Args:
            graphs: `names` among them, and the full model.
            names: of the graphs to price.
            request: says how they will be served.
            rows: places in the source of the images that may say what an image costs.
            bars: show what goes on.
        """
        from perf.prices import Served, price

        pool = _pool(graphs, request.source, rows)
        return price(graphs, names, pool, Served(request.instances, request.threads), bars)


def _pool(graphs: GraphSet, source: ImageSource, rows: Sequence[int]) -> Pool:
    """Some of these images of the source, evenly spread, as they are sent."""
    preprocessing = Preprocessing.from_dict(graphs.preprocessing)
    encoded, tensors = [], []
    for place in spread(len(rows), PRICED_IMAGES):
        with contextlib.suppress(ImageError):  # there are others
            data = source[rows[place]].data
            tensors.append(preprocessing(decode(data)))
            encoded.append(data)
    return Pool(source.title, encoded, tensors, [None] * len(encoded), [])
