"""`align`: bake a fitted map into a cheap graph, between its last CLS tokens and its head.

The map and why it helps: `routing.alignment`. The graph stays one file that needs nothing else.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper

from export.errors import UsageError
from routing.alignment import Alignment

_BODY = "embedding_unaligned"


def bake_alignment(model: onnx.ModelProto, alignment: Alignment) -> onnx.ModelProto:
    """A copy of a graph whose `embedding` is aligned and whose `logits` follow from that.

    Args:
        model: with outputs `embedding`, `cls_layers` and, with a head, `logits`.
        alignment: fitted on what this graph answers.

    Raises:
        UsageError: the head reads more than the embedding.
    """
    aligned = onnx.ModelProto()
    aligned.CopyFrom(model)
    graph = aligned.graph
    outputs = {output.name for output in graph.output}
    head = _take_head(graph) if "logits" in outputs else None
    _rename(graph, "embedding", _BODY)
    graph.node.extend(_map(graph, alignment))
    if head is not None:
        head.input[0] = "embedding"
        graph.node.append(head)
    _prune(graph)
    del graph.value_info[:]  # of tensors that were renamed; shapes are inferred at load
    return aligned


def _take_head(graph: onnx.GraphProto) -> onnx.NodeProto:
    """Remove the node that makes the logits, a linear layer, and return it."""
    constants = {item.name for item in graph.initializer}
    for node in graph.node:
        if "logits" in node.output:
            if node.op_type != "Gemm" or not set(node.input[1:]) <= constants:
                break
            head = onnx.NodeProto()
            head.CopyFrom(node)
            graph.node.remove(node)
            return head
    raise UsageError("align needs a linear head on the CLS token; this model's head is another")


def _map(graph: onnx.GraphProto, alignment: Alignment) -> list[onnx.NodeProto]:
    """Slice the layers, put them beside the embedding, multiply and add."""
    constants = {
        "align_starts": np.array([-1 - alignment.layers]),
        "align_ends": np.array([-1]),
        "align_axes": np.array([1]),
        "align_weights": alignment.weights,
        "align_bias": alignment.bias,
    }
    graph.initializer.extend(numpy_helper.from_array(a, name) for name, a in constants.items())
    slice_inputs = ["cls_layers", "align_starts", "align_ends", "align_axes"]
    gemm_inputs = ["align_tokens", "align_weights", "align_bias"]
    return [
        helper.make_node("Slice", slice_inputs, ["align_layers"], "align_slice"),
        helper.make_node("Flatten", ["align_layers"], ["align_flat"], "align_flatten", axis=1),
        helper.make_node("Concat", [_BODY, "align_flat"], ["align_tokens"], "align_concat", axis=1),
        helper.make_node("Gemm", gemm_inputs, ["embedding"], "align_map"),
    ]


def _rename(graph: onnx.GraphProto, old: str, new: str) -> None:
    for node in graph.node:
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                if name == old:
                    names[index] = new


def _prune(graph: onnx.GraphProto) -> None:
    """Drop nodes and weights that no output needs any more."""
    needed = {output.name for output in graph.output}
    for node in reversed(list(graph.node)):
        if needed.isdisjoint(node.output):
            graph.node.remove(node)
        else:
            needed.update(node.input)
    for item in list(graph.initializer):
        if item.name not in needed:
            graph.initializer.remove(item)
