"""What `python -m perf run` needs before it starts, made without torch and without a server."""

import shutil
from dataclasses import replace
from pathlib import Path

from bundle import manifest
from bundle.graphs import GraphSet
from tests.unit.fakes import make_calibration
from tests.unit.image_files import write_images
from tests.unit.onnx_files import CLASSES, LAYERS, D, graph_at, write_graph_set, write_rung

ROOT = Path(__file__).resolve().parents[2]


def write_rungs(folder, alternatives=(), seeds=(1, 2)):
    """Rungs of 4 and 8 px, and static ones of the resolutions given."""
    graphs = GraphSet.load(write_graph_set(folder, seeds=seeds))
    for px in alternatives:
        file = folder / f"px{px}.onnx"
        write_rung(file, seed=px)
        graphs = graphs.adding(graph_at(file, px))
    graphs.save(folder)
    return GraphSet.load(folder)


def calibration_of(graph_set, **changes):
    """An artifact of these rungs."""
    fields = {
        "backbone": graph_set.backbone,
        "rungs": graph_set.rungs,
        "image_shape": graph_set.image_shape,
        "preprocessing_sha256": graph_set.preprocessing_sha256(),
        "embedding_dim": D,
        "layers": LAYERS,
        "classes": CLASSES,
        "chosen_by": {"fidelity": "top1", "tolerance": None},
    }
    return replace(make_calibration(), **{**fields, **changes})


def write_repository(folder, graph_set):
    """Laid out as `export repository` does, as far as measuring looks at it."""
    for name, file in graph_set.files.items():
        version = folder / name / "1"
        version.mkdir(parents=True)
        (version / "model.onnx").write_bytes(file.read_bytes())
        (folder / name / "config.pbtxt").write_text(f'backend: "onnxruntime" # of {name}\n')
    (folder / "router").mkdir()
    shutil.copy(ROOT / "model_repository/router/config.pbtxt", folder / "router")
    manifest.write(folder)
    return folder


def write_workplace(folder, image_count=8):
    """`build/` and `images/` where the defaults of the command line look for them."""
    graph_set = write_rungs(folder / "build/onnx")
    calibration_of(graph_set).save(folder / "build/calibration/calibration.json")
    write_repository(folder / "build/model_repository", graph_set)
    write_images(folder / "images", *(f"{i}.png" for i in range(image_count)))
    return folder
