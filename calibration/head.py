"""The linear head of an exported graph, for answers that no graph gives yet."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper


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
        """The head of a graph; None where it has none, or one that is not linear."""
        graph = onnx.load(file).graph  # with the weights that lie outside of it
        constants = {item.name: item for item in graph.initializer}
        for node in graph.node:
            if "logits" not in node.output:
                continue
            if node.op_type != "Gemm" or not set(node.input[1:]) <= set(constants):
                return None
            weights = numpy_helper.to_array(constants[node.input[1]])
            transposed = any(a.name == "transB" and a.i for a in node.attribute)
            weights = weights.T if transposed else weights  # (D, C)
            if len(node.input) < 3:  # the exporter drops a bias of zeros
                return cls(weights, np.zeros(weights.shape[1], np.float32))
            return cls(weights, numpy_helper.to_array(constants[node.input[2]]))
        return None

    def __call__(self, embedding: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits (B, C) of embeddings (B, D)."""
        return embedding @ self.weights + self.bias
