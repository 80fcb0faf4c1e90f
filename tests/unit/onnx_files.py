"""A pair of tiny real ONNX rungs with their graphs.json, made without torch."""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from bundle import manifest
from bundle.graphs import HIGH, LOW, REFERENCE, Graph, GraphSet
from imaging import Preprocessing
from routing import RungRecord

SIZE, D, LAYERS, CLASSES = 8, 6, 3, 4


def write_rung(path, seed, classes=CLASSES):
    """embedding = pooled pixels x W; cls_layers = its multiples; logits = embedding x H."""
    rng = np.random.default_rng(seed)
    weights = {
        "W": rng.normal(size=(3, D)).astype(np.float32) * 3,
        "S": np.linspace(0.5, 1.0, LAYERS + 1, dtype=np.float32).reshape(1, LAYERS + 1, 1),
        "axis1": np.array([1], np.int64),
        "flat": np.array([0, 3], np.int64),
        "H": np.random.default_rng(0).normal(size=(D, CLASSES)).astype(np.float32),
    }
    nodes = [
        helper.make_node("GlobalAveragePool", ["image"], ["pooled"]),
        helper.make_node("Reshape", ["pooled", "flat"], ["colour"]),
        helper.make_node("MatMul", ["colour", "W"], ["embedding"]),
        helper.make_node("Unsqueeze", ["embedding", "axis1"], ["row"]),
        helper.make_node("Mul", ["row", "S"], ["cls_layers"]),
    ]
    outputs = {"embedding": ["batch", D], "cls_layers": ["batch", LAYERS + 1, D]}
    if classes is not None:
        nodes.append(helper.make_node("MatMul", ["embedding", "H"], ["logits"]))
        outputs["logits"] = ["batch", CLASSES]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, SIZE, SIZE])],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, d) for n, d in outputs.items()],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, path)


def graph_at(file, px):
    """A file as an exported graph."""
    return Graph(file.stem, RungRecord(px, f"px={px}", manifest.sha256_file(file)), file)


def write_graph_set(folder, classes=CLASSES, seeds=(1, 2)):
    """Write both rungs and graphs.json as `export rungs` does."""
    folder.mkdir(parents=True, exist_ok=True)
    graphs = {}
    for name, px, seed in ((LOW, SIZE // 2, seeds[0]), (HIGH, SIZE, seeds[1])):
        file = folder / f"{name}.onnx"
        write_rung(file, seed, classes)
        graphs[name] = graph_at(file, px)
    GraphSet(
        backbone="tiny",
        image_shape=(3, SIZE, SIZE),
        embedding_dim=D,
        layers=LAYERS,
        classes=classes,
        labels=None if classes is None else tuple(f"class {i}" for i in range(classes)),
        preprocessing=Preprocessing(
            SIZE, SIZE, None, "bilinear", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
        ).to_dict(),
        graphs=graphs,
        roles={LOW: LOW, HIGH: HIGH, REFERENCE: HIGH},
    ).save(folder)
    return folder
