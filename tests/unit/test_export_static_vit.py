from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from bundle.recipe import Recipe
from export.backbones import Backbone
from export.errors import UsageError
from export.parity import sample_images
from export.static_vit import static_vit


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return static_vit(seed=0)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.from_numpy(sample_images(8, 64, seed=5))


def test_shapes_of_tiny_imagenet(backbone):
    assert backbone.default_px == (32, 64)
    assert backbone.output_shapes() == {
        "embedding": (192,),
        "cls_layers": (13, 192),
        "logits": (200,),
    }
    assert backbone.labels is None


@pytest.mark.parametrize("px", [32, 64])
def test_a_rung_with_its_baked_table_equals_the_interpolating_model(backbone, images, px):
    with torch.inference_mode():
        answers = backbone.rung(Recipe(px))(images)
    reference = backbone.reference(images, px)
    for answer, truth in zip(answers, reference.values(), strict=True):
        torch.testing.assert_close(answer, truth, rtol=1e-5, atol=1e-5)


def test_both_sizes_have_the_same_weights_but_for_the_table(backbone):
    low, high = (backbone.rung(Recipe(px)).state_dict() for px in (32, 64))
    assert low.keys() == high.keys()
    different = [name for name in low if not torch.equal(low[name], high[name])]
    assert different == ["model.vit.embeddings.position_embeddings"]
    assert low[different[0]].shape == (1, 1 + 8 * 8, 192)
    assert high[different[0]].shape == (1, 1 + 16 * 16, 192)


def test_outputs_vary_by_image_and_by_resolution(backbone, images):
    high = backbone.reference(images, 64)["embedding"]
    low = backbone.reference(images, 32)["embedding"]
    spread = high.std(dim=0).norm() / high.norm(dim=1).mean()
    assert spread > 0.2
    distance = (high - low).norm(dim=1)
    assert distance.std() > 0.05 * distance.mean()
    cosine = torch.nn.functional.cosine_similarity(high, low)
    assert 0.5 < cosine.mean() < 0.97


def test_the_seed_decides_the_weights(backbone):
    same, other = static_vit(seed=0).model.state_dict(), static_vit(seed=1).model.state_dict()
    weights = backbone.model.state_dict()
    assert all(torch.equal(weights[name], same[name]) for name in weights)
    assert not torch.equal(weights["classifier.weight"], other["classifier.weight"])


@pytest.mark.parametrize(
    ("suffix", "wrapped"), [(".safetensors", False), (".pt", False), (".pt", True)]
)
def test_a_checkpoint_comes_back(suffix, wrapped, tmp_path):
    state = static_vit(seed=7).model.state_dict()
    file = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(state, file)
    else:
        torch.save({"state_dict": state, "epoch": 3} if wrapped else state, file)
    loaded = static_vit(checkpoint=file)
    assert all(torch.equal(state[name], value) for name, value in loaded.model.state_dict().items())
    assert loaded.source["kind"] == "checkpoint"
    assert loaded.source["file"] == file.name
    assert len(loaded.source["sha256"]) == 64


def missing(state):
    del state["classifier.bias"]


def surplus(state):
    state["another.weight"] = torch.zeros(2)


def reshaped(state):
    state["classifier.bias"] = torch.zeros(10)


@pytest.mark.parametrize("change", [missing, surplus, reshaped])
def test_a_checkpoint_that_does_not_fit(change, tmp_path):
    state = static_vit().model.state_dict()
    change(state)
    file = tmp_path / "weights.safetensors"
    save_file(state, file)
    with pytest.raises(UsageError, match="weights.safetensors does not fit static-vit") as caught:
        static_vit(checkpoint=file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["notes.txt", "weights.safetensors"])
def test_a_file_that_is_no_checkpoint(name, tmp_path):
    file = tmp_path / name
    file.write_text("hello")
    with pytest.raises(UsageError, match="neither safetensors"):
        static_vit(checkpoint=file)


def test_a_torch_file_that_is_no_state_dict(tmp_path):
    file = tmp_path / "list.pt"
    torch.save([1, 2, 3], file)
    with pytest.raises(UsageError, match="holds no state dict"):
        static_vit(checkpoint=file)
