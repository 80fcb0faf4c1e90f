"""From a model and images to an adapted state: what is written, when nothing is, and resuming."""

from __future__ import annotations

import json
import resource
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from adaptation import distil as road
from adaptation import result, training
from adaptation.objective import Objective
from adaptation.request import AdaptationError
from adaptation.resuming import UNFINISHED
from bundle.adapted import NAME, WEIGHTS, Adapted
from bundle.fidelity import FidelityLoss
from bundle.recipe import Recipe
from export.pretrained import pretrained
from tests.unit import adapting
from tests.unit.adapting import adapt, interrupting, request, write_pictures
from tests.unit.export_tiny import PX, QUIET, save_tiny


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return pretrained(str(save_tiny(tmp_path_factory.mktemp("models") / "dino", "Dinov2Model")))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def cache(backbone, images, tmp_path_factory):
    """The full model's answers, which every test of the file shares."""
    folder = tmp_path_factory.mktemp("cache")
    adapting.lesson(backbone, request(folder, images, cache=folder))
    return folder


@pytest.fixture
def asked(tmp_path, images, cache):
    return request(tmp_path, images, cache=cache)


@pytest.fixture(scope="module")
def trained(backbone, images, cache, tmp_path_factory):
    """What an undisturbed training came to; its files are not to be changed."""
    return adapt(backbone, request(tmp_path_factory.mktemp("whole"), images, cache=cache))


def files(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()} if folder.exists() else set()


def curve(found) -> list:
    return found.about["curve"]


def test_the_state_is_written_with_what_it_is_of(trained, backbone, images):
    folder = trained.adapted.folder
    assert files(folder) == {NAME, WEIGHTS}
    content = json.loads((folder / NAME).read_text())
    assert content["recipe"] == "px=8" and content["image_px"] == PX
    assert content["teacher"] == backbone.weights_sha256
    assert content["seed"] == 0 and len(content["curve"]) > 2
    counts = content["images"]
    assert counts["learned"] + counts["held_out"] == adapting.COUNT and counts["held_out"] == 10
    prints = Adapted.load(folder).image_prints
    assert len(prints) * 3 // 4 == pytest.approx(adapting.COUNT * 37, abs=2)  # held-out ones too
    said = " ".join(trained.lines())
    assert "on 10 held-out images" in said and f"adapted={folder}" in said


def test_training_makes_the_held_out_answers_nearer(trained):
    distances = [look["held_out"]["distance"] for look in curve(trained)]
    assert trained.best.distance == min(distances) < 0.7 * trained.plain.distance
    assert trained.best.beats(trained.start) and not trained.plain.beats(trained.start)
    assert trained.start.distance < trained.plain.distance  # this one begins aligned
    assert trained.about["aligned"] and curve(trained)[0]["held_out"] == {
        "distance": trained.start.distance,
        "acceptable": trained.start.acceptable,
        "cosine": trained.start.cosine,
        "depth": None,  # no token halts
    }


def test_the_saved_weights_are_those_of_the_best_look(backbone, asked, monkeypatch):
    looks = {}

    class Noted(training.Run):
        def look(self):
            point = super().look()
            looks[point.step] = {k: v.clone() for k, v in self.student.weights().items()}
            return point

    monkeypatch.setattr(road, "Run", Noted)
    # Small steps help; from the eighth on each is worse than the one before.
    monkeypatch.setattr(training, "schedule", lambda step, steps: 0.5 if step < 7 else 40.0)
    found = adapt(backbone, asked)
    distances = {p["step"]: p["held_out"]["distance"] for p in curve(found)}
    best = found.about["steps"]["best"]
    assert 0 < best <= 7 and distances[max(distances)] > distances[best] == min(distances.values())
    assert found.about["steps"]["taken"] < found.about["steps"]["of"]  # and it stopped early
    saved = load_file(found.adapted.file)
    assert saved.keys() == looks[best].keys()
    assert all(torch.equal(saved[name], value) for name, value in looks[best].items())
    last = looks[max(looks)]
    assert any(not torch.equal(saved[name], last[name]) for name in saved)


