import json
from dataclasses import replace

import numpy as np
import onnxruntime as ort
import pytest
from rich.console import Console

from bundle.graphs import GraphSet
from bundle.prints import no_looks
from calibration.align import fit_alignment
from calibration.fidelity import Fidelity
from calibration.head import LinearHead
from calibration.outputs import Made, Outputs
from planner import subprocesses
from planner.bars import Bars
from planner.candidates import recipes, shelf_graphs
from planner.shelf import FIT_IMAGES, align_graph, export_shelf
from planner.subprocesses import PlanError
from routing import Alignment, RungOutputs
from tests.unit.calibration_outputs import sha256
from tests.unit.onnx_files import write_rung_set
from tests.unit.plan_workplace import (
    LAYERS,
    QUIET,
    SIZE,
    Commands,
    D,
    TwoColours,
    make_request,
    patch_commands,
    write_shelf,
)

RECIPES = recipes("px=4,int8=static; int8=static; px=6")
TOP1 = Fidelity("top1")


@pytest.fixture
def commands(monkeypatch):
    commands = Commands()
    patch_commands(monkeypatch, commands)
    return commands


def test_one_command_exports_the_full_model_and_every_recipe(tmp_path, commands):
    request = make_request(tmp_path)
    shelf = export_shelf(request, RECIPES, QUIET)
    (said,) = commands.said
    assert said[:6] == ["export", "rungs", "--model", "tiny", "--low", "px=4,int8=static"]
    assert said[6:12] == ["--high", f"px={SIZE}", "--beside", "int8=static", "--beside", "px=6"]
    assert shelf.parent == request.cache
    assert set(shelf_graphs(GraphSet.load(shelf))) == {
        *("px4_int8static", "full", "int8static", "px6")
    }


def test_without_px_the_full_model_is_said_as_such_and_a_head_is_passed_on(tmp_path, commands):
    head = tmp_path / "head"
    head.mkdir()
    export_shelf(make_request(tmp_path, px=None, head_images=head), RECIPES, QUIET)
    text = " ".join(commands.said[0])
    assert "--high fp32 " in text and f"--head linear --images {head} " in text


def test_ranges_are_learned_from_images_spread_over_the_source(tmp_path, commands):
    source = TwoColours(700)
    shelf = export_shelf(make_request(tmp_path, source=source), RECIPES, QUIET)
    files = sorted(shelf.with_suffix(".images").iterdir())
    rows = [int(file.name) for file in files]
    assert len(rows) == FIT_IMAGES and (rows[0], rows[-1]) == (0, 699)
    assert max(np.diff(rows)) <= 12
    assert all(file.read_bytes() == source[row].data for file, row in zip(files, rows, strict=True))


def test_an_image_that_cannot_be_read_teaches_nothing(tmp_path, commands):
    shelf = export_shelf(make_request(tmp_path, source=TwoColours(700, gone=[0])), RECIPES, QUIET)
    assert len(list(shelf.with_suffix(".images").iterdir())) == FIT_IMAGES - 1


def test_the_same_request_for_another_risk_finds_the_shelf_as_it_is(tmp_path, commands):
    request = make_request(tmp_path)
    shelf = export_shelf(request, RECIPES, QUIET)
    stricter = replace(request, goal=replace(request.goal, max_risk=0.01), out=tmp_path / "other")
    assert export_shelf(stricter, RECIPES, QUIET) == shelf
    assert len(commands.said) == 1


def test_a_shelf_that_was_never_finished_is_made_anew(tmp_path, commands):
    shelf = export_shelf(make_request(tmp_path), RECIPES, QUIET)
    for file in shelf.iterdir():
        file.unlink()
    shelf.rmdir()
    shelf.with_suffix(".images").joinpath("stale").write_text("of an earlier run")
    assert export_shelf(make_request(tmp_path), RECIPES, QUIET) == shelf
    assert len(commands.said) == 2
    assert not shelf.with_suffix(".images").joinpath("stale").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"px": 16},
        {"model": "other"},
        {"seed": 1},
        {"group_by": "folder"},
        {"source": TwoColours(701)},
        {"source": TwoColours(700, seed=1)},
    ],
    ids=["px", "model", "seed", "group_by", "one more image", "other images"],
)
def test_whatever_decides_what_lies_on_a_shelf_makes_another(tmp_path, commands, change):
    shelf = export_shelf(make_request(tmp_path), RECIPES, QUIET)
    assert export_shelf(make_request(tmp_path, **change), RECIPES, QUIET) != shelf
    assert export_shelf(make_request(tmp_path), RECIPES[:2], QUIET) != shelf


