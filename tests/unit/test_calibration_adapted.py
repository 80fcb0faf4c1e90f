"""Images that weights were adapted to are in no fit, no certificate and no test, in any form."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageOps

from bundle.graphs import GraphSet
from bundle.prints import among, encode
from bundle.recipe import Recipe
from calibration.fidelity import Fidelity
from calibration.fit import EscalationRate, FitError, Options, fit, without_learned
from calibration.outputs import Outputs, usable
from calibration.record import Fit
from export.graphs import export_graphs
from export.pretrained import pretrained
from export.request import GraphsRequest
from routing import Calibration
from routing.manifest import verify
from tests.unit import adapting
from tests.unit.calibrating import run
from tests.unit.export_tiny import PX, QUIET, run_export, save_tiny

pytestmark = pytest.mark.usefixtures("remembered_exports")

IMAGES, LEARNED, COPIES = 240, 70, 12


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """Rungs of which the cheap one is adapted, images, and what `collect` stores of them.

    The weights have learned from 70 images; those, and 12 more that are other forms of some of
    them, are among the 252 that are collected.
    """
    folder = tmp_path_factory.mktemp("user")
    images = adapting.write_pictures(folder / "images", IMAGES)
    shutil.copytree(images, folder / "learned", ignore=beyond(LEARNED))
    for index in range(COPIES):
        image = Image.open(images / f"{index:03d}.png").resize((48, 48))
        image = ImageOps.mirror(image) if index % 2 else image
        image.save(images / f"copy{index:03d}.jpg", quality=95)
    backbone = pretrained(str(save_tiny(folder / "model", "ViTForImageClassification")))
    learned = adapting.lesson(backbone, adapting.request(folder, folder / "learned"))
    source = adapting.FolderImages(folder / "learned")
    found = learned.teacher.read_images(source, range(LEARNED), QUIET).pictures
    prints = encode(found.hashes, found.looks)
    state = adapting.disturbed(backbone, Recipe(8), folder / "state", prints)
    low = Recipe(8, adapted=str(state.folder))
    export_graphs(backbone, GraphsRequest(folder / "build/onnx", low), QUIET)
    assert run(folder, "collect", "--images", "images") == 0
    return folder


def beyond(count):
    return lambda folder, names: [name for name in names if int(name[:3]) >= count]


def loaded(workplace):
    graphs = GraphSet.load(workplace / "build/onnx")
    return Outputs.load(workplace / "build/calibration/outputs.json"), graphs


def is_learned(name):
    return name.startswith("copy") or int(name[:3]) < LEARNED


def test_they_and_their_other_forms_are_left_out(workplace):
    collected, graphs = loaded(workplace)
    found = usable(collected, graphs)
    assert len(collected) == IMAGES + COPIES
    assert found.names == tuple(name for name in collected.names if not is_learned(name))
    assert not found.taught.any()
    np.testing.assert_array_equal(found.low.embedding, collected.low.embedding[found.places])
    assert without_learned(collected, graphs).names == found.names
    plain = replace(graphs, graphs={n: replace(g, adapted_on="") for n, g in graphs.graphs.items()})
    assert usable(collected, plain) is collected  # it is the record that says so


def test_others_of_their_groups_are_left_out_with_them(workplace):
    collected, graphs = loaded(workplace)
    # Folders of four; the last of those that were learned from has two that were not.
    names = tuple(
        name if name.startswith("copy") else f"{int(name[:3]) // 4}/{name}"
        for name in collected.names
    )
    collected = replace(collected, names=names)
    learned = {name.partition("/")[0] for name in names if "/" in name and is_learned(name[-7:])}
    wanted = [n for n in names if "/" in n and n.partition("/")[0] not in learned]
    assert len(wanted) == IMAGES - LEARNED - 2
    for found in (usable, without_learned):
        assert list(found(collected, graphs, "folder").names) == wanted
        assert len(found(collected, graphs)) == IMAGES - LEARNED


def test_they_are_in_no_split(workplace, capsys):
    assert run(workplace, "fit", "--max-risk", 0.3, "--test-share", 0.2) == 0
    said = " ".join(capsys.readouterr().err.split())
    left_out = f"{LEARNED + COPIES} images taught a graph or its head, in this or another form"
    assert f"{left_out}, or are of the group of one that did; they are left out" in said
    collected, graphs = loaded(workplace)
    found = usable(collected, graphs)
    fitted = Fit.load(workplace / "build/calibration/calibration.json", found)
    assert set(fitted.splits) == {"fit", "certify", "test"}
    rows = np.concatenate(list(fitted.splits.values()))
    assert sorted(rows) == list(range(IMAGES - LEARNED))
    assert not among(found.hashes, found.looks, graphs.low.adapted_on)[rows].any()
    with pytest.raises(FitError, match="used to fit a graph; leave them out"):
        fit(collected, graphs, EscalationRate(0.3), Options(Fidelity("top1")))
    assert run(workplace, "report") == 0


def test_nothing_is_held_against_them_later(workplace, tmp_path, capsys):
    assert run(workplace, "fit", "--escalation-rate", 0.3) == 0
    capsys.readouterr()
    later = adapting.write_pictures(tmp_path / "later", 40, seed=1)
    for index in range(10):
        shutil.copy(workplace / f"images/{index:03d}.png", later / f"known{index}.png")
        shutil.copy(workplace / f"images/copy{index:03d}.jpg", later)
    assert run(workplace, "evaluate", "--images", later, "--json") in (0, 1)  # what it finds
    printed = capsys.readouterr()
    assert "20 images taught a graph or its head" in printed.err
    assert json.loads(printed.out)["images"] == 40
    assert run(workplace, "evaluate", "--images", "learned") == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")


def test_every_command_leaves_out_their_groups(workplace, tmp_path, capsys):
    folder = tmp_path / "user"
    shutil.copytree(workplace / "build", folder / "build")
    by_folder = ("--group-by", "folder")  # one folder, of which some were learned from
    all_of_them = f"{IMAGES + COPIES} images taught a graph or its head, in this or another form"
    for arguments in (("fit", "--max-risk", 0.3, *by_folder), ("align", *by_folder)):
        capsys.readouterr()
        assert run(folder, *arguments) == 2
        assert all_of_them in " ".join(capsys.readouterr().err.split())
    assert run(folder, "fit", "--escalation-rate", 0.3) == 0
    artifact = folder / "build/calibration/calibration.json"
    content = json.loads(artifact.read_text())
    content["data"]["group_by"] = "folder"
    artifact.write_text(json.dumps(content))
    capsys.readouterr()
    assert run(folder, "report") == 2
    assert all_of_them in " ".join(capsys.readouterr().err.split())
    later = adapting.write_pictures(tmp_path / "later", 10, seed=1)
    shutil.copy(workplace / "images/000.png", later / "known.png")
    assert run(folder, "evaluate", "--images", later) == 2
    assert "11 images taught a graph" in " ".join(capsys.readouterr().err.split())


def test_an_alignment_on_top_learns_from_others(workplace, tmp_path, capsys):
    folder = tmp_path / "user"
    shutil.copytree(workplace / "build", folder / "build")
    assert run(folder, "align") == 0
    capsys.readouterr()
    file = folder / "build/calibration/alignment.npz"
    assert run_export("align", "--onnx", folder / "build/onnx", "--alignment", file).code == 0
    graphs = GraphSet.load(folder / "build/onnx")
    assert graphs.low.recipe.align and graphs.low.recipe.adapted
    collected, before = loaded(workplace)
    learned = among(collected.hashes, collected.looks, graphs.low.fitted_on)
    assert learned.any()
    assert not any(is_learned(collected.names[row]) for row in np.flatnonzero(learned))
    assert run(folder, "collect", "--images", workplace / "images") == 0
    stored, graphs = loaded(folder)
    kept = usable(stored, graphs)
    assert kept.names == usable(collected, before).names
    assert [kept.names[i] for i in np.flatnonzero(kept.taught)] == [
        collected.names[i] for i in np.flatnonzero(learned)
    ]
    assert run(folder, "fit", "--escalation-rate", 0.3) == 0


def test_where_all_were_learned_one_line_says_so(workplace, tmp_path, capsys):
    folder = tmp_path / "user"
    shutil.copytree(workplace / "build/onnx", folder / "build/onnx")
    assert run(folder, "collect", "--images", workplace / "learned") == 0
    said = " ".join(capsys.readouterr().err.split())
    assert f"{LEARNED} images taught a graph or its head, in this or another form; nothing" in said
    for command in (
        ("fit", "--max-risk", 0.3),
        ("fit", "--threshold", 0.5),
        ("align",),
        ("report",),
    ):
        assert run(folder, *command) == 2, command
        printed = capsys.readouterr()
        last = printed.err.splitlines()[-1]
        assert last.startswith("error: ") and "Traceback" not in printed.err
        assert len([line for line in printed.err.splitlines() if "error" in line]) == 1


def test_a_repository_of_an_adapted_rung(workplace, tmp_path):
    assert run(workplace, "fit", "--escalation-rate", 0.3) == 0
    _, graphs = loaded(workplace)
    done = run_export(
        *("repository", "--onnx", workplace / "build/onnx", "--out", tmp_path / "repository"),
        *("--calibration", workplace / "build/calibration/calibration.json"),
    )
    assert done.code == 0, done.err
    verify(tmp_path / "repository")
    (file,) = (tmp_path / "repository").rglob("calibration.json")
    low = Calibration.load(file).rungs["vit_low"]
    assert low.recipe == f"px=8,adapted={graphs.low.recipe.adapted}"
    assert low.fingerprint == graphs.low.record.fingerprint
    assert str(workplace) not in file.read_text()
    assert (tmp_path / "repository/vit_low/1/model.onnx").read_bytes() == (
        graphs.low.file.read_bytes()
    )
    assert PX == graphs.image_shape[1]
