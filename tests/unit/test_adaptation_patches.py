"""Patch tokens: which are read, how they are normalised and averaged, and what they add.

The truth is made by hand in NumPy, of the tokens that the library itself returns.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from adaptation.objective import Objective
from adaptation.patches import Patches, pooled
from adaptation.teacher import Batch, Teacher
from adaptation.training import Run, Settings
from bundle.recipe import Recipe
from export.families import blocks, tower
from export.pretrained import pretrained
from export.recipes.smaller import downsample
from tests.unit.adapting import lesson, one_thread, request, write_pictures
from tests.unit.export_tiny import PATCH, PX, WIDTH, save_tiny

# Leading tokens that are no patches, and what normalises the rest; None: nothing does.
BARE = "BeitForImageClassification"
MODELS = {
    "ViTForImageClassification": ({}, 1, "layernorm"),
    "Dinov2WithRegistersModel": ({}, 1 + 3, "layernorm"),
    "DINOv3ViTModel": ({}, 1 + 2, "norm"),
    "DeiTForImageClassificationWithTeacher": ({}, 2, "layernorm"),
    "SiglipForImageClassification": ({}, 0, "post_layernorm"),
    "CLIPVisionModelWithProjection": ({}, 1, "post_layernorm"),
    "BeitModel": ({"use_mean_pooling": False}, 1, "layernorm"),
    BARE: ({"use_mean_pooling": True}, 1, None),
    "Data2VecVisionModel": ({"use_mean_pooling": True}, 1, None),
}
GRID = PX // PATCH // 2  # what is kept of the full model's


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"), 60)


@pytest.fixture(scope="module", params=MODELS)
def taught(request, tmp_path_factory, images):
    """A backbone, and a lesson of it."""
    folder = tmp_path_factory.mktemp("models")
    return made(request.param, folder, images)


def made(name, folder, images):
    backbone = pretrained(str(save_tiny(folder / name, name, **MODELS[name][0])))
    return backbone, lesson(backbone, request(folder, images))


def by_hand(backbone, pixels):
    """The library's normalised patch tokens (B, S, S, W), S rows of the image first."""
    _, special, norm = MODELS[type(backbone.model).__name__]
    base = tower(backbone.model)
    with torch.inference_mode():
        output = base(pixels, output_hidden_states=True, **backbone.family.options)
    tokens = output.hidden_states[-1][:, special:].numpy().astype(np.float64)
    weight, bias, eps = 1.0, 0.0, 1e-5
    if norm is not None:
        layer = getattr(base, norm)
        weight, bias, eps = layer.weight.detach().numpy(), layer.bias.detach().numpy(), layer.eps
    centred = tokens - tokens.mean(axis=-1, keepdims=True)
    tokens = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + eps) * weight + bias
    side = pixels.shape[2] // PATCH
    assert tokens.shape[1:] == (side * side, WIDTH)
    return np.stack([tokens[:, row * side : (row + 1) * side] for row in range(side)], axis=1)


