"""`python -m export rungs` as a command: the same bytes again, nothing half done, misuse."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from rich.console import Console

from bundle.manifest import sha256_file
from bundle.recipe import Recipe
from export import onnx_graph
from export.errors import UsageError
from export.families import SUPPORTED
from export.graphs import export_graphs
from export.pretrained import pretrained
from export.request import GraphsRequest
from report.terminal import Bars
from tests.unit.export_tiny import PX, QUIET, WIDTH, run_export, save_tiny

pytestmark = pytest.mark.usefixtures("remembered_exports")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    processor = {"size": {"height": PX, "width": PX}}
    folder = tmp_path_factory.mktemp("models") / "tiny"
    return save_tiny(folder, "ViTForImageClassification", processor)


@pytest.fixture(scope="module")
def exported(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "onnx"
    result = run_export("rungs", "--model", model, "--out", out, "--json")
    assert result.code == 0, result.err
    assert result.out == (out / "graphs.json").read_text()
    return out


def listing(folder: Path) -> dict[str, str]:
    return {
        file.relative_to(folder).as_posix(): sha256_file(file)
        for file in folder.rglob("*")
        if file.is_file()
    }


def test_without_recipes_the_models_own_two_resolutions_are_exported(exported):
    files = ["full.onnx", "graphs.json", "labels.txt", "px8.onnx", "weights.bin"]
    assert sorted(listing(exported)) == files


def test_the_same_request_gives_the_same_bytes_without_paths(
    exported, model, tmp_path, remembered_exports, monkeypatch
):
    monkeypatch.setattr(onnx_graph, "export_onnx", remembered_exports)
    export_graphs(pretrained(str(model)), GraphsRequest(tmp_path / "again"), QUIET)
    assert listing(tmp_path / "again") == listing(exported)
    for file in exported.iterdir():
        data = file.read_bytes()
        assert str(model.parent).encode() not in data
        assert b"site-packages" not in data


def test_a_parity_failure_keeps_an_earlier_export(model, tmp_path):
    out = tmp_path / "onnx"
    out.mkdir()
    (out / "graphs.json").write_text("{}")
    (out / "px8.onnx").write_bytes(b"earlier")
    files = listing(tmp_path)
    strict = ("--rtol=0", "--atol=0", "--beside=px=12")
    result = run_export("rungs", "--model", model, "--out", out, *strict)
    assert (result.code, result.out) == (2, "")
    last = result.err.strip().splitlines()[-1]
    assert last.startswith("error: the ONNX graph differs from the model: ")
    for rung in ("px8", "full", "px12"):
        for output in ("embedding", "cls_layers", "logits"):
            assert f"{rung} {output}: differs by up to" in last
    assert listing(tmp_path) == files
    assert list(tmp_path.iterdir()) == [out]  # the staging folder is gone too


def test_a_bar_counts_the_steps_to_the_last(model, tmp_path):
    terminal = io.StringIO()
    bars = Bars(Console(file=terminal, force_terminal=True, width=120))
    export_graphs(pretrained(str(model)), GraphsRequest(tmp_path, beside=(Recipe(12),)), bars)
    shown = terminal.getvalue()
    assert "0/6" in shown and "6/6" in shown and "7/6" not in shown


def test_labels_and_graphs_that_only_an_earlier_export_wrote_go(model, tmp_path):
    out = tmp_path / "onnx"
    request = GraphsRequest(out, beside=(Recipe(12),))
    export_graphs(pretrained(str(model)), request, QUIET)
    (out / "mine.onnx").write_text("mine")
    folder = save_tiny(tmp_path / "headless", "ViTModel")
    graphs = export_graphs(pretrained(str(folder)), GraphsRequest(out, opset=21), QUIET)
    ours = ["graphs.json", "full.onnx", "px8.onnx", "weights.bin"]
    assert sorted(listing(out)) == sorted([*ours, "mine.onnx"])
    assert (graphs.classes, graphs.labels, graphs.about["head"]) == (None, None, None)
    graph = onnx.load(out / "px8.onnx", load_external_data=False)
    assert [output.name for output in graph.graph.output] == ["embedding", "cls_layers"]
    assert [entry.version for entry in graph.opset_import] == [21]
    assert graph.ir_version == 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--low", "px=10"], "px=10 is no positive multiple of the patch size 4; use 8 or 12"),
        (["--low", "px=0"], "px=0 is no positive multiple of the patch size 4; use 4"),
        (["--high", "px=-8"], "'px=-8' in a recipe must be a whole number, as px=112"),
        (["--high", "px=99999"], "px=99999 is too large; 256 px is the most for this model"),
        (["--low", "px=16"], "px=16 is asked for 2 times; each graph needs another recipe"),
        (["--high", "px=4"], "px=8 looks at more than the full rung's 4 px"),
        (["--low", "px=20"], "px=20 looks at more than the full rung's 16 px"),
        (["--beside", "px=20"], "px=20 looks at more than the full rung's 16 px"),
        (["--beside", "px=12,px=8"], "recipe 'px=12,px=8' says its px twice; once is enough"),
        (["--beside", "px=12.0"], "'px=12.0' in a recipe must be a whole number"),
        (["--beside", "tame=4"], "recipe 'tame=4': 'tame=4' is unknown; known are px=N, depth=N"),
        (["--beside", ""], "recipe '': '' is unknown; known are"),
        (["--beside", "px=10"], "px=10 is no positive multiple of the patch size 4; use 8 or 12"),
        (["--beside", "px=12", "--beside", "px=12"], "px=12 is asked for 2 times"),
        (["--beside", "px=8"], "px=8 is asked for 2 times"),  # the default of --low
        (["--beside", "fp32"], "px=16 is asked for 2 times"),  # the default of --high
        (["--low", "px=8,align"], "recipe px=8,align: align is fitted on what the graph answers"),
        (["--low", "depth=2"], "depth=2 must be between 1 and 1; the model has 2 blocks"),
        (["--low", "depth=0"], "depth=0 must be between 1 and 1; the model has 2 blocks"),
        (["--low", "px=4,tome=1"], "tome=1 has one patch at 4 px, none to merge"),
        (["--low", "int8=static"], "recipe int8=static: int8=static learns ranges from images"),
        (
            ["--low=px=8,fp16", "--out", "{model}/config.json"],
            "--out {model}/config.json is a file",
        ),
        (["--out", "{model}/config.json/onnx"], "{model}/config.json"),
        (["--out", "{model}/config.json/a/onnx"], "{model}/config.json"),
        (["--low", "int8=static", "--fit-images", "no-such"], "--fit-images no-such: no such dir"),
        (["--opset", "17"], "Invalid value for '--opset'"),
        (["--opset", "22"], "Invalid value for '--opset'"),
        (["--rtol", "-1"], "Invalid value for '--rtol'"),
        (["--head", "linear"], "--head linear and --images DIR go together"),
        (["--images", "x"], "--head linear and --images DIR go together"),
        (["--head", "linear", "--images", "no-such"], "--images no-such: no such directory"),
        (["--model", "no-such-model"], "--model no-such-model is no directory"),
    ],
)
def test_misuse_is_one_line_and_exit_code_2(arguments, message, model, tmp_path):
    arguments = [argument.format(model=model) for argument in arguments]
    before = listing(model)
    result = run_export("rungs", "--model", model, "--out", tmp_path / "onnx", *arguments)
    assert (result.code, result.out) == (2, "")
    (line,) = (line for line in result.err.splitlines() if not line.startswith("load "))
    assert line.startswith(f"error: {message.format(model=model)}")
    assert list(tmp_path.iterdir()) == [] and listing(model) == before


def test_ranges_without_images_are_refused_before_the_model_is_loaded(model, tmp_path):
    options = ("--beside", "int8=static", "--out", tmp_path)
    result = run_export("rungs", "--model", model, *options)
    assert "give --fit-images DIR" in result.err and "load" not in result.err


WITH_HEAD = [name for name in SUPPORTED if "Classification" in name]
LINEAR = {
    "ViTForImageClassification",
    "DeiTForImageClassification",
    "ViTMSNForImageClassification",
    "BeitForImageClassification",
    "Data2VecVisionForImageClassification",
}


@pytest.mark.parametrize("class_name", WITH_HEAD)
def test_align_is_said_to_reach_exactly_the_heads_that_are_linear_on_the_cls_token(
    class_name, tmp_path
):
    backbone = pretrained(str(save_tiny(tmp_path, class_name)))
    images = torch.randn(6 * WIDTH, 3, PX, PX, generator=torch.manual_seed(0))
    with torch.inference_mode():
        embedding, _, logits = backbone.rung(Recipe(8))(images)
    inputs = np.hstack([embedding.numpy(), np.ones((len(embedding), 1))]).astype(np.float64)
    rest = np.linalg.lstsq(inputs, logits.numpy().astype(np.float64), rcond=None)[1]
    linear = bool((rest / len(images) < 1e-8 * logits.numpy().var()).all())
    assert backbone.aligns == linear
    assert linear == (class_name in LINEAR)


def test_depth_and_tokens_are_checked_at_the_recipes_own_resolution(model):
    backbone = pretrained(str(model))
    backbone.check(Recipe(depth=1, tome=1), PX)
    with pytest.raises(UsageError, match="tome=1 has one patch at 4 px"):
        backbone.check(Recipe(tome=1), 4)


def test_without_a_verb_the_help_is_shown():
    result = run_export()
    assert result.code == 2
    assert "rungs" in result.out and "repository" in result.out
    assert result.err == ""


def test_an_unknown_verb_is_one_line():
    result = run_export("rung")
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("error: No such command 'rung'")
    assert len(result.err.splitlines()) == 1
