"""The shelf: all graphs of a plan, exported at once into a folder named by what made them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bundle.graphs import NAME as RECORD
from bundle.graphs import GraphSet
from bundle.prints import looks_sha256
from calibration.align import Aligned, fit_alignment
from calibration.fidelity import Fidelity
from calibration.head import LinearHead
from calibration.outputs import Outputs
from calibration.splits import group_keys
from imaging import ImageError, code_sha256
from routing import Alignment, AlignmentError

from .bars import Bars
from .candidates import ALIGN, Graph, said
from .request import Request
from .subprocesses import PlanError, run

FIT_IMAGES = 64  # what `export rungs` takes of a folder
_LIBRARIES = ("torch", "transformers", "onnx", "onnxscript", "onnxruntime-gpu")


def export_shelf(request: Request, recipes: list[frozenset[str]], bars: Bars) -> Path:
    """Export the full model and every recipe without its alignment, unless that was done before.

    Args:
        request: of the plan.
        recipes: of all graphs but the full model, no two alike.
        bars: where to say so.

    Returns:
        The folder.

    Raises:
        PlanError: the export failed.
    """
    px = [] if request.px is None else [f"px={request.px}"]
    low, *beside = [said(recipe) for recipe in recipes]
    arguments = ["export", "rungs", "--model", request.model, "--low", low]
    arguments += ["--high", *(px or ["fp32"])]
    for recipe in beside:
        arguments += ["--beside", recipe]
    if request.head_images is not None:
        arguments += ["--head", "linear", "--images", str(request.head_images)]
    shelf = request.cache / _identity(request, arguments)
    if (shelf / RECORD).is_file():
        bars.say(f"the graphs lie in {shelf} from before")
        return shelf
    images = shelf.with_suffix(".images")
    _write_images(request, images)
    run([*arguments, "--fit-images", images, "--out", shelf], bars.say)
    return shelf


def align_graph(
    shelf: Path,
    graph: Graph,
    outputs: Outputs,
    fidelity: Fidelity,
    group_by: str,
    seed: int,
    bars: Bars,
) -> tuple[str, Aligned]:
    """Align a graph of the shelf where that helps, unless it was done before.

    Args:
        shelf: the folder.
        graph: without alignment.
        outputs: of this graph, for images to learn from.
        fidelity: when an answer is acceptable.
        group_by: see `splits.group_keys`; cross-validation divides no group.
        seed: of cross-validation.
        bars: where to say so.

    Returns:
        The aligned graph's name, and what the alignment is worth; where it does not help on images
        that it has not learned, nothing is exported and the name is that of the graph without.

    Raises:
        PlanError: a head that an alignment does not reach, or the export failed.
    """
    rung_set = GraphSet.load(shelf)
    head = LinearHead.read(graph.file) if rung_set.classes is not None else None
    if rung_set.classes is not None and head is None:
        raise PlanError(
            f"{graph.record.recipe}: the head reads more than the CLS token; leave align out"
        )
    aligned = fit_alignment(
        outputs,
        np.arange(len(outputs)),
        np.array(group_keys(outputs, group_by)),
        (graph.record.fingerprint, graph.record.recipe),
        fidelity,
        head,
        seed,
    )
    if not aligned.helps:
        bars.say(
            f"{graph.record.recipe},{ALIGN}: the alignment does not help on held-out images; the "
            "graph without it takes its place"
        )
        return graph.name, aligned
    name = f"{graph.name}_{ALIGN}"
    file = shelf / f"{name}.npz"
    if name not in rung_set.graphs or not _same(aligned.alignment, file):
        aligned.alignment.save(file)
        run(
            ["export", "align", "--onnx", shelf, "--graph", graph.name] + ["--alignment", file],
            bars.say,
        )
    return name, aligned


def taught_by_export(rung_set: GraphSet) -> str:
    """Prints of the images that a head or ranges of int8 learned from, without any alignment's.

    Args:
        rung_set: of the shelf, which may hold aligned graphs from before.
    """
    graphs = rung_set.graphs
    return rung_set.learned(name for name in graphs if not graphs[name].recipe.align)


def _same(alignment: Alignment, file: Path) -> bool:
    try:
        before = Alignment.load(file)
    except AlignmentError:
        return False
    return (before.graph, before.image_prints) == (alignment.graph, alignment.image_prints)


def _identity(request: Request, arguments: list[str]) -> str:
    """A hash over everything that decides what lies on the shelf."""
    head = request.head_images
    files = sorted(head.rglob("*")) if head is not None else []
    content = {
        "arguments": arguments,
        "head": [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file()],
        "source": request.source.fingerprint(),
        "imaging": code_sha256(),  # makes what a head and ranges are fitted on
        "looks": looks_sha256(),  # and this finds those images again
        "seed": request.seed,
        "group_by": request.group_by,
        "model": _stamp(Path(request.model)),
        "record": 3,  # of graphs.json: one without its task would be taken for another model's
        "versions": {name: _version(name) for name in _LIBRARIES},
    }
    text = json.dumps(content, sort_keys=True, default=str)
    return "shelf-" + hashlib.sha256(text.encode()).hexdigest()[:16]


def _stamp(path: Path) -> list[tuple[str, int, int]]:
    """Of a local model its files' names, sizes and times; of a name nothing."""
    files = sorted(path.rglob("*")) if path.is_dir() else []
    return [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file()]


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def fit_image_rows(count: int) -> NDArray[np.intp]:
    """Which of `count` images teach `int8=static` its ranges: evenly spread ones."""
    return np.unique(np.linspace(0, count - 1, FIT_IMAGES).round().astype(np.intp))


def _write_images(request: Request, folder: Path) -> None:
    """Some of the images as files, for the ranges of `int8=static`."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for row in fit_image_rows(len(request.source)):
        with contextlib.suppress(ImageError):  # such an image is left out of everything
            (folder / f"{row:06d}").write_bytes(request.source[int(row)].data)
