"""The planner's graphs: what decides the folder they lie in, and aligning them there."""

import json
import os
from dataclasses import replace

import numpy as np
import onnxruntime as ort
import pytest
from rich.console import Console

from bundle.graphs import GraphSet
from bundle.head import LinearHead
from bundle.prints import encode, look_of
from bundle.recipe import Recipe
from calibration.align import fit_alignment
from calibration.answers import AnswerCache
from calibration.certify import Goal
from calibration.fidelity import Fidelity
from calibration.outputs import Made
from export.request import MOST, Texts, spread
from imaging import decode, pixels_sha256
from perf import prices
from planner import graphs as module
from planner.graphs import aligned_graph, exported
from planner.request import PlanError
from planner.workshop import PRICED_IMAGES, Workshop
from report.terminal import Bars
from routing import RungOutputs
from tests.unit import timm_files
from tests.unit.calibration_outputs import outputs_of
from tests.unit.export_tiny import PX, save_tiny, save_tokenizer
from tests.unit.plan_workplace import (
    LAYERS,
    QUIET,
    SIZE,
    D,
    FakeWorkshop,
    TwoColours,
    make_request,
    tiny_backbone,
    write_shelf,
)

pytestmark = pytest.mark.usefixtures("remembered_exports")

FULL = Recipe(SIZE)
RECIPES = (Recipe(4, precision="int8=static"), Recipe(SIZE, precision="int8=static"), Recipe(6))
TOP1 = Fidelity("top1")


@pytest.fixture
def workshop():
    return FakeWorkshop()


@pytest.fixture
def export(tmp_path, workshop):
    """Export for a request with these changes, ranges from these places; returns the folder."""

    def export(recipes=RECIPES, places=range(0, 700, 2), **changes):
        request = make_request(tmp_path, **changes)
        backbone = tiny_backbone()
        graphs = exported(request, FULL, recipes, backbone, workshop, QUIET, places)
        return graphs.reference.file.parent

    return export


def test_the_full_model_and_every_recipe_are_exported_at_once(tmp_path, workshop, export):
    head = tmp_path / "head"
    folder = export(head_images=head)
    (asked,) = workshop.exports
    assert (asked.low, asked.high, asked.beside) == (FULL, FULL, RECIPES)
    assert asked.head_images == head and asked.adds
    assert folder.parent == tmp_path / "cache"
    assert set(GraphSet.load(folder).graphs) == {"px4_int8static", "int8static", "px6", "full"}


@pytest.mark.parametrize("gone", [(), (1, 699)])
def test_ranges_are_learned_from_readable_images_spread_over_the_fit_images(workshop, export, gone):
    places = [1, *range(101, 600), 699]
    export(source=TwoColours(700, gone), places=places)
    rows = [places[row] for row in spread(len(places))]
    assert len(rows) == MOST and (rows[0], rows[-1]) == (1, 699)
    (exports,) = workshop.exports
    assert len(exports.fit_images.tensors) == MOST - len(gone)
    whole = TwoColours(700)
    taught = [decode(whole[int(row)].data) for row in rows if row not in gone]
    hashes, looks = map(pixels_sha256, taught), np.stack([look_of(image) for image in taught])
    assert exports.fit_images.prints == encode(list(hashes), looks)


def test_without_int8_no_image_teaches_ranges(workshop, export):
    export(recipes=(Recipe(6),))
    assert workshop.exports[0].fit_images is None


def test_ranges_of_images_that_cannot_be_read_are_one_line(export):
    with pytest.raises(PlanError, match="not one of 64 images to learn the ranges of int8"):
        export(source=TwoColours(50, gone=range(50)), places=range(50))


INT8 = ["px4_int8static", "int8static"]


@pytest.mark.parametrize(
    ("changes", "made"),
    [
        ({}, []),
        ({"recipes": RECIPES[:2]}, []),
        ({"recipes": (*RECIPES[:2], Recipe(5))}, ["px5"]),
        ({"recipes": (Recipe(5, precision="int8=static"),)}, ["px5_int8static"]),
        ({"goal": Goal(0.01, 0.9, "ltt"), "seed": 1, "group_by": "folder", "beside": ""}, []),
        ({"places": range(1, 700, 2)}, INT8),
        ({"source": TwoColours(700, seed=1)}, INT8),
        ({"source": TwoColours(700, seed=1), "recipes": RECIPES[2:]}, []),
    ],
)
def test_only_what_is_missing_or_learned_from_other_images_is_exported(
    workshop, export, changes, made
):
    folder = export()
    before = {file: file.read_bytes() for file in folder.glob("*.onnx")}
    workshop.made.clear()
    assert export(**changes) == folder
    assert workshop.made == made
    names = set(GraphSet.load(folder).graphs)
    assert names >= {"px4_int8static", "int8static", "px6", "full", *made}
    for file, content in before.items():
        assert file.read_bytes() == content