@pytest.mark.parametrize("code", ["code_sha256", "looks_sha256"])
def test_other_code_that_decodes_or_looks_makes_another_shelf(
    tmp_path, commands, monkeypatch, code
):
    shelf = export_shelf(make_request(tmp_path), RECIPES, QUIET)
    monkeypatch.setattr(f"planner.shelf.{code}", lambda: "e" * 64)
    assert export_shelf(make_request(tmp_path), RECIPES, QUIET) != shelf


@pytest.mark.parametrize("field", ["head_images", "model"])
def test_a_folder_whose_files_change_makes_another_shelf(tmp_path, commands, field):
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "one").write_text("1")
    changes = {field: folder if field == "head_images" else str(folder)}
    shelf = export_shelf(make_request(tmp_path, **changes), RECIPES, QUIET)
    (folder / "one").write_text("12")
    assert export_shelf(make_request(tmp_path, **changes), RECIPES, QUIET) != shelf


def outputs_of(rung_set, n=200, seed=0):
    """The cheap embedding is the full one, shifted."""
    head = LinearHead.read(rung_set.files["vit_low"])
    rng = np.random.default_rng(seed)
    high = rng.normal(size=(n, D)).astype(np.float32)
    low = (high + 2).astype(np.float32)
    layers = np.repeat(low[:, None], LAYERS + 1, axis=1)
    names = tuple(f"{seed}-{i}" for i in range(n))
    return Outputs(
        low=RungOutputs(low, layers, None if head is None else head(low)),
        high=RungOutputs(high, None, None if head is None else head(high)),
        labels=np.full(n, -1),
        names=names,
        groups=names,
        hashes=tuple(map(sha256, names)),
        looks=no_looks(n),
        made=Made.by(rung_set),
        source="",
        title="",
    )


@pytest.fixture
def shelf(tmp_path):
    return write_shelf(tmp_path / "shelf", "px=4", ["px=6"])


def align(shelf, name="px6", seed=0):
    rung_set = GraphSet.load(shelf)
    graph = shelf_graphs(rung_set)[name]
    return align_graph(shelf, graph, outputs_of(rung_set, seed=seed), TOP1, "source", 0, QUIET)


def test_an_aligned_graph_lies_beside_the_one_it_was_made_of(shelf, commands):
    name, aligned = align(shelf)
    assert name == "px6_align" and len(aligned.growth) > 1
    graphs = shelf_graphs(GraphSet.load(shelf))
    assert graphs[name].record.recipe == "px=6,align"
    assert graphs["px6"].record.recipe == "px=6"
    assert aligned.alignment.graph == graphs["px6"].record.fingerprint
    assert aligned.alignment.recipe == "px=6"
    image = np.random.default_rng(0).normal(size=(2, 3, SIZE, SIZE)).astype(np.float32)
    found = {}
    for which in ("px6", name):
        session = ort.InferenceSession(str(graphs[which].file))
        found[which] = RungOutputs(
            *session.run(["embedding", "cls_layers"], {"image": image}), None
        )
    np.testing.assert_allclose(
        found[name].embedding, aligned.alignment.embedding(found["px6"]), rtol=1e-4, atol=1e-4
    )


def test_it_is_baked_in_once_for_the_same_images_and_again_for_others(shelf, commands):
    first, _ = align(shelf)
    assert align(shelf)[0] == first
    assert len(commands.of("export", "align")) == 1
    before = shelf_graphs(GraphSet.load(shelf))[first].record.sha256
    align(shelf, seed=1)
    assert len(commands.of("export", "align")) == 2
    assert shelf_graphs(GraphSet.load(shelf))[first].record.sha256 != before


