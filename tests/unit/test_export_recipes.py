"""Every recipe alone, and some together, exported at once from a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx.external_data_helper import uses_external_data

from bundle.graphs import GraphSet
from bundle.manifest import sha256_file
from bundle.prints import encode, look_of
from bundle.recipe import Recipe
from export.onnx_graph import check_versions
from export.parity import ParityError, sample_images, structure_failures
from export.pretrained import pretrained
from export.rungs import RungsRequest, export_rungs
from imaging import decode, pixels_sha256
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
    assert result.exit_code == 0, result.stderr
    cells = [line.split("│")[2].strip() for line in result.stdout.splitlines() if "│" in line]
    for name, text in RECIPES.items():
        assert name in result.stdout
        assert str(Recipe.parse(text).at(PX)) in "".join(cells)  # folded, never cut
    return out


@pytest.fixture(scope="module")
def record(exported) -> dict:
    return json.loads((exported / "graphs.json").read_text())


def test_entries_say_what_was_asked_for(record, exported):
    assert record["roles"] == {
        **{"vit_low": "px8_int8static", "vit_high": "int8", "reference": "full"},
    }
    assert list(record["graphs"]) == list(RECIPES)
    for name, entry in record["graphs"].items():
        recipe = Recipe.parse(RECIPES[name]).at(PX)
        assert entry["recipe"] == str(recipe) and entry["px"] == recipe.px
        assert entry["file"] == f"{name}.onnx"
        assert entry["sha256"] == sha256_file(exported / entry["file"])
        assert entry["layers"] == (recipe.depth or LAYERS)
    files = {entry["file"] for entry in record["graphs"].values()}
    labels = {"graphs.json", "labels.txt", "weights.bin"}
    assert {file.name for file in exported.iterdir()} == files | labels


def test_the_images_that_ranges_were_learned_from_are_on_record(record, fit_images):
    images = [decode((fit_images / f"{i}.png").read_bytes()) for i in range(5)]
    looks = np.stack([look_of(image) for image in images])
    learned = encode([pixels_sha256(image) for image in images], looks)
    for name, entry in record["graphs"].items():
        assert entry["fitted_on"] == (learned if "int8static" in name else "")
    assert record["fitted_on"] == ""  # no head was fitted
    assert record["graphs"]["full"]["fidelity"]["images"] == "5 fit"


@pytest.mark.parametrize("name", RECIPES)
def test_every_graph_is_within_the_contract_and_the_limits(name, exported):
    graph = onnx.load(exported / f"{name}.onnx", load_external_data=False)
    check_versions(graph)
    onnx.checker.check_model(str(exported / f"{name}.onnx"))
    layers = 1 if "depth1" in name else LAYERS
    shapes = {"embedding": (WIDTH,), "cls_layers": (layers + 1, WIDTH), "logits": (3,)}
    assert structure_failures(name, graph, PX, shapes) == []
    assert not graph.metadata_props and not graph.doc_string


@pytest.mark.parametrize("name", RECIPES)
def test_every_graph_answers_at_any_batch(name, exported):
    whole = ask(exported / f"{name}.onnx", IMAGES)
    assert {value.dtype for value in whole.values()} == {np.dtype(np.float32)}
    for batch in (1, 3):
        part = ask(exported / f"{name}.onnx", IMAGES[:batch])
        if name == "int8":  # dynamic int8: see `quantise_dynamic`
            assert part["embedding"].shape == (batch, WIDTH)
            continue
        for output, value in part.items():
            tolerance = 1e-2 if "fp16" in name else 1e-4
            np.testing.assert_allclose(
                value, whole[output][:batch], rtol=tolerance, atol=tolerance, err_msg=output
            )


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
    fidelity = {name: entry["fidelity"]["cosine_mean"] for name, entry in record["graphs"].items()}
    assert fidelity["full"] == pytest.approx(1)
    others = [value for name, value in fidelity.items() if name != "full"]
    assert all(0 < value < 1 for value in others)
    assert fidelity["fp16"] > fidelity["int8static"] > fidelity["px8"]


def test_what_graphs_share_lies_once_and_its_hash_stands_with_those_that_read_it(record, exported):
    weights = sha256_file(exported / "weights.bin")
    for name, entry in record["graphs"].items():
        graph = onnx.load(exported / entry["file"], load_external_data=False).graph
        outside = any(uses_external_data(tensor) for tensor in graph.initializer)
        assert entry["weights_sha256"] == (weights if outside else None), name
    readers = [name for name, entry in record["graphs"].items() if entry["weights_sha256"]]
    assert {"full", "px8", "tome2", "depth1"} <= set(readers)


def test_the_set_knows_the_roles_and_how_deep_a_graph_is(exported):
    graphs = GraphSet.load(exported)
    assert (graphs.low.name, graphs.high.name) == ("px8_int8static", "int8")
    assert graphs.reference.recipe == Recipe(PX)
    assert (graphs.layers, graphs.graphs["depth1"].record.layers) == (LAYERS, 1)
    assert list(graphs.playing()) == ["vit_low", "vit_high", "reference"]


def test_graphs_that_share_nothing_need_no_file_beside_them(model, tmp_path):
    graphs = export_rungs(
        RungsRequest(str(model), tmp_path / "onnx", low=Recipe(8, precision="fp16")), QUIET
    )
    assert [rung.weights_sha256 for rung in graphs.rungs.values()] == [None, None]
    assert not (tmp_path / "onnx/weights.bin").exists()


def test_a_graph_in_fewer_bits_that_lost_its_answers_is_not_written(model, tmp_path, monkeypatch):
    monkeypatch.setattr("export.graphs.LEAST_COSINE", {"fp16": 1.01})
    request = RungsRequest(str(model), tmp_path / "onnx", low=Recipe(8, precision="fp16"))
    with pytest.raises(ParityError, match="fp16 has a mean cosine of 1.000 to FP32") as caught:
        export_rungs(request, QUIET)
    assert "\n" not in str(caught.value) and not (tmp_path / "onnx").exists()
