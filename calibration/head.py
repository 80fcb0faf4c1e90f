"""The linear head of an exported graph, for answers that no graph gives yet."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper
from onnx.external_data_helper import ExternalDataInfo


@dataclass(frozen=True, eq=False)
class LinearHead:
    """Embedding to logits.

    Attributes:
        weights: FP32 (D, C).
        bias: FP32 (C,).
    """

    weights: NDArray[np.float32]
    bias: NDArray[np.float32]

    @classmethod
    def read(cls, file: Path) -> LinearHead | None:
        """The head of a graph; None where it has none, or one that is not linear on the CLS."""
        graph = onnx.load(file, load_external_data=False).graph
        constants = {item.name: item for item in graph.initializer}
        makers = {output: node for node in graph.node for output in node.output}
        node, offsets = makers.get("logits"), []
        while node is not None and node.op_type in ("Add", "Cast"):
            # Where graphs are in int8 the bias stands apart, where in FP16 a Cast comes last.
            offsets += [constants[name] for name in node.input if name in constants]
            sources = [name for name in node.input if name not in constants]
            node = makers.get(sources[0]) if len(sources) == 1 else None
        if node is None or node.op_type not in ("Gemm", "MatMul"):
            return None
        if not set(node.input[1:]) <= set(constants):
            return None
        weights = _array(constants[node.input[1]], file)
        if any(attribute.name == "transB" and attribute.i for attribute in node.attribute):
            weights = weights.T
        offsets += [constants[name] for name in node.input[2:]]
        width = {output.name: output for output in graph.output}["embedding"]
        if len(weights) != width.type.tensor_type.shape.dim[1].dim_value:
            return None  # it reads the other tokens too
        bias = np.zeros(weights.shape[1], np.float32)  # the exporter drops one of zeros
        return cls(weights, sum((_array(offset, file) for offset in offsets), bias))

    def __call__(self, embedding: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits (B, C) of embeddings (B, D)."""
        return embedding @ self.weights + self.bias


def _array(tensor: onnx.TensorProto, file: Path) -> NDArray[np.float32]:
    """A constant of a graph, wherever it lies.

    `onnx.load` refuses weights that have several hard links, as those of graphs that were chosen
    from a shelf do.
    """
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        place = ExternalDataInfo(tensor)
        with file.with_name(place.location).open("rb") as weights:
            weights.seek(place.offset or 0)
            content = weights.read(place.length)
        inside = onnx.TensorProto(data_type=tensor.data_type, dims=tensor.dims, raw_data=content)
        return _array(inside, file)
    return np.asarray(numpy_helper.to_array(tensor), dtype=np.float32)
