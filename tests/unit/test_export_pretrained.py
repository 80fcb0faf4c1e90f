from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub
import numpy as np
import onnxruntime as ort
import pytest
import torch
import transformers
from PIL import Image
from sklearn.datasets import load_sample_image
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.deit.image_processing_pil_deit import DeiTImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from bundle.recipe import Recipe
from export import onnx_graph
from export.errors import UsageError
from export.pretrained import pretrained
from export.processors import Processor
from export.recipes.smaller import downsample
from tests.unit.export_tiny import LAYERS, PX, WIDTH, save_tiny, saved_library_model

pytestmark = pytest.mark.usefixtures("remembered_exports")

LOW_PX = 8

WITH_HEAD = (
    "ViTForImageClassification",
    "DeiTForImageClassification",
    "DeiTForImageClassificationWithTeacher",
    "Dinov2ForImageClassification",
)
WITHOUT_HEAD = ("Dinov2Model",)  # ViTModel: test_export_rungs.py; DeiT differs in nothing here


def run_onnx(file: Path, image: torch.Tensor) -> dict[str, np.ndarray]:
    session = ort.InferenceSession(file, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, {"image": image.numpy()}), strict=True))


@pytest.mark.parametrize("class_name", WITH_HEAD + WITHOUT_HEAD)
def test_rungs_answer_as_the_library_does(class_name, tmp_path):
    folder = save_tiny(tmp_path, class_name)
    backbone = pretrained(str(folder))
    assert backbone.classes == (3 if class_name in WITH_HEAD else None)
    assert backbone.labels == (
        ("LABEL_0", "LABEL_1", "LABEL_2") if class_name in WITH_HEAD else None
    )
    library = saved_library_model(folder, class_name)
    options = {} if class_name.startswith("Dinov2") else {"interpolate_pos_encoding": True}
    image = torch.randn(5, 3, PX, PX, generator=torch.Generator().manual_seed(3))

    names = list(backbone.output_shapes())
    with torch.no_grad():
        high = dict(zip(names, backbone.rung(Recipe(PX))(image), strict=True))
        high_truth = library(image, output_hidden_states=True, **options)
        low_truth = library(downsample(image, LOW_PX), output_hidden_states=True, **options)
    # The low rung as ONNX: it has everything that the high one has, and Resize and a fitted table.
    low_rung = backbone.rung(Recipe(LOW_PX))
    onnx_graph.export_onnx(low_rung, PX, names, tmp_path / "vit_low.onnx", 20)
    low = run_onnx(tmp_path / "vit_low.onnx", image)

    for answer, truth in ((high, high_truth), (low, low_truth)):
        cls_layers = np.stack([hidden[:, 0] for hidden in truth.hidden_states], axis=1)
        assert answer["cls_layers"].shape == (5, LAYERS + 1, WIDTH)
        np.testing.assert_allclose(answer["cls_layers"], cls_layers, rtol=1e-4, atol=1e-4)
        if class_name in WITH_HEAD:
            np.testing.assert_allclose(answer["logits"], truth.logits, rtol=1e-4, atol=1e-4)
        else:
            embedding = truth.last_hidden_state[:, 0]
            np.testing.assert_allclose(answer["embedding"], embedding, rtol=1e-4, atol=1e-4)


def test_labels_and_source_come_from_the_checkpoint(tmp_path):
    folder = save_tiny(tmp_path / "pets", "ViTForImageClassification")
    config = json.loads((folder / "config.json").read_text())
    config["id2label"] = {"0": "cat", "1": "dog,\nhound", "2": "emu"}
    config["label2id"] = {"cat": 0, "dog": 1, "emu": 2}
    (folder / "config.json").write_text(json.dumps(config))
    backbone = pretrained(str(folder))
    assert backbone.labels == ("cat", "dog, hound", "emu")
    assert backbone.name == "pets"
    assert backbone.default_px == (8, 16)
    assert list(backbone.source["files"]) == ["model.safetensors"]
    assert str(tmp_path) not in json.dumps(backbone.source)


