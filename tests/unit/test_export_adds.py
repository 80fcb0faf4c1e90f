"""Graphs that are added to those of before: what stays as it lies, and what is made anew."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

from bundle.alignment import Alignment
from bundle.graphs import GraphSet
from bundle.head import LinearHead
from bundle.prints import encode, no_looks
from bundle.recipe import Recipe
from export.align import align
from export.graphs import export_graphs
from export.parity import sample_images
from export.pretrained import pretrained
from export.request import GraphsRequest, LearnedImages
from export.shared_weights import share
from tests.unit.export_tiny import LAYERS, PX, QUIET, WIDTH, save_tiny
from tests.unit.image_files import write_images
from tests.unit.quantised_files import ask

pytestmark = pytest.mark.usefixtures("remembered_exports")

FULL = Recipe(PX)
INT8 = (Recipe(8, precision="int8=static"), Recipe(PX, precision="int8=static"))
RECIPES = (*INT8, Recipe(8))
NAMES = {"full", "px8_int8static", "int8static", "px8"}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    return pretrained(str(save_tiny(folder, "ViTForImageClassification")))


def learned(seed):
    """Images that ranges of int8 are learned from."""
    return LearnedImages(sample_images(4, PX, seed), encode([f"{seed:x}" * 64], no_looks(1)))


def add(backbone, out, recipes, seed=1, **more):
    fields = {"beside": tuple(recipes), "fit_images": learned(seed), "adds": True}
    return export_graphs(backbone, GraphsRequest(out, FULL, FULL, **{**fields, **more}), QUIET)


@pytest.fixture(scope="module")
def before(backbone, tmp_path_factory):
    """The full model alone, then others, two of them aligned."""
    out = tmp_path_factory.mktemp("exported") / "onnx"
    assert set(add(backbone, out, ()).graphs) == {"full"}
    graphs = add(backbone, out, RECIPES)
    rng = np.random.default_rng(0)
    for name in ("px8_int8static", "px8"):
        record = graphs.graphs[name].record
        alignment = Alignment(
            weights=rng.normal(size=((1 + LAYERS) * WIDTH, WIDTH)).astype(np.float32),
            bias=np.zeros(WIDTH, np.float32),
            graph=record.fingerprint,
            reference=graphs.reference.record.fingerprint,
            recipe=record.recipe,
            image_prints=encode(["a" * 64], no_looks(1)),
            image_hashes=np.array(["a" * 64]),
            cross_fitted=np.zeros((1, WIDTH), np.float32),
        )
        graphs = align(graphs, name, alignment)
    return out


ALIGNED = {"px8_int8static_align", "px8_align"}


def files(out: Path):
    """Each file but the record, with its content."""
    found = {file.name: file.read_bytes() for file in out.iterdir() if file.name != "graphs.json"}
    return {name: content for name, content in found.items() if name != "labels.txt"}


@pytest.mark.parametrize(
    ("recipes", "seed", "made", "gone"),
    [
        (RECIPES, 1, set(), set()),
        ((), 2, set(), set()),
        (RECIPES[:1], 1, set(), set()),
        ((*RECIPES, Recipe(12)), 1, {"px12"}, set()),
        ((*RECIPES[:2], Recipe(12)), 1, {"px12"}, set()),
        ((Recipe(12, precision="int8=static"),), 1, {"px12_int8static"}, set()),
        (RECIPES, 2, {"px8_int8static", "int8static"}, {"px8_int8static_align"}),
        (INT8[:1], 2, {"px8_int8static"}, {"px8_int8static_align", "int8static"}),
    ],
)
def test_only_what_is_missing_or_learned_from_other_images_is_made(
    backbone, before, tmp_path, monkeypatch, recipes, seed, made, gone
):
    out = Path(shutil.copytree(before, tmp_path / "onnx"))
    there, exported = files(out), []
    from export import graphs as module

    class Exporter(module._Exporter):
        def export(self, recipes, kept):
            exported.extend(recipe.slug(PX) for recipe in recipes)
            return super().export(recipes, kept)

    monkeypatch.setattr(module, "_Exporter", Exporter)
    graphs = add(backbone, out, recipes, seed)
    assert set(exported) == made
    expected = (NAMES | ALIGNED | made) - gone
    assert set(graphs.graphs) == set(GraphSet.load(out).graphs) == expected
    found = files(out)
    aligned = {f"{name}.npz" for name in expected & ALIGNED}
    assert set(found) == {f"{name}.onnx" for name in expected} | aligned
    for name in expected - made:
        assert found[f"{name}.onnx"] == there[f"{name}.onnx"]
    for name in made:
        graph = graphs.graphs[name]
        assert graph.fault() is None
        assert graph.fitted_on == (learned(seed).prints if "int8static" in name else "")
        if name in NAMES:
            assert found[f"{name}.onnx"] != there[f"{name}.onnx"]
    assert (graphs.high.name, graphs.reference.name) == ("full", "full")


def test_a_graph_is_the_same_whatever_lies_beside_it(backbone, before, tmp_path):
    together = add(backbone, tmp_path / "together", (*RECIPES, Recipe(12)))
    for name in NAMES:
        assert together.graphs[name].record == GraphSet.load(before).graphs[name].record
    assert not (tmp_path / "together/weights.bin").exists()


def test_the_full_model_is_what_new_graphs_are_held_against(backbone, before, tmp_path):
    out = Path(shutil.copytree(before, tmp_path / "onnx"))
    graphs = add(backbone, out, [Recipe(12, precision="fp16")])
    found = graphs.graphs["px12_fp16"].notes["fidelity"]["cosine_mean"]
    assert 0 < found < 1
    assert graphs.graphs["full"].notes["fidelity"]["cosine_mean"] == pytest.approx(1)


@pytest.mark.parametrize("lost", ["graphs.json", "px8.onnx"])
def test_what_is_not_whole_is_made_anew(backbone, before, tmp_path, lost):
    out = Path(shutil.copytree(before, tmp_path / "onnx"))
    (out / lost).unlink()
    graphs = add(backbone, out, RECIPES)
    assert set(graphs.graphs) == NAMES and (out / lost).is_file()


def test_a_head_that_was_fitted_before_is_not_fitted_again(tmp_path, monkeypatch):
    backbone = pretrained(str(save_tiny(tmp_path / "model", "Dinov2Model")))
    names = [f"{label}/{index}.png" for label in ("ant", "bee") for index in range(4)]
    more = {"head_images": write_images(tmp_path / "images", *names), "fit_images": None}
    first = add(backbone, tmp_path / "onnx", (), **more)

    def never(*arguments):
        raise AssertionError("the head is fitted again")

    monkeypatch.setattr("export.graphs.fit_probe", never)
    graphs = add(backbone, tmp_path / "onnx", [Recipe(8)], **more)
    assert graphs.fitted_on == first.fitted_on and graphs.labels == first.labels == ("ant", "bee")
    assert graphs.about["head"] == first.about["head"]
    heads = [LinearHead.read(graphs.graphs[name].file) for name in ("full", "px8")]
    np.testing.assert_array_equal(heads[0].weights, heads[1].weights)
    np.testing.assert_array_equal(heads[0].bias, heads[1].bias)
    answers = ask(graphs.graphs["px8"].file, sample_images(2, PX, 5))
    np.testing.assert_allclose(
        answers["logits"], heads[0](answers["embedding"]), rtol=1e-4, atol=1e-4
    )


def test_what_added_graphs_share_is_stored_once_when_they_are_placed(before, tmp_path):
    earlier = GraphSet.load(before)
    kept = {name: graph.file.read_bytes() for name, graph in earlier.graphs.items()}
    placed = share(earlier.cast("px8_align", "full").place(tmp_path / "out"), tmp_path / "out")
    assert placed == GraphSet.load(tmp_path / "out")
    assert (tmp_path / "out" / "weights.bin").stat().st_size > 1000
    for name, graph in placed.graphs.items():
        assert graph.fault() is None
        one, other = (onnx.load(file.file) for file in (earlier.graphs[name], graph))
        for output, values in ask(one, sample_images(2, PX, 3)).items():
            np.testing.assert_array_equal(ask(other, sample_images(2, PX, 3))[output], values)
        assert earlier.graphs[name].file.read_bytes() == kept[name]
    assert placed.low.record.weights_sha256 is not None and placed.low.alignment() is not None
