"""Tiny models that run `apt`, pictures with areas of two colours, and the equations' answers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from bundle.recipe import Recipe
from export.backbones import Backbone
from export.families import blocks, family_of, tower
from export.pretrained import pretrained
from export.recipes.patch_sizes import PatchSizesVit
from tests.unit.export_tiny import save_tiny
from tests.unit.patch_sizes_reference import choose, embed

PX, PATCH = 32, 4
TWO, THREE = "apt=4", "apt=4/2.5"
# Class, its patch in pixels, recipe, whether coarse cells have detail of their own.
MODELS = {
    "ViT": ("ViTForImageClassification", PATCH, THREE, False),
    "DeiT": ("DeiTModel", PATCH, TWO, False),
    "DeiT, one head": ("DeiTForImageClassification", PATCH, THREE, True),
    "DeiT, two heads": ("DeiTForImageClassificationWithTeacher", PATCH, TWO, True),
    "DINOv2": ("Dinov2ForImageClassification", 14, TWO, False),
    "DINOv2 with registers": ("Dinov2WithRegistersForImageClassification", PATCH, THREE, True),
    "CLIP": ("CLIPForImageClassification", PATCH, THREE, False),
    "CLIP, projected": ("CLIPVisionModelWithProjection", PATCH, TWO, True),
    "MSN": ("ViTMSNForImageClassification", PATCH, THREE, False),
    "MAE": ("ViTMAEModel", PATCH, TWO, True),
}
_MADE: dict[str, Backbone] = {}


def backbone_of(name: str, folder: Path) -> Backbone:
    """A tiny model of 64 patches, or 16 of 14 px; read once."""
    if name not in _MADE:
        class_name, patch, _, has_detail = MODELS[name]
        saved = save_tiny(folder / class_name, class_name, image_size=px_of(name), patch_size=patch)
        _MADE[name] = pretrained(str(saved))
        if has_detail:
            _MADE[name] = replace(_MADE[name], detail=detail(_MADE[name].layer_dim))
    return _MADE[name]


def detail(width: int) -> dict[str, torch.Tensor]:
    """Random weights under the public names."""
    generator = torch.Generator().manual_seed(1)
    shapes = {"patch_attn.weight": (width, width, 2, 2), "patch_attn.bias": (width,)}
    shapes |= {"zero_conv.weight": (width, width), "zero_conv.bias": (width,)}
    return {key: 0.2 * torch.randn(shape, generator=generator) for key, shape in shapes.items()}


def px_of(name: str) -> int:
    return 56 if MODELS[name][1] == 14 else PX


def rung_of(name: str, backbone: Backbone, apt: str = "") -> PatchSizesVit:
    module = backbone.rung(Recipe.parse(apt or MODELS[name][2]).at(px_of(name)))
    assert isinstance(module, PatchSizesVit)
    return module.eval()


def pictures(count: int, px: int) -> np.ndarray:
    """Noise with some quarters, and quarters of those, in two colours: UINT8 (count, 3, px, px)."""
    rng = np.random.default_rng(4)
    levels = rng.integers(0, 256, (count, 3, px, px), dtype=np.uint8)
    for number, image in enumerate(levels):
        for parts in (4, 2):
            side = px // parts
            for row, column in np.argwhere(rng.random((parts, parts)) < number / (count - 1)):
                cell = image[:, row * side : (row + 1) * side, column * side : (column + 1) * side]
                cell[:] = rng.integers(0, 176, (3, 1, 1)) + 80 * rng.integers(0, 2, (side, side))
    return levels


def normalised(levels: np.ndarray, backbone: Backbone) -> torch.Tensor:
    transform = backbone.preprocessing(levels.shape[-1])
    mean, std = (np.reshape(v, (3, 1, 1)) for v in (transform.mean, transform.std))
    return torch.from_numpy(((levels / 255 - mean) / std).astype(np.float32))


@torch.inference_mode()
def by_the_equations(name: str, backbone: Backbone, levels: np.ndarray) -> dict[str, np.ndarray]:
    """One image: tokens by NumPy, then the library's own blocks, norm and head."""
    model, patch = backbone.model, backbone.patch_size
    base, image = tower(model), normalised(levels, backbone)
    embeddings = base.embeddings
    if hasattr(embeddings, "patch_embedding"):  # CLIP's
        project, table = embeddings.patch_embedding, embeddings.position_embedding.weight[None]
    else:
        project, table = embeddings.patch_embeddings.projection, embeddings.position_embeddings
    side = levels.shape[-1] // patch
    grid = table[0, -(side**2) :].unflatten(0, (side, side))
    bias = torch.zeros(1) if project.bias is None else project.bias
    weights = {"patches": project.weight, "bias": bias, "grid": grid, **(backbone.detail or {})}
    take = choose(levels, patch, Recipe.parse(MODELS[name][2]).apt)
    arrays = {key: value.double().numpy() for key, value in weights.items()}
    patches = torch.from_numpy(embed(image.double().numpy(), take, arrays)).float()[None]
    hidden = embeddings(image[None])
    special = hidden.shape[1] - side**2
    tokens = torch.cat([hidden[:, :special], patches], dim=1)
    if hasattr(base, "pre_layrnorm"):
        tokens = base.pre_layrnorm(tokens)
    layers = [tokens[0, 0]]
    for block in blocks(model):
        found = block(tokens, attention_mask=None) if "CLIP" in name else block(tokens)
        tokens = found[0] if isinstance(found, tuple) else found
        layers.append(tokens[0, 0])
    normed = getattr(base, family_of(model).norm)(tokens)[0]
    sizes = torch.cat([torch.full((int(t.sum()), 1), 4.0**i) for i, t in enumerate(take)])
    cls, embedding = normed[0], normed[0]
    if hasattr(model, "visual_projection"):
        embedding = model.visual_projection(cls)
    answers = {"embedding": embedding, "cls_layers": torch.stack(layers)}
    if name.startswith("DeiT, two"):
        heads = model.cls_classifier(cls) + model.distillation_classifier(normed[1])
        answers["logits"] = heads / 2
    elif name.startswith("DINOv2"):
        mean = (normed[special:] * sizes).sum(dim=0) / side**2
        answers["logits"] = model.classifier(torch.cat([cls, mean]))
    elif name == "CLIP":
        answers["logits"] = model.classifier((tokens[0, special:] * sizes).sum(dim=0) / side**2)
    elif backbone.has_own_head:
        answers["logits"] = model.classifier(cls)
    kept = sum(int(chosen.sum()) for chosen in take)
    patches_of = np.ones((side, side), dtype=np.int32)
    for scale in range(1, len(take)):
        patches_of[take[scale].repeat(2**scale, 0).repeat(2**scale, 1)] = 2**scale
    found = {key: value.numpy() for key, value in answers.items()}
    return {**found, "tokens": np.array([special + kept]), "patches": patches_of.ravel()}
