"""Every recipe alone, and some together, exported at once from a tiny model: files and record."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from onnx.external_data_helper import uses_external_data

from bundle.graphs import SCHEMA_VERSION, GraphSet
from bundle.manifest import sha256_file
from bundle.prints import encode, look_of
from bundle.recipe import Recipe
from export.graphs import export_graphs
from export.onnx_graph import check_versions, settle_versions
from export.parity import ParityError, sample_images, structure_failures
from export.pretrained import pretrained
from export.request import GraphsRequest
from imaging import Preprocessing, decode, pixels_sha256
from routing.provenance import RELEASE
from tests.unit.export_tiny import LAYERS, PX, QUIET, WIDTH, run_export, save_tiny
from tests.unit.image_files import write_images
from tests.unit.quantised_files import ask, cosines

pytestmark = pytest.mark.usefixtures("remembered_exports")

LOW, HIGH = "px=8,int8=static", "int8"
BESIDE = {
    "px8": "px=8",
    "depth1": "depth=1",
    "tome2": "tome=2",
    "int8static": "int8=static",
    "fp16": "fp16",
    "px8_depth1_tome2_int8static": "int8=static,tome=2,depth=1,px=8",
    "tome2_fp16": "tome=2,fp16",
}
RECIPES = {"px8_int8static": LOW, "int8": HIGH, "full": "fp32", **BESIDE}
IMAGES = sample_images(8, PX, seed=10)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny", "ViTForImageClassification")


@pytest.fixture(scope="module")
def fit_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"), *(f"{i}.png" for i in range(5)))


@pytest.fixture(scope="module")
def exported(model, fit_images, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "onnx"
    beside = [argument for recipe in BESIDE.values() for argument in ("--beside", recipe)]
    options = ["--low", LOW, "--high", HIGH, "--fit-images", fit_images, "--out", out]
    result = run_export("rungs", "--model", model, *options, *beside)
    assert result.code == 0, result.err
    cells = [line.split("│")[2].strip() for line in result.out.splitlines() if "│" in line]
    for name, text in RECIPES.items():
        assert name in result.out
        assert str(Recipe.parse(text).at(PX)) in "".join(cells)  # folded, never cut
    assert "weights.bin" in result.out
    return out


@pytest.fixture(scope="module")
def record(exported) -> dict:
    return json.loads((exported / "graphs.json").read_text())


def test_the_record_says_what_the_model_is_and_how_it_was_exported(record, exported):
    assert record["schema_version"] == SCHEMA_VERSION
    assert record["release"] == GraphSet.load(exported).release == RELEASE
    assert (record["backbone"], record["image"]) == ("tiny", {"shape": [3, PX, PX]})
    assert (record["embedding_dim"], record["layers"], record["classes"]) == (WIDTH, LAYERS, 3)
    assert record["labels"] == (exported / "labels.txt").read_text().splitlines()
    assert record["head"] == {"kind": "own"} and record["fitted_on"] == ""
    assert Preprocessing.from_dict(record["preprocessing"]).height == PX
    assert (record["opset"], record["parity"]["batches"]) == (20, [1, 3, 8])
    assert record["ir_version"] == 9


def test_entries_say_what_was_asked_for(record, exported):
    roles = {"vit_low": "px8_int8static", "vit_high": "int8", "reference": "full"}
    assert record["roles"] == roles
    assert list(record["graphs"]) == list(RECIPES)  # the rungs, and as they were asked for
    weights = exported / "weights.bin"
    for name, entry in record["graphs"].items():
        recipe, file = Recipe.parse(RECIPES[name]).at(PX), exported / f"{name}.onnx"
        graph = onnx.load(file, load_external_data=False).graph
        reads = any(uses_external_data(tensor) for tensor in graph.initializer)
        assert {key: entry[key] for key in entry.keys() - {"fidelity", "checks", "fitted_on"}} == {
            "px": recipe.px,
            "recipe": str(recipe),
            "file": file.name,
            "sha256": sha256_file(file),
            "weights_sha256": sha256_file(weights) if reads else None,
            "layers": recipe.depth or LAYERS,
            "size_bytes": file.stat().st_size,
            "weights_size_bytes": weights.stat().st_size if reads else None,
        }
        assert reads or name not in ("full", "px8", "tome2", "depth1")
        # Every output at every batch, of graphs in FP32; the others are held against a cosine.
        checked = {(check["rung"], check["batch"], check["output"]) for check in entry["checks"]}
        assert len(checked) == len(entry["checks"]) == (9 if recipe.precision == "fp32" else 0)
        assert {batch for _, batch, _ in checked} <= {1, 3, 8}
        assert {rung for rung, _, _ in checked} <= {name}
    files = {entry["file"] for entry in record["graphs"].values()}
    assert {f.name for f in exported.iterdir()} == files | {
        "graphs.json",
        "labels.txt",
        weights.name,
    }
    graphs = GraphSet.load(exported)
    assert (graphs.low.name, graphs.high.name) == ("px8_int8static", "int8")
    assert graphs.reference.recipe == Recipe(PX) and list(graphs.playing()) == list(roles)


def test_the_images_that_ranges_were_learned_from_are_on_record(record, fit_images):
    images = [decode((fit_images / f"{i}.png").read_bytes()) for i in range(5)]
    looks = np.stack([look_of(image) for image in images])
    learned = encode([pixels_sha256(image) for image in images], looks)
    for name, entry in record["graphs"].items():
        assert entry["fitted_on"] == (learned if "int8static" in name else "")


@pytest.mark.parametrize("name", RECIPES)
def test_every_graph_is_within_the_contract_and_answers_at_any_batch(name, exported):
    file = exported / f"{name}.onnx"
    graph = onnx.load(file, load_external_data=False)
    check_versions(graph)
    assert graph.ir_version == 9
    onnx.checker.check_model(str(file))
    recipe = Recipe.parse(RECIPES[name]).at(PX)
    shapes = {"embedding": (WIDTH,), "cls_layers": ((recipe.depth or LAYERS) + 1, WIDTH)}
    # It takes the full image, shrinks it itself, and names all that it answers.
    assert structure_failures(name, graph, PX, shapes | {"logits": (3,)}) == []
    assert not graph.metadata_props and not graph.doc_string
    assert ("Resize" in {node.op_type for node in graph.graph.node}) == (recipe.px < PX)
    whole = ask(file, IMAGES)
    assert {value.dtype for value in whole.values()} == {np.dtype(np.float32)}
    for batch in (1, 3):
        part = ask(file, IMAGES[:batch])
        assert part["embedding"].shape == (batch, WIDTH)
        tolerance = np.inf if name == "int8" else 1e-2 if "fp16" in name else 1e-4
        for output, value in part.items():
            np.testing.assert_allclose(
                value, whole[output][:batch], rtol=tolerance, atol=tolerance, err_msg=output
            )


# Which ONNX release had an opset first, by docs/Versioning.md of ONNX: 1.13, 1.14, 1.15, 1.16.
@pytest.mark.parametrize(("opset", "ir_version"), [(18, 8), (19, 9), (20, 9), (21, 10)])
def test_a_graph_gets_the_least_ir_version_of_its_opset(opset, ir_version):
    graph = helper.make_graph([], "empty", [], [])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=11)
    settle_versions(model)
    assert model.ir_version == ir_version


def test_the_ir_version_follows_the_opset_whatever_the_recipe(model, fit_images, tmp_path):
    recipes = ("int8", "int8=static", "fp16", "px=8,tome=2,depth=1")
    beside = [argument for recipe in recipes for argument in ("--beside", recipe)]
    options = ["--fit-images", fit_images, "--out", tmp_path / "onnx", "--opset", 18]
    result = run_export("rungs", "--model", model, "--low", "px=8", *options, *beside)
    assert result.code == 0, result.err
    graphs = GraphSet.load(tmp_path / "onnx")
    assert graphs.about["ir_version"] == 8 and len(graphs.graphs) == 6
    for graph in graphs.graphs.values():
        stored = onnx.load(graph.file, load_external_data=False)
        assert [entry.version for entry in stored.opset_import] == [18]
        assert stored.ir_version == 8
        assert set(ask(graph.file, IMAGES)) == {"embedding", "cls_layers", "logits"}


@pytest.mark.parametrize("name", ["full", "px8", "depth1", "tome2"])
def test_an_fp32_graph_is_its_recipe_in_torch(name, exported, model):
    module = pretrained(str(model)).rung(Recipe.parse(RECIPES[name]).at(PX))
    with torch.inference_mode():
        truth = module(torch.from_numpy(IMAGES))
    answers = ask(exported / f"{name}.onnx", IMAGES)
    for value, expected in zip(answers.values(), truth, strict=True):
        np.testing.assert_allclose(value, expected.numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("cheap", "whole"),
    [
        ("px8_int8static", "px8"),
        ("int8", "full"),
        ("int8static", "full"),
        ("fp16", "full"),
        ("tome2_fp16", "tome2"),
    ],
)
def test_fewer_bits_answer_nearly_as_the_same_graph_in_fp32(cheap, whole, exported):
    graphs = (ask(exported / f"{name}.onnx", IMAGES)["embedding"] for name in (cheap, whole))
    assert 0.95 < cosines(*graphs).mean() < 1


def test_fidelity_to_the_full_model_is_reported_for_each(record):
    found = {name: entry["fidelity"] for name, entry in record["graphs"].items()}
    assert {fidelity["images"] for fidelity in found.values()} == {"5 fit"}
    means = {name: fidelity["cosine_mean"] for name, fidelity in found.items()}
    assert means.pop("full") == pytest.approx(1) and all(0 < mean < 1 for mean in means.values())
    assert means["fp16"] > means["int8static"] > means["px8"]
    assert all(0 < f["cosine_min"] <= f["cosine_mean"] <= 1 + 1e-9 for f in found.values())


def test_graphs_that_share_nothing_need_no_file_beside_them(model, tmp_path):
    request = GraphsRequest(tmp_path / "onnx", low=Recipe(8, precision="fp16"))
    graphs = export_graphs(pretrained(str(model)), request, QUIET)
    assert [rung.weights_sha256 for rung in graphs.rungs.values()] == [None, None]
    assert not (tmp_path / "onnx/weights.bin").exists()
    assert graphs.high.notes["fidelity"]["images"] == "16 synthetic"


def test_a_graph_in_fewer_bits_that_lost_its_answers_is_not_written(model, tmp_path, monkeypatch):
    monkeypatch.setattr("export.graphs.LEAST_COSINE", {"fp16": 1.01})
    request = GraphsRequest(tmp_path / "onnx", low=Recipe(8, precision="fp16"))
    with pytest.raises(ParityError, match="fp16 has a mean cosine of 1.000 to FP32") as caught:
        export_graphs(pretrained(str(model)), request, QUIET)
    assert "\n" not in str(caught.value) and not (tmp_path / "onnx").exists()