def test_a_resumed_training_ends_in_the_same_bits(backbone, asked, trained):
    for step in (2, 6):  # stopped twice, between two looks
        with pytest.raises(KeyboardInterrupt):
            adapt(backbone, asked, interrupting(step))
        assert UNFINISHED in files(asked.out)
        asked = replace(asked, resume=True)
    found = adapt(backbone, asked)
    assert found.adapted.file.read_bytes() == trained.adapted.file.read_bytes()
    assert curve(found) == curve(trained) and found.start == trained.start
    assert files(asked.out) == {NAME, WEIGHTS}


def test_the_first_interrupt_keeps_the_best_state(backbone, asked):
    bars = interrupting(6)
    with pytest.raises(KeyboardInterrupt):
        adapt(backbone, asked, bars)
    assert files(asked.out) == {NAME, WEIGHTS, UNFINISHED}
    state = Adapted.load(asked.out)
    assert state.about["steps"]["taken"] == 6 < state.about["steps"]["of"]
    assert bars.lines[-1] == "stopped; what was learned is kept"
    # It can be begun again only by going on, or by removing what is there.
    with pytest.raises(AdaptationError, match="was stopped; add --resume to go on with it, or rem"):
        adapt(backbone, asked)


def test_the_second_interrupt_does_not_wait(backbone, asked):
    steps = []
    bars = interrupting(3, times=2)
    at_step = bars._at_step
    bars._at_step = lambda step: (steps.append(step), at_step(step))
    with pytest.raises(KeyboardInterrupt):
        adapt(backbone, asked, bars)
    assert steps[-1] == 3 and NAME not in files(asked.out)
    assert "stopped; what was learned is kept" not in bars.lines
    # What was kept at the looks before is still there to go on with.
    assert adapt(backbone, replace(asked, resume=True)).adapted is not None


def test_where_it_does_not_help_nothing_is_written(backbone, asked, monkeypatch):
    # The objective falls, but training never begins: no step is better than none.
    monkeypatch.setattr(training, "schedule", lambda step, steps: 0.0)
    found = adapt(backbone, asked)
    assert found.adapted is None and files(asked.out) == set()
    assert found.lines()[-1] == "it did not help: nothing is written"
    json.dumps(found.about, allow_nan=False)


class Broken(Objective):
    """Of a training, no number from the step `Broken.at` on."""

    at, calls = 0, 0

    def __call__(self, *arguments, **more):
        distance = super().__call__(*arguments, **more)
        if distance.requires_grad:
            type(self).calls += 1
            if self.calls > self.at:
                return distance * torch.nan
        return distance


@pytest.mark.parametrize("at", [0, 4, 13])
def test_training_that_leaves_the_numbers_keeps_the_best_state(at, backbone, asked, monkeypatch):
    trial = 4  # steps of the two trials
    monkeypatch.setattr(Broken, "at", trial + at)
    monkeypatch.setattr(Broken, "calls", 0)
    monkeypatch.setattr(road, "Objective", Broken)
    bars = adapting.Watching()
    found = adapt(backbone, asked, bars)
    said = f"the objective is no number at step {at}; training ends with the best state before"
    assert said in bars.lines and found.about["steps"]["taken"] == at
    written = {NAME, WEIGHTS} if at else set()
    assert files(asked.out) == written
    if at:
        assert all(v.isfinite().all() for v in load_file(found.adapted.file).values())


def test_weights_that_leave_the_numbers_are_noticed_at_the_next_look(backbone, asked, monkeypatch):
    class Spoilt(training.Run):
        def take_step(self):
            value = super().take_step()
            if self.step == 8:
                with torch.no_grad():
                    self.student.tower.layernorm.weight.fill_(torch.nan)
            return value

    monkeypatch.setattr(road, "Run", Spoilt)
    bars = adapting.Watching()
    found = adapt(backbone, asked, bars)
    assert any("no number at step 8" in line for line in bars.lines)
    assert 0 < found.about["steps"]["best"] < 8 and found.adapted is not None


