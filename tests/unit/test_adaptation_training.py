"""Steps, looks, and what a student is worth: a known teacher is recovered in seconds."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from adaptation import distil as road
from adaptation import training
from adaptation.objective import Objective
from adaptation.request import AdaptationError, judged_by
from adaptation.result import written
from adaptation.resuming import UNFINISHED
from adaptation.training import Held, Run, Settings, fitting, schedule
from bundle.adapted import Adapted
from bundle.fidelity import FidelityError, FidelityLoss
from bundle.recipe import Recipe
from export.families import blocks
from export.pretrained import load_backbone, pretrained
from export.request import Texts
from tests.unit.adapting import Watching, adapt, lesson, request, write_pictures
from tests.unit.export_tiny import PX, save_tiny, save_tokenizer

MODELS = ("ViTForImageClassification", "Dinov2Model", "Dinov2ForImageClassification")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {name: pretrained(str(save_tiny(folder / name, name))) for name in MODELS}


def taught(backbone, folder, images, **fields):
    return lesson(backbone, request(folder, images, cache=folder / "cache", **fields))


def test_a_known_teacher_is_recovered(models, images, tmp_path):
    """The student is the teacher with disturbed weights: nothing keeps it from being as good."""
    backbone = models["Dinov2Model"]
    learned = taught(backbone, tmp_path, images)
    student = backbone.trainable(Recipe(PX))
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in student.tower.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    run = Run(student, learned, Settings(5e-3), 80)
    before = run.look().held_out
    while not run.is_done:
        run.take_step()
        if run.step % 20 == 0:
            run.look()
    after = run.best_point.held_out
    assert after.distance < before.distance / 4, (before, after)
    assert after.beats(before) and after.cosine > before.cosine


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("recipe", ["px=8", "depth=1", "px=8,tome=2"])
def test_every_recipe_and_head_learns(name, recipe, models, images, tmp_path):
    learned = taught(models[name], tmp_path, images)
    student = models[name].trainable(Recipe.parse(recipe).at(PX))
    before = {key: value.clone() for key, value in student.weights().items()}
    run = Run(student, learned, Settings(2e-3), 20)
    first = run.look().held_out
    for _ in range(20):
        run.take_step()
    assert run.look().held_out.distance < 0.9 * first.distance
    changed = {key for key, value in student.weights().items() if not value.equal(before[key])}
    assert any("alignment" in key for key in changed) == models[name].aligns
    assert any("embeddings" in key for key in changed)
    assert any(key.startswith("tower.layernorm") for key in changed)


FAMILIES = (
    *("ViTModel", "DeiTForImageClassificationWithTeacher", "DINOv3ViTModel", "ViTMAEModel"),
    *("Dinov2WithRegistersModel", "BeitForImageClassification", "Data2VecVisionModel"),
    *("ViTMSNModel", "CLIPVisionModelWithProjection", "SiglipForImageClassification"),
)
# Angles of patches, which are no weights, and what stands for a patch that is masked.
UNTRAINED = ("rope_embeddings.cos", "rope_embeddings.sin", "index", "mask_token")


@pytest.mark.parametrize("name", FAMILIES)
def test_all_weights_of_every_family_learn_and_are_written(name, images, tmp_path):
    backbone = pretrained(str(save_tiny(tmp_path / name, name)))
    learned = taught(backbone, tmp_path, images)
    student = backbone.trainable(Recipe(8))
    before = {key: value.clone() for key, value in student.weights().items()}
    run = Run(student, learned, Settings(5e-3, 0.8), 12)
    first = run.look().held_out
    for _ in range(12):
        run.take_step()
    assert run.look().held_out.distance < first.distance
    same = [key for key, value in student.weights().items() if value.equal(before[key])]
    assert all(key.endswith(UNTRAINED) for key in same), same
    state = Adapted(tmp_path, Recipe(8), backbone.weights_sha256, PX, "", "")
    saved = replace(backbone, adapted={"a": written(state, student.weights(), False)})
    image = learned.at(0).image
    with torch.inference_mode():
        answers = saved.rung(Recipe(8, adapted="a"))(image)
        for one, other in zip(answers, student(image), strict=True):
            assert torch.equal(one, other)


def test_the_head_and_the_model_itself_are_never_trained(models, images, tmp_path):
    backbone = models["ViTForImageClassification"]
    before = copy.deepcopy(backbone.model.state_dict())
    adapt(backbone, request(tmp_path, images))
    after = backbone.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_tasks_of_labels_and_of_a_value_and_texts(models, images, tmp_path):
    folder = save_tokenizer(save_tiny(tmp_path / "clip", "CLIPModel"))
    one = pretrained(str(save_tiny(tmp_path / "one", "ViTForImageClassification", num_labels=1)))
    kinds = {
        "labels": models["ViTForImageClassification"].answering("labels"),
        "value": one,
        "classes": load_backbone(str(folder), Texts(("cat", "dog", "emu"))),
    }
    for task, backbone in kinds.items():
        assert backbone.task == task
        found = adapt(backbone, request(tmp_path, images, out=tmp_path / task))
        assert found.best.distance < found.plain.distance, task
        assert 0 <= found.best.acceptable <= 1


def test_what_is_acceptable_of_a_value_is_said_by_embeddings_unless_asked():
    assert judged_by("value", None, None).kind == "cosine"
    assert judged_by("value", "value", 0.5).tolerance == 0.5
    assert judged_by(None, None, None).kind == "cosine"
    assert (judged_by("classes", None, None).kind, judged_by("labels", None, None).kind) == (
        "top1",
        "labels",
    )
    with pytest.raises(FidelityError):
        judged_by(None, "top1", None)


@pytest.mark.parametrize("task", ["classes", "labels", "value", None])
def test_the_objective_is_least_where_the_answers_are_the_teachers(task, models, images, tmp_path):
    name = "Dinov2Model" if task is None else "ViTForImageClassification"
    backbone = replace(models[name], own_task=task) if task else models[name]
    truth = taught(backbone, tmp_path, images).at(0)
    answers = [truth.embedding, truth.cls_layers, truth.logits][: 2 + (task is not None)]
    for layers in (0.0, 0.5):
        objective = Objective(task, layers=layers)
        best = objective(answers, truth)
        for index in range(len(answers)):
            moved = list(answers)
            moved[index] = moved[index] + 0.3 * torch.randn(
                moved[index].shape, generator=torch.Generator().manual_seed(0)
            )
            distance = objective(moved, truth)
            assert distance > best if index != 1 or layers else distance == best


def test_a_look_says_what_routing_would_say(models, images, tmp_path):
    backbone = models["ViTForImageClassification"]
    learned = taught(backbone, tmp_path, images)
    same = learned.judge(backbone.trainable(Recipe(PX)))
    assert same.acceptable == 1 and same.cosine == pytest.approx(1, abs=1e-5)
    strict = replace(learned, fidelity=FidelityLoss("cosine", 1e-4))
    assert strict.judge(backbone.trainable(Recipe(8))).acceptable == 0


def test_more_acceptable_answers_win_and_then_nearer_ones():
    held = Held(0.5, 0.8, 0.9)
    assert Held(0.9, 0.9, 0.5).beats(held) and Held(0.4, 0.8, 0.9).beats(held)
    assert not held.beats(held) and not Held(0.1, 0.7, 0.99).beats(held)


def test_a_step_follows_from_its_number_alone(models, images, tmp_path):
    learned = taught(models["Dinov2Model"], tmp_path, images)
    epoch = learned.steps_per_epoch
    assert all(torch.equal(learned.at(7).image, learned.at(7).image) for _ in range(2))
    first, second = ([learned.at(e * epoch + s) for s in range(epoch)] for e in (0, 1))
    shown = [torch.cat([batch.embedding for batch in batches]) for batches in (first, second)]
    assert not torch.equal(*shown)
    assert all(len(batch.image) == learned.batch for batch in (*first, *second))
    other = replace(learned, seed=1)
    assert not torch.equal(learned.at(0).image, other.at(0).image)


def test_each_epoch_shows_another_view_of_each_image(models, images, tmp_path):
    learned = replace(taught(models["Dinov2Model"], tmp_path, images), batch=1)
    seen = [set(), set()]
    asked = []
    batch = learned.teacher.batch
    learned.teacher.batch = lambda views: asked.append(views) or batch(views)
    for epoch in range(2):
        asked.clear()
        for place in range(len(learned.learned)):
            learned.at(epoch * learned.steps_per_epoch + place)
        seen[epoch] = {view for views in asked for view in views}
        assert {view.image for view in seen[epoch]} == set(learned.learned)
    assert seen[0].isdisjoint(seen[1])
    assert not set(learned.learned) & set(learned.held_out)


def test_the_rate_rises_and_falls_and_shrinks_from_block_to_block(models):
    rates = [schedule(step, 100) for step in range(100)]
    assert rates[9] == max(rates) == 1 and 0 < rates[0] <= 0.1 and 0 <= rates[-1] < 0.01
    assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)
    student = models["Dinov2Model"].trainable(Recipe(8))
    groups = training._groups(student, Settings(1.0, 0.5))
    rate = {id(group["params"][0]): group["lr"] for group in groups}
    decayed = {id(g["params"][0]) for g in groups if g["weight_decay"]}
    layers = blocks(student.model)
    for depth, block in enumerate(layers):
        assert {rate[id(p)] for p in block.parameters()} == {0.5 ** (len(layers) - depth)}
    embeddings = student.tower.embeddings
    assert {rate[id(p)] for p in embeddings.parameters()} == {0.5 ** (len(layers) + 1)}
    assert {rate[id(p)] for p in student.alignment.parameters()} == {1.0}
    assert id(student.alignment.bias) not in decayed and id(student.alignment.weight) in decayed
    assert len(groups) == len(list(student.tower.parameters())) + 2


SHARED = {"use_relative_position_bias": False, "use_shared_relative_position_bias": True}
# What lies before the blocks, beside the embeddings.
BEFORE = [
    ("Dinov2Model", {}, []),
    ("CLIPVisionModel", {}, ["pre_layrnorm"]),
    ("BeitForImageClassification", SHARED, ["shared_position_bias"]),
    ("Data2VecVisionModel", SHARED, ["encoder.relative_position_bias"]),
]


@pytest.mark.parametrize(("name", "config", "before"), BEFORE)
def test_frozen_blocks_and_the_embeddings_before_them_keep_their_weights(
    name, config, before, tmp_path, images
):
    backbone = pretrained(str(save_tiny(tmp_path / "model", name, **config)))
    student = backbone.trainable(Recipe(8))
    layers = blocks(student.model)
    half = len(layers) // 2
    first = [student.tower.get_submodule(part) for part in ["embeddings", *before]]
    parts = [*first, *layers[:half]], layers[half:]
    kept, trained = ([p for part in some for p in part.parameters()] for some in parts)
    was = [[weight.detach().clone() for weight in some] for some in (kept, trained)]
    run = Run(student, taught(backbone, tmp_path, images), Settings(1e-3, frozen=0.5), 2)
    run.take_step()
    assert all(map(torch.equal, kept, was[0])) and all(list(p.parameters()) for p in first)
    assert not all(map(torch.equal, trained, was[1])) and trained
    assert all(weight.grad is None for weight in kept)


@pytest.mark.parametrize(
    ("name", "config"), [*((n, {}) for n in FAMILIES), *((n, c) for n, c, _ in BEFORE if c)]
)
def test_the_lowest_rate_is_of_all_that_runs_before_the_first_block(name, config, tmp_path):
    student = pretrained(str(save_tiny(tmp_path / name, name, **config))).trainable(Recipe(8))
    layers, ran = blocks(student.model), []
    for part in student.tower.modules():
        part.register_forward_pre_hook(lambda part, given: ran.append(part))
    student(torch.zeros(1, 3, PX, PX))
    early = [p for part in ran[: ran.index(layers[0])] for p in part.parameters(recurse=False)]
    groups = training._groups(student, Settings(1.0, 0.5))
    least = 0.5 ** (len(layers) + 1)
    assert {id(g["params"][0]) for g in groups if g["lr"] == least} == set(map(id, early)) != set()
    late = getattr(student.tower, student.rung.family.norm).parameters()
    assert {g["lr"] for weight in late for g in groups if g["params"][0] is weight} <= {1.0}


class SmallGpu:
    """A student's forward pass that takes so many views at most while it learns."""

    def __init__(self, most, monkeypatch, after=0):
        self.seen, self.most = [], most
        forward = training.AdaptedRung.forward

        def refuse(student, image):
            if torch.is_grad_enabled():
                self.seen.append(len(image))
                if len(image) > most and len(self.seen) > after:
                    raise torch.cuda.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
            return forward(student, image)

        monkeypatch.setattr(training.AdaptedRung, "forward", refuse)


