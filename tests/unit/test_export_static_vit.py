"""`static-vit` has weights by its seed, and answers that depend on the image and the resolution."""

from __future__ import annotations

import torch

from bundle.recipe import Recipe
from export.parity import sample_images
from export.static_vit import static_vit


def test_the_seed_decides_the_weights_and_the_resolution_the_table_alone():
    backbone = static_vit(seed=0)
    assert (backbone.default_px, backbone.labels) == ((32, 64), None)
    shapes = {"embedding": (192,), "cls_layers": (13, 192), "logits": (200,)}
    assert backbone.output_shapes() == shapes
    weights, other = backbone.model.state_dict(), static_vit(seed=1).model.state_dict()
    assert all(torch.equal(weights[k], v) for k, v in static_vit(0).model.state_dict().items())
    assert not torch.equal(weights["classifier.weight"], other["classifier.weight"])
    low, high = (backbone.rung(Recipe(px)).state_dict() for px in (32, 64))
    assert low.keys() == high.keys()
    different = [name for name in low if not torch.equal(low[name], high[name])]
    assert different == ["model.vit.embeddings.position_embeddings"]
    assert low[different[0]].shape == (1, 1 + 8 * 8, 192)
    assert high[different[0]].shape == (1, 1 + 16 * 16, 192)


@torch.inference_mode()
def test_outputs_vary_by_image_and_by_resolution():
    backbone, images = static_vit(seed=0), torch.from_numpy(sample_images(8, 64, seed=5))
    low, high = (backbone.reference(images, px) for px in (32, 64))
    for px, truth in ((32, low), (64, high)):  # a baked table is the library's interpolation
        for answer, expected in zip(backbone.rung(Recipe(px))(images), truth.values(), strict=True):
            torch.testing.assert_close(answer, expected, rtol=1e-5, atol=1e-5)
    low, high = low["embedding"], high["embedding"]
    assert high.std(dim=0).norm() / high.norm(dim=1).mean() > 0.2
    distance = (high - low).norm(dim=1)
    assert distance.std() > 0.05 * distance.mean()
    assert 0.5 < torch.nn.functional.cosine_similarity(high, low).mean() < 0.97
