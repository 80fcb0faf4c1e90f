"""`align`: bake a fitted map into a cheap graph, between its last CLS tokens and its head.

The map and why it helps: `bundle.alignment`. The graph stays one file that needs nothing else.
"""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper, numpy_helper

from bundle import manifest
from bundle.alignment import Alignment
from bundle.graphs import Graph, GraphSet
from bundle.head import find_head
from bundle.prints import joined
from export import onnx_graph
from export.errors import ExportError, UsageError

_BODY = "embedding_unaligned"


def align(graphs: GraphSet, name: str, alignment: Alignment) -> GraphSet:
    """Bake an alignment into a graph and write the aligned one beside it, as `NAME_align`.

    Args:
        graphs: what `export rungs` wrote; its folder gets the aligned graph and its record.
        name: of the graph.
        alignment: fitted on what this graph answered.

    Returns:
        The graphs with the aligned one among them; it plays no role yet.

    Raises:
        UsageError: no such cheap graph, an alignment of another one, or a head that cannot follow
            it.
        ExportError: the aligned graph does not load.
        OSError: a file cannot be written.
    """
    graph = graphs.graphs.get(name)
    full = {graphs.high.name, graphs.reference.name}
    if graph is None or graph.name in full:
        known = ", ".join(other for other in graphs.graphs if other not in full)
        raise UsageError(f"--graph {name}: no cheap graph of that name; there are {known}")
    if graph.recipe.align:
        raise UsageError(f"--graph {name} is aligned already ({graph.recipe}); give another")
    folder = graph.file.parent
    if (fault := graph.fault()) is not None:
        raise UsageError(f"{folder}: {fault}; run python -m export rungs again")
    if graph.record.fingerprint != alignment.graph:
        raise UsageError(
            f"the alignment was fitted on another graph than {name} ({alignment.recipe}); run "
            "python -m calibration collect and python -m calibration align with this one"
        )
    model = bake_alignment(onnx.load(graph.file, load_external_data=False), alignment)
    onnx_graph.settle_versions(model)
    file = folder / f"{name}_align.onnx"
    fresh = file.with_suffix(".aligned")  # os.replace puts it in place whole
    fresh.write_bytes(model.SerializeToString(deterministic=True))
    try:  # as it will be served; onnx's own checker refuses weights with several links
        ort.InferenceSession(fresh, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions share no base class
        fresh.unlink()
        raise ExportError(f"ONNX Runtime does not load the aligned graph: {error}") from error
    record = replace(
        graph.record,
        recipe=str(replace(graph.recipe, align=True)),
        sha256=manifest.sha256_file(fresh),
        size_bytes=fresh.stat().st_size,
    )
    alignment.save(file.with_suffix(".npz"))
    os.replace(fresh, file)
    learned = joined(graph.fitted_on, alignment.image_prints)
    more = graphs.adding(Graph(file.stem, record, file, learned, graph.adapted_on))
    more.save(folder)
    return more


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
    head = _take_head(graph, len(alignment.bias)) if "logits" in outputs else []
    _rename(graph, "embedding", _BODY)
    graph.node.extend([*_map(graph, alignment), *head])
    _prune(graph)
    del graph.value_info[:]  # of tensors that were renamed; shapes are inferred at load
    return aligned


def _take_head(graph: onnx.GraphProto, width: int) -> list[onnx.NodeProto]:
    """Remove the nodes that make the logits, a linear layer, and return them on `embedding`."""
    found = find_head(graph)
    if found is None or not found.follows(width):
        raise UsageError("align needs a linear head on the CLS token; this model's head is another")
    head = []
    for node in found.nodes:
        head.append(onnx.NodeProto())
        head[-1].CopyFrom(node)
        graph.node.remove(node)
    kind = found.weights.data_type
    head[0].input[0] = "embedding" if kind == onnx.TensorProto.FLOAT else "align_cast"
    if kind != onnx.TensorProto.FLOAT:
        cast = helper.make_node("Cast", ["embedding"], ["align_cast"], "align_cast", to=kind)
        head.insert(0, cast)
    return head


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
