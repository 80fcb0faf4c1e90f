"""Checkpoints under timm's key names answer as a ViT written down from the paper, by hand."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bundle.graphs import GraphSet
from bundle.manifest import sha256_file
from bundle.recipe import Recipe
from export.errors import UsageError
from export.pretrained import load_backbone
from export.timm_checkpoint import load
from export.timm_vit import convert
from tests.unit.export_tiny import run_export
from tests.unit.quantised_files import ask
from tests.unit.timm_files import (
    CLASSES,
    DEPTH,
    HIDDEN,
    NAME,
    PX,
    WIDTH,
    answers,
    checkpoint,
    save,
)

pytestmark = pytest.mark.usefixtures("remembered_exports")

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
IMAGES = torch.randn(3, 3, PX, PX, generator=torch.Generator().manual_seed(1))
VARIANTS = {
    "ViT": (NAME, {}),
    "ViT without a head": (NAME, {"head": False}),
    "ViT without biases of qkv": (NAME, {"bias": False}),
    "distilled DeiT": ("deit_tiny_distilled_patch4_16", {"distilled": True}),
    "distilled DeiT without heads": (
        "deit_tiny_distilled_patch4_16",
        {"distilled": True, "head": False},
    ),
    "DeiT III": ("deit3_tiny_patch4_16", {"scales": True, "positions": 0}),
    "DINOv2": ("vit_tiny_patch4_dinov2.lvd142m", {"scales": True, "head": False}),
}
WITH_REGISTERS = {
    "DINOv2 with registers": {"head": False, "positions": 0},
    "DINOv2 with registers and a head": {"positions": 0},
    "registers that have positions": {},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_checkpoint_answers_as_the_model_it_is_of(variant, tmp_path):
    name, options = VARIANTS[variant]
    tensors = checkpoint(**options)
    backbone = load_backbone(f"timm:{name}", checkpoint=save(tmp_path, tensors))
    with torch.inference_mode():
        found = backbone.reference(IMAGES, PX)
        rung = backbone.rung(Recipe(PX))(IMAGES)
    expected = answers(tensors, IMAGES)
    assert found.keys() == expected.keys() and backbone.layers == DEPTH
    for (key, value), from_rung in zip(expected.items(), rung, strict=True):
        torch.testing.assert_close(found[key], value, **TOLERANCE, msg=f"{variant}: {key}")
        torch.testing.assert_close(from_rung, value, **TOLERANCE, msg=f"{variant}: {key}")


@pytest.mark.parametrize("variant", WITH_REGISTERS)
def test_registers_answer_as_the_model_they_are_of(variant):
    tensors = checkpoint(scales=True, registers=4, **WITH_REGISTERS[variant])
    model = convert(tensors, "vit_tiny_patch4_reg4_dinov2", {})
    with torch.inference_mode():
        output = model(IMAGES, output_hidden_states=True)
    expected = answers(tensors, IMAGES)
    layers = torch.stack([hidden[:, 0] for hidden in output.hidden_states], dim=1)
    torch.testing.assert_close(layers, expected["cls_layers"], **TOLERANCE)
    if "logits" in expected:
        torch.testing.assert_close(output.logits, expected["logits"], **TOLERANCE)
    else:
        cls = output.last_hidden_state[:, 0]
        torch.testing.assert_close(cls, expected["embedding"], **TOLERANCE)


def test_names_of_the_first_repositories_of_deit3_and_dinov2_are_read():
    tensors = checkpoint(scales=True, registers=4, positions=0, head=False)
    renamed = {
        key.replace("ls1.gamma", "gamma_1")
        .replace("ls2.gamma", "gamma_2")
        .replace("reg_token", "register_tokens"): value
        for key, value in tensors.items()
    }
    # There the CLS token has a position and the registers have none.
    renamed["pos_embed"] = torch.cat([torch.zeros(1, 1, WIDTH), renamed["pos_embed"]], dim=1)
    models = [convert(t, "vit_tiny_patch4_reg4_dinov2", {}) for t in (tensors, renamed)]
    for value, other in zip(*(model.state_dict().values() for model in models), strict=True):
        assert torch.equal(value, other)


def holding(folder: Path, content: object) -> Path:
    torch.save(content, folder / "weights.pth")
    return folder / "weights.pth"


@pytest.mark.parametrize(
    ("wrap", "notice"),
    [
        (lambda tensors: tensors, ""),
        (lambda tensors: {"model": tensors, "args": argparse.Namespace(lr=1.0), "epoch": 3}, ""),
        (
            lambda tensors: {
                "state_dict": {"module.cls_token": torch.zeros(1)},
                "state_dict_ema": {f"module._orig_mod.{k}": v for k, v in tensors.items()},
            },
            "weights.pth holds averaged weights (state_dict_ema), which are taken",
        ),
        (
            lambda tensors: {
                "state_dict": {
                    **{f"model.{k}": v.half().float() for k, v in tensors.items()},
                    "criterion.weight": torch.zeros(2),
                }
            },
            "",
        ),
    ],
)
def test_weights_are_found_in_what_training_scripts_save(wrap, notice, tmp_path):
    tensors = checkpoint()
    backbone = load(f"timm:{NAME}", holding(tmp_path, wrap(tensors)))
    with torch.inference_mode():
        found = backbone.reference(IMAGES, PX)["logits"]
    torch.testing.assert_close(found, answers(tensors, IMAGES)["logits"], rtol=0.02, atol=0.02)
    assert [n for n in backbone.notices if "averaged" in n] == ([notice] if notice else [])


def test_both_rungs_are_exported_with_their_origin(tmp_path):
    tensors = checkpoint()
    file = save(tmp_path, tensors)
    arguments = ["--model", f"timm:{NAME}", "--checkpoint", file, "--out", tmp_path / "onnx"]
    result = run_export("rungs", *arguments)
    assert result.code == 0, result.err
    assert "by its name, crop_pct 0.9, interpolation bicubic, mean" in " ".join(result.err.split())
    graphs = GraphSet.load(tmp_path / "onnx")
    assert graphs.about["source"] == {
        "kind": "timm",
        "name": NAME,
        "file": file.name,
        "sha256": sha256_file(file),
    }
    assert (graphs.backbone, graphs.classes, graphs.low.record.px) == (NAME, CLASSES, PX // 2)
    found = ask(graphs.high.file, IMAGES.numpy())
    for key, value in answers(tensors, IMAGES).items():
        np.testing.assert_allclose(found[key], value, rtol=1e-4, atol=1e-4, err_msg=key)


# --- hub folders and preprocessing ---------------------------------------------------------------

HUB = {
    "architecture": NAME,
    "num_classes": CLASSES,
    "global_pool": "token",
    "pretrained_cfg": {
        "tag": "mine",
        "mean": [0.1, 0.2, 0.3],
        "std": [0.4, 0.5, 0.6],
        "interpolation": "bilinear",
        "crop_pct": 0.95,
        "crop_mode": "squash",
        "input_size": [3, PX, PX],
        "label_names": ["a", "b\n c", "d", "e", "f"],
    },
}


def test_a_folder_in_timms_hub_format_is_a_model(tmp_path):
    file = save(tmp_path / "mine", checkpoint(), "model.safetensors")
    (tmp_path / "mine/config.json").write_text(json.dumps(HUB))
    backbone = load_backbone(str(tmp_path / "mine"))
    assert (backbone.name, backbone.labels) == (f"{NAME}.mine", ("a", "b c", "d", "e", "f"))
    assert backbone.source["sha256"] == sha256_file(file) and not backbone.notices
    made = backbone.preprocessing(PX)
    assert (made.mean, made.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert (made.resample, made.stretch_to) == ("bilinear", (16, 16))  # floor(16 / 0.95)
    # A file of these weights has the same beside it.
    beside = load(f"timm:{NAME}.mine", file)
    assert replace(beside, model=backbone.model) == backbone


def test_classes_of_one_name_or_none_are_told_apart(tmp_path):
    names = {**HUB["pretrained_cfg"], "label_names": ["crane", "", "crane", "d", " "]}
    save(tmp_path / "mine", checkpoint(), "model.safetensors")
    (tmp_path / "mine/config.json").write_text(json.dumps({**HUB, "pretrained_cfg": names}))
    backbone = load_backbone(str(tmp_path / "mine"))
    assert backbone.labels == ("crane (0)", "LABEL_1", "crane (2)", "d", "LABEL_4")
    (notice,) = backbone.notices
    assert notice == "there are several classes called crane: told apart by their numbers"


@pytest.mark.parametrize("told", [{"global_pool": "avg"}, {"model_args": {"global_pool": "avg"}}])
def test_a_head_that_reads_pooled_tokens_is_refused_wherever_the_file_says_so(told, tmp_path):
    save(tmp_path / "mine", checkpoint(), "model.safetensors")
    (tmp_path / "mine/config.json").write_text(json.dumps({**HUB, **told}))
    with pytest.raises(UsageError, match="the head reads pooled patch tokens .global_pool."):
        load_backbone(str(tmp_path / "mine"))


HALF, IMAGENET = (0.5, 0.5, 0.5), (0.485, 0.456, 0.406)


@pytest.mark.parametrize(
    ("name", "mean", "crop_pct", "resample"),
    [
        ("vit_tiny_patch16_224.augreg_in21k_ft_in1k", HALF, 0.9, "bicubic"),
        ("vit_tiny_patch16_224", HALF, 0.9, "bicubic"),
        ("deit_tiny_patch16_224.fb_in1k", IMAGENET, 0.9, "bicubic"),
        ("deit3_tiny_patch16_224.fb_in22k_ft_in1k", IMAGENET, 1.0, "bicubic"),
        ("vit_tiny_patch14_dinov2.lvd142m", IMAGENET, 1.0, "bicubic"),
        ("vit_tiny_patch16_224.dino", IMAGENET, 0.9, "bicubic"),
        ("vit_tiny_patch16_224_miil.in21k", (0.0, 0.0, 0.0), 0.875, "bilinear"),
    ],
)
def test_preprocessing_is_what_timm_has_for_the_name(name, mean, crop_pct, resample, tmp_path):
    made = load(f"timm:{name}", save(tmp_path, checkpoint())).preprocessing(224)
    assert (made.mean, made.resample) == (mean, resample)
    assert made.resize_shortest_edge == int(224 / crop_pct)


def test_a_model_of_384_px_is_shown_the_whole_image(tmp_path):
    tensors = checkpoint(head=False)
    tensors["pos_embed"] = torch.zeros(1, 1 + 96**2, WIDTH)
    backbone = load("timm:vit_tiny_patch4_384", save(tmp_path, tensors))
    assert backbone.default_px == (192, 384)
    assert backbone.preprocessing(384).resize_shortest_edge == 384


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm_pre.weight": (WIDTH,)}, "norm_pre.weight: tokens are normalised before the first"),
        ({"fc_norm.weight": (WIDTH,)}, "fc_norm.weight: the head reads the mean of the patch"),
        ({"blocks.1.attn.q_norm.weight": (64,)}, "blocks.1.attn.q_norm.weight: queries and keys"),
        ({"blocks.0.attn.rel_pos.x": (4,)}, "blocks.0.attn.rel_pos.x: positions are relative"),
        ({"blocks.0.attn.q_bias": (4,)}, "blocks.0.attn.q_bias: queries and values have biases"),
        ({"blocks.0.mlp.w3.weight": (4,)}, "blocks.0.mlp.w3.weight: the MLP is a SwiGLU"),
        ({"blocks.0.mlp.fc1.weight": (2 * HIDDEN, WIDTH)}, "blocks.0.mlp.fc1.weight is of a SwiGL"),
        ({"attn_pool.latent": (1,)}, "attn_pool.latent: the head reads an attention pooling"),
        ({"cls_token": None}, "there is no cls_token: the model pools its patch tokens"),
        ({"blocks.1.attn.proj.bias": None}, f"there is no blocks.1.attn.proj.bias, which {NAME}"),
        ({"blocks.0.norm1.bias": None}, "there is no blocks.0.norm1.bias, which a ViT has"),
        ({"pos_embed": (1, 19, WIDTH)}, "pos_embed has 19 positions, which make no square"),
        ({"tail.weight": (1,)}, "tail.weight is no tensor of a ViT or DeiT"),
        ({"head.weight": (CLASSES, 3)}, "its tensors do not fit each other (size mismatch for "),
        ({"patch_embed.proj.weight": (WIDTH, 1, 4, 4)}, "patch_embed.proj.weight takes 1 channels"),
        ({"patch_embed.proj.weight": None}, "has no patch_embed.proj.weight, as a ViT of timm has"),
    ],
)
def test_what_does_not_map_is_refused_by_its_tensor(change, message, tmp_path):
    tensors = checkpoint()
    for key, shape in change.items():
        tensors.pop(key, None)
        if shape is not None:
            tensors[key] = torch.zeros(shape)
    with pytest.raises(UsageError) as caught:
        load(f"timm:{NAME}", save(tmp_path, tensors))
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit_base_patch4_16", "vit_base_patch4_16 is 768 wide and cls_token 192"),
        ("resnet50", "timm:resnet50 is not timm's name of a ViT or DeiT"),
        ("eva_tiny_patch4_16", "is not timm's name of a ViT or DeiT"),
        ("vit_tiny_patch4_rope_16", "positions are rotary"),
        ("vit_tiny_patch4_gap_16", "the head reads pooled patch tokens"),
    ],
)
def test_a_name_of_another_model_is_refused(name, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        load(f"timm:{name}", save(tmp_path, checkpoint()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["timm:vit_tiny_patch16_224"], "needs --checkpoint FILE"),
        (["static-vit", "--checkpoint", "x.pth"], "--checkpoint FILE goes with --model timm:NAME"),
        (["timm:vit_tiny_patch16_224", "--checkpoint", "absent.pth"], "absent.pth: no such file"),
        (["timm/vit_tiny_patch16_224.augreg_in1k"], "--model timm:NAME --checkpoint FILE; timm"),
    ],
)
def test_a_command_line_that_lacks_half_is_one_line(arguments, message):
    result = run_export("rungs", "--model", *arguments)
    assert result.code == 2 and message in " ".join(result.err.split())
    assert "Traceback" not in result.err


def test_a_file_that_holds_objects_is_not_run(tmp_path):
    file = holding(tmp_path, {"model": checkpoint(), "saved": Path("x")})
    with pytest.raises(UsageError, match="cannot be read"):
        load(f"timm:{NAME}", file)
    (tmp_path / "text.safetensors").write_text("not weights")
    with pytest.raises(UsageError, match="cannot be read"):
        load(f"timm:{NAME}", tmp_path / "text.safetensors")


def test_a_hub_folder_without_weights_says_what_it_lacks(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(HUB))
    with pytest.raises(UsageError, match="neither of model.safetensors, pytorch_model.bin"):
        load_backbone(str(tmp_path))
