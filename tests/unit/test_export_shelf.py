"""Work on a folder of graphs: align one, or make a pair of two."""

from __future__ import annotations

import base64
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from export import shelf, staging
from export.errors import UsageError
from export.parity import sample_images
from export.recipes.recipe import Recipe
from export.rungs import RungsRequest, export_rungs
from routing import Alignment, RungOutputs, RungSet
from routing.manifest import sha256_file
from tests.unit.export_tiny import LAYERS, PX, QUIET, WIDTH, run_export, save_tiny
from tests.unit.image_files import write_images
from tests.unit.quantised_files import ask

pytestmark = pytest.mark.usefixtures("remembered_exports")

IMAGES = sample_images(4, PX, seed=12)
LEARNED = base64.b64encode(bytes(range(16))).decode()  # of two images
ALIGNED = "static_8_int8static_align"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shelf")
    model = save_tiny(folder / "tiny", "ViTForImageClassification")
    request = RungsRequest(
        str(model),
        folder / "onnx",
        beside=(Recipe(12), Recipe(8, precision="int8=static"), Recipe(precision="fp16")),
        fit_images=write_images(folder / "images", "a.png"),
    )
    export_rungs(request, QUIET)
    return folder / "onnx"


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    return shutil.copytree(exported, tmp_path / "onnx")


def fitted(folder: Path, graph: str, **changes) -> Alignment:
    """An alignment as `calibration align` would give it, but for its numbers."""
    rung_set = RungSet.load(folder)
    record = {**rung_set.rungs, **rung_set.alternatives}[graph]
    rng = np.random.default_rng(3)
    fields = {
        "weights": rng.normal(size=((1 + LAYERS) * WIDTH, WIDTH)).astype(np.float32),
        "bias": rng.normal(size=WIDTH).astype(np.float32),
        "graph": record.fingerprint,
        "reference": rung_set.rungs["vit_high"].fingerprint,
        "recipe": record.recipe,
        "image_prints": LEARNED,
    }
    return Alignment(**{**fields, **changes})


def read(folder: Path) -> dict:
    return json.loads((folder / "rungs.json").read_text())


def hashes(folder: Path) -> dict[str, str]:
    return {file.name: sha256_file(file) for file in folder.iterdir()}


def embedding(folder: Path, name: str) -> np.ndarray:
    return ask(folder / f"{name}.onnx", IMAGES)["embedding"]


def test_an_alignment_takes_the_place_of_its_graph(folder):
    fitted_one, before = fitted(folder, "vit_low"), ask(folder / "vit_low.onnx", IMAGES)
    others = {n: h for n, h in hashes(folder).items() if n not in ("vit_low.onnx", "rungs.json")}
    assert shelf.align(folder, "vit_low", fitted_one) == "vit_low"
    expected = fitted_one.embedding(RungOutputs(before["embedding"], before["cls_layers"], None))
    np.testing.assert_allclose(embedding(folder, "vit_low"), expected, rtol=1e-5, atol=1e-5)
    entry = read(folder)["rungs"]["vit_low"]
    assert entry["recipe"] == "px=8,align"
    assert entry["sha256"] == sha256_file(folder / "vit_low.onnx")
    # Everything else lies as it did, with no temporary file among it.
    found = hashes(folder)
    assert {n: found[n] for n in others} == others
    assert set(found) == {*others, "vit_low.onnx", "rungs.json"}
    record = RungSet.load(folder).rungs["vit_low"]
    assert record.is_file(folder / "vit_low.onnx") and record.fingerprint != fitted_one.graph


def test_an_alignment_under_another_name_stands_beside_its_graph(folder):
    graph = "static_8_int8static"
    before = read(folder)
    assert shelf.align(folder, graph, fitted(folder, graph), ALIGNED) == ALIGNED
    after = read(folder)
    assert after["rungs"] == before["rungs"]
    assert after["alternatives"][graph] == before["alternatives"][graph]
    assert after["alternatives"][ALIGNED]["recipe"] == "px=8,int8=static,align"
    assert RungSet.load(folder).alternatives[ALIGNED].is_file(folder / f"{ALIGNED}.onnx")
    assert np.abs(embedding(folder, ALIGNED) - embedding(folder, graph)).max() > 0.1


def test_the_images_it_learned_from_join_those_on_record(folder):
    before = base64.b64decode(read(folder)["fitted_on"])
    assert len(before) == 37  # what int8=static learned from
    shelf.align(folder, "vit_low", fitted(folder, "vit_low"))
    assert base64.b64decode(RungSet.load(folder).fitted_on) == before + bytes(range(16))


