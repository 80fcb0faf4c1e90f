"""Every family's rungs answer as the library does, at every resolution and by every recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnxruntime as ort
import pytest
import torch
import transformers
from PIL import Image
from sklearn.datasets import load_sample_image
from transformers.models.beit.image_processing_pil_beit import BeitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from bundle.head import LinearHead
from bundle.recipe import Recipe
from export import onnx_graph
from export.errors import UsageError
from export.families import FAMILIES, SUPPORTED
from export.parity import sample_images
from export.pretrained import pretrained
from export.processors import Processor
from export.recipes.smaller import downsample
from export.recipes.token_merging import MergingVit
from tests.unit.export_tiny import LAYERS, PROJECTION, PX, WIDTH, run_export, save_tiny

pytestmark = pytest.mark.usefixtures("remembered_exports")

LOW_PX = 8
IMAGES = torch.from_numpy(sample_images(5, PX, seed=3))
TOLD = {"interpolate_pos_encoding": True}


class Truth(NamedTuple):
    """How users of the library get a model's answers.

    Attributes:
        loads: the library's class.
        embedding: by which of its names.
        mean_layers: whether the mean of all tokens stands for the image, not the first.
        told: whether it must be told to interpolate positions.
        head: whether it has logits.
    """

    loads: str
    embedding: str
    mean_layers: bool = False
    told: bool = True
    head: bool = False


# What is served of a checkpoint of a class, each by the library's own names.
TRUTHS = {
    "Dinov2WithRegistersModel": Truth("Dinov2WithRegistersModel", "cls", told=False),
    "Dinov2WithRegistersForImageClassification": Truth(
        "Dinov2WithRegistersForImageClassification", "cls", told=False, head=True
    ),
    "DINOv3ViTModel": Truth("DINOv3ViTModel", "cls", told=False),
    "ViTMSNModel": Truth("ViTMSNModel", "cls"),
    "ViTMSNForImageClassification": Truth("ViTMSNForImageClassification", "cls", head=True),
    "ViTMAEForPreTraining": Truth("ViTMAEModel", "cls"),
    "BeitModel": Truth("BeitModel", "pooler_output", told=False),
    "BeitForImageClassification": Truth(
        "BeitForImageClassification", "pooler_output", told=False, head=True
    ),
    "Data2VecVisionForImageClassification": Truth(
        "Data2VecVisionForImageClassification", "pooler_output", told=False, head=True
    ),
    "CLIPVisionModel": Truth("CLIPVisionModel", "pooler_output"),
    "CLIPVisionModelWithProjection": Truth("CLIPVisionModelWithProjection", "image_embeds"),
    "CLIPModel": Truth("CLIPModel", "image_features"),
    "CLIPForImageClassification": Truth("CLIPForImageClassification", "pooler_output", head=True),
    "SiglipVisionModel": Truth("SiglipVisionModel", "pooler_output", mean_layers=True),
    "SiglipModel": Truth("SiglipModel", "image_features", mean_layers=True),
    "SiglipForImageClassification": Truth(
        "SiglipForImageClassification", "pooler_output", mean_layers=True, head=True
    ),
}


def library(folder: Path, class_name: str, **changes: object) -> torch.nn.Module:
    model = getattr(transformers, class_name).from_pretrained(folder, **changes)
    return model.eval()


@torch.no_grad()
def answers(model: torch.nn.Module, truth: Truth, pixels: torch.Tensor) -> dict[str, np.ndarray]:
    """What the library answers for pixels (B, 3, H, W)."""
    options = dict(TOLD) if truth.told else {}
    tower = getattr(model, "vision_model", model)
    if not hasattr(tower, "embeddings"):  # below a head
        tower = getattr(model, model.base_model_prefix)
    noise = {}
    if truth.loads == "ViTMAEModel":  # nothing masked, in order
        model.config.mask_ratio = 0.0
        patches = (pixels.shape[2] // model.config.patch_size) ** 2
        noise = {"noise": torch.arange(patches)[None].expand(len(pixels), -1).float()}
    base = tower(pixels, output_hidden_states=True, **options, **noise)
    embedding = {
        "cls": lambda: base.last_hidden_state[:, 0],
        "pooler_output": lambda: base.pooler_output,
        "image_embeds": lambda: model(pixels, **options).image_embeds,
        "image_features": lambda: model.get_image_features(pixels, **options).pooler_output,
    }[truth.embedding]()
    layers = [h.mean(dim=1) if truth.mean_layers else h[:, 0] for h in base.hidden_states]
    found = {"embedding": embedding.numpy(), "cls_layers": torch.stack(layers, dim=1).numpy()}
    if truth.head:
        found["logits"] = model(pixels, **options).logits.numpy()
    return found


def run_onnx(file: Path, images: torch.Tensor) -> dict[str, np.ndarray]:
    session = ort.InferenceSession(file, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, {"image": images.numpy()}), strict=True))


def assert_same(found: dict[str, np.ndarray], truth: dict[str, np.ndarray]) -> None:
    assert list(found) == list(truth)
    for name, values in truth.items():
        assert found[name].shape == values.shape, name
        np.testing.assert_allclose(found[name], values, rtol=1e-4, atol=1e-4, err_msg=name)


def rung(backbone, recipe: Recipe) -> dict[str, np.ndarray]:
    with torch.no_grad():
        found = backbone.rung(recipe)(IMAGES)
    names = backbone.output_shapes(recipe)
    return {name: value.numpy() for name, value in zip(names, found, strict=True)}


def test_a_family_that_is_supported_is_tested():
    old = ("ViT", "DeiT", "DINOv2")  # test_export_pretrained.py
    tested = {family.title for family in FAMILIES.values() if set(family.classes) & set(TRUTHS)}
    assert tested == {family.title for family in FAMILIES.values()} - set(old)


@pytest.mark.parametrize("class_name", TRUTHS)
def test_rungs_answer_as_the_library_does(class_name, tmp_path):
    folder = save_tiny(tmp_path, class_name)
    backbone, truth = pretrained(str(folder)), TRUTHS[class_name]
    model = library(folder, truth.loads)
    assert backbone.classes == (3 if truth.head else None)
    full = answers(model, truth, IMAGES)
    assert_same(rung(backbone, Recipe(PX)), full)
    assert full["cls_layers"].shape == (len(IMAGES), LAYERS + 1, WIDTH)
    assert (backbone.embedding_dim, backbone.layer_dim) == (full["embedding"].shape[1], WIDTH)
    low = answers(model, truth, downsample(IMAGES, LOW_PX))
    assert_same(rung(backbone, Recipe(LOW_PX)), low)
    # What an export is checked against.
    reference = backbone.reference(IMAGES, LOW_PX)
    assert_same({name: value.numpy() for name, value in reference.items()}, low)


EXPORTED = [name for name, truth in TRUTHS.items() if truth.head] + ["DINOv3ViTModel"]


@pytest.mark.parametrize("class_name", EXPORTED)
def test_onnx_answers_as_the_library_does_and_tells_what_its_head_reads(class_name, tmp_path):
    # The low rung has everything that the high one has, and Resize and interpolated positions.
    folder = save_tiny(tmp_path / "model", class_name)
    backbone, truth, file = pretrained(str(folder)), TRUTHS[class_name], tmp_path / "low.onnx"
    names = list(backbone.output_shapes())
    onnx_graph.export_onnx(backbone.rung(Recipe(LOW_PX)), PX, names, file, 20)
    low = answers(library(folder, truth.loads), truth, downsample(IMAGES, LOW_PX))
    assert_same(run_onnx(file, IMAGES), low)
    # An alignment reaches a head that is linear in the embedding, and no other.
    head = LinearHead.read(file)
    assert (head is not None) == (truth.head and backbone.aligns)
    if head is not None:
        np.testing.assert_allclose(head(low["embedding"]), low["logits"], rtol=1e-4, atol=1e-4)


ALONE = [name for name in TRUTHS if name not in ("CLIPModel", "SiglipModel")]


@pytest.mark.parametrize("class_name", ALONE)
def test_a_shallow_rung_is_the_librarys_model_of_so_many_blocks(class_name, tmp_path):
    folder = save_tiny(tmp_path, class_name)
    truth = TRUTHS[class_name]
    config = transformers.AutoConfig.from_pretrained(folder)
    getattr(config, "vision_config", config).num_hidden_layers = 1
    shallow = library(folder, truth.loads, config=config)
    found = rung(pretrained(str(folder)), Recipe(LOW_PX, 1))
    assert_same(found, answers(shallow, truth, downsample(IMAGES, LOW_PX)))


MERGING = [name for name in TRUTHS if not name.startswith(("DINOv3", "Beit", "Data2Vec", "Siglip"))]


@pytest.mark.parametrize("class_name", MERGING)
def test_the_merging_forward_is_the_librarys_where_nothing_merges(class_name, tmp_path):
    folder = save_tiny(tmp_path, class_name)
    backbone, truth = pretrained(str(folder)), TRUTHS[class_name]
    with torch.no_grad():
        found = MergingVit(backbone.model, PX, 0, None)(IMAGES)
    found = dict(zip(backbone.output_shapes(), (part.numpy() for part in found), strict=True))
    assert_same(found, answers(library(folder, truth.loads), truth, IMAGES))
    merged = rung(backbone, Recipe(PX, tome=3))
    cosines = (merged["embedding"] * found["embedding"]).sum(axis=1)
    cosines /= np.linalg.norm(merged["embedding"], axis=1)
    cosines /= np.linalg.norm(found["embedding"], axis=1)
    assert not np.allclose(merged["embedding"], found["embedding"]) and cosines.min() > 0.5


@pytest.mark.parametrize("class_name", sorted(set(TRUTHS) - set(MERGING)))
def test_tokens_that_cannot_merge_are_refused_before_anything_is_exported(class_name, tmp_path):
    folder = save_tiny(tmp_path / "model", class_name)
    out = tmp_path / "onnx"
    ran = run_export("rungs", "--model", folder, "--low", "px=8,tome=2", "--out", out)
    assert ran.code == 2 and not out.exists()
    (line,) = (line for line in ran.err.splitlines() if line.startswith("error"))
    assert "tome=2 is not for" in line and "leave tome out" in line


@pytest.mark.parametrize(
    "options",
    [
        {"use_relative_position_bias": False, "use_absolute_position_embeddings": True},
        {"use_relative_position_bias": False, "use_shared_relative_position_bias": True},
        {"use_mean_pooling": False},
    ],
    ids=lambda options: next(name for name, value in options.items() if value or len(options) == 1),
)
def test_beits_other_positions_and_pooling(options, tmp_path):
    folder = save_tiny(tmp_path, "BeitForImageClassification", **options)
    backbone, truth = pretrained(str(folder)), TRUTHS["BeitForImageClassification"]
    expected = answers(library(folder, truth.loads), truth, downsample(IMAGES, LOW_PX))
    assert_same(rung(backbone, Recipe(LOW_PX)), expected)


@torch.no_grad()
def test_a_beit_that_predicts_patches_serves_its_normalised_cls_token(tmp_path):
    folder = save_tiny(tmp_path, "BeitForMaskedImageModeling")
    model = library(folder, "BeitForMaskedImageModeling")
    expected = model.layernorm(model.beit(IMAGES).last_hidden_state)[:, 0].numpy()
    found = rung(pretrained(str(folder)), Recipe(PX))
    assert list(found) == ["embedding", "cls_layers"]
    np.testing.assert_allclose(found["embedding"], expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_siglip_without_pooling_serves_the_mean_of_its_tokens(tmp_path):
    folder = save_tiny(tmp_path, "SiglipVisionModel", vision_use_head=False)
    expected = library(folder, "SiglipVisionModel")(IMAGES).last_hidden_state.mean(dim=1)
    found = rung(pretrained(str(folder)), Recipe(PX))
    np.testing.assert_allclose(found["embedding"], expected, rtol=1e-4, atol=1e-4)


def test_a_whole_export_is_checked_and_recorded(tmp_path):
    folder, out = save_tiny(tmp_path / "model", "CLIPModel"), tmp_path / "onnx"
    ran = run_export("rungs", "--model", folder, "--low", "px=8", "--out", out)
    assert ran.code == 0, ran.err
    record = json.loads((out / "graphs.json").read_text())
    assert (record["embedding_dim"], record["layer_dim"]) == (PROJECTION, WIDTH)


def test_siglip_2_of_any_shape_is_refused_by_name(tmp_path):
    config = transformers.Siglip2Config(architectures=["Siglip2Model"])
    config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UsageError, match="NaFlex.*model_type siglip"):
        pretrained(str(tmp_path))


CLIP_FIELDS = {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": 224},
    "crop_size": {"height": 224, "width": 224},
    "resample": 3,
    "do_convert_rgb": True,
}
# Fields of published files, and the library's own class that carries them out.
PROCESSORS = {
    "clip": ("CLIPVisionModel", CLIPImageProcessorPil, CLIP_FIELDS),
    "clip of 2021": (
        "CLIPVisionModel",
        CLIPImageProcessorPil,
        {"feature_extractor_type": "CLIPFeatureExtractor", "size": 224, "crop_size": 224},
    ),
    "siglip": (
        "SiglipVisionModel",
        SiglipImageProcessorPil,
        {"image_processor_type": "SiglipImageProcessor", "size": {"height": 224, "width": 224}},
    ),
    "beit": (
        "BeitModel",
        BeitImageProcessorPil,
        {
            "feature_extractor_type": "BeitFeatureExtractor",
            "size": 224,
            "crop_size": 224,
            "do_center_crop": False,
            "reduce_labels": False,
            "do_reduce_labels": True,
            "resample": 2,
        },
    ),
    # The library's own class needs torchvision.
    "dinov3": (
        "DINOv3ViTModel",
        ViTImageProcessorPil,
        {
            "image_processor_type": "DINOv3ViTImageProcessorFast",
            "size": {"height": 224, "width": 224},
            "resample": 2,
            "image_mean": [0.485, 0.456, 0.406],
            "image_std": [0.229, 0.224, 0.225],
        },
    ),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_photographs_are_preprocessed_as_the_library_does(name, tmp_path):
    class_name, kind, fields = PROCESSORS[name]
    folder = save_tiny(tmp_path, class_name, fields)
    config = transformers.AutoConfig.from_pretrained(folder)
    processor = Processor.load(str(folder), config)
    photo = Image.fromarray(load_sample_image("china.jpg"))  # 640 x 427
    given = {key: value for key, value in fields.items() if not key.endswith("_type")}
    expected = kind(**given)(photo, return_tensors="np")["pixel_values"][0]
    found = processor.preprocessing(processor.native_px)(photo)
    assert processor.notices == ()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_a_processor_inside_that_of_images_and_texts_is_found(tmp_path):
    folder = save_tiny(tmp_path, "CLIPModel")
    nested = {"processor_class": "CLIPProcessor", "image_processor": CLIP_FIELDS}
    (folder / "processor_config.json").write_text(json.dumps(nested))
    config = transformers.AutoConfig.from_pretrained(folder)
    processor = Processor.load(str(folder), config)
    assert (processor.native_px, processor.resized_px, processor.stretches) == (224, 224, False)
    assert processor.mean[0] == pytest.approx(0.48145466)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_family_has_its_usual_preprocessing(model_type, tmp_path):
    class_name = next(iter(FAMILIES[model_type].classes))
    folder = save_tiny(tmp_path, class_name)
    config = transformers.AutoConfig.from_pretrained(folder)
    processor = Processor.load(str(folder), config)
    assert processor.native_px == PX and len(processor.notices) == 1
    half = (0.5, 0.5, 0.5)
    if model_type in ("vit", "beit", "data2vec-vision", "siglip_vision_model"):
        assert processor.mean == half
    elif model_type == "clip_vision_model":
        assert processor.mean == pytest.approx((0.48145466, 0.4578275, 0.40821073))
    else:
        assert processor.mean == pytest.approx((0.485, 0.456, 0.406))


def test_the_help_of_rungs_names_what_readme_names():
    assert len(SUPPORTED) > len(FAMILIES)
    shown = " ".join(run_export("rungs", "--help").out.split())
    for title in ("DINOv3", "CLIP", "SigLIP", "BEiT"):
        assert title in shown
