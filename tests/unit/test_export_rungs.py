from __future__ import annotations

import io
import json
from pathlib import Path

import onnx
import pytest
from rich.console import Console

from bundle.graphs import SCHEMA_VERSION, GraphSet
from bundle.manifest import sha256_file
from bundle.recipe import Recipe
from export import onnx_graph
from export.progress import Steps
from export.rungs import RungsRequest, export_rungs
from imaging import Preprocessing
from routing.provenance import RELEASE
from tests.unit.export_tiny import LAYERS, PX, QUIET, WIDTH, run_export, save_tiny

pytestmark = pytest.mark.usefixtures("remembered_exports")

MORE = ("--low", "px=4", "--beside", "px=12", "--beside", "px=8")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    processor = {"size": {"height": PX, "width": PX}}
    folder = tmp_path_factory.mktemp("models") / "tiny"
    return save_tiny(folder, "ViTForImageClassification", processor)


@pytest.fixture(scope="module")
def exported(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(output directory, what the command printed)."""
    out = tmp_path_factory.mktemp("exported") / "onnx"
    result = run_export("rungs", "--model", model, "--out", out, "--json")
    assert result.exit_code == 0, result.stderr
    return out, result.stdout


@pytest.fixture(scope="module")
def with_alternatives(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(output directory, what the command printed)."""
    out = tmp_path_factory.mktemp("alternatives") / "onnx"
    result = run_export("rungs", "--model", model, "--out", out, *MORE)
    assert result.exit_code == 0, result.stderr
    return out, result.stdout


def listing(folder: Path) -> dict[str, str]:
    return {
        file.relative_to(folder).as_posix(): sha256_file(file)
        for file in folder.rglob("*")
        if file.is_file()
    }


def test_files_and_record(exported):
    out, printed = exported
    files = listing(out.parent)
    assert sorted(files) == [
        "onnx/full.onnx",
        "onnx/graphs.json",
        "onnx/labels.txt",
        "onnx/px8.onnx",
        "onnx/weights.bin",
    ]
    record = json.loads((out / "graphs.json").read_text())
    assert json.loads(printed) == record
    assert record["schema_version"] == SCHEMA_VERSION
    assert record["release"] == GraphSet.load(out).release == RELEASE
    assert record["backbone"] == "tiny"
    assert record["image"] == {"shape": [3, PX, PX]}
    assert (record["embedding_dim"], record["layers"], record["classes"]) == (WIDTH, LAYERS, 3)
    assert record["labels"] == (out / "labels.txt").read_text().splitlines()
    assert record["head"] == {"kind": "own"}
    assert Preprocessing.from_dict(record["preprocessing"]).height == PX
    assert GraphSet.load(out).image_shape == (3, PX, PX)
    assert record["opset"] == 20
    assert record["ir_version"] <= 10
    for name, px in (("px8", PX // 2), ("full", PX)):
        entry = record["graphs"][name]
        fidelity, checks = entry.pop("fidelity"), entry.pop("checks")
        assert len(checks) == 3 * 3  # batches, outputs
        assert entry == {
            "px": px,
            "recipe": f"px={px}",
            "file": f"{name}.onnx",
            "sha256": files[f"onnx/{name}.onnx"],
            "weights_sha256": files["onnx/weights.bin"],
            "layers": LAYERS,
            "size_bytes": (out / f"{name}.onnx").stat().st_size,
            "weights_size_bytes": (out / "weights.bin").stat().st_size,
            "fitted_on": "",
        }
        assert fidelity["images"] == "16 synthetic"
        assert fidelity["cosine_min"] <= fidelity["cosine_mean"] <= 1 + 1e-9
        assert (fidelity["cosine_min"] > 1 - 1e-9) == (name == "full")
    assert list(record["graphs"]) == ["px8", "full"]
    assert list(record["roles"].values()) == ["px8", "full", "full"]
    assert record["fitted_on"] == ""
    assert record["parity"]["batches"] == [1, 3, 8]


@pytest.mark.parametrize("name", ["px4", "px8", "px12", "full"])
def test_every_graph_takes_the_full_image_at_any_batch(with_alternatives, name):
    out, _ = with_alternatives
    graph = onnx.load(out / f"{name}.onnx", load_external_data=False).graph
    shapes = {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }
    assert shapes == {
        "image": ["batch", 3, PX, PX],
        "embedding": ["batch", WIDTH],
        "cls_layers": ["batch", LAYERS + 1, WIDTH],
        "logits": ["batch", 3],
    }
    resizes = "Resize" in {node.op_type for node in graph.node}
    assert resizes == (name != "full")


def test_graphs_beside_are_recorded_and_checked_like_the_rungs(with_alternatives):
    out, printed = with_alternatives
    graphs = GraphSet.load(out)
    assert list(graphs.graphs) == ["px4", "full", "px12", "px8"]  # as they were asked for
    assert (graphs.low.name, graphs.high.name, graphs.reference.name) == ("px4", "full", "full")
    assert list(graphs.beside) == ["px12", "px8"]
    for name, graph in graphs.graphs.items():
        px = graph.record.px
        assert (graph.record.recipe, graph.file) == (f"px={px}", out / f"{name}.onnx")
        assert graph.record.sha256 == sha256_file(graph.file)
        assert 0 < graph.notes["fidelity"]["cosine_mean"] <= 1 + 1e-9
        checked = [check["batch"] for check in graph.notes["checks"]]
        assert set(checked) == {1, 3, 8} and len(checked) == 3 * 3  # batches, outputs
        assert {check["rung"] for check in graph.notes["checks"]} == {name}
    for name in (*graphs.graphs, "weights.bin"):
        assert name in printed


def test_the_same_request_gives_the_same_bytes_without_paths(
    exported, model, tmp_path, remembered_exports, monkeypatch
):
    out, _ = exported
    monkeypatch.setattr(onnx_graph, "export_onnx", remembered_exports)
    export_rungs(RungsRequest(str(model), tmp_path / "again"), QUIET)
    assert listing(tmp_path / "again") == listing(out)
    for file in out.iterdir():
        data = file.read_bytes()
        assert str(model.parent).encode() not in data
        assert b"site-packages" not in data


def test_a_parity_failure_keeps_an_earlier_export_and_is_exit_code_1(model, tmp_path):
    out = tmp_path / "onnx"
    out.mkdir()
    (out / "graphs.json").write_text("{}")
    (out / "px8.onnx").write_bytes(b"earlier")
    files = listing(tmp_path)
    strict = ("--rtol=0", "--atol=0", "--beside=px=12")
    result = run_export("rungs", "--model", model, "--out", out, *strict)
    assert result.exit_code == 1
    assert result.stdout == ""
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: the ONNX graph differs from the model: ")
    for rung in ("px8", "full", "px12"):
        for output in ("embedding", "cls_layers", "logits"):
            assert f"{rung} {output}: differs by up to" in last
    assert "✓ compare" not in result.stderr
    assert listing(tmp_path) == files
    assert list(tmp_path.iterdir()) == [out]  # the staging folder is gone too


def test_a_bar_counts_the_steps_to_the_last(model, tmp_path):
    terminal = io.StringIO()
    steps = Steps(Console(file=terminal, force_terminal=True, width=120))
    request = RungsRequest(str(model), tmp_path / "onnx", beside=(Recipe(12),))
    export_rungs(request, steps)
    shown = terminal.getvalue()
    assert "0/7" in shown and "7/7" in shown and "8/7" not in shown
    assert shown.count("✓") == 7


def test_labels_and_graphs_that_only_an_earlier_export_wrote_go(model, tmp_path):
    out = tmp_path / "onnx"
    export_rungs(RungsRequest(str(model), out, beside=(Recipe(12),)), QUIET)
    (out / "mine.onnx").write_text("mine")
    folder = save_tiny(tmp_path / "headless", "ViTModel")
    graphs = export_rungs(RungsRequest(str(folder), out, opset=21), QUIET)
    ours = ["graphs.json", "full.onnx", "px8.onnx", "weights.bin"]
    assert sorted(listing(out)) == sorted([*ours, "mine.onnx"])
    assert (graphs.classes, graphs.labels, graphs.about["head"]) == (None, None, None)
    graph = onnx.load(out / "px8.onnx", load_external_data=False)
    assert [output.name for output in graph.graph.output] == ["embedding", "cls_layers"]
    assert [entry.version for entry in graph.opset_import] == [21]
    assert graph.ir_version <= 10


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
        (["--low", "int8=static"], "recipe int8=static: int8=static learns ranges from images"),
        (["--low", "int8=static", "--fit-images", "no-such"], "--fit-images no-such: no such dir"),
        (["--opset", "17"], "--opset 17 is not supported; use 18 to 21"),
        (["--opset", "22"], "--opset 22 is not supported; use 18 to 21"),
        (["--rtol", "-1"], "--rtol -1.0 must be a number of at least 0"),
        (["--atol", "nan"], "--atol nan must be a number of at least 0"),
        (["--head", "linear"], "--head linear and --images DIR go together"),
        (["--images", "x"], "--head linear and --images DIR go together"),
        (["--head", "linear", "--images", "no-such"], "--images no-such: no such directory"),
        (["--checkpoint", "x.pt"], "--checkpoint is for static-vit"),
        (["--model", "static-vit", "--checkpoint", "x.pt"], "--checkpoint x.pt: no such file"),
        (["--model", "no-such-model"], "--model no-such-model is no directory"),
    ],
)
def test_misuse_is_one_line_and_exit_code_2(arguments, message, model, tmp_path):
    out = tmp_path / "onnx"
    result = run_export("rungs", "--model", model, "--out", out, *arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    # Lines with a tick report steps that went well.
    lines = [line for line in result.stderr.splitlines() if not line.startswith("✓")]
    assert len(lines) == 1
    assert lines[0].startswith(f"error: {message}")
    assert list(tmp_path.iterdir()) == []


def test_out_that_is_a_file(model, tmp_path):
    out = tmp_path / "file"
    out.write_text("mine")
    result = run_export("rungs", "--model", model, "--out", out)
    assert result.exit_code == 2
    assert "is a file; give a directory" in result.stderr
    assert out.read_text() == "mine"


@pytest.mark.parametrize("below", ["onnx", "deeper/onnx"])
def test_out_below_a_file(model, tmp_path, below):
    (tmp_path / "file").write_text("mine")
    result = run_export("rungs", "--model", model, "--out", tmp_path / "file" / below)
    assert result.exit_code == 2
    last = result.stderr.splitlines()[-1]
    assert last.startswith(f"error: {tmp_path / 'file'}") and last.endswith(": Not a directory")


def test_without_a_verb_the_help_is_shown():
    result = run_export()
    assert result.exit_code == 2
    assert "rungs" in result.stdout and "repository" in result.stdout
    assert result.stderr == ""


def test_an_unknown_verb_is_one_line():
    result = run_export("rung")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("error: No such command 'rung'")
    assert len(result.stderr.splitlines()) == 1
