"""What adaptation is worth, by the product's own functions, on pictures that no part has seen."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from adaptation import distil as road
from adaptation.__main__ import ERRORS
from adaptation.device import Device
from adaptation.request import AdaptationError, judged_by
from adaptation.study import SHARES, Subject, study
from adaptation.teacher import Teacher
from bundle.adapted import Adapted
from bundle.prints import encode
from bundle.recipe import Recipe
from calibration.images import FolderImages
from export.pretrained import pretrained
from imaging import decode
from tests import commands
from tests.unit import adapting
from tests.unit.adapting import QUICK, Watching, request, write_pictures
from tests.unit.export_tiny import PX, QUIET, save_tiny

LEARN, TEST = 240, 60  # a quarter of those to learn from is enough to learn from


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("models") / "vit", "ViTForImageClassification")


@pytest.fixture(scope="module")
def backbone(model):
    return pretrained(str(model))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    return write_pictures(folder / "learn", LEARN, 1), write_pictures(folder / "test", TEST, 2)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(road, "SETTINGS", QUICK)
    monkeypatch.setattr(Device, "find", adapting.one_thread)


def subject(backbone, folder: Path, learn: Path, test: Path, recipes=("px=8",)) -> Subject:
    asked = replace(request(folder, learn, epochs=6, views=1), out=folder / "states")
    fidelity = judged_by(backbone.task, None, None)
    found = [Recipe.parse(recipe) for recipe in recipes]
    return Subject(backbone, found, FolderImages(test), asked, fidelity)


@pytest.fixture(scope="module")
def studied(backbone, pictures, tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(road, "SETTINGS", QUICK)
        patch.setattr(Device, "find", adapting.one_thread)
        return list(study(subject(backbone, folder, *pictures), QUIET)), folder


def answers(backbone, recipe: Recipe, folder: Path) -> np.ndarray:
    """Classes by the modules themselves, whatever a study does."""
    preprocessing = backbone.preprocessing(PX)
    tensors = [preprocessing(decode(file.read_bytes())) for file in sorted(folder.iterdir())]
    with torch.inference_mode():
        logits = backbone.rung(recipe).eval()(torch.from_numpy(np.stack(tensors)))[2]
    return logits.argmax(dim=1).numpy()


def test_each_share_of_the_images_has_a_row_for_each_state(studied):
    rows, _ = studied
    few, all_of_them = (round(share * LEARN) for share in SHARES)
    assert [(row.state, row.train_images) for row in rows] == [
        ("plain", 0),
        *((state, few) for state in ("aligned", "adapted", "adapted+aligned")),
        *((state, all_of_them) for state in ("aligned", "adapted", "adapted+aligned")),
    ]
    assert {row.recipe for row in rows} == {"px=8"} and {row.test_images for row in rows} == {TEST}
    assert all((row.minutes > 0) == row.state.startswith("adapted") for row in rows)


def test_what_a_row_says_is_what_the_modules_answer(studied, backbone, pictures):
    rows, folder = studied
    full = answers(backbone, Recipe(PX), pictures[1])
    plain = answers(backbone, Recipe(8), pictures[1])
    assert rows[0].agreement == pytest.approx((plain == full).mean())
    state = Adapted.load(folder / "states" / f"px8-{LEARN}")
    knowing, recipe = backbone.knowing(Recipe(8, adapted=str(state.folder)), PX)
    adapted = answers(knowing, recipe, pictures[1])
    assert rows[5].agreement == pytest.approx((adapted == full).mean())
    assert rows[5].agreement > rows[0].agreement  # the tiny model has much to learn


def test_less_risk_needs_more_escalation(studied):
    rows, _ = studied
    for row in rows:
        lost = 1 - row.agreement
        assert 0 <= row.needed_at_5 <= row.needed_at_2 <= 1
        assert row.needed_at_5 >= lost - 0.05 - 1e-9  # no fewer than the losses themselves


def test_no_picture_is_on_both_sides(backbone, pictures, tmp_path):
    learn, test = pictures
    both = tmp_path / "both"
    both.mkdir()
    for file in [*sorted(test.iterdir())[:20], *sorted(learn.iterdir())[:7]]:
        (both / f"{file.parent.name}-{file.name}").write_bytes(file.read_bytes())
    bars = Watching()
    first = next(study(subject(backbone, tmp_path, learn, both), bars))
    assert first.test_images == 20
    assert "7 test images are to be learned from or taught the head, and are left out" in bars.lines


def test_a_test_of_nothing_new_is_refused(backbone, pictures, tmp_path):
    learn, _ = pictures
    with pytest.raises(AdaptationError, match="no test image is left"):
        next(study(subject(backbone, tmp_path, learn, learn), QUIET))


def test_images_of_the_head_are_not_judged_by(backbone, pictures, tmp_path):
    learn, test = pictures
    head = Teacher(backbone, PX, tmp_path / "head", 0, Device("cpu", half=False))
    source = FolderImages(test)
    found = head.read_images(source, range(9), QUIET).pictures
    asked = subject(backbone, tmp_path, learn, test)
    asked = replace(asked, head_prints=encode(found.hashes, found.looks))
    assert next(study(asked, QUIET)).test_images == TEST - 9


def test_a_training_that_cannot_be_is_a_line_and_the_others_go_on(backbone, pictures, tmp_path):
    asked = subject(backbone, tmp_path, *pictures)
    quickly = replace(asked, request=replace(asked.request, epochs=None, minutes=1e-6))
    bars = Watching()
    rows = list(study(quickly, bars))
    assert [row.state for row in rows] == ["plain", "aligned", "aligned"]
    assert sum("does not learn from" in line and "too few" in line for line in bars.lines) == 2


def test_too_few_images_for_a_quarter_are_refused_at_once(backbone, pictures, tmp_path):
    few = write_pictures(tmp_path / "few", 196, 1)
    with pytest.raises(AdaptationError, match="49 images or groups of them are too few"):
        subject(backbone, tmp_path, few, pictures[1])
    subject(backbone, tmp_path, write_pictures(few, 200, 1), pictures[1])


def test_every_recipe_is_looked_at_before_the_full_model_answers(backbone, pictures, tmp_path):
    with pytest.raises(ERRORS, match="no positive multiple of the patch size"):
        subject(backbone, tmp_path, *pictures, recipes=("px=8", "px=9"))
    with pytest.raises(ERRORS, match="px=16 is the full model itself"):
        subject(backbone, tmp_path, *pictures, recipes=("px=8", "px=16"))
    with pytest.raises(ERRORS, match="weights are adapted in FP32"):
        subject(backbone, tmp_path, *pictures, recipes=("px=8", "px=8,int8"))
    assert not (tmp_path / "cache").exists()


def test_the_command_writes_a_summary_and_prints_a_table(model, pictures, tmp_path):
    learn, test = pictures
    ran = commands.run(
        *("adaptation", "study", "--model", model, "--recipes", "px=8", "--images", learn),
        *("--test", test, "--epochs", 2, "--views", 1, "--out", tmp_path / "out"),
        *("--cache", tmp_path / "cache"),
    )
    assert ran.code == 0, ran.err
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert set(summary) == {"rows", "environment"} and len(summary["rows"]) == 7
    keys = {"recipe", "state", "train_images", "test_images", "agreement", "needed_at_5"}
    assert set(summary["rows"][0]) == {*keys, "needed_at_2", "minutes"}
    assert "adapted+aligned" in ran.out and f"on {TEST} test images" in ran.out
