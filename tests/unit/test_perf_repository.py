"""The repository under test: the assembled one with the static alternatives beside it."""

import os
from dataclasses import replace

import pytest

from bundle import config, manifest
from perf import repository as deployment
from perf.figures import PerfError
from perf.repository import assembled, with_alternatives
from routing import WEIGHTS
from tests.unit.perf_workplace import write_repository, write_rungs


@pytest.fixture
def graph_set(tmp_path):
    return write_rungs(tmp_path / "onnx", alternatives=(5, 6))


@pytest.fixture
def repository(tmp_path, graph_set):
    return write_repository(tmp_path / "build" / "model_repository", graph_set)


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def router_parameter(repository, key):
    return config.parameter(config.read(repository / "router/config.pbtxt"), key)


def test_the_assembled_repository_is_copied_whole_with_every_alternative_beside_the_full_rung(
    tmp_path, graph_set, repository
):
    before = contents(repository)
    folder = with_alternatives(repository, graph_set, tmp_path / "perf" / "model_repository")
    laid_out = contents(folder)
    assert contents(repository) == before  # and stays as it was
    changed = {name for name in before if laid_out[name] != before[name]}
    assert changed == {"router/config.pbtxt", "MANIFEST.json"}
    manifest.verify(folder)  # the router checks it when it starts
    for px in (5, 6):
        assert laid_out[f"px{px}/config.pbtxt"] == laid_out["vit_high/config.pbtxt"]
        weights = graph_set.graphs[f"px{px}"].file
        assert os.path.samefile(folder / f"px{px}/1/model.onnx", weights)  # a second name
    models = {"vit_low", "vit_high", "router", "px5", "px6"}
    assert {path.name for path in folder.iterdir()} == {*models, "MANIFEST.json"}
    assert os.path.samefile(folder / "vit_high/1/model.onnx", repository / "vit_high/1/model.onnx")
    # A text that somebody may want to try something in is not.
    assert not os.path.samefile(folder / "px5/config.pbtxt", repository / "vit_high/config.pbtxt")
    # Requests may choose any threshold in the copy only, and no router compares answers meanwhile.
    assert router_parameter(repository, "client_parameters") == "careful"
    assert router_parameter(folder, "client_parameters") == "any"
    assert router_parameter(folder, "reference_check") == "off"


def test_weights_that_graphs_share_are_served_beside_those_that_name_them(
    tmp_path, graph_set, repository
):
    shared = tmp_path / "onnx" / WEIGHTS
    shared.write_bytes(b"weights of several graphs")
    (repository / "vit_high/1" / WEIGHTS).hardlink_to(shared)
    manifest.write(repository)
    graph = graph_set.graphs["px5"]
    named = replace(graph.record, weights_sha256=manifest.sha256_file(shared))
    rungs = graph_set.adding(replace(graph, record=named))
    folder = with_alternatives(repository, rungs, tmp_path / "out")
    assert os.path.samefile(folder / "px5/1" / WEIGHTS, shared)
    assert os.path.samefile(folder / "vit_high/1" / WEIGHTS, shared)
    assert not (folder / "px6/1" / WEIGHTS).exists()


def test_where_no_second_name_can_be_given_weights_are_copied(
    tmp_path, graph_set, repository, monkeypatch
):
    def refuse(source, target):
        raise OSError("another device")

    monkeypatch.setattr(deployment.os, "link", refuse)
    folder = with_alternatives(repository, graph_set, tmp_path / "out")
    source = repository / "vit_low/1/model.onnx"
    assert (folder / "vit_low/1/model.onnx").read_bytes() == source.read_bytes()
    assert not os.path.samefile(folder / "vit_low/1/model.onnx", source)


def test_a_link_in_the_repository_is_followed(tmp_path, graph_set, repository):
    weights = repository / "vit_high/1/model.onnx"
    content = weights.read_bytes()
    weights.rename(tmp_path / "weights.onnx")
    weights.symlink_to(tmp_path / "weights.onnx")
    folder = with_alternatives(repository, graph_set, tmp_path / "deep" / "er" / "out")
    assert not (folder / "vit_high/1/model.onnx").is_symlink()
    assert (folder / "vit_high/1/model.onnx").read_bytes() == content


def test_what_lay_there_before_is_gone_and_without_alternatives_it_has_the_assembled_models(
    tmp_path, graph_set, repository
):
    old = with_alternatives(repository, graph_set, tmp_path / "out") / "px5"
    (old / "left_over").write_text("of an earlier run")
    folder = with_alternatives(repository, write_rungs(tmp_path / "again"), tmp_path / "out")
    assert not old.exists() and contents(folder).keys() == contents(repository).keys()


@pytest.mark.parametrize("place", [".", "..", "vit_high"])
def test_the_assembled_repository_is_never_overwritten(graph_set, repository, place):
    before = contents(repository)
    with pytest.raises(PerfError, match="give another --out"):
        with_alternatives(repository, graph_set, repository / place)
    assert contents(repository) == before


def test_a_folder_that_nobody_assembled_is_refused(tmp_path, graph_set):
    with pytest.raises(PerfError, match="run python -m export repository"):
        assembled(tmp_path)
    (tmp_path / "out").mkdir()
    with pytest.raises(PerfError, match="no assembled model repository"):
        with_alternatives(tmp_path / "nowhere", graph_set, tmp_path / "out")
    assert (tmp_path / "out").is_dir()
