"""What makes and prices graphs for the planner: `export` and `perf`, called as functions.

Torch is imported when a model is loaded, once and in some seconds; whatever can be refused before
is refused at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bundle.alignment import Alignment
from bundle.graphs import GraphSet
from calibration.images import ImageSource
from export.request import GraphsRequest, spread
from imaging import ImageError, Preprocessing, decode
from perf.images import Pool
from report.terminal import Bars

from .request import Request

if TYPE_CHECKING:
    from export.backbones import Backbone

PRICED_IMAGES = 32
Prices = Mapping[str, Mapping[str, Any]]  # by the graph's name, as `perf.prices.price` returns them


@dataclass(frozen=True)
class Workshop:
    """What the planner has others do; tests hand in another.

    Attributes:
        load: a model by its name, folder or hub id.
        export: graphs of a loaded model, each checked against it.
        align: bakes an alignment into a graph of that name; the aligned one lies beside it.
        price: what graphs of these names cost as Triton serves them on this machine, measured
            twice where the machine was busy.
    """

    load: Callable[[str], Backbone]
    export: Callable[[Backbone, GraphsRequest, Bars], GraphSet]
    align: Callable[[GraphSet, str, Alignment], GraphSet]
    price: Callable[[GraphSet, Sequence[str], Request, Bars], Prices]


def _load(model: str) -> Backbone:
    from export.pretrained import load_backbone

    return load_backbone(model)


def _export(backbone: Backbone, request: GraphsRequest, bars: Bars) -> GraphSet:
    from export.graphs import export_graphs

    return export_graphs(backbone, request, bars)


def _align(graphs: GraphSet, name: str, alignment: Alignment) -> GraphSet:
    from export.align import align

    return align(graphs, name, alignment)


def _price(graphs: GraphSet, names: Sequence[str], request: Request, bars: Bars) -> Prices:
    from perf.prices import Served, price

    pool = _pool(graphs, request.source)
    return price(graphs, names, pool, Served(request.instances, request.threads), bars)


def _pool(graphs: GraphSet, source: ImageSource) -> Pool:
    """Some images of the source, evenly spread, as they are sent."""
    preprocessing = Preprocessing.from_dict(graphs.preprocessing)
    encoded, tensors = [], []
    for row in spread(len(source), PRICED_IMAGES):
        with contextlib.suppress(ImageError):  # there are others
            data = source[int(row)].data
            tensors.append(preprocessing(decode(data)))
            encoded.append(data)
    return Pool(source.title, encoded, tensors, [None] * len(encoded), [])


WORKSHOP = Workshop(_load, _export, _align, _price)
