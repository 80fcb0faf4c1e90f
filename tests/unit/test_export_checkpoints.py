"""Folders as users have them work as with transformers, or one line names file and way out."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from bundle.recipe import Recipe
from export.errors import UsageError
from export.parity import sample_images
from export.pretrained import load_backbone
from tests.unit.export_tiny import PX, save_tiny

HEAD = "ViTForImageClassification"
IMAGES = torch.from_numpy(sample_images(2, PX, seed=5))
SIZE = {"height": PX, "width": PX}


def change(folder: Path, **fields: object) -> Path:
    """Set fields of config.json; None takes one out."""
    file = folder / "config.json"
    content = json.loads(file.read_text()) | fields
    kept = {name: value for name, value in content.items() if value is not None}
    file.write_text(json.dumps(kept))
    return folder


def answer(folder: Path) -> list[torch.Tensor]:
    with torch.no_grad():
        return list(load_backbone(str(folder)).rung(Recipe(PX))(IMAGES))


def refused(folder: Path) -> str:
    with pytest.raises(UsageError) as caught:
        load_backbone(str(folder))
    message = str(caught.value)
    assert "\n" not in message and message.startswith("--model ")
    return message


@pytest.mark.parametrize(
    ("class_name", "classes", "embedding_dim"),
    [
        (HEAD, 3, 16),
        ("ViTModel", None, 16),
        ("DeiTForImageClassification", 3, 16),
        ("DeiTForImageClassificationWithTeacher", 3, 16),
        ("Dinov2ForImageClassification", 3, 16),
        ("BeitForMaskedImageModeling", None, 16),
        ("CLIPModel", None, 12),
        ("CLIPVisionModelWithProjection", None, 12),
        ("CLIPVisionModel", None, 16),
        ("SiglipForImageClassification", 3, 16),
    ],
)
@pytest.mark.parametrize("architectures", [None, []])
def test_without_architectures_the_weights_tell(
    class_name, classes, embedding_dim, architectures, tmp_path
):
    folder = save_tiny(tmp_path, class_name)
    expected = answer(folder)
    backbone = load_backbone(str(change(folder, architectures=architectures)))
    assert (backbone.classes, backbone.embedding_dim) == (classes, embedding_dim)
    for found, truth in zip(answer(folder), expected, strict=True):
        assert torch.equal(found, truth)


@pytest.mark.parametrize("class_name", [HEAD, "BeitModel", "CLIPVisionModel", "DINOv3ViTModel"])
def test_sizes_as_lists(class_name, tmp_path):
    folder = save_tiny(tmp_path, class_name)
    expected = answer(folder)
    change(folder, image_size=[PX, PX])
    for found, truth in zip(answer(folder), expected, strict=True):
        assert torch.equal(found, truth)
    message = refused(change(folder, image_size=[PX, 2 * PX]))
    assert "config.json has image_size [16, 32]; only square ones" in message


@pytest.mark.parametrize("class_name", ["ViTModel", "DeiTModel"])
def test_a_pooler_that_is_not_exported_is_said(class_name, tmp_path):
    notices = load_backbone(str(save_tiny(tmp_path, class_name))).notices
    assert any(
        "normalised CLS token" in line and "pooler_output is not" in line for line in notices
    )


def test_a_head_needs_no_such_notice(tmp_path):
    notices = load_backbone(str(save_tiny(tmp_path, HEAD))).notices
    assert not any("pooler" in line for line in notices)


def test_a_processor_of_another_size_than_the_model(tmp_path):
    # transformers refuses such images; a DINOv2 takes any, and is trained at another size.
    folder = save_tiny(tmp_path / "vit", HEAD, {"size": {"height": 8, "width": 8}})
    backbone = load_backbone(str(folder))
    assert backbone.default_px == (8, 16)
    (line,) = backbone.notices
    assert "8 px and config.json says image_size 16" in line and "--high px=8" in line
    cropped = {"size": {"shortest_edge": 9}, "crop_size": 8, "do_center_crop": True}
    dinov2 = load_backbone(str(save_tiny(tmp_path / "dinov2", "Dinov2Model", cropped)))
    assert (dinov2.default_px, dinov2.notices) == ((4, 8), ())


def test_a_size_that_holds_no_whole_number_of_patches(tmp_path):
    fields = {"size": {"height": 18, "width": 18}}
    backbone = load_backbone(str(save_tiny(tmp_path, HEAD, fields, image_size=18)))
    assert backbone.default_px == (8, 16)
    assert backbone.notices == ("18 px hold no whole number of patches of 4 px: 16 px are taken",)


def test_images_that_are_not_to_be_resized_have_the_models_size(tmp_path):
    folder = save_tiny(tmp_path, HEAD, {"do_resize": False, "size": {"height": 9, "width": 9}})
    backbone = load_backbone(str(folder))
    made = backbone.preprocessing(PX)
    assert (backbone.default_px, made.stretch_to) == ((8, PX), (PX, PX))
    (line,) = backbone.notices
    assert line.startswith("do_resize is false in preprocessor_config.json: images of 16 px are")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"size": PX}, None),
        ({"size": SIZE, "crop_pct": 0.9}, None),  # no processor of these families reads it
        ({"size": SIZE, "image_mean": 0.5, "image_std": 0.25}, None),
        ({"size": SIZE, "image_mean": [0.5]}, "are not three numbers"),
        ({"size": {"longest_edge": PX}}, "size {'longest_edge': 16} without a centre crop"),
        ({"size": SIZE, "do_rescale": False}, "do_rescale"),
        ({"size": SIZE, "do_resize": False, "do_center_crop": True}, "do_resize true and the size"),
    ],
)
def test_fields_of_a_processor(fields, expected, tmp_path):
    folder = save_tiny(tmp_path, HEAD, fields)
    if expected is None:
        backbone = load_backbone(str(folder))
        assert backbone.default_px == (8, PX) and backbone.notices == ()
        assert backbone.preprocessing(PX).mean == (0.5, 0.5, 0.5)
        return
    message = refused(folder)
    assert expected in message and "preprocessor_config.json" in message


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe\x00"])
@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
def test_files_that_hold_no_fields(name, content, tmp_path):
    folder = save_tiny(tmp_path, HEAD)
    (folder / name).write_bytes(content)
    message = refused(folder)
    assert f"{name} is not" in message or f"{name} has no model_type" in message


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (["crane", "crane", "cat"], ("crane (0)", "crane (1)", "cat")),
        (["a", "a", "a (1)"], ("a (0)", "a (1) (1)", "a (1) (2)")),
        (["crane ", "crane\n", ""], ("crane (0)", "crane (1)", "LABEL_2")),
    ],
)
def test_classes_of_one_name_are_told_apart_and_it_is_said(names, labels, tmp_path):
    folder = change(save_tiny(tmp_path, HEAD), id2label=dict(enumerate(names)), label2id=None)
    backbone = load_backbone(str(folder))
    assert backbone.labels == labels
    assert any("several classes called" in line for line in backbone.notices)


def test_labels_with_gaps(tmp_path):
    folder = change(save_tiny(tmp_path, HEAD), id2label={"0": "a", "5": "b", "2": "c"})
    assert load_backbone(str(folder)).labels == ("a", "LABEL_1", "c")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (
            {"id2label": {"0": "a", "1": "b"}},
            "classifier.bias is [3] in the file and [2] by config",
        ),
        ({"id2label": {"x": "a"}}, "config.json is none that transformers reads"),
        ({"hidden_size": 32}, "its weights do not fit its config.json"),
        ({"hidden_size": "16"}, "'hidden_size' expected int"),
        ({"num_channels": 1}, "config.json has num_channels 1"),
        ({"num_hidden_layers": 0}, "config.json has num_hidden_layers 0"),
        ({"model_type": None}, "config.json has no model_type"),
        (
            {"model_type": "weird", "auto_map": {"AutoConfig": "c.C"}},
            "auto_map), which is never run",
        ),
        (
            {"quantization_config": {"quant_method": "bitsandbytes"}},
            "config.json has a quantization",
        ),
        ({"architectures": ["ViTForSegmentation"]}, "is a ViTForSegmentation; supported are ViT, "),
    ],
)
def test_configurations_that_no_model_has(fields, expected, tmp_path):
    message = refused(change(save_tiny(tmp_path, HEAD), **fields))
    assert expected in message


def test_an_image_tower_inside_another_model_is_no_model(tmp_path):
    folder = save_tiny(tmp_path, "CLIPVisionModel")
    vision = json.loads((folder / "config.json").read_text())
    for fields in ({}, {"architectures": ["LlavaForConditionalGeneration"]}):
        content = {"model_type": "llava", "vision_config": vision, **fields}
        (folder / "config.json").write_text(json.dumps(content))
        assert "lava" in refused(folder)


def test_code_of_a_checkpoint_is_not_run(tmp_path):
    folder = save_tiny(tmp_path / "model", HEAD)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    change(folder, auto_map={"AutoConfig": "evil.C", "AutoModel": "evil.M"})
    assert load_backbone(str(folder)).classes == 3  # a ViT needs no code of its own
    refused(change(folder, model_type="weird"))
    assert not (tmp_path / "ran").exists()


class Harm:
    """What runs a command where a pickle is trusted."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch '{self.file}'",)


