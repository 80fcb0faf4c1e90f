"""By which recipes a model can be exported is said before anything is exported."""

import numpy as np
import pytest
import torch

from bundle.recipe import Recipe
from export.errors import UsageError
from export.pretrained import SUPPORTED, pretrained
from tests.unit.export_tiny import PX, WIDTH, run_export, save_tiny

WITH_HEAD = [name for name in SUPPORTED if "Classification" in name]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"), "ViTForImageClassification")


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
    assert linear == (class_name in ("ViTForImageClassification", "DeiTForImageClassification"))


@pytest.mark.parametrize("text", ["px=6", "px=20", "depth=0", "px=4,tome=1"])
def test_what_a_backbone_refuses_the_export_refuses_before_it_writes_a_graph(
    folder, tmp_path, text
):
    with pytest.raises(UsageError) as problem:
        pretrained(str(folder)).check(Recipe.parse(text), PX)
    result = run_export("rungs", "--model", folder, "--low", text, "--out", tmp_path / "out")
    assert result.exit_code == 2 and result.stderr.splitlines()[-1] == f"error: {problem.value}"
    assert "export px" not in result.stderr


def test_static_int8_without_images_is_refused_before_the_model_is_loaded(folder, tmp_path):
    result = run_export("rungs", "--model", folder, "--beside", "int8=static", "--out", tmp_path)
    assert result.exit_code == 2 and "give --fit-images DIR" in result.stderr
    assert "load" not in result.stderr


def test_depth_and_tokens_are_checked_at_the_recipes_own_resolution(folder):
    backbone = pretrained(str(folder))
    backbone.check(Recipe(depth=1, tome=1), PX)
    with pytest.raises(UsageError, match="tome=1 has one patch at 4 px"):
        backbone.check(Recipe(tome=1), 4)