def test_checks_of_a_graph_that_was_replaced_go(folder):
    def checked() -> set[str]:
        return {check["rung"] for check in read(folder)["parity"]["checks"]}

    assert checked() == {"vit_low", "vit_high", "static_12"}
    shelf.align(folder, "static_12", fitted(folder, "static_12"), "static_12_align")
    assert checked() == {"vit_low", "vit_high", "static_12"}
    shelf.align(folder, "vit_low", fitted(folder, "vit_low"))
    assert checked() == {"vit_high", "static_12"}


@pytest.mark.parametrize(
    ("graph", "name", "message"),
    [
        ("static_9", None, "--graph static_9: no cheap graph of that name in "),
        ("vit_high", None, "--graph vit_high: no cheap graph of that name in "),
        ("reference", None, "--graph reference: no cheap graph of that name in "),
        ("vit_low", "vit_high", "--name vit_high cannot be a cheap graph's; use one such as"),
        ("vit_low", "reference", "--name reference cannot be a cheap graph's"),
        ("vit_low", "../mine", "--name ../mine cannot be a cheap graph's"),
        ("static_12", None, "the alignment was fitted on another graph than static_12 (px=8)"),
    ],
)
def test_an_alignment_that_cannot_be_baked_is_refused(folder, graph, name, message):
    before = hashes(folder)
    with pytest.raises(UsageError) as caught:
        shelf.align(folder, graph, fitted(folder, "vit_low"), name)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
    assert hashes(folder) == before


def test_an_alignment_of_a_graph_or_weights_that_changed_since_is_refused(folder):
    alignment = fitted(folder, "vit_low")
    weights = (folder / "weights.bin").read_bytes()
    (folder / "weights.bin").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    with pytest.raises(UsageError, match=r"weights\.bin differs from its SHA-256 in rungs\.json"):
        shelf.align(folder, "vit_low", alignment)
    (folder / "weights.bin").write_bytes(weights[:-9])
    with pytest.raises(UsageError, match=r"weights\.bin was cut short: it has [\d,]+ of [\d,]+"):
        shelf.align(folder, "vit_low", alignment)
    (folder / "weights.bin").write_bytes(weights)
    with pytest.raises(UsageError, match="fitted on another graph than vit_low"):
        shelf.align(folder, "vit_low", replace(alignment, graph="0" * 64))
    shelf.align(folder, "vit_low", alignment)
    with pytest.raises(UsageError, match=r"vit_low is aligned already \(px=8,align\)"):
        shelf.align(folder, "vit_low", fitted(folder, "vit_low"))


def test_two_graphs_become_a_pair_with_their_names_and_the_reference(folder, tmp_path):
    out = tmp_path / "pair"
    keep = ["static_12", "vit_low", "vit_high", "static_8_int8static"]
    shelf.choose(folder, "static_8_int8static", "static_fp16", keep, out)
    old, new = read(folder), read(out)
    sources = {
        "vit_low": old["alternatives"]["static_8_int8static"],
        "vit_high": old["alternatives"]["static_fp16"],
        "reference": old["rungs"]["vit_high"],
        "static_12": old["alternatives"]["static_12"],
        "static_low": old["rungs"]["vit_low"],
        "static_full": old["rungs"]["vit_high"],
    }
    assert list(new["alternatives"]) == ["static_12", "static_low", "static_full"]
    found = {**new["rungs"], "reference": new["reference"], **new["alternatives"]}
    for name, source in sources.items():
        assert found[name] == {**source, "file": f"{name}.onnx"}
        assert os.path.samefile(out / f"{name}.onnx", folder / source["file"])
        np.testing.assert_array_equal(
            embedding(out, name), embedding(folder, Path(source["file"]).stem)
        )
    assert os.path.samefile(out / "weights.bin", folder / "weights.bin")
    rung_set = RungSet.load(out)
    for record, file in rung_set.graphs().values():
        assert record.is_file(file)
    assert rung_set.fitted_on == old["fitted_on"] and rung_set.labels == (
        "LABEL_0",
        *rung_set.labels[1:],
    )
    checks = {check["rung"] for check in new["parity"]["checks"]}
    assert checks == {"reference", "static_12", "static_low", "static_full"}