@pytest.mark.parametrize("fields", [{}, {"epochs": None, "minutes": 1.0}])
def test_where_no_setting_works_one_line_says_so(fields, backbone, asked, monkeypatch):
    monkeypatch.setattr(Broken, "at", 0)
    monkeypatch.setattr(Broken, "calls", 0)
    monkeypatch.setattr(road, "Objective", Broken)
    with pytest.raises(AdaptationError, match="is the model sound|no number at step 0"):
        adapt(backbone, replace(asked, **fields))
    assert files(asked.out) == set()


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"seed": 1}, "seed"),
        ({"recipe": Recipe.parse("depth=1")}, "recipe"),
        ({"epochs": 5}, "epochs"),
        ({"epochs": None, "minutes": 3.0}, "minutes"),
        ({"batch": 16}, "batch"),
        ({"places": range(60)}, "learned"),
    ],
)
def test_a_training_is_only_resumed_as_what_it_was(changes, word, stopped, backbone, asked):
    shutil.copytree(stopped, asked.out)
    before = {name: (asked.out / name).read_bytes() for name in files(asked.out)}
    with pytest.raises(AdaptationError, match="give the same command, or remove it") as caught:
        adapt(backbone, replace(asked, resume=True, **changes))
    assert word in str(caught.value) and "\n" not in str(caught.value)
    assert {name: (asked.out / name).read_bytes() for name in files(asked.out)} == before


def test_other_options_are_noticed_before_the_full_model_answers(
    stopped, backbone, asked, monkeypatch
):
    shutil.copytree(stopped, asked.out)
    monkeypatch.setattr(road, "Teacher", raising(AssertionError("the full model is asked")))
    with pytest.raises(AdaptationError, match="with another seed, views; give the same command"):
        adapt(backbone, replace(asked, resume=True, views=5, seed=9))


@pytest.fixture(scope="module")
def stopped(backbone, images, cache, tmp_path_factory):
    asked = request(tmp_path_factory.mktemp("stopped"), images, cache=cache)
    with pytest.raises(KeyboardInterrupt):
        adapt(backbone, asked, interrupting(4))
    return asked.out


def test_another_tolerance_or_another_head_is_another_training(stopped, backbone, asked):
    shutil.copytree(stopped, asked.out)
    asked = replace(asked, resume=True)
    with pytest.raises(AdaptationError, match="with another fidelity; give the same command"):
        road.distil(backbone, asked, FidelityLoss.asked(None, "cosine", 0.3), QUIET)
    headed = backbone.with_probe(torch.nn.Linear(16, 3), ("a", "b", "c"))
    with pytest.raises(AdaptationError, match="with another objective, fidelity, head; give"):
        adapt(headed, asked)


def test_a_damaged_or_missing_training_cannot_be_resumed(stopped, backbone, asked):
    with pytest.raises(AdaptationError, match="nothing to resume in .*; leave --resume out"):
        adapt(backbone, replace(asked, resume=True))
    shutil.copytree(stopped, asked.out)
    file = asked.out / UNFINISHED
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(AdaptationError, match="is not readable .*; remove it and begin") as caught:
        adapt(backbone, replace(asked, resume=True))
    assert "\n" not in str(caught.value)


def test_a_disk_that_is_full_costs_no_training(backbone, asked, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(result, "save_file", short_of_room(result.save_file))
        with pytest.raises(AdaptationError, match=r"cannot be written .* with --resume") as caught:
            adapt(backbone, asked)
    assert "\n" not in str(caught.value) and files(asked.out) == {UNFINISHED}
    # Where the training cannot be kept, either, it goes on, and says so.
    other, bars = replace(asked, out=asked.out.with_name("other")), adapting.Watching()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", short_of_room(torch.save))
        found = adapt(backbone, other, bars)
    assert found.adapted is not None and files(other.out) == {NAME, WEIGHTS}
    assert any("the state so far cannot be kept" in line for line in bars.lines)
    with monkeypatch.context() as patch:  # nothing is left to train
        patch.setattr(training.Run, "take_step", raising(AssertionError()))
        again = adapt(backbone, replace(asked, resume=True))
    assert again.adapted.file.read_bytes() == found.adapted.file.read_bytes()


def short_of_room(write):
    """The same function where a file cannot grow, as on a disk that is full."""

    def written(*arguments):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
        try:
            return write(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return written


def raising(error: BaseException):
    def refuse(*arguments, **more):
        raise error

    return refuse