def test_unsupported_architectures_are_named_with_the_supported_ones(tmp_path):
    config = transformers.SwinConfig(architectures=["SwinForImageClassification"])
    config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UsageError, match="is a SwinForImageClassification.*DINOv2") as caught:
        pretrained(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_missing_weights_are_not_made_up(tmp_path):
    folder = save_tiny(tmp_path, "ViTModel")
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["ViTForImageClassification"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="lacks 2 weights.*classifier.bias"):
        pretrained(str(folder))


@pytest.mark.parametrize(
    ("class_name", "part", "change", "message"),
    [
        *(
            (name, None, {"num_hidden_layers": LAYERS - 1}, f"{blocks} has {LAYERS} blocks in the")
            for name, blocks in (
                ("ViTForImageClassification", "vit.layers"),
                ("ViTMAEForPreTraining", "layers"),
                ("Dinov2Model", "encoder.layer"),
                ("DINOv3ViTModel", "model.layer"),
                ("CLIPVisionModel", "encoder.layers"),
            )
        ),
        (
            *("CLIPModel", "vision_config", {"num_hidden_layers": LAYERS - 1}),
            "vision_model.encoder.layers has 2 blocks in the",
        ),
        (
            *("SiglipModel", "text_config", {"num_hidden_layers": 0}),
            "text_model.encoder.layers has 1 blocks in the",
        ),
        (
            *("ViTModel", None, {"qkv_bias": False}),
            "layers.0.attention.k_proj.bias is in the file and config.json says a model without",
        ),
    ],
)
def test_no_weights_of_blocks_are_left_out(class_name, part, change, message, tmp_path):
    folder = save_tiny(tmp_path, class_name)
    pretrained(str(folder))
    config = json.loads((folder / "config.json").read_text())
    for stages in ("out_features", "out_indices", "stage_names"):  # the library looks at them first
        config.pop(stages, None)
    (config if part is None else config[part]).update(change)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=f"do not fit its config.json: {message}") as caught:
        pretrained(str(folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", ["delete", "truncate"])
def test_damaged_checkpoints(damage, tmp_path):
    folder = save_tiny(tmp_path, "ViTModel")
    weights = folder / "model.safetensors"
    if damage == "delete":
        weights.unlink()
    else:
        weights.write_bytes(weights.read_bytes()[:100])
    expected = {"delete": "no model.safetensors nor", "truncate": "weights cannot be loaded"}
    with pytest.raises(UsageError, match=expected[damage]) as caught:
        pretrained(str(folder))
    assert "\n" not in str(caught.value)


def test_a_directory_without_a_model(tmp_path):
    with pytest.raises(UsageError, match="cannot be loaded") as caught:
        pretrained(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["no-such-model", "./no/such/dir", "a/b/c"])
def test_names_that_are_nothing(name):
    with pytest.raises(UsageError, match="is no directory; give static-vit, dinov2-small"):
        pretrained(name)


def test_an_unreachable_hub_is_one_line(monkeypatch, capfd):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match="--model owner/not-cached cannot be loaded") as caught:
        pretrained("owner/not-cached")
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


def processor_of(tmp_path: Path, fields: dict | None, model_type: str = "vit") -> Processor:
    if fields is not None:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(fields))
    config = {
        "vit": transformers.ViTConfig,
        "deit": transformers.DeiTConfig,
        "dinov2": transformers.Dinov2Config,
    }[model_type](image_size=16, patch_size=4)
    config.save_pretrained(tmp_path)
    return Processor.load(str(tmp_path), config)


SQUARE_256, SQUARE_224 = {"height": 256, "width": 256}, {"height": 224, "width": 224}
CROPPED = {"do_center_crop": True, "crop_size": SQUARE_224, "resample": 3, **IMAGENET}
# As checkpoints on the hub have them: google/vit-base-patch16-224, facebook/deit-* before and since
# 2022, facebook/dinov2-*; and files that leave everything to the class.
PUBLISHED = {
    "vit": ("vit", {"size": SQUARE_224, "resample": 2, "image_mean": [0.5] * 3}),
    "vit, cropped": ("vit", {"size": 256, **CROPPED}),
    "deit": ("deit", {"size": SQUARE_256, **CROPPED}),
    "deit of 2021": (
        "deit",
        {
            "feature_extractor_type": "DeiTFeatureExtractor",
            **CROPPED,
            "size": 256,
            "crop_size": 224,
        },
    ),
    "dinov2": (
        "dinov2",
        {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 256}, **CROPPED},
    ),
    "dinov2, no margin": ("dinov2", {"size": 224, **CROPPED}),
    "vit, empty": ("vit", {}),
    "deit, empty": ("deit", {}),
    "dinov2, empty": ("dinov2", {}),
}
PIL_PROCESSORS = {
    "vit": ViTImageProcessorPil,
    "deit": DeiTImageProcessorPil,
    "dinov2": BitImageProcessorPil,
}


