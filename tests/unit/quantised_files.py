"""Rungs to make cheaper, exported once per test module, and how to ask them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from bundle.recipe import Recipe
from export import onnx_graph
from export.static_vit import static_vit

FULL_PX = 64


def export_static_vit(folder: Path, px: int) -> Path:
    """The first four blocks of `static-vit` at a resolution, as `export rungs` writes them."""
    backbone = static_vit(seed=0)
    file = folder / f"static_vit_{px}.onnx"
    recipe = Recipe(px, depth=4)
    names = list(backbone.output_shapes(recipe))
    module = backbone.rung(recipe)
    onnx_graph.export_onnx(module, FULL_PX, names, file, 20)
    return file


def ask(model: onnx.ModelProto | Path, images: NDArray[np.float32]) -> dict[str, NDArray]:
    """All outputs of a graph, on one thread."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {"image": images}), strict=True))


def cosines(first: NDArray[np.float32], second: NDArray[np.float32]) -> NDArray[np.float32]:
    """Cosine of each row to the same row of the other."""
    norms = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    return (first * second).sum(axis=1) / norms