def test_where_the_full_model_is_the_full_rung_it_is_the_reference(folder, tmp_path):
    shelf.choose(folder, "static_12", "vit_high", ["vit_high", "static_12"], tmp_path / "pair")
    record = read(tmp_path / "pair")
    assert (record["reference"], record["alternatives"]) == (None, {})
    assert list(RungSet.load(tmp_path / "pair").graphs()) == ["vit_low", "vit_high"]


def test_choosing_from_what_was_chosen_keeps_the_reference(folder, tmp_path):
    shelf.choose(folder, "static_12", "static_fp16", ["vit_low"], tmp_path / "one")
    shelf.choose(tmp_path / "one", "static_low", "vit_high", [], tmp_path / "two")
    assert read(tmp_path / "two")["reference"]["recipe"] == f"px={PX}"
    shelf.choose(tmp_path / "one", "static_low", "reference", [], tmp_path / "three")
    assert read(tmp_path / "three")["reference"] is None


def test_an_earlier_pair_goes_and_its_files_in_other_folders_stay(folder, tmp_path):
    out = tmp_path / "pair"
    shelf.choose(folder, "static_12", "static_fp16", ["vit_low"], out)
    before = hashes(folder)
    shelf.choose(folder, "vit_low", "vit_high", [], out)
    names = {"vit_low.onnx", "vit_high.onnx", "weights.bin", "rungs.json", "labels.txt"}
    assert set(hashes(out)) == names
    assert hashes(folder) == before


def test_graphs_without_shared_weights_need_none_beside_them(folder, tmp_path):
    record = read(folder)
    record["reference"] = None
    alone = [n for n, e in record["alternatives"].items() if e["weights_sha256"] is None]
    assert alone == ["static_fp16"]
    shelf.choose(folder, alone[0], alone[0], [], tmp_path / "pair")
    # The reference reads them.
    assert os.path.samefile(tmp_path / "pair/weights.bin", folder / "weights.bin")


def test_where_no_second_name_can_be_given_files_are_copied(folder, tmp_path, monkeypatch):
    def refuse(source: object, target: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(staging.os, "link", refuse)
    shelf.choose(folder, "vit_low", "vit_high", [], tmp_path / "pair")
    for name in ("vit_low.onnx", "vit_high.onnx", "weights.bin"):
        assert sha256_file(tmp_path / "pair" / name) == sha256_file(folder / name)
        assert not os.path.samefile(tmp_path / "pair" / name, folder / name)


@pytest.mark.parametrize(
    ("low", "high", "keep", "message"),
    [
        ("static_9", "vit_high", [], "--low static_9: no graph of that name in "),
        ("vit_low", "reference", [], "--high reference: no graph of that name in "),
        ("vit_low", "vit_high", ["static_12", "x"], "--keep x: no graph of that name in "),
    ],
)
def test_unknown_names_are_refused(folder, tmp_path, low, high, keep, message):
    with pytest.raises(UsageError) as caught:
        shelf.choose(folder, low, high, keep, tmp_path / "pair")
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
    assert not (tmp_path / "pair").exists()


def test_the_folder_itself_is_no_place_for_the_pair(folder):
    before = hashes(folder)
    with pytest.raises(UsageError, match="holds the graphs to choose from; give another folder"):
        shelf.choose(folder, "vit_low", "vit_high", [], folder.parent / "x" / ".." / folder.name)
    assert hashes(folder) == before


def test_the_commands_do_the_same_and_say_what_is_wrong_in_one_line(folder, tmp_path):
    file, out = tmp_path / "alignment.npz", tmp_path / "pair"
    fitted(folder, "vit_low").save(file)
    align = ("align", "--onnx", folder, "--alignment", file)
    done = run_export(*align, "--name", "static_8_align")
    assert (done.exit_code, done.stderr) == (0, "") and "wrote static_8_align in" in done.stdout
    choose = ("choose", "--onnx", folder, "--high", "vit_high", "--keep", "static_12")
    done = run_export(*choose, "--low", "static_8_align", "--out", out)
    assert (done.exit_code, done.stderr) == (0, "")
    assert RungSet.load(out).rungs["vit_low"].recipe == "px=8,align"
    for arguments, message in (
        ((*align, "--graph", "static_12"), "error: the alignment was fitted on another graph"),
        (("align", "--alignment", tmp_path / "no.npz"), "error: no "),
        (("align", "--onnx", tmp_path, "--alignment", file), "error: no rungs.json in "),
        ((*choose, "--low", "x", "--out", out), "error: --low x: no graph of that name"),
    ):
        done = run_export(*arguments)
        assert done.exit_code == 2 and done.stderr.startswith(message)
        assert len(done.stderr.splitlines()) == 1