@pytest.mark.parametrize("turned", [False, True], ids=["landscape", "portrait"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_photographs_are_preprocessed_as_the_library_does(name, turned, tmp_path):
    model_type, fields = PUBLISHED[name]
    photo = Image.fromarray(load_sample_image("china.jpg"))  # 640 x 427
    if turned:
        photo = photo.transpose(Image.Transpose.ROTATE_90)
    given = {key: value for key, value in fields.items() if not key.endswith("_type")}
    library = PIL_PROCESSORS[model_type](**given)
    expected = library(photo, return_tensors="np")["pixel_values"][0]  # (3, 224, 224)
    processor = processor_of(tmp_path, fields, model_type)
    assert processor.notices == ()
    found = processor.preprocessing(processor.native_px)(photo)
    # A grey level is 1 / 255 / 0.225 = 0.017 here; only the order of the arithmetic differs.
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_other_resolutions_keep_the_margin_in_proportion(tmp_path):
    dinov2 = processor_of(tmp_path, PUBLISHED["dinov2"][1], "dinov2")
    assert dinov2.preprocessing(112).resize_shortest_edge == 128
    assert dinov2.preprocessing(112).mean == (0.485, 0.456, 0.406)
    deit = processor_of(tmp_path, PUBLISHED["deit"][1], "deit").preprocessing(112)
    assert (deit.resize_shortest_edge, deit.stretch_to) == (None, (128, 128))
    vit = processor_of(tmp_path, PUBLISHED["vit"][1]).preprocessing(112)
    assert (vit.height, vit.width, vit.stretch_to) == (112, 112, (112, 112))


@pytest.mark.parametrize(
    ("model_type", "resized_px", "stretches"),
    [("vit", 16, True), ("deit", 18, True), ("dinov2", 18, False)],
)
def test_a_model_without_a_processor_gets_its_familys_and_a_notice(
    model_type, resized_px, stretches, tmp_path
):
    processor = processor_of(tmp_path, None, model_type)
    assert (processor.native_px, processor.resized_px) == (16, resized_px)
    assert processor.stretches == stretches
    assert "no preprocessor_config.json" in processor.notices[0]


@pytest.mark.parametrize(
    "fields",
    [
        {"do_resize": False, "do_center_crop": True},
        {"do_rescale": False},
        {"rescale_factor": 1.0},
        {"resample": 99},
        {"image_std": [0, 0, 0]},
        {"image_mean": [0.5]},
        {"size": {"height": 32, "width": 16}},
        {"size": {"longest_edge": 32}, "do_center_crop": True, "crop_size": 32},
        {"size": {"shortest_edge": 16}, "do_center_crop": True, "crop_size": 32},
        {"size": {"shortest_edge": 32}},
        {"size": "large"},
        {"do_pad": True, "pad_size": {"height": 256, "width": 256}},
        {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 32}},
        {"image_processor_type": "NoSuchImageProcessor"},
    ],
)
def test_processors_that_imaging_cannot_follow(fields, tmp_path):
    with pytest.raises(UsageError, match="not supported") as caught:
        processor_of(tmp_path, fields)
    assert "\n" not in str(caught.value)


def test_a_damaged_processor_file_is_not_taken_for_a_missing_one(tmp_path):
    save_tiny(tmp_path, "ViTModel")
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(UsageError, match="is not a valid JSON file") as caught:
        pretrained(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_no_normalisation(tmp_path):
    made = processor_of(tmp_path, {"do_normalize": False}).preprocessing(16)
    assert (made.mean, made.std) == ((0.0,) * 3, (1.0,) * 3)
