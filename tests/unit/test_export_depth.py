"""`depth=K` is the library's own hidden states, cut off after K blocks."""

from __future__ import annotations

import pytest
import torch

from bundle.recipe import Recipe
from export.backbones import RungModule
from export.errors import UsageError
from export.families import blocks
from export.parity import sample_images
from export.pretrained import pretrained
from export.recipes.smaller import downsample, first_blocks
from tests.unit.export_tiny import LAYERS, PX, WIDTH, save_tiny

CLASSES = (
    "ViTModel",
    "ViTForImageClassification",
    "DeiTForImageClassification",
    "DeiTForImageClassificationWithTeacher",
    "Dinov2Model",
    "Dinov2ForImageClassification",
)
IMAGES = torch.from_numpy(sample_images(3, PX, seed=6))
DEPTH = 1  # of the two blocks that the tiny models have


@pytest.fixture(scope="module", params=CLASSES)
def backbone(request, tmp_path_factory):
    return pretrained(str(save_tiny(tmp_path_factory.mktemp("tiny"), request.param)))


@torch.inference_mode()
def test_a_shallow_model_ends_where_the_library_is_after_so_many_blocks(backbone):
    options = (
        {} if backbone.model.config.model_type == "dinov2" else {"interpolate_pos_encoding": True}
    )
    base = backbone.model.base_model
    hidden = base(downsample(IMAGES, 8), output_hidden_states=True, **options).hidden_states
    embedding, cls_layers, *_ = backbone.rung(Recipe(8, DEPTH))(IMAGES)
    assert len(hidden) == LAYERS + 1 and cls_layers.shape == (3, DEPTH + 1, WIDTH)
    for layer in range(DEPTH + 1):
        torch.testing.assert_close(cls_layers[:, layer], hidden[layer][:, 0], rtol=1e-5, atol=1e-5)
    # The final normalisation is the full model's.
    expected = base.layernorm(hidden[DEPTH])[:, 0]
    torch.testing.assert_close(embedding, expected, rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_the_head_is_the_full_models_on_what_there_is_after_so_many_blocks(backbone):
    if backbone.classes is None:
        assert len(backbone.rung(Recipe(PX, DEPTH))(IMAGES)) == 2
        return
    model = backbone.model
    tokens = model.base_model(IMAGES, output_hidden_states=True).hidden_states[DEPTH]
    tokens = model.base_model.layernorm(tokens)
    if hasattr(model, "distillation_classifier"):
        logits = model.cls_classifier(tokens[:, 0]) + model.distillation_classifier(tokens[:, 1])
        logits = logits / 2
    elif model.config.model_type == "dinov2":
        logits = model.classifier(torch.cat([tokens[:, 0], tokens[:, 1:].mean(dim=1)], dim=1))
    else:
        logits = model.classifier(tokens[:, 0])
    found = backbone.rung(Recipe(PX, DEPTH))(IMAGES)[2]
    torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_the_given_model_keeps_all_its_blocks(backbone):
    before = RungModule(backbone.model, PX, None)(IMAGES)
    shallow = first_blocks(backbone.model, DEPTH)
    assert len(blocks(shallow)) == DEPTH and shallow.config.num_hidden_layers == DEPTH
    assert len(blocks(backbone.model)) == backbone.layers == LAYERS
    for answer, again in zip(before, RungModule(backbone.model, PX, None)(IMAGES), strict=True):
        assert torch.equal(answer, again)


@pytest.mark.parametrize("depth", [-1, 0, LAYERS, LAYERS + 1])
def test_a_depth_that_is_none_or_all_is_refused(backbone, depth):
    with pytest.raises(UsageError, match=f"depth={depth} must be between 1 and 1; the model has 2"):
        backbone.check(Recipe(depth=depth), PX)
