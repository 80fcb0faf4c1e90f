"""graphs.json: what is read, what is refused, and which graph plays which role."""

import base64
import json
import os
from dataclasses import replace

import pytest

from bundle import labels, manifest, placing
from bundle.graphs import HIGH, LOW, REFERENCE, Graph, GraphsError, GraphSet
from bundle.recipe import Recipe
from routing import WEIGHTS, RungRecord
from tests.unit.onnx_files import graph_at, write_graph_set, write_rung


def prints(*first):
    """Prints of images, 37 bytes each."""
    return base64.b64encode(b"".join(bytes([byte]) * 37 for byte in first)).decode()


@pytest.fixture
def graphs(tmp_path):
    """A cheap graph, an int8 one, the full model that is neither, and one beside them."""
    folder = write_graph_set(tmp_path / "onnx")
    (folder / WEIGHTS).write_bytes(b"what graphs share")
    found = GraphSet.load(folder)
    made = {}
    for seed, (name, px) in enumerate((("px4", 4), ("int8static", 8), ("full", 8), ("px6", 6))):
        file = folder / f"{name}.onnx"
        write_rung(file, seed)
        graph = graph_at(file, px)
        weights = manifest.sha256_file(folder / WEIGHTS) if name == "full" else None
        record = replace(graph.record, weights_sha256=weights)
        made[name] = replace(graph, record=record, fitted_on=prints(seed, 9))
    roles = {LOW: "px4", HIGH: "int8static", REFERENCE: "full"}
    found = replace(found, graphs=made, roles=roles, fitted_on=prints(8), about={"opset": 20})
    found.save(folder)
    return GraphSet.load(folder)


def folder_of(graphs):
    return graphs.low.file.parent


def change(folder, **fields):
    path = folder / "graphs.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_what_is_saved_is_what_is_loaded(graphs, tmp_path):
    assert list(graphs.graphs) == ["px4", "int8static", "full", "px6"]
    assert graphs.low.recipe == Recipe(4) and graphs.about == {"opset": 20}
    graphs.save(folder_of(graphs))
    assert GraphSet.load(folder_of(graphs)) == graphs
    assert (folder_of(graphs) / "labels.txt").read_text().splitlines() == list(graphs.labels)
    assert all(graph.fault() is None for graph in graphs.graphs.values())


def test_each_label_has_its_line_whatever_is_in_it(tmp_path):
    labels.write(tmp_path, ("a\nb", "c\x85d", "", "e  f", "g\u2028", "\udce9"))
    lines = (tmp_path / "labels.txt").read_text("utf-8").splitlines()
    assert lines == ["a b", "c d", "", "e f", "g", "\\udce9"]


def test_a_file_that_is_not_the_exported_one_is_named(graphs):
    graphs.low.file.write_bytes(b"another")
    assert graphs.low.fault() == "px4.onnx differs from its SHA-256 in graphs.json"
    (folder_of(graphs) / WEIGHTS).unlink()
    assert graphs.reference.fault() == "weights.bin is missing (the weights that full.onnx reads)"


def test_a_folder_without_graphs_says_what_to_run(tmp_path):
    with pytest.raises(GraphsError, match=r"no graphs\.json in .*; run python -m export rungs"):
        GraphSet.load(tmp_path)


# As release 0.1 wrote it.
EARLIER = """{
  "schema_version": 2, "backbone": "tiny", "image": {"shape": [3, 8, 8]}, "embedding_dim": 6,
  "layers": 3, "classes": null, "labels": null, "preprocessing": {}, "fitted_on": "",
  "rungs": {
    "vit_low": {"px": 4, "recipe": "px=4", "file": "vit_low.onnx", "sha256": "abc"},
    "vit_high": {"px": 8, "recipe": "px=8", "file": "vit_high.onnx", "sha256": "def"}
  },
  "reference": null, "alternatives": {}
}"""


def test_graphs_of_an_earlier_release_are_to_be_made_again_and_then_leave(graphs, tmp_path):
    folder = tmp_path / "earlier"
    folder.mkdir()
    (folder / "rungs.json").write_text(EARLIER)
    for name in ("vit_low.onnx", "static_168.onnx"):
        (folder / name).write_bytes(b"")
    with pytest.raises(GraphsError, match=r"rungs\.json is of an earlier release; make the") as e:
        GraphSet.load(folder)
    assert "\n" not in str(e.value)
    graphs.place(folder)
    left = {file.name for file in folder.iterdir()}
    assert not {"rungs.json", "vit_low.onnx", "static_168.onnx"} & left


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"schema_version": 2}, "schema version 2, this code reads 3; run python -m export rungs"),
        ({"graphs": None}, "is not readable"),
        ({"graphs": {"px4": {"px": 4}}}, "is not readable"),
        ({"graphs": {"px4": 4}}, "is not readable"),
        ({"roles": {LOW: "px4", HIGH: "int8static"}}, "no graph plays reference"),
        ({"roles": {LOW: "px5", HIGH: "full", REFERENCE: "full"}}, "no graph plays vit_low"),
        ({"task": "poems"}, "task 'poems' is none of"),
        ({"image": {"shape": [8]}}, "is not readable"),
    ],
)
def test_an_unreadable_record_says_what_to_run(graphs, fields, message):
    change(folder_of(graphs), **fields)
    with pytest.raises(GraphsError, match=message) as error:
        GraphSet.load(folder_of(graphs))
    assert "\n" not in str(error.value) and "export" in str(error.value)


