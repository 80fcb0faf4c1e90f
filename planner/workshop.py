"""What makes and prices graphs for the planner: `export` and `perf`, called as functions.

Torch is imported when a model is loaded, once and in some seconds; whatever can be refused before
is refused at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bundle.alignment import Alignment
from bundle.graphs import GraphSet
from bundle.recipe import Recipe
from calibration.images import ImageSource
from export.fit_images import FitImages
from imaging import ImageError, Preprocessing, decode
from perf.images import Pool
from report.terminal import Bars

from .request import Request

if TYPE_CHECKING:
    from export.backbones import Backbone

PRICED_IMAGES = 32
Prices = Mapping[str, Mapping[str, Any]]  # by the graph's name, as `perf.prices.price` returns them


@dataclass(frozen=True)
class Exports:
    """Graphs to be exported together.

    Attributes:
        full: the full model in FP32, its resolution that of the input.
        recipes: of the other graphs, at least one, without alignments.
        fit_images: what `int8=static` learns its ranges from; None: no graph does.
        head_images: one folder per class, to fit a linear head on; None: the model's own head.
        out: folder to write.
    """

    full: Recipe
    recipes: Sequence[Recipe]
    fit_images: FitImages | None
    head_images: Path | None
    out: Path


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
    export: Callable[[Backbone, Exports, Bars], GraphSet]
    align: Callable[[GraphSet, str, Alignment], GraphSet]
    price: Callable[[GraphSet, Sequence[str], Request, Bars], Prices]


def _load(model: str) -> Backbone:
    from export.rungs import load_backbone

    return load_backbone(model)


def _export(backbone: Backbone, exports: Exports, bars: Bars) -> GraphSet:
    from export.progress import Steps
    from export.rungs import RungsRequest, export_rungs

    low, *beside = exports.recipes
    request = RungsRequest(
        model=backbone.name,
        out=exports.out,
        low=low,
        high=exports.full,
        beside=tuple(beside),
        probe_images=exports.head_images,
        fit_images=exports.fit_images,
    )
    return export_rungs(request, Steps(bars.console), backbone)


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
    for row in np.unique(np.linspace(0, len(source) - 1, PRICED_IMAGES).round().astype(int)):
        with contextlib.suppress(ImageError):  # there are others
            data = source[int(row)].data
            tensors.append(preprocessing(decode(data)))
            encoded.append(data)
    return Pool(source.title, encoded, tensors, [None] * len(encoded), [])


WORKSHOP = Workshop(_load, _export, _align, _price)
