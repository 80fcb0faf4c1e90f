"""FP16 weights and arithmetic inside a rung, FP32 at its ends: half the memory, for GPUs.

LayerNorm and Softmax need no exception: ONNX defines LayerNormalization's mean and variance in FP32
whatever its input (`stash_type`), and ONNX Runtime's CUDA kernels of both sum in FP32. Kept in FP32
is `Resize`, whose antialiasing filter has no FP16 kernel. On DINOv2 ViT-S/14 at 112 px the
embedding's cosine to FP32's is 0.99999. A CPU without FP16 arithmetic runs the graph too, with
conversions around every node: correct, and slower than FP32.
"""

from __future__ import annotations

import onnx
from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16
from onnxruntime.transformers.onnx_model import OnnxModel

from export.errors import ExportError, first_line
from export.onnx_graph import INPUT_NAME, settle_versions, strip_provenance

_FLOAT = onnx.TensorProto.FLOAT


def to_half(model: onnx.ModelProto) -> onnx.ModelProto:
    """Convert a rung to FP16 with FP32 input and outputs.

    Args:
        model: a rung in FP32; left as it is.

    Returns:
        The rung with the same input and outputs.

    Raises:
        ExportError: ONNX Runtime cannot convert it.
    """
    source = onnx.ModelProto()
    source.CopyFrom(model)  # parts of it would be changed in place
    try:
        half: onnx.ModelProto = convert_float_to_float16(
            source, keep_io_types=True, op_block_list=[*DEFAULT_OP_BLOCK_LIST, "Resize"]
        )
        _read_image_unrounded(half.graph)
        # The conversion appends its Cast nodes at the end.
        OnnxModel.graph_topological_sort(half.graph, is_deterministic=True)
    except Exception as error:  # whatever its steps raise
        raise ExportError(f"ONNX Runtime could not convert to FP16: {first_line(error)}") from error
    # Some of what it records are types from before the conversion.
    del half.graph.value_info[:]
    strip_provenance(half)
    settle_versions(half)
    onnx.checker.check_model(half)
    return half


def _read_image_unrounded(graph: onnx.GraphProto) -> None:
    """Let the FP32 nodes at the start read the image, not its FP16 copy made FP32 again."""
    copies = {n.output[0] for n in graph.node if n.op_type == "Cast" and INPUT_NAME in n.input}
    restored = {
        node.output[0]: node
        for node in graph.node
        if node.op_type == "Cast" and node.input[0] in copies and node.attribute[0].i == _FLOAT
    }
    for node in graph.node:
        for position, name in enumerate(node.input):
            if name in restored or (node.op_type == "Shape" and name in copies):
                node.input[position] = INPUT_NAME
    for node in restored.values():
        graph.node.remove(node)
    read = {name for node in graph.node for name in node.input}
    for node in [node for node in graph.node if node.output[0] in copies - read]:
        graph.node.remove(node)