def test_an_alignment_that_does_not_help_leaves_the_graph_as_it_is(shelf, commands):
    rung_set = GraphSet.load(shelf)
    graph = shelf_graphs(rung_set)["px6"]
    outputs = outputs_of(rung_set)
    same = replace(outputs.low, embedding=outputs.high.embedding, logits=outputs.high.logits)
    said = []
    bars = Bars(Console(quiet=True))
    bars.say = said.append
    name, aligned = align_graph(shelf, graph, replace(outputs, low=same), TOP1, "source", 0, bars)
    assert name == "px6" and not aligned.helps and len(aligned.growth) > 1
    assert commands.said == [] and not list(shelf.glob("*.npz"))
    assert GraphSet.load(shelf) == rung_set
    assert len(said) == 1 and said[0].startswith("px=6,align: the alignment does not help")


def test_copies_of_a_picture_do_not_show_that_an_alignment_helps(shelf, commands):
    rung_set = GraphSet.load(shelf)
    once = outputs_of(rung_set, n=8)
    # What the full model answers has nothing to do with the cheap graph's tokens: with a copy of
    # each held-out picture to learn from, an alignment remembers it all the same.
    rng = np.random.default_rng(99)
    high = rng.normal(size=once.high.embedding.shape).astype(np.float32)
    head = LinearHead.read(shelf_graphs(rung_set)["px6"].file)
    once = replace(once, high=RungOutputs(high, None, head(high)))
    copies = once.rows(np.repeat(np.arange(8), 10))
    names = tuple(f"copy {i}" for i in range(80))
    copies = replace(copies, names=names, groups=names)
    graph = shelf_graphs(rung_set)["px6"]
    _, aligned = align_graph(shelf, graph, copies, TOP1, "source", 0, QUIET)
    by_file = fit_alignment(
        copies, np.arange(80), np.array(names), (graph.record.fingerprint, "px=6"), TOP1, head, 0
    )
    assert by_file.growth[-1].cosine > aligned.growth[-1].cosine + 0.1
    assert by_file.growth[-1].acceptable > aligned.growth[-1].acceptable


def test_an_alignment_whose_graph_was_never_baked_is_baked_again(shelf, commands):
    name, aligned = align(shelf)
    record = json.loads((shelf / "graphs.json").read_text())
    del record["graphs"][name]
    (shelf / "graphs.json").write_text(json.dumps(record))
    align(shelf)
    assert name in GraphSet.load(shelf).graphs
    assert Alignment.load(shelf / f"{name}.npz").image_prints == aligned.alignment.image_prints


def test_what_an_alignment_has_learned_from_is_on_the_shelfs_record(shelf, commands):
    name, aligned = align(shelf)
    assert GraphSet.load(shelf).learned([name]) == aligned.alignment.image_prints


def test_a_model_without_a_head_is_aligned_all_the_same(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("planner.shelf.run", lambda arguments, say: said.append(arguments))
    rung_set = GraphSet.load(write_rung_set(tmp_path / "onnx", classes=None))
    headless = outputs_of(rung_set)
    assert headless.low.logits is None
    name, aligned = align_graph(
        tmp_path / "onnx", rung_set.low, headless, Fidelity("cosine"), "source", 0, QUIET
    )
    assert name == "vit_low_align" and aligned.helps
    assert len(said) == 1


def test_a_failing_command_is_one_line_that_says_which(capfd):
    said = []
    with pytest.raises(PlanError, match=r"`python -m export nonsense` failed with exit code") as e:
        subprocesses.run(["export", "nonsense"], said.append)
    assert said == ["$ python -m export nonsense"]
    assert "\n" not in str(e.value)
    assert "nonsense" in capfd.readouterr().err


def test_a_command_that_prints_no_json_is_one_line():
    with pytest.raises(PlanError, match=r"`python -m platform` printed no JSON"):
        subprocesses.run_json(["platform"], lambda line: None)
