"""The graphs of a plan: each exported once into the folder of its model, then aligned."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bundle.graphs import SCHEMA_VERSION, GraphSet
from bundle.head import LinearHead
from bundle.prints import joined, looks_sha256
from bundle.recipe import Recipe
from calibration.align import Aligned, fit_alignment
from calibration.fidelity import Fidelity
from calibration.images import ImageSource
from calibration.outputs import Outputs
from calibration.splits import group_keys
from export.request import MOST, GraphsRequest, LearnedImages, spread
from imaging import ImageError, Preprocessing, code_sha256
from report.terminal import Bars

from .request import PlanError, Request
from .workshop import Workshop

if TYPE_CHECKING:  # torch takes seconds to import
    from export.backbones import Backbone

_LIBRARIES = ("torch", "transformers", "onnx", "onnxscript", "onnxruntime-gpu")


def exported(
    request: Request,
    full: Recipe,
    recipes: Sequence[Recipe],
    backbone: Backbone,
    workshop: Workshop,
    bars: Bars,
    places: Sequence[int] = (),
) -> GraphSet:
    """Export the full model and graphs of other recipes, but for those that earlier plans did.

    Args:
        request: of the plan.
        full: recipe of the full model.
        recipes: of other graphs.
        backbone: the model.
        workshop: exports.
        bars: where to show progress.
        places: of the fit images in the source: the ranges of int8 are learned from some of them.

    Returns:
        All graphs of this model, aligned ones and others of earlier plans among them.

    Raises:
        PlanError: no image that ranges are learned from can be read.
        ExportError: a graph cannot be made, or does not answer as the model does.
    """
    images = None
    if any(recipe.precision == "int8=static" for recipe in recipes):
        images = _fit_images(request.source, places, backbone.preprocessing(full.px or 0))
    asked = GraphsRequest(
        *(request.cache / identity(request, full, backbone), full, full, tuple(recipes)),
        head_images=request.head_images,
        fit_images=images,
        adds=True,
    )
    return workshop.export(backbone, asked, bars)


def aligned_graph(
    graphs: GraphSet,
    name: str,
    outputs: Outputs,
    fidelity: Fidelity,
    request: Request,
    workshop: Workshop,
    bars: Bars,
) -> tuple[GraphSet, str, Aligned]:
    """Align the graph of that name where it helps, by what it answers for images to learn from.

    Cross-validation divides no group. An alignment that an earlier plan baked in, learned from the
    same images, is not baked anew.

    Returns:
        The graphs, the aligned graph's name, and what the alignment is worth; where it does not
        help on images that it has not learned, the name is that of the graph without.

    Raises:
        ExportError: the aligned graph cannot be made.
    """
    graph = graphs.graphs[name]
    head = LinearHead.read(graph.file)  # `Backbone.check` has refused one that is not linear
    found = fit_alignment(
        outputs,
        np.arange(len(outputs)),
        np.array(group_keys(outputs, request.group_by)),
        (graph.record.fingerprint, graph.record.recipe),
        fidelity,
        head,
        request.seed,
    )
    if not found.helps:
        bars.say(without_help(graph.record.recipe))
        return graphs, name, found
    aligned = f"{name}_align"
    learned = joined(graph.fitted_on, found.alignment.image_prints)
    there = graphs.graphs.get(aligned)
    if there is None or there.fitted_on != learned or there.alignment() is None:
        bars.say(f"align {name} ({graph.recipe})")
        graphs = workshop.align(graphs, name, found.alignment)
    return graphs, aligned, found


def without_help(recipe: str) -> str:
    """What is said of an alignment of a graph that does not help."""
    return (
        f"{recipe},align: the alignment does not help on held-out images; the graph without it "
        "took its place"
    )


def _fit_images(
    source: ImageSource, places: Sequence[int], preprocessing: Preprocessing
) -> LearnedImages:
    files = []
    for row in spread(len(places)):
        with contextlib.suppress(ImageError):  # it was there when the full model answered
            files.append(source[places[row]].data)
    images = LearnedImages.of(files, preprocessing)
    if images is None:
        raise PlanError(f"not one of {MOST} images to learn the ranges of int8 can be read")
    return images


def identity(request: Request, full: Recipe, backbone: Backbone) -> str:
    """The name of the folder: a hash over everything that decides what lies in it.

    But for the images that ranges and alignments learned from: each graph says its own.
    """
    content = {
        "model": [request.model, _stamp(Path(request.model))],
        "source": backbone.source,  # of `timm:NAME` the checkpoint's hash, of a hub id its revision
        "labels": backbone.labels,
        "texts": None if backbone.texts is None else dict(backbone.texts),
        "preprocessing": backbone.preprocessing(full.px or 0).to_dict(),
        "full": str(full),
        "head": None if request.head_images is None else _stamp(request.head_images),
        "imaging": code_sha256(),  # makes what a head and ranges are fitted on
        "looks": looks_sha256(),  # and this finds those images again
        "record": SCHEMA_VERSION,
        "versions": {name: _version(name) for name in _LIBRARIES},
    }
    text = json.dumps(content, sort_keys=True)
    return "graphs-" + hashlib.sha256(text.encode()).hexdigest()[:16]


def _stamp(path: Path) -> list[tuple[str, int, int]]:
    """Of a folder its files' names, sizes and times; of the name of a model nothing."""
    files = [f for f in sorted(path.rglob("*")) if f.is_file()] if path.is_dir() else []
    names = [f.relative_to(path).as_posix() for f in files]
    stats = [f.stat() for f in files]
    return [(n, s.st_size, s.st_mtime_ns) for n, s in zip(names, stats, strict=True)]


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None
