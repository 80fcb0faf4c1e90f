"""`export describe` says, before anything is exported, by which recipes a model can be."""

import json

import numpy as np
import pytest
import torch

from bundle.recipe import Recipe
from export.errors import UsageError
from export.pretrained import SUPPORTED, pretrained
from export.rungs import describe
from tests.unit.export_tiny import LAYERS, PX, WIDTH, run_export, save_tiny

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


def test_recipes_are_held_against_the_model_and_written_canonically(folder):
    result = run_export(
        *("describe", "--model", folder, "--recipe", "int8=static,px=08,align"),
        *("--recipe", f"px={PX}", "--recipe", f"depth={LAYERS}", "--recipe", "speed"),
    )
    assert result.exit_code == 0, result.stderr
    content = json.loads(result.stdout)
    assert content["aligns"] and content["layers"] == LAYERS
    good, full, deep, unknown = content["recipes"]
    assert (good["recipe"], good["problem"]) == ("px=8,int8=static,align", None)
    assert good["asked"] == "int8=static,px=08,align"
    assert (full["recipe"], full["problem"]) == ("fp32", None)
    assert "depth=2 must be between 1 and 1; the model has 2 blocks" in deep["problem"]
    assert unknown["recipe"] is None and "'speed' is unknown" in unknown["problem"]


def test_the_resolution_and_the_head_that_recipes_are_held_against_can_be_given(tmp_path):
    model = save_tiny(tmp_path, "Dinov2ForImageClassification")
    own = json.loads(run_export("describe", "--model", model, "--recipe", "align").stdout)
    assert "does not reach this model's head" in own["recipes"][0]["problem"]
    options = ("--head", "linear", "--px", 8, "--recipe", "px=4,align", "--recipe", "px=12")
    fitted = json.loads(run_export("describe", "--model", model, *options).stdout)
    near, far = fitted["recipes"]
    assert near["problem"] is None
    assert "px=12 looks at more than the full rung's 8 px" in far["problem"]


@pytest.mark.parametrize("text", ["px=6", "px=20", "depth=0", "px=4,tome=1"])
def test_what_is_refused_here_is_refused_by_the_export_before_it_writes_a_graph(
    folder, tmp_path, text
):
    problem = describe(pretrained(str(folder)), [text])["recipes"][0]["problem"]
    result = run_export("rungs", "--model", folder, "--low", text, "--out", tmp_path / "out")
    assert result.exit_code == 2 and result.stderr.splitlines()[-1] == f"error: {problem}"
    assert "export vit_low" not in result.stderr


def test_static_int8_without_images_is_refused_before_the_model_is_loaded(folder, tmp_path):
    result = run_export("rungs", "--model", folder, "--beside", "int8=static", "--out", tmp_path)
    assert result.exit_code == 2 and "give --fit-images DIR" in result.stderr
    assert "load" not in result.stderr


def test_depth_and_tokens_are_checked_at_the_recipes_own_resolution(folder):
    backbone = pretrained(str(folder))
    backbone.check(Recipe(depth=1, tome=1), PX)
    with pytest.raises(UsageError, match="tome=1 has one patch at 4 px"):
        backbone.check(Recipe(tome=1), 4)
