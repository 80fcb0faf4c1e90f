"""What is refused before anything is trained, which images are held out, and the command line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import adaptation.__main__ as command_line
from adaptation import distil as road
from adaptation.request import LEAST_GROUPS, AdaptationError
from bundle.adapted import NAME, WEIGHTS, Adapted
from bundle.graphs import GraphSet
from bundle.recipe import Recipe
from calibration.images import open_images
from calibration.splits import SplitError, group_keys
from export.errors import UsageError
from export.pretrained import pretrained
from tests import commands
from tests.unit import adapting
from tests.unit.adapting import adapt, lesson, request, write_pictures
from tests.unit.export_tiny import PX, QUIET, run_export, save_tiny
from tests.unit.image_files import write_images


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny", "Dinov2Model")


@pytest.fixture(scope="module")
def backbone(model):
    return pretrained(str(model))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"), 60)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("px=8,int8", "weights are adapted in FP32; leave int8 out here and give it to python -m"),
        ("px=8,int8=static", "leave int8=static out here"),
        ("px=8,fp16", "leave fp16 out here"),
        ("px=8,align", "an adapted state is aligned by itself; leave align out here"),
        ("px=8,adapted=x", "px=8,adapted=x is adapted already; adapt the recipe without"),
    ],
)
def test_a_recipe_of_graphs_is_refused_before_a_model_is_loaded(recipe, message, images, tmp_path):
    with pytest.raises(AdaptationError) as caught:
        request(tmp_path, images, recipe)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"minutes": 3.0}, "--minutes and --epochs say the same twice; give one of them"),
        ({"epochs": None, "minutes": 0.0}, "--minutes 0 is no time to train in"),
        ({"epochs": None, "minutes": float("nan")}, "--minutes nan is no time"),
        ({"epochs": None, "minutes": float("inf")}, "--minutes inf is no time"),
        ({"out": Path("a,b")}, "--out a,b has a comma, which ends it in a recipe"),
        ({"out": Path(__file__)}, "is a file; give a folder"),
        ({"places": range(49)}, f"49 images or groups of them are too few .*, {LEAST_GROUPS} are"),
    ],
)
def test_a_request_that_means_nothing_is_refused(fields, message, images, tmp_path):
    with pytest.raises(AdaptationError, match=message) as caught:
        request(tmp_path, images, **fields)
    assert "\n" not in str(caught.value)
    with pytest.raises(SplitError, match="--group-by 'day' is none of"):
        request(tmp_path, images, group_by="day")


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("fp32", "px=16 is the full model itself; give a cheaper recipe"),
        ("px=16", "px=16 is the full model itself"),
        ("px=10", "px=10 is no positive multiple of the patch size 4"),
        ("px=20", "looks at more than the full rung's 16 px"),
        ("depth=2", "depth=2 must be between 1 and 1"),
    ],
)
def test_a_recipe_that_is_not_for_the_model_writes_nothing(
    recipe, message, backbone, images, tmp_path
):
    with pytest.raises((AdaptationError, UsageError), match=message):
        adapt(backbone, request(tmp_path, images, recipe))
    assert not list(tmp_path.iterdir())


def test_a_cheap_recipe_of_another_full_resolution(backbone, images, tmp_path):
    found = adapt(backbone, request(tmp_path, images, "px=16", px=32, epochs=8))
    assert found.about["images"]["learned"] == 50
    assert found.adapted is not None and found.adapted.image_px == 32


def test_images_that_are_one_picture_are_too_few(backbone, tmp_path):
    image = Image.open(write_pictures(tmp_path / "one", 1) / "000.png")
    for index in range(60):
        image.save(tmp_path / "one" / f"{index:03d}.png", compress_level=index % 9)
    with pytest.raises(AdaptationError, match="1 images or groups of them are too few"):
        adapt(backbone, request(tmp_path, tmp_path / "one"))


def test_too_few_folders_are_refused_before_the_full_model_answers(images, tmp_path):
    for index, file in enumerate(sorted(images.iterdir())):
        (tmp_path / f"few/{index % 49}").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"few/{index % 49}/{file.name}").write_bytes(file.read_bytes())
    assert request(tmp_path, tmp_path / "few").groups == 60
    with pytest.raises(AdaptationError, match="49 images or groups of them are too few"):
        request(tmp_path, tmp_path / "few", group_by="folder")


def test_unreadable_images_are_said_and_counted(backbone, tmp_path):
    folder = write_pictures(tmp_path / "some", 52)
    for number in range(2):
        (folder / f"x{number}.png").write_bytes(b"no image")
    bars = adapting.Watching()
    found = adapt(backbone, request(tmp_path, folder, epochs=1), bars)
    assert sum(line.startswith("left out: x") for line in bars.lines) == 2
    assert sum(found.about["images"].values()) == 52
    folder = write_pictures(tmp_path / "few", 49)
    for number in range(2):
        (folder / f"x{number}.png").write_bytes(b"no image")
    with pytest.raises(AdaptationError, match="49 images or groups of them are too few"):
        adapt(backbone, request(tmp_path, folder, out=tmp_path / "other"))


@pytest.mark.parametrize("group_by", ["source", "folder", "content"])
def test_no_group_and_no_picture_is_on_both_sides(group_by, backbone, tmp_path):
    rng = np.random.default_rng(0)
    for index in range(180):
        folder = tmp_path / "images" / f"{index % 60:02d}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (6, 6, 3), np.uint8)
        image = Image.fromarray(pixels).resize((24, 24), Image.Resampling.BICUBIC)
        image.save(folder / f"{index}.png")
        if index % 20 == 0:  # the same picture once more, in another folder and larger
            other = tmp_path / "images" / f"{(index + 1) % 60:02d}"
            other.mkdir(parents=True, exist_ok=True)
            image.resize((48, 48)).save(other / f"copy{index}.png")
    asked = request(tmp_path, tmp_path / "images", group_by=group_by)
    learned = lesson(backbone, asked)
    found = learned.teacher.read_images(asked.source, asked.rows, QUIET)
    rows, held_out = road.divide(found, asked)
    assert sorted([*rows, *held_out]) == list(range(len(found.keys)))
    groups = np.array(group_keys(found.pictures, group_by))
    assert set(groups[rows]).isdisjoint(groups[held_out])
    assert len(set(groups[held_out])) >= road.FEWEST_HELD_OUT
    name = {name: row for row, name in enumerate(found.pictures.names)}
    sides = np.isin(np.arange(len(found.keys)), held_out)
    for index in range(0, 180, 20):
        first = name[f"{index % 60:02d}/{index}.png"]
        copy = name[f"{(index + 1) % 60:02d}/copy{index}.png"]
        assert sides[first] == sides[copy]
    if group_by == "folder":
        folders = np.array([text.split("/")[0] for text in found.pictures.names])
        assert set(folders[rows]).isdisjoint(folders[held_out])
    other = road.divide(found, replace(asked, seed=1))
    assert other != (rows, held_out) and road.divide(found, asked) == (rows, held_out)


def test_of_very_many_images_some_are_held_out(monkeypatch, backbone, images, tmp_path):
    monkeypatch.setattr(road, "FEWEST_HELD_OUT", 2)
    monkeypatch.setattr(road, "MOST_HELD_OUT", 3)
    assert len(lesson(backbone, request(tmp_path, images)).held_out) == 3


# --- the command ------------------------------------------------------------------------------


@pytest.fixture
def arguments(model, images, tmp_path, monkeypatch):
    monkeypatch.setattr(road, "SETTINGS", (adapting.Settings(2e-4), *adapting.QUICK))
    monkeypatch.setattr(adapting.Device, "find", adapting.one_thread)
    folders = ("--out", tmp_path / "my state", "--cache", tmp_path / "cache")
    return ("distil", "--model", model, "--recipe", "px=8", "--images", images, *folders)


def no_map(inputs, lacking, groups, seed):
    return np.zeros((inputs.shape[1], lacking.shape[1])), np.zeros(lacking.shape[1])


def test_the_command_trains_a_state_that_is_baked_in(arguments, model, tmp_path, monkeypatch):
    monkeypatch.setattr(road, "fit_map", no_map)  # begins as it is, so that training surely helps
    strict = ("--fidelity", "cosine", "--tolerance", "1e-6")  # only nearer wins
    done = commands.run("adaptation", *arguments, *strict, "--epochs", "8", "--json")
    assert done.code == 0, done.err
    about = json.loads(done.out)
    state = Adapted.load(tmp_path / "my state")
    assert about == dict(state.about) and about["steps"]["of"] == 8 * (50 // 32)
    assert "wrote " in done.err and "next: python -m export rungs" in done.err
    (next_line,) = (line for line in done.err.splitlines() if line.startswith("next: "))
    recipe = next_line.split('"')[1]
    exported = run_export("rungs", "--model", model, "--low", recipe, "--out", tmp_path / "onnx")
    assert exported.code == 0, exported.err
    graphs = GraphSet.load(tmp_path / "onnx")
    assert graphs.low.recipe == Recipe(8, adapted=state.key)
    assert graphs.left_out() == state.image_prints
    # Without --json the lines are what is printed.
    again = commands.run("adaptation", *arguments, "--epochs", "2", "--batch", "10", "--seed", "5")
    assert again.code == 0 and "held-out images: " in again.out.splitlines()[0]


def test_a_head_is_fitted_and_its_answers_are_matched(arguments, tmp_path):
    names = [f"{kind}/{index}.png" for kind in "ab" for index in range(6)]
    heads = write_images(tmp_path / "heads", *names)
    more = ("--head-images", heads, "--epochs", "1", "--fidelity", "top1", "--json")
    done = commands.run("adaptation", *arguments, *more)
    assert done.code == 0, done.err
    assert json.loads(done.out)["images"] == {"learned": 50, "held_out": 10}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--epochs", "0"), "greater than or equal to 1"),
        (("--epochs", "1", "--minutes", "1"), "say the same twice"),
        (("--minutes", "0"), "is no time to train in"),
        (("--batch", "0"), "greater than or equal to 1"),
        (("--resume",), "nothing to resume in "),
        (("--recipe", "px=8,int8"), "weights are adapted in FP32"),
        (("--recipe", "px=16"), "is the full model itself"),
        (("--recipe", "px=nine"), "must be a whole number"),
        (("--images", "nowhere"), "no such folder: nowhere"),
        (("--limit", "49"), "49 images or groups of them are too few"),
        (("--group-by", "day"), "--group-by 'day' is none of"),
        (("--model", "nowhere"), "nowhere"),
        (("--fidelity", "top1"), "top1"),
        (("--labels", "cat,dog"), "labels"),
        (("--px", "15"), "px=15 is no positive multiple"),
        (("--out", __file__), "is a file; give a folder"),
        (("--cache", __file__), __file__),
    ],
)
def test_bad_usage_is_one_line_and_writes_nothing(more, message, arguments, tmp_path):
    done = commands.run("adaptation", *arguments, *more)
    last = done.err.splitlines()[-1]
    assert done.code == 2 and done.out == "" and last.startswith("error: ") and message in last
    assert "Traceback" not in done.err
    assert not (tmp_path / "my state" / NAME).exists()


def test_ctrl_c_at_the_command_line_and_going_on(arguments, tmp_path, monkeypatch):
    bars = adapting.interrupting(3)
    with monkeypatch.context() as patch:
        patch.setattr(command_line, "Bars", lambda console: bars)
        done = commands.run("adaptation", *arguments, "--epochs", "12")
    assert done.code == 130 and "Traceback" not in done.err
    assert bars.lines[-2] == "stopped; what was learned is kept"
    assert bars.lines[-1] == "the same command with --resume goes on"
    assert done.err.splitlines()[-1] == "interrupted"
    refused = commands.run("adaptation", *arguments, "--epochs", "12")
    assert refused.code == 2 and "add --resume to go on with it" in refused.err
    done = commands.run("adaptation", *arguments, "--epochs", "12", "--resume")
    assert done.code == 0, done.err
    assert {file.name for file in (tmp_path / "my state").iterdir()} <= {NAME, WEIGHTS}


def test_the_sample_teaches_without_files(backbone, tmp_path):
    source = open_images("sample:0", 60)
    asked = replace(request(tmp_path, write_pictures(tmp_path / "p", 50)), source=source, epochs=1)
    found = adapt(backbone, asked)
    assert sum(found.about["images"].values()) == 60 and PX == 16
