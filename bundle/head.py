"""The linear head of an exported graph: the nodes that make `logits` of a product."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper
from onnx.external_data_helper import ExternalDataInfo

LOGITS = "logits"
EMBEDDING = "embedding"
# What ends a mean over tokens. A head that reads one reads no embedding, unless that is the mean.
_MEANS = ("ReduceMean", "ReduceSum", "Div")
_PASSED = ("Cast", "Gather", "Reshape", "Slice", "Squeeze")


@dataclass(frozen=True)
class Head:
    """How a graph makes its logits.

    Attributes:
        nodes: a product with constant weights, then what adds its bias and casts; the last one
            makes `logits`. A graph in int8 sets the bias apart, one in FP16 ends in a Cast.
        constants: the graph's, by name.
        reads_mean: whether the product reads a mean over tokens that is not the embedding.
    """

    nodes: tuple[onnx.NodeProto, ...]
    constants: Mapping[str, onnx.TensorProto]
    reads_mean: bool

    @property
    def weights(self) -> onnx.TensorProto:
        """What the product multiplies with."""
        return self.constants[self.nodes[0].input[1]]

    @property
    def transposed(self) -> bool:
        """Whether the weights are (C, D) instead of (D, C)."""
        return any(a.name == "transB" and a.i for a in self.nodes[0].attribute)

    @property
    def width(self) -> int:
        """D: of how many numbers each logit is a sum."""
        return int(self.weights.dims[1 if self.transposed else 0])

    def follows(self, width: int) -> bool:
        """Whether it is linear on the embedding, of so many numbers.

        The exporter may compute what the head reads once more, so its name does not tell. Of
        another width, it reads other tokens too.
        """
        return self.width == width and not self.reads_mean

    @property
    def offsets(self) -> list[onnx.TensorProto]:
        """Everything that is added to the product."""
        names = list(self.nodes[0].input[2:])
        names += [name for node in self.nodes[1:] for name in node.input]
        return [self.constants[name] for name in names if name in self.constants]


def find_head(graph: onnx.GraphProto) -> Head | None:
    """How a graph makes its logits; None where it has none, or makes them in another way."""
    constants = {item.name: item for item in graph.initializer}
    makers = {output: node for node in graph.node for output in node.output}
    if LOGITS not in makers:
        return None
    nodes = [makers[LOGITS]]
    while nodes[0].op_type in ("Add", "Cast"):
        sources = [makers[name] for name in nodes[0].input if name in makers]
        if len(sources) != 1:
            return None
        nodes = [*sources, *nodes]
    product = nodes[0]
    if product.op_type not in ("Gemm", "MatMul") or not set(product.input[1:]) <= set(constants):
        return None
    return Head(tuple(nodes), constants, _is_mean(product.input[0], makers))


def _is_mean(name: str, makers: Mapping[str, onnx.NodeProto]) -> bool:
    while name != EMBEDDING and name in makers and makers[name].op_type in _PASSED:
        name = makers[name].input[0]
    return name != EMBEDDING and name in makers and makers[name].op_type in _MEANS


@dataclass(frozen=True, eq=False)
class LinearHead:
    """Embedding to logits, for answers that no graph gives yet.

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
        head = find_head(graph)
        embedding = {output.name: output for output in graph.output}[EMBEDDING]
        width = embedding.type.tensor_type.shape.dim[1].dim_value
        if head is None or not head.follows(width):
            return None
        weights = _array(head.weights, file)
        weights = weights.T if head.transposed else weights
        bias = np.zeros(weights.shape[1], np.float32)  # the exporter drops one of zeros
        return cls(weights, sum((_array(offset, file) for offset in head.offsets), bias))

    def __call__(self, embedding: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits (B, C) of embeddings (B, D)."""
        return embedding @ self.weights + self.bias


def _array(tensor: onnx.TensorProto, file: Path) -> NDArray[np.float32]:
    """A constant of a graph, wherever it lies.

    `onnx.load` refuses weights that have several hard links, as those of graphs that lie in
    several folders do.
    """
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        place = ExternalDataInfo(tensor)
        with file.with_name(place.location).open("rb") as weights:
            weights.seek(place.offset or 0)
            content = weights.read(place.length)
        inside = onnx.TensorProto(data_type=tensor.data_type, dims=tensor.dims, raw_data=content)
        return _array(inside, file)
    return np.asarray(numpy_helper.to_array(tensor), dtype=np.float32)