def test_every_graph_has_its_file(graphs):
    graphs.graphs["px6"].file.unlink()
    with pytest.raises(GraphsError, match=r"no ONNX file at .*px6\.onnx; run python -m export"):
        GraphSet.load(folder_of(graphs))


@pytest.mark.parametrize(("classes", "task"), [(None, None), (1, "value"), (5, "classes")])
def test_a_task_that_nobody_said_is_read_as_transformers_would(graphs, classes, task):
    assert replace(graphs, classes=classes, labels=None, task=None).task == task


def test_the_reference_runs_beside_the_rungs_only_where_it_is_another_graph(graphs):
    assert list(graphs.playing()) == [LOW, HIGH, REFERENCE]
    assert graphs.reference_record == graphs.reference.record
    full = graphs.cast("px4", "full")
    assert list(full.playing()) == [LOW, HIGH] and full.reference_record is None
    assert full.fingerprints() == {
        LOW: graphs.low.record.sha256,
        HIGH: graphs.reference.record.fingerprint,
    }
    assert full.fingerprints()[HIGH] != graphs.reference.record.sha256  # its weights count
    assert list(graphs.beside) == ["full", "px6"] and list(full.beside) == ["int8static", "px6"]


def test_the_layers_of_the_cheap_rung_are_its_own(graphs):
    assert graphs.low_layers == graphs.layers == 3
    shallow = replace(graphs.low, record=replace(graphs.low.record, layers=1))
    assert graphs.adding(shallow).low_layers == 1


def test_only_graphs_that_play_a_role_and_their_head_teach_what_is_served(graphs):
    """Seeds 0 to 3 in order, 8 for the head and 9 for all graphs: each image once."""
    assert graphs.learned() == prints(8, 0, 9, 1, 2)
    assert graphs.cast("px4", "full").learned() == prints(8, 0, 9, 2)
    assert graphs.learned(["px6"]) == prints(8, 3, 9)
    assert graphs.learned(graphs.graphs) == prints(8, 0, 9, 1, 2, 3)


def test_casting_gives_roles_to_graphs_that_are_there(graphs):
    other = graphs.cast("px6", "full")
    assert (other.low.name, other.high.name, other.reference.name) == ("px6", "full", "full")
    assert other.graphs == graphs.graphs
    with pytest.raises(GraphsError, match="no graph 'px5' was exported; there are px4, int8stat"):
        graphs.cast("px5", "full")


def test_graphs_are_placed_by_links_and_what_lay_there_goes(graphs, tmp_path):
    out = tmp_path / "plan/onnx"
    placed = graphs.cast("px6", "full").place(out, ["int8static"])
    assert GraphSet.load(out) == placed
    assert list(placed.graphs) == ["int8static", "full", "px6"]
    for name, graph in placed.graphs.items():
        assert graph.file == out / f"{name}.onnx" and graph.fault() is None
        assert os.path.samefile(graph.file, graphs.graphs[name].file)
    assert os.path.samefile(out / WEIGHTS, folder_of(graphs) / WEIGHTS)
    (out / "mine.onnx").write_text("mine")
    alone = {LOW: "px4", HIGH: "px6", REFERENCE: "px6"}
    replace(graphs, roles=alone, labels=None).place(out, [])
    names = {"graphs.json", "px4.onnx", "px6.onnx", "mine.onnx"}
    assert {file.name for file in out.iterdir()} == names  # neither weights nor labels


def test_where_no_second_name_can_be_given_files_are_copied(graphs, tmp_path, monkeypatch):
    def refuse(source, target):
        raise OSError("no links here")

    monkeypatch.setattr(placing.os, "link", refuse)
    for name, graph in graphs.place(tmp_path / "out").graphs.items():
        assert graph.fault() is None
        assert not os.path.samefile(graph.file, graphs.graphs[name].file)


def test_a_record_that_cannot_be_written_leaves_what_was_there(graphs, tmp_path):
    graphs.place(tmp_path / "out")
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    unwritable = Graph("bad", RungRecord(4, "px=4", "0" * 64), tmp_path / "gone.onnx")
    with pytest.raises(OSError, match="gone"):
        graphs.adding(unwritable).place(tmp_path / "out")
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["onnx", "out"]


def test_preprocessing_has_one_hash_however_it_is_laid_out(graphs):
    turned = dict(reversed(graphs.preprocessing.items()))
    assert replace(graphs, preprocessing=turned).preprocessing_sha256() == (
        graphs.preprocessing_sha256()
    )
