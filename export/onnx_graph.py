"""A rung's torch module to an ONNX file that is small, clean and the same every time."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import onnx
import torch
from onnx import helper
from torch import nn

from export.errors import ExportError, first_line

INPUT_NAME = "image"
# INT32 outputs, the last ones, of graphs whose images differ in cost.
COUNTS = ("tokens", "patches")
BATCH_AXIS = "batch"
MAX_OPSET = 21  # older Triton images load no newer one
# Only a bound for the exporter's shape reasoning; the graph itself accepts any batch.
MAX_TRACED_BATCH = 1024


def export_onnx(
    module: nn.Module, image_px: int, output_names: list[str], file: Path, opset: int
) -> onnx.ModelProto:
    """Export with a dynamic batch axis, clean the graph and write it.

    Args:
        module: takes `image` FP32 (B, 3, H, W), returns one tensor per output name.
        image_px: H = W, the full rung's resolution.
        output_names: in the order the module returns them.
        file: where to write.
        opset: 18 to 21.

    Returns:
        The model as written.

    Raises:
        ExportError: the exporter failed, or the opset came out too new.
    """
    # Batch 2: a traced 1 would be taken for a constant.
    example = torch.zeros(2, 3, image_px, image_px)
    batch = torch.export.Dim(BATCH_AXIS, min=1, max=MAX_TRACED_BATCH)
    try:
        with _quiet():
            program = torch.onnx.export(
                module.eval(),
                (example,),
                input_names=[INPUT_NAME],
                output_names=output_names,
                dynamic_shapes={INPUT_NAME: {0: batch}},
                opset_version=opset,
                dynamo=True,
                verbose=False,
            )
    except Exception as error:  # the exporter wraps whatever its stages raise
        raise ExportError(f"torch could not export {file.stem}: {first_line(error)}") from error
    assert program is not None  # it is None without dynamo
    model = program.model_proto
    strip_provenance(model)
    settle_versions(model)
    onnx.checker.check_model(model)
    file.write_bytes(model.SerializeToString(deterministic=True))
    return model


def strip_provenance(model: onnx.ModelProto) -> None:
    """Remove source paths, stack traces and comments, which differ from machine to machine."""
    graph = model.graph
    tensors = (*graph.input, *graph.output, *graph.value_info, *graph.initializer)
    # Subgraphs of If, Loop and Scan would need the same; a ViT has none.
    nodes = [node for holder in (graph, *model.functions) for node in holder.node]
    for item in (model, graph, *model.functions, *nodes, *tensors):
        item.doc_string = ""
        del item.metadata_props[:]


def settle_versions(model: onnx.ModelProto) -> None:
    """Give a graph the least IR version that its opset allows, and check both.

    Exporters write the newest version they know, whatever the opset, and a server refuses an IR
    version that is newer than itself: ONNX Runtime 1.17 one above 9, 1.16 the same.

    Raises:
        ExportError: as `check_versions`.
    """
    model.ir_version = least_ir_version(model)
    check_versions(model)


def least_ir_version(model: onnx.ModelProto) -> int:
    """The IR version of the first ONNX release that had a graph's opset (18: 8, 20: 9, 21: 10).

    By the table of releases in ONNX's docs/Versioning.md. Opsets that are not in it count for
    nothing.
    """
    return int(helper.find_min_ir_version_for(model.opset_import, ignore_unknown=True))


def check_versions(model: onnx.ModelProto) -> None:
    """Hold the graph to what older Triton images load.

    Raises:
        ExportError: opset above 21, an IR version above the opset's own, or a custom operator
            domain.
    """
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    foreign = sorted(domain for domain in opsets if domain not in ("", "ai.onnx"))
    newest, ceiling = max(opsets.values()), least_ir_version(model)
    if foreign or newest > MAX_OPSET or model.ir_version > ceiling:
        raise ExportError(
            f"the graph has opset {newest}, IR version {model.ir_version}"
            + (f" and domains {', '.join(foreign)}" if foreign else "")
            + f"; the ceiling is opset {MAX_OPSET}, the IR version that came with the opset "
            f"({ceiling}), no custom domain"
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's progress, deprecations and remarks on torchvision; not its errors.

    And what the library below it says each time that the exporter gives it an empty list.
    """
    names = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
