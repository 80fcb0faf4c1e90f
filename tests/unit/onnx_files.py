"""A pair of tiny real ONNX rungs with their rungs.json, made without torch."""

import json

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from imaging import Preprocessing
from routing import manifest
from routing.rungset import SCHEMA_VERSION

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


def write_rung_set(folder, classes=CLASSES, seeds=(1, 2)):
    """Write both rungs and rungs.json as `export rungs` does."""
    folder.mkdir(parents=True, exist_ok=True)
    rungs = {}
    for name, px, seed in (("vit_low", SIZE // 2, seeds[0]), ("vit_high", SIZE, seeds[1])):
        file = folder / f"{name}.onnx"
        write_rung(file, seed, classes)
        rungs[name] = {
            "px": px,
            "recipe": f"px={px}",
            "file": file.name,
            "sha256": manifest.sha256_file(file),
        }
    content = {
        "schema_version": SCHEMA_VERSION,
        "backbone": "tiny",
        "image": {"shape": [3, SIZE, SIZE]},
        "embedding_dim": D,
        "layers": LAYERS,
        "classes": classes,
        "labels": None if classes is None else [f"class {i}" for i in range(classes)],
        "preprocessing": Preprocessing(
            SIZE, SIZE, None, "bilinear", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
        ).to_dict(),
        "rungs": rungs,
    }
    (folder / "rungs.json").write_text(json.dumps(content))
    return folder
