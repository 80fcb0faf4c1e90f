"""What a certificate counts is pictures, and none of those that something was fitted on."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageOps

from bundle.graphs import GraphSet
from calibration.answers import AnswerCache
from calibration.certify import Goal
from calibration.evaluate import evaluate
from calibration.fidelity import Fidelity
from calibration.fit import FitError, Options, fit, without_learned
from calibration.images import open_images, write_sample
from calibration.outputs import Outputs, OutputsError, collect, usable
from calibration.splits import group_keys
from export.request import LearnedImages
from imaging import Preprocessing
from tests.unit.calibrating import run
from tests.unit.onnx_files import write_graph_set

CROPS, TIMES, NEW = 40, 3, 20


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of rungs, of crops, of each crop in several files, of other forms and new crops."""
    root = tmp_path_factory.mktemp("identity")
    write_graph_set(root / "onnx", seeds=(1, 2))
    write_sample(root / "crops", CROPS, seed=3)
    for file in sorted((root / "crops").rglob("*.jpg")):
        place = root / "copied" / file.relative_to(root / "crops")
        place.parent.mkdir(parents=True, exist_ok=True)
        for time in range(TIMES):
            name = f"{place.stem}-{time}.jpg"
            place.with_name(name).write_bytes(file.read_bytes() + b"\0" * time)
        image = Image.open(file)
        other = root / "forms" / f"{file.stem}.webp"
        other.parent.mkdir(exist_ok=True)
        ImageOps.mirror(image).resize((image.width // 2, image.height // 2)).save(other)
    write_sample(root / "forms/new", NEW, seed=4)
    return root


def collected(folders, source, name):
    graphs = GraphSet.load(folders / "onnx")
    collect(AnswerCache(folders / "answers", source, graphs), folders / name)
    return Outputs.load(folders / name)


@pytest.fixture(scope="module")
def outputs(folders):
    """What `collect` stores of each folder."""
    found = {}
    for name in ("crops", "copied", "forms"):
        found[name] = collected(folders, open_images(str(folders / name)), f"{name}.json")
    return found


def fitted(outputs, folders):
    goal, options = Goal(0.3, 0.9, "ltt"), Options(Fidelity("top1"))
    return fit(outputs, GraphSet.load(folders / "onnx"), goal, options).calibration


def test_a_picture_stored_many_times_counts_once(outputs, folders):
    assert len(outputs["copied"]) == TIMES * CROPS
    alone, copied = fitted(outputs["crops"], folders), fitted(outputs["copied"], folders)
    for key in ("n", "allowed"):
        assert copied.certificate[key] == alone.certificate[key]
    same = (TIMES - 1) * CROPS
    assert copied.data["same_pixels"] == same
    assert copied.data["look_alike"] == alone.data["look_alike"] <= 0.1 * CROPS
    assert len(set(group_keys(outputs["copied"], "source"))) == len(
        set(group_keys(outputs["crops"], "source"))
    )


def test_evaluate_leaves_out_what_the_calibration_has_seen_in_another_form(outputs, folders):
    evaluation = evaluate(fitted(outputs["crops"], folders), outputs["forms"])
    assert 0.9 * CROPS <= evaluation.known <= CROPS + 2
    assert NEW - 2 <= evaluation.images <= len(outputs["forms"]) - evaluation.known


@pytest.mark.parametrize(
    ("teaches", "message"),
    [
        ("head", "0 images are too few to split"),
        ("ranges", "split 'certify' gets 0 of them"),
    ],
)
def test_images_that_taught_a_graph_certify_nothing_in_any_form(
    outputs, folders, tmp_path, capsys, teaches, message
):
    graph_set = GraphSet.load(folders / "onnx")
    preprocessing = Preprocessing.from_dict(graph_set.preprocessing)
    learned = LearnedImages.read(folders / "crops", preprocessing).prints
    onnx = tmp_path / "onnx"
    write_graph_set(onnx, seeds=(1, 2))
    taught = GraphSet.load(onnx)
    if teaches == "head":
        taught = replace(taught, fitted_on=learned)
    else:
        taught = taught.adding(replace(taught.high, fitted_on=learned))
    taught.save(onnx)
    assert len(without_learned(outputs["copied"], taught)) == 0
    assert NEW - 2 <= len(without_learned(outputs["forms"], taught)) <= NEW + 0.1 * CROPS
    with pytest.raises(FitError, match="used to fit a graph"):
        fit(outputs["forms"], taught, Goal(0.3, 0.9, "ltt"), Options(Fidelity("top1")))
    found = usable(outputs["forms"], taught)
    marked = 0 if found.taught is None else found.taught.sum()
    assert len(found) - marked == len(without_learned(outputs["forms"], taught))
    assert bool(marked) == (teaches == "ranges")
    where = ("--onnx", onnx, "--outputs", folders / "copied.json")
    assert run(tmp_path, "fit", "--max-risk", 0.3, *where) == 2
    said = capsys.readouterr().err
    assert message in said.splitlines()[-1]
    images = "images taught a graph or its head, in this or another form"
    if teaches == "head":
        why = f"{TIMES * CROPS} {images}, or are of the group of one that did, and were left out"
        assert said.splitlines()[-1].endswith(why)
    else:
        assert f"{TIMES * CROPS} images taught a graph without labels" in said


def test_crops_drawn_from_the_sample_stream_are_independent(folders, tmp_path):
    source = open_images("sample:3", CROPS)
    drawn = collected(folders, source, "drawn.json")
    assert group_keys(drawn, "source") == drawn.groups
    assert not drawn.looks.any()


def test_outputs_of_an_earlier_release_are_to_be_collected_again(tmp_path):
    np.savez(tmp_path / "outputs.npz", names=np.array(["a.png"]))
    with pytest.raises(OutputsError, match=r"outputs\.npz is not readable .*; collect again"):
        Outputs.load(tmp_path / "outputs.npz")