def averaged(grid, side):
    """Each place the mean of the patches that it covers, whole or in part."""
    fine = grid.shape[1]
    spans = [slice(n * fine // side, -(-(n + 1) * fine // side)) for n in range(side)]
    rows = [[grid[:, row, column].mean(axis=(1, 2)) for column in spans] for row in spans]
    return np.stack([np.stack(row, axis=1) for row in rows], axis=1)


def distance_by_hand(found, wanted):
    """1 - cosine and smooth L1, each the mean of all."""
    lengths = np.linalg.norm(found, axis=3) * np.linalg.norm(wanted, axis=3)
    apart = np.abs(found - wanted)
    smooth = np.where(apart < 1, 0.5 * apart**2, apart - 0.5)
    return (1 - (found * wanted).sum(axis=3) / lengths).mean() + smooth.mean()


def test_the_teachers_patches_are_the_librarys_normalised_and_averaged(taught):
    backbone, learned = taught
    batch = learned.at(learned.steps_per_epoch)  # images, and crops that may be flipped
    truth = averaged(by_hand(backbone, batch.image), GRID)
    assert batch.patches.shape == truth.shape == (learned.batch, GRID, GRID, WIDTH)
    np.testing.assert_allclose(batch.patches.numpy(), truth, rtol=3e-3, atol=3e-3)


@pytest.mark.parametrize("px", [PX, 12, 8, 4])
def test_a_students_patches_are_those_of_its_own_forward(taught, px):
    backbone, learned = taught
    student = backbone.trainable(Recipe(px))
    patches = Patches(student.model, px)
    assert patches.take(GRID) is None
    image = learned.at(0).image
    student(image)
    found = patches.take(GRID)
    truth = by_hand(backbone, downsample(image, px))
    side = min(GRID, px // PATCH)
    assert found.dtype == torch.float32 and found.requires_grad
    np.testing.assert_allclose(found.detach().numpy(), averaged(truth, side), rtol=1e-4, atol=1e-4)
    assert patches.take(GRID) is None  # they are taken once
    student(image)
    np.testing.assert_allclose(
        patches.take(px // PATCH).detach().numpy(), truth, rtol=1e-4, atol=1e-4
    )


def test_a_step_asks_for_tensors_on_one_device_alone(taught):
    # The device `meta`, which holds no numbers, computes with no other's tensors, as a GPU does.
    backbone, learned = taught
    truth = Batch(*(None if part is None else part.to("meta") for part in learned.at(0)))
    for text in ("px=8", "depth=1", *(["tome=2"] if backbone.family.unmergeable is None else [])):
        recipe = Recipe.parse(text).at(PX)
        student = backbone.trainable(recipe)
        patches = Patches(student.model, recipe.px)
        student.to("meta")
        answers = student(truth.image)
        distance = learned.objective(answers, truth, patches.take(GRID))
        distance.backward()
        assert {part.device.type for part in (*answers, distance)} == {"meta"}
        for part in student.modules():  # neither a weight nor a buffer: it would stay behind
            assert not any(isinstance(value, torch.Tensor) for value in vars(part).values())


def test_where_tokens_are_merged_there_are_no_patches(tmp_path, images):
    backbone, learned = made("ViTForImageClassification", tmp_path, images)
    student = backbone.trainable(Recipe(PX, tome=2))
    patches = Patches(student.model, PX)
    student(learned.at(0).image)
    assert patches.take(GRID) is None


@pytest.mark.parametrize("side", [4, 3, 2, 1])
def test_averages_keep_rows_and_columns_where_they_are(side):
    grid = np.random.default_rng(0).normal(size=(2, 4, 4, 3))
    found = pooled(torch.from_numpy(grid), side)
    np.testing.assert_allclose(found.numpy(), averaged(grid, side))
    assert torch.equal(pooled(found, 4), found)  # none is made up


@pytest.mark.parametrize("px", [8, 4])
@pytest.mark.parametrize("weight", [1.0, 0.25, 0.0])
def test_a_step_adds_the_distance_of_the_patches_alone(px, weight, tmp_path, images):
    backbone, learned = made("Dinov2WithRegistersModel", tmp_path, images)
    learned = replace(learned, objective=Objective(None, patches=weight))
    student, truth = backbone.trainable(Recipe(px)), learned.at(0)
    plain = Run(student, learned, Settings(0.0), 2).take_step()
    with_patches = Run(student, learned, Settings(0.0), 2, Patches(student.model, px)).take_step()
    side = min(GRID, px // PATCH)
    wanted = averaged(truth.patches.numpy(), side)
    found = averaged(by_hand(backbone, downsample(truth.image, px)), side)
    grown = weight * distance_by_hand(found, wanted)
    assert with_patches - plain == pytest.approx(grown, rel=1e-4, abs=1e-6)
    assert grown > 0.05 or not weight
    answers = [answer.detach() for answer in student(truth.image)]
    same = learned.objective(answers, truth, torch.from_numpy(wanted))
    assert float(same) == pytest.approx(plain, abs=1e-5)
    moved = wanted.copy()
    moved[:, 0, 0, 3] += 2.5
    grown = weight * distance_by_hand(moved, wanted)
    apart = learned.objective(answers, truth, torch.from_numpy(moved)) - same
    assert float(apart) == pytest.approx(grown, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", [name for name, fields in MODELS.items() if fields[2] is None])
def test_a_large_channel_does_not_outweigh_the_others_without_a_norm(name, tmp_path, images):
    backbone = pretrained(str(save_tiny(tmp_path / name, name, **MODELS[name][0])))
    last = [part for part in blocks(backbone.model)[-1].modules() if isinstance(part, nn.Linear)][
        -1
    ]
    with torch.no_grad():
        last.bias[5] += 1e4
    patches = lesson(backbone, request(tmp_path, images)).at(0).patches.abs()
    assert patches[..., 5].min() > 1 and patches.max() <= WIDTH**0.5


def test_a_file_with_patches_as_they_came_is_not_read_again(tmp_path):
    # Under a norm without weights a model is the same but for its patches, so that its file has
    # the name that files had before bare tokens were normalised.
    def file(model):
        return Teacher(replace(backbone, model=model), PX, tmp_path / "cache", 0, device).file

    backbone, device = pretrained(str(save_tiny(tmp_path / "model", BARE))), one_thread()
    normed = copy.deepcopy(backbone.model)
    normed.base_model.layernorm = nn.LayerNorm(WIDTH, elementwise_affine=False)
    assert file(normed) != file(backbone.model) == file(copy.deepcopy(backbone.model))