@pytest.mark.parametrize("lost", ["graphs.json", "px6.onnx"])
def test_graphs_that_are_not_whole_are_made_anew(workshop, export, lost):
    folder = export()
    (folder / lost).unlink()
    assert export() == folder and (folder / lost).is_file()
    assert workshop.used == {"export": 8}


def test_whatever_decides_what_the_full_model_is_makes_another_folder(
    tmp_path, workshop, export, monkeypatch
):
    local = tmp_path / "model"
    local.mkdir()
    (local / "one").write_text("1")
    found = [export()]
    found += [export(model="other"), export(head_images=local), export(model=str(local))]
    (local / "one").write_text("12")
    found += [export(head_images=local), export(model=str(local))]
    request = make_request(tmp_path)
    other = exported(request, Recipe(16), RECIPES[2:], tiny_backbone(), workshop, QUIET)
    found.append(other.reference.file.parent)
    for code in ("code_sha256", "looks_sha256"):
        with monkeypatch.context() as patch:
            patch.setattr(module, code, lambda: "e" * 64)
            found.append(export())
    with monkeypatch.context() as patch:
        patch.setattr(module, "version", lambda name: "0")
        found.append(export())
    assert len(set(found)) == len(found) == 10
    assert export() == found[0]


@pytest.fixture
def of_texts(tmp_path):
    """Export the full graph of a tiny CLIP with these labels; returns the graphs."""
    model = str(save_tokenizer(save_tiny(tmp_path / "clip", "CLIPModel")))

    def of_texts(workshop, labels, prompt=None):
        request = make_request(tmp_path, model=model, texts=Texts(labels, prompt))
        backbone = Workshop().load(request)
        return exported(request, Recipe(PX), (), backbone, workshop, QUIET)

    return of_texts


def test_other_labels_get_graphs_and_answers_of_their_own(tmp_path, of_texts):
    keys = []
    for labels in (("cat", "dog"), ("cat", "emu"), ("cat", "dog")):
        graphs = of_texts(Workshop(), labels)
        assert graphs.labels == labels
        assert graphs.about["head"]["prompt"] == "a photo of a {}."
        cache = AnswerCache(tmp_path / "answers", TwoColours(9), graphs)
        keys.append((graphs.reference.file, cache.key(graphs.reference)))
    assert keys[0] == keys[2]
    assert keys[0][0] != keys[1][0] and keys[0][1] != keys[1][1]


def test_another_prompt_gets_graphs_of_its_own_and_the_usual_one_in_words_does_not(
    workshop, of_texts
):
    prompts = (None, "a photo of a {}.", "This is a {}.")
    found = [of_texts(workshop, ("cat", "dog"), p).reference.file.parent for p in prompts]
    assert found[0] == found[1] != found[2]


def test_graphs_are_of_what_a_checkpoint_holds_and_of_the_file_beside_it(tmp_path, workshop):
    model, weights = f"timm:{timm_files.NAME}", timm_files.checkpoint()

    def folder():
        file = timm_files.save(tmp_path / "timm", weights)
        os.utime(file, (0, 0))  # of one name, size and time
        request = make_request(tmp_path, model=model, checkpoint=file)
        backbone = Workshop().load(request)
        graphs = exported(request, Recipe(timm_files.PX), (), backbone, workshop, QUIET)
        return graphs.reference.file.parent

    found = [folder()]
    assert folder() == found[0]
    weights["head.bias"] += 1
    found.append(folder())
    hub = {"architecture": timm_files.NAME, "pretrained_cfg": {"label_names": [*"abcde"]}}
    for more in ({}, {"mean": [0.1, 0.2, 0.3]}):
        hub["pretrained_cfg"] |= more
        (tmp_path / "timm/config.json").write_text(json.dumps(hub))
        found.append(folder())
    assert len(set(found)) == 4


def made_of(graphs, n=200, seed=0):
    """The cheap embedding is the full one, shifted."""
    head = LinearHead.read(graphs.low.file)
    rng = np.random.default_rng(seed)
    high = rng.normal(size=(n, D)).astype(np.float32)
    low = (high + 2).astype(np.float32)
    layers = np.repeat(low[:, None], LAYERS + 1, axis=1)
    names = tuple(f"{seed}-{i}" for i in range(n))
    return outputs_of(
        RungOutputs(low, layers, None if head is None else head(low)),
        RungOutputs(high, None, None if head is None else head(high)),
        names=names,
        made=Made.by(graphs),
    )


@pytest.fixture
def shelf(tmp_path):
    return write_shelf(tmp_path / "shelf", ["px=6", "px=4"])


@pytest.fixture
def align(tmp_path, workshop):
    """Align px6 on these outputs; returns the graphs, the name and what it is worth."""

    def align(graphs, outputs=None, fidelity=TOP1, bars=QUIET):
        outputs = made_of(graphs) if outputs is None else outputs
        request = make_request(tmp_path)
        return aligned_graph(graphs, "px6", outputs, fidelity, request, workshop, bars)

    return align