def test_a_pickle_runs_nothing(tmp_path):
    folder = save_tiny(tmp_path / "model", HEAD)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Harm(tmp_path / "ran"), 2))
    assert "its weights cannot be loaded" in refused(folder)
    assert not (tmp_path / "ran").exists()


def as_pickle(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def as_shards(folder: Path) -> None:
    model = transformers.ViTForImageClassification.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="5KB")
    assert len(list(folder.glob("*.safetensors"))) > 2


@pytest.mark.parametrize("store", [as_pickle, as_shards])
def test_weights_stored_in_another_way_are_the_same(store, tmp_path):
    folder = save_tiny(tmp_path, HEAD)
    expected = answer(folder)
    store(folder)
    for found, truth in zip(answer(folder), expected, strict=True):
        assert torch.equal(found, truth)
    assert len(load_backbone(str(folder)).source["files"]) >= 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_half_precision_are_loaded_in_fp32(dtype, tmp_path):
    folder = save_tiny(tmp_path, HEAD)
    expected = answer(folder)
    transformers.ViTForImageClassification.from_pretrained(folder).to(dtype).save_pretrained(folder)
    for found, truth in zip(answer(folder), expected, strict=True):
        assert found.dtype == torch.float32
        assert torch.nn.functional.cosine_similarity(found, truth, dim=-1).min() > 0.99


def lose_shard(folder: Path) -> None:
    as_shards(folder)
    min(folder.glob("*.safetensors")).unlink()


def only_onnx(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model.onnx")


def adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("harm", "expected"),
    [
        (
            lambda folder: (folder / "model.safetensors").write_bytes(b""),
            "weights cannot be loaded",
        ),
        (lose_shard, "model-00001-of-"),
        (only_onnx, "no model.safetensors nor pytorch_model.bin (there is model.onnx)"),
        (adapter, "adapter_config.json makes it an adapter; merge it into its model"),
        (lambda folder: (folder / "config.json").unlink(), "there is no config.json (it holds"),
    ],
)
def test_folders_that_hold_no_whole_model(harm, expected, tmp_path):
    folder = save_tiny(tmp_path, HEAD)
    harm(folder)
    assert expected in refused(folder)