@pytest.mark.parametrize("fields", [{}, {"epochs": None, "minutes": 5.0}])
@pytest.mark.parametrize(("most", "batch", "fits"), [(10, 32, 8), (16, 24, 12), (1, 32, 1)])
def test_a_gpu_without_room_is_told_which_batch_fits(
    most, batch, fits, fields, models, images, tmp_path, monkeypatch
):
    gpu = SmallGpu(most, monkeypatch)
    asked = request(tmp_path, images, batch=batch, **fields)
    with pytest.raises(AdaptationError) as caught:
        adapt(models["Dinov2Model"], asked)
    assert str(caught.value) == (
        f"the GPU has no room for steps with {batch} views, {fits} fit; give --batch {fits}"
    )
    assert caught.value.__context__ is None  # the tensors of the step that failed are gone
    assert gpu.seen == [batch // 2**n for n in range(len(gpu.seen))] and gpu.seen[-1] == fits
    assert not list(asked.out.iterdir())
    found = adapt(models["Dinov2Model"], replace(asked, batch=fits, epochs=1, minutes=None))
    assert found.about["batch"] == fits


def test_a_gpu_that_is_full_and_one_that_fills_later(models, images, tmp_path, monkeypatch):
    asked, backbone = request(tmp_path, images), models["Dinov2Model"]
    with monkeypatch.context() as patch:
        SmallGpu(0, patch)
        with pytest.raises(AdaptationError, match="no room for a step with one view; free"):
            adapt(backbone, asked)
        assert fitting(backbone.trainable(Recipe(8)), lesson(backbone, asked)) == 0
    with monkeypatch.context() as patch:
        SmallGpu(16, patch, after=4 + 7)  # of the trials, and of the training
        with pytest.raises(AdaptationError) as caught:
            adapt(backbone, asked)
    file = asked.out / UNFINISHED
    assert str(caught.value) == (
        "the GPU has no room for steps with 32 views, 16 fit; free memory and add --resume, or "
        f"remove {file} and give --batch 16"
    )
    resumed = adapt(backbone, replace(asked, resume=True))
    whole = adapt(backbone, replace(asked, out=tmp_path / "whole"))
    assert resumed.adapted.file.read_bytes() == whole.adapted.file.read_bytes()


def test_minutes_bound_the_training_and_too_few_say_how_many(models, images, tmp_path):
    asked, backbone = request(tmp_path, images, epochs=None), models["Dinov2Model"]
    with pytest.raises(AdaptationError, match=r"^1e-06 minutes are too few: a step .*--minutes 1 "):
        adapt(backbone, replace(asked, minutes=1e-6))
    assert not list(asked.out.iterdir())
    bars = Watching()
    found = adapt(backbone, replace(asked, minutes=0.05), bars)
    assert found.about["steps"]["of"] >= road.LOOKS and found.minutes < 1
    assert found.about["steps"]["taken"] > 0 and np.isfinite(found.best.distance)


@pytest.mark.parametrize("minutes", [2, 10])
def test_search_looks_and_steps_end_within_the_minutes(
    minutes, models, images, tmp_path, monkeypatch
):
    clock = SlowClock(monkeypatch, step_s=2.0, look_s=1.0)
    asked = request(tmp_path, images, epochs=None, minutes=minutes)
    found = adapt(models["Dinov2Model"], asked)
    assert found.about["steps"]["taken"] == found.about["steps"]["of"]
    assert 0.95 * minutes < found.minutes <= minutes
    assert clock.seconds >= 60 * found.minutes


class SlowClock:
    """A clock on which only steps and looks at the held-out images take time."""

    def __init__(self, monkeypatch, step_s, look_s):
        self.seconds = 0.0
        monkeypatch.setattr(road, "time", self)
        monkeypatch.setattr(training, "PATIENCE", 1000)
        self._slow(monkeypatch, training.Run, "take_step", step_s)
        self._slow(monkeypatch, training.Lesson, "judge", look_s)

    def _slow(self, monkeypatch, owner, name, seconds):
        quick = getattr(owner, name)

        def slow(*arguments):
            self.seconds += seconds
            return quick(*arguments)

        monkeypatch.setattr(owner, name, slow)

    def monotonic(self):
        return self.seconds


def held(acceptable, distance):
    return training.Held(distance, acceptable, 0.9)


@pytest.mark.parametrize(
    ("looks", "best"),
    [
        ([(0.80, 1.0), (0.86, 0.9), (0.70, 0.5)], 1),  # nearer, and worse than at the start
        ([(0.80, 1.0), (0.81, 0.9), (0.83, 0.8), (0.90, 0.85)], 2),
        ([(0.80, 1.0), (0.79, 0.2), (0.75, 0.1)], 0),
        ([(0.80, 1.0), (0.80, 0.9)], 1),
        ([(0.80, 1.0), (0.80, 1.1)], 0),
    ],
)
def test_the_best_look_is_the_nearest_that_beats_the_start(looks, best, models, images, tmp_path):
    backbone = models["Dinov2Model"]
    student = backbone.trainable(Recipe(8))
    run = Run(student, taught(backbone, tmp_path, images), Settings(1e-3), 100)
    run.curve = [training.Point(n, None, held(*look)) for n, look in enumerate(looks)]
    assert run.best_point.step == best and not run.is_done


def test_a_model_that_has_answered_in_inference_mode_can_learn(images, tmp_path):
    # BEiT's places of patches are remembered by the library, from whoever asked first.
    folder = save_tiny(tmp_path / "beit", "BeitModel")
    with torch.inference_mode():
        pretrained(str(folder)).reference(torch.zeros(1, 3, PX, PX), 8)
    backbone = pretrained(str(folder))
    run = Run(backbone.trainable(Recipe(8)), taught(backbone, tmp_path, images), Settings(1e-3), 2)
    run.take_step()