def test_an_aligned_graph_lies_beside_the_one_it_was_made_of(shelf, align):
    graphs, name, aligned = align(shelf)
    assert name == "px6_align" and len(aligned.growth) > 1
    for found in (graphs, GraphSet.load(shelf.low.file.parent)):
        assert found.graphs[name].record.recipe == "px=6,align"
        assert found.graphs["px6"] == shelf.graphs["px6"]
        assert found.learned([name]) == aligned.alignment.image_prints
        assert found.learned(["px6"]) == ""
    assert aligned.alignment.graph == shelf.low.record.fingerprint
    assert aligned.alignment.recipe == "px=6"
    image = np.random.default_rng(0).normal(size=(2, 3, SIZE, SIZE)).astype(np.float32)
    answers = {}
    for which in ("px6", name):
        session = ort.InferenceSession(str(graphs.graphs[which].file))
        answers[which] = RungOutputs(
            *session.run(["embedding", "cls_layers"], {"image": image}), None
        )
    np.testing.assert_allclose(
        answers[name].embedding, aligned.alignment.embedding(answers["px6"]), rtol=1e-4, atol=1e-4
    )


def test_it_is_baked_in_once_for_the_same_images_and_again_for_others(shelf, align, workshop):
    first, name, _ = align(shelf)
    folder = shelf.low.file.parent
    again, same, _ = align(GraphSet.load(folder))
    assert (again.graphs[same], workshop.used["align"]) == (first.graphs[name], 1)
    others, _, _ = align(GraphSet.load(folder), made_of(shelf, seed=1))
    assert workshop.used["align"] == 2
    assert others.graphs[name].record.sha256 != first.graphs[name].record.sha256
    assert others.learned([name]) != first.learned([name])


def test_an_alignment_that_does_not_help_leaves_the_graph_as_it_is(shelf, align, workshop):
    outputs = made_of(shelf)
    same = replace(outputs.low, embedding=outputs.high.embedding, logits=outputs.high.logits)
    bars, said = Bars(Console(quiet=True)), []
    bars.say = said.append
    graphs, name, aligned = align(shelf, replace(outputs, low=same), bars=bars)
    assert name == "px6" and not aligned.helps and len(aligned.growth) > 1
    assert graphs == shelf == GraphSet.load(shelf.low.file.parent)
    assert not workshop.used
    assert len(said) == 1 and said[0].startswith("px=6,align: the alignment does not help")


def test_copies_of_a_picture_do_not_show_that_an_alignment_helps(shelf, align):
    once = made_of(shelf, n=8)
    # What the full model answers has nothing to do with the cheap graph's tokens: with a copy of
    # each held-out picture to learn from, an alignment remembers it all the same.
    rng = np.random.default_rng(99)
    high = rng.normal(size=once.high.embedding.shape).astype(np.float32)
    head = LinearHead.read(shelf.low.file)
    once = replace(once, high=RungOutputs(high, None, head(high)))
    copies = once.rows(np.repeat(np.arange(8), 10))
    names = tuple(f"copy {i}" for i in range(80))
    copies = replace(copies, names=names, groups=names)
    _, _, aligned = align(shelf, copies)
    graph = (shelf.low.record.fingerprint, "px=6")
    by_file = fit_alignment(copies, np.arange(80), np.array(names), graph, TOP1, head, 0)
    assert by_file.growth[-1].cosine > aligned.growth[-1].cosine + 0.1
    assert by_file.growth[-1].acceptable > aligned.growth[-1].acceptable


def test_a_model_without_a_head_is_aligned_all_the_same(tmp_path, align):
    graphs = write_shelf(tmp_path / "headless", ["px=6"], head=False)
    outputs = made_of(graphs)
    assert outputs.low.logits is None
    _, name, aligned = align(graphs, outputs, Fidelity("cosine"))
    assert name == "px6_align" and aligned.helps


def test_graphs_are_priced_as_they_will_be_served_on_images_spread_over_those_given(
    tmp_path, monkeypatch
):
    asked = []

    def price(graphs, names, pool, served, bars):
        asked.append((list(names), len(pool), served))
        assert bars is QUIET
        return {name: {} for name in names}

    monkeypatch.setattr(prices, "price", price)
    graphs = write_shelf(tmp_path / "graphs", ["px=4"])
    source = TwoColours(700, gone=[0])
    request = make_request(tmp_path, source=source, instances=3, threads=2)
    rows = list(range(0, 700, 3))
    found = Workshop().price(graphs, ["px4", "full"], request, rows, QUIET)
    assert set(found) == {"px4", "full"}
    assert asked == [(["px4", "full"], PRICED_IMAGES - 1, prices.Served(3, 2))]
    assert (source.read[0], source.read[-1], len(source.read)) == (0, 699, PRICED_IMAGES)
    assert set(source.read) <= set(rows)
