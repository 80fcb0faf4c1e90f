"""Graphs with adapted weights: what they answer, what is recorded, and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from bundle.adapted import Adapted, AdaptedError
from bundle.alignment import Alignment
from bundle.graphs import GraphSet
from bundle.prints import encode, no_looks
from bundle.recipe import Recipe
from export.align import align
from export.graphs import export_graphs
from export.parity import sample_images
from export.pretrained import load_backbone, pretrained
from export.request import GraphsRequest, Texts
from routing import RungOutputs
from tests.unit.adapting import disturbed
from tests.unit.export_tiny import (
    LAYERS,
    PX,
    QUIET,
    WIDTH,
    run_export,
    save_tiny,
    save_tokenizer,
)
from tests.unit.image_files import write_images
from tests.unit.quantised_files import ask, cosines

pytestmark = pytest.mark.usefixtures("remembered_exports")

IMAGES = sample_images(8, PX, seed=11)
PRINTS = encode(["ab" * 32], no_looks(1))
HEADS = ("none", "fitted", "own", "more", "texts")
CLASSES = {"none": "Dinov2Model", "fitted": "Dinov2Model", "own": "ViTForImageClassification"}
CLASSES |= {"more": "Dinov2ForImageClassification", "texts": "CLIPModel"}


def loaded(folder: Path, head: str):
    """A tiny model with a head of a kind."""
    model = str(save_tiny(folder / head, CLASSES[head]))
    if head == "texts":
        save_tokenizer(Path(model))
        return load_backbone(model, Texts(("cat", "dog", "emu")))
    backbone = pretrained(model)
    if head == "fitted":
        torch.manual_seed(1)
        backbone = backbone.with_probe(torch.nn.Linear(WIDTH, 4), tuple("abcd"))
    return backbone


@pytest.fixture(scope="module", params=HEADS)
def kind(request, tmp_path_factory):
    """(backbone, its disturbed state at px=8, the graphs)."""
    folder = tmp_path_factory.mktemp(request.param)
    backbone = loaded(folder, request.param)
    state = disturbed(backbone, Recipe(8), folder / "a state", PRINTS)
    low = Recipe(8, adapted=str(state.folder))
    graphs = export_graphs(
        backbone, GraphsRequest(folder / "onnx", low, beside=(Recipe(8),)), QUIET
    )
    return backbone, state, graphs


def as_torch(backbone, recipe, state=None) -> dict[str, np.ndarray]:
    """What the torch module of a recipe answers, with a state's weights or the model's own."""
    module = backbone.trainable(recipe)
    if state is not None:
        module.load(load_file(state.file))
    with torch.inference_mode():
        answers = module.eval()(torch.from_numpy(IMAGES))
    return dict(zip(backbone.output_shapes(), (a.numpy() for a in answers), strict=True))


def check_answers(file, backbone, state) -> None:
    """A graph answers as the module that its state was written from, and not as the plain one."""
    expected, found = as_torch(backbone, state.recipe, state), ask(file, IMAGES)
    plain = as_torch(backbone, state.recipe)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-4, atol=1e-4)
        assert np.abs(found[name] - plain[name]).max() > 1e-2


def test_the_graph_answers_as_its_module_and_not_as_the_plain_one(kind):
    backbone, state, graphs = kind
    check_answers(graphs.low.file, backbone, state)
    checks = graphs.low.notes["checks"]
    assert len(checks) == 3 * len(backbone.output_shapes()) and {
        check["rung"] for check in checks
    } == {graphs.low.name}


def test_logits_are_the_heads_of_the_embedding_that_is_answered(kind):
    backbone, _, graphs = kind
    found = ask(graphs.low.file, IMAGES)
    head = backbone.linear_head
    assert (head is not None) == ("logits" in found and backbone.aligns)
    if head is not None:
        with torch.inference_mode():
            logits = head(torch.from_numpy(found["embedding"])).numpy()
        np.testing.assert_allclose(found["logits"], logits, rtol=1e-4, atol=1e-4)


def test_the_record_names_the_weights_and_what_they_learned(kind):
    _, state, graphs = kind
    folder = graphs.low.file.parent
    assert graphs.low.name == f"px8_adapted{state.sha256[:12]}"
    content = json.loads((folder / "graphs.json").read_text())
    entries = content["graphs"]
    assert entries[graphs.low.name]["recipe"] == f"px=8,adapted={state.sha256[:12]}"
    assert entries[graphs.low.name]["adapted_on"] == PRINTS
    assert "adapted_on" not in entries["full"]
    assert str(state.folder) not in (folder / "graphs.json").read_text()
    again = GraphSet.load(folder)
    assert again.graphs == graphs.graphs and again.low.recipe == Recipe(
        8, adapted=state.sha256[:12]
    )
    assert again.left_out() == again.learned() == PRINTS
    assert again.left_out(["full"]) == ""
    assert all(graph.fault() is None for graph in again.graphs.values())


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vit")
    return loaded(folder, "own")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"), *(f"{i}.png" for i in range(5)))


@pytest.mark.parametrize("text", ["px=12", "depth=1", "tome=2", "px=8,depth=1,tome=2"])
def test_every_recipe_is_baked(text, vit, tmp_path):
    recipe = Recipe.parse(text).at(PX)
    state = disturbed(vit, recipe, tmp_path / "state")
    low = replace(recipe, adapted=str(state.folder))
    graphs = export_graphs(vit, GraphsRequest(tmp_path / "onnx", low), QUIET)
    check_answers(graphs.low.file, vit, state)
    assert graphs.low_layers == (recipe.depth or LAYERS)


@pytest.mark.parametrize("precision", ["int8", "int8=static", "fp16"])
def test_fewer_bits_and_an_alignment_come_on_top(precision, vit, images, tmp_path):
    state = disturbed(vit, Recipe(8), tmp_path / "state", PRINTS)
    body = Recipe(8, adapted=str(state.folder))
    low = replace(body, precision=precision)
    request = GraphsRequest(tmp_path / "onnx", low, beside=(body,), fit_images=images)
    graphs = export_graphs(vit, request, QUIET)
    assert graphs.low.adapted_on == PRINTS
    assert bool(graphs.low.fitted_on) == (precision == "int8=static")
    found, expected = ask(graphs.low.file, IMAGES), as_torch(vit, Recipe(8), state)["embedding"]
    plain = as_torch(vit, Recipe(8))["embedding"]
    assert cosines(found["embedding"], expected).mean() > 0.95
    assert cosines(found["embedding"], expected).mean() > cosines(found["embedding"], plain).mean()
    # `export align`, of what this graph answers.
    record = graphs.low.record
    rng = np.random.default_rng(0)
    arrays = rng.normal(size=((1 + LAYERS) * WIDTH, WIDTH)), rng.normal(size=WIDTH)
    fitted = Alignment(
        *(array.astype(np.float32) for array in arrays),
        *(record.fingerprint, "b", record.recipe, encode(["cd" * 32], no_looks(1))),
        *(np.array(["c" * 64]), np.zeros((1, WIDTH), np.float32)),
    )
    made = align(graphs, graphs.low.name, fitted)
    aligned = made.graphs[f"{graphs.low.name}_align"]
    assert aligned.adapted_on == PRINTS and aligned.recipe == replace(graphs.low.recipe, align=True)
    outputs = RungOutputs(found["embedding"], found["cls_layers"], None)
    answered = ask(aligned.file, IMAGES)["embedding"]
    tolerance = 2e-2 if precision == "fp16" else 1e-4
    np.testing.assert_allclose(answered, fitted.embedding(outputs), rtol=tolerance, atol=tolerance)
    cast = made.cast(aligned.name, "full")
    assert cast.left_out() == PRINTS and cast.learned() != PRINTS
    assert GraphSet.load(graphs.low.file.parent).graphs[aligned.name].adapted_on == PRINTS


def test_two_states_of_one_recipe_lie_side_by_side_and_are_added(vit, tmp_path):
    first = disturbed(vit, Recipe(8), tmp_path / "first", PRINTS)
    out = tmp_path / "onnx"
    low = Recipe(8, adapted=str(first.folder))
    export_graphs(vit, GraphsRequest(out, low, adds=True), QUIET)
    weights = {name: 1.01 * value for name, value in load_file(first.file).items()}
    shutil.copytree(first.folder, tmp_path / "second")
    save_file(weights, tmp_path / "second" / first.file.name)
    second = replace(first, folder=tmp_path / "second").save()
    other = Recipe(8, adapted=str(second.folder))
    graphs = export_graphs(vit, GraphsRequest(out, other, beside=(low,), adds=True), QUIET)
    names = [f"px8_adapted{state.key}" for state in (first, second)]
    assert set(graphs.graphs) == {"full", *names} and len(set(names)) == 2
    assert graphs.low.name == names[1]
    for name, state in zip(names, (first, second), strict=True):
        expected = as_torch(vit, Recipe(8), state)["logits"]
        np.testing.assert_allclose(
            ask(graphs.graphs[name].file, IMAGES)["logits"], expected, rtol=1e-4, atol=1e-4
        )
    # Both by the same weights are one graph twice.
    with pytest.raises(Exception, match="is asked for 2 times"):
        twice = (low, Recipe(8, adapted=str(first.folder) + "/"))
        export_graphs(vit, GraphsRequest(tmp_path / "new", low, beside=twice[1:]), QUIET)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"recipe": "px=12,adapted={}"}, "is of px=8, not of px=12; adapt that recipe"),
        ({"recipe": "px=8,tome=2,adapted={}"}, "is of px=8, not of px=8,tome=2; adapt that"),
        ({"high": "px=32"}, "full model at 16 px, not at 32 px; adapt it again"),
        ({"model": "fitted"}, "was trained by another model"),
        ({"teacher": "0" * 64}, "was trained by another model (000000000000…"),
        ({"weights": "cut"}, "differs from its SHA-256 in adapted.json"),
        ({"weights": "fewer"}, "weights of another module (1 differ, as tower.layernorm.bias)"),
        ({"weights": "shapes"}, "weights of another module (1 differ, as shapes)"),
        ({"folder": "elsewhere"}, "no elsewhere/adapted.json; give a folder that"),
    ],
)
def test_a_state_of_something_else_is_refused_before_anything_is_written(
    change, message, vit, tmp_path
):
    state = disturbed(vit, Recipe(8), tmp_path / "state")
    if "teacher" in change:
        state = replace(state, teacher=change["teacher"]).save()
    spoil(state, change.get("weights"))
    backbone = loaded(tmp_path, change["model"]) if "model" in change else vit
    text = change.get("recipe", "px=8,adapted={}")
    low = Recipe.parse(text.format(change.get("folder", state.folder)))
    high = Recipe.parse(change["high"]) if "high" in change else None
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "kept.txt").write_text("kept")
    with pytest.raises(AdaptedError) as caught:
        export_graphs(backbone, GraphsRequest(tmp_path / "onnx", low, high), QUIET)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert [file.name for file in (tmp_path / "onnx").iterdir()] == ["kept.txt"]
    assert {file.name for file in tmp_path.iterdir()} <= {"onnx", "state", "fitted"}


def spoil(state: Adapted, how: str | None) -> None:
    if how == "cut":
        state.file.write_bytes(state.file.read_bytes()[:-4])
    elif how is not None:
        weights = load_file(state.file)
        value = weights.pop("tower.layernorm.bias")
        if how == "shapes":
            weights["tower.layernorm.bias"] = value[:-1].clone()
        save_file(weights, state.file)
        state.save()


def test_texts_and_projections_are_part_of_the_full_model(tmp_path):
    """Embeddings of length 1 are other answers than those without."""
    texts = loaded(tmp_path, "texts")
    plain = pretrained(str(tmp_path / "texts"))
    state = disturbed(texts, Recipe(8), tmp_path / "state")
    with pytest.raises(AdaptedError, match="was trained by another model"):
        plain.knowing(Recipe(8, adapted=str(state.folder)), PX)
    found, recipe = texts.knowing(Recipe(8, adapted=str(state.folder)), PX)
    assert found.knowing(recipe, PX)[1] == recipe == Recipe(8, adapted=state.key)


def test_the_command_line(tmp_path):
    model = save_tiny(tmp_path / "model", "ViTForImageClassification")
    state = disturbed(pretrained(str(model)), Recipe(8), tmp_path / "my state", PRINTS)
    command = ("rungs", "--model", model, "--out", tmp_path / "onnx")
    done = run_export(*command, "--low", f"adapted={state.folder},px=8")
    assert done.code == 0, done.err
    graphs = GraphSet.load(tmp_path / "onnx")
    assert graphs.low.adapted_on == PRINTS and graphs.low.record.recipe.endswith(state.key)
    for recipe, message in (
        (f"px=12,adapted={state.folder}", "is of px=8, not of px=12; adapt that recipe with"),
        (f"px=8,adapted={tmp_path}", "adapted.json; give a folder that python -m adaptation"),
        ("px=8,adapted=", "'adapted=' is unknown"),
        (f"px=8,adapted={state.folder},adapted=x", "says its adapted twice"),
    ):
        done = run_export(*command, "--low", recipe)
        assert done.code == 2 and done.err.splitlines()[-1].startswith("error: ")
        assert message in done.err and "Traceback" not in done.err
