"""Published checkpoints of A-ViT are read strictly, by timm's names and the gate of their name."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from bundle.graphs import GraphSet
from bundle.manifest import sha256_file
from bundle.recipe import Recipe
from export.backbones import Backbone
from export.errors import UsageError
from export.parity import sample_images
from export.pretrained import load_backbone
from tests import commands
from tests.unit import timm_files
from tests.unit.export_tiny import run_export
from tests.unit.image_files import write_images
from tests.unit.quantised_files import ask
from tests.unit.timm_files import WIDTH

pytestmark = pytest.mark.usefixtures("remembered_exports")

TRAINING = argparse.Namespace(model="avit_tiny_patch16_224", ponder_token_scale=5e-4)
PLAIN = argparse.Namespace(model="deit_tiny_patch16_224", lr=5e-4)
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def linears(width: int, classes: int) -> dict[str, tuple[int, ...]]:
    """Shapes of weights that are followed by a bias, by timm's names."""
    found = {"patch_embed.proj": (width, 3, 16, 16), "norm": (width,), "head": (classes, width)}
    for block in range(12):
        found |= {f"blocks.{block}.{norm}": (width,) for norm in ("norm1", "norm2")}
        found |= {
            f"blocks.{block}.attn.qkv": (3 * width, width),
            f"blocks.{block}.attn.proj": (width, width),
            f"blocks.{block}.mlp.fc1": (4 * width, width),
            f"blocks.{block}.mlp.fc2": (width, 4 * width),
        }
    return found


def state(width: int = WIDTH, classes: int = 1000) -> dict[str, torch.Tensor]:
    """Random weights of a whole A-ViT, tokens of which halt at many blocks by 10, 30."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "cls_token": 0.1 * torch.randn(1, 1, width, generator=generator),
        "pos_embed": 0.1 * torch.randn(1, 197, width, generator=generator),
    }
    for name, shape in linears(width, classes).items():
        fan_in = int(np.prod(shape[1:]))
        weight = torch.randn(shape, generator=generator) * (1.5 / fan_in**0.5)
        tensors[f"{name}.weight"] = weight if len(shape) > 1 else 1 + 0.1 * weight
        tensors[f"{name}.bias"] = 0.1 * torch.randn(shape[0], generator=generator)
        if name.endswith("fc2"):
            tensors[f"{name}.bias"][0] = 0.35
    return tensors


STATE = state()
FOREIGN = {name: torch.zeros_like(value) for name, value in STATE.items()}


def training_file(file: Path, model: dict[str, torch.Tensor] = STATE, **more: object) -> Path:
    """What A-ViT's training saves."""
    content = {"model": model, "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}}
    content |= {"lr_scheduler": {"base_values": [0.1]}, "epoch": 99, "model_ema": FOREIGN}
    torch.save({**content, "scaler": {"scale": 65536.0}, "args": TRAINING, **more}, file)
    return file


def test_the_state_has_the_published_number_of_tensors():
    assert len(STATE) == 152


def test_a_training_file_is_read_with_the_gate_of_its_name(tmp_path):
    file = training_file(tmp_path / "tiny-10-30.pth")
    backbone = load_backbone("avit-tiny", checkpoint=file)
    assert backbone.gate == (10.0, 30.0) and backbone.labels is None
    assert backbone.default_px == (112, 224) and backbone.layers == 12
    assert backbone.source == {
        "kind": "avit",
        "name": "avit-tiny",
        "file": "tiny-10-30.pth",
        "sha256": sha256_file(file),
        "gate": [10.0, 30.0],
    }
    (notice,) = backbone.notices
    assert notice.startswith("tokens of tiny-10-30.pth halt by sigmoid(10 x - 30), as its name")
    made = backbone.preprocessing(224)
    assert (made.resize_shortest_edge, made.width, made.resample) == (256, 224, "bicubic")
    assert (made.mean, made.std) == IMAGENET
    assert backbone.preprocessing(112).resize_shortest_edge == 128


def test_the_weights_are_those_of_model_and_answer_as_a_plain_vit_where_none_halts(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(timm_files, "DEPTH", 12)
    monkeypatch.setattr(timm_files, "PATCH", 16)
    file = training_file(tmp_path / "tiny-10-30.pth")
    backbone = load_backbone("avit-tiny", checkpoint=file, gate=(1.0, 1e6))
    images = torch.from_numpy(sample_images(2, 224, seed=5))
    found = backbone.reference(images, 224)
    for name, value in timm_files.answers(STATE, images).items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4, msg=name)


def test_removing_is_the_masked_forward_of_the_checkpoint(tmp_path):
    backbone = load_backbone("avit-tiny", checkpoint=training_file(tmp_path / "tiny-10-30.pth"))
    images = torch.from_numpy(sample_images(3, 224, seed=5))
    with torch.inference_mode():
        *answers, tokens, patches = backbone.rung(Recipe(224, halt=0.0))(images)
    for found, value in zip(answers, backbone.reference(images, 224).values(), strict=True):
        torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-4)
    assert len(patches.unique()) > 3 and 0 < tokens.float().mean() < 190


@pytest.mark.parametrize(
    ("name", "gate", "expected"),
    [
        ("small-10-75.pth", None, (10.0, 75.0)),
        ("my-own-model-12.5-40.pth", None, (12.5, 40.0)),
        ("visualization-tiny.pth", (5.0, 50.0), (5.0, 50.0)),
        ("tiny-10-30.pth", (5.0, 50.0), (5.0, 50.0)),
    ],
)
def test_an_option_says_another_gate_than_the_name(name, gate, expected, tmp_path):
    backbone = load_backbone("avit-tiny", checkpoint=training_file(tmp_path / name), gate=gate)
    assert backbone.gate == expected
    told = "as --gate says" if gate else "as its name says"
    assert told in backbone.notices[0]


@pytest.mark.parametrize(
    "save",
    [
        lambda file: torch.save(STATE, file.with_suffix(".pth")),
        lambda file: torch.save({"model": STATE, "args": PLAIN}, file.with_suffix(".pth")),
        lambda file: torch.save(
            {"model": {f"module.{k}": v for k, v in STATE.items()}}, file.with_suffix(".pth")
        ),
        lambda file: safetensors.torch.save_file(STATE, file.with_suffix(".safetensors")),
    ],
)
def test_a_plain_deit_is_read_and_its_gate_told_to_be_untrained(save, tmp_path):
    save(tmp_path / "deit")
    (file,) = tmp_path.iterdir()
    backbone = load_backbone("avit-tiny", checkpoint=file, gate=(10.0, 30.0))
    _, notice = backbone.notices
    assert "the gate of a plain DeiT is untrained" in notice and file.name in notice
    assert torch.equal(backbone.model.classifier.weight, STATE["head.weight"])


def test_classes_of_a_fine_tuned_head_are_read_off_it(tmp_path):
    file = training_file(tmp_path / "pets-10-30.pth", state(classes=37))
    assert load_backbone("avit-tiny", checkpoint=file).classes == 37


# --- what is refused -----------------------------------------------------------------------------


def refused(file: Path, model: str = "avit-tiny", **more: object) -> str:
    with pytest.raises(UsageError) as caught:
        load_backbone(model, checkpoint=file, **more)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(shape)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dist_token": zeros(1, 1, WIDTH)}, "it has dist_token, which A-ViT has not"),
        (
            {"head_dist.weight": zeros(9, WIDTH), "head_dist.bias": zeros(9)},
            "it has head_dist.weight and 1 more tensor, which A-ViT has not",
        ),
        ({"mask_token": zeros(1, WIDTH)}, "it has mask_token, which"),
        ({"blocks.0.ls1.gamma": zeros(WIDTH)}, "it has blocks.0.ls1.gamma, which"),
        ({"blocks.12.norm1.weight": zeros(WIDTH)}, "it has blocks.12.norm1.weight, which"),
        ({"epoch": 3}, "it has epoch, which"),
        ({"head.weight": None, "head.bias": None}, "it lacks head.weight and 1 more tensor"),
        ({"blocks.11.attn.qkv.bias": None}, "it lacks blocks.11.attn.qkv.bias"),
        ({"cls_token": None}, "it lacks cls_token"),
        ({"patch_embed.proj.bias": None}, "it lacks patch_embed.proj.bias"),
        (
            {"pos_embed": zeros(1, 257, WIDTH)},
            f"its pos_embed is [1, 257, {WIDTH}] and should be [1, 197, {WIDTH}]",
        ),
        (
            {"patch_embed.proj.weight": zeros(WIDTH, 3, 14, 14)},
            f"its patch_embed.proj.weight is [{WIDTH}, 3, 14, 14] and should be",
        ),
        ({"head.weight": zeros(37, WIDTH)}, "its head.weight is [37, 192] and should be [1000, "),
        ({"norm.bias": zeros(3)}, "its norm.bias is [3] and should be [192]"),
        ({"norm.bias": 0.5}, "its norm.bias is a float, no tensor"),
        ({"patch_embed.proj.weight": None}, "has no patch_embed.proj.weight, as a ViT of timm has"),
    ],
)
def test_what_is_not_exactly_the_model_is_refused(change, message, tmp_path):
    changed = {**STATE, **change}
    model = {name: value for name, value in changed.items() if value is not None}
    assert message in refused(training_file(tmp_path / "tiny-10-30.pth", model))


@pytest.mark.parametrize(
    ("model", "width", "message"),
    [
        ("avit-small", 192, "cls_token is 192 wide and should be 384; give --model avit-tiny"),
        ("avit-tiny", 384, "cls_token is 384 wide and should be 192; give --model avit-small"),
        ("avit-tiny", 768, "is no avit-tiny: its cls_token is 768 wide and should be 192"),
    ],
)
def test_a_file_of_another_size_is_refused_by_its_width(model, width, message, tmp_path):
    weights = {"cls_token": zeros(1, 1, width), "patch_embed.proj.weight": zeros(width, 3, 16, 16)}
    told = refused(training_file(tmp_path / "any-10-30.pth", weights), model)
    assert message in told and (width < 768 or "give" not in told)


class Payload:
    """What must not be made again by reading."""


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"args": Path("x")}, "it holds a pathlib."),
        (
            {"saved": Payload()},
            "test_export_avit.Payload, which would be run",
        ),
    ],
)
def test_a_file_that_pickles_more_than_arguments_is_not_run(more, message, tmp_path):
    told = refused(training_file(tmp_path / "tiny-10-30.pth", **more))
    assert message in told and "cannot be read" in told


def test_files_that_hold_no_checkpoint_are_one_line(tmp_path):
    (tmp_path / "cut-10-30.pth").write_bytes(
        training_file(tmp_path / "tiny-10-30.pth").read_bytes()[:9999]
    )
    assert "cannot be read" in refused(tmp_path / "cut-10-30.pth")
    assert "no such file" in refused(tmp_path / "absent-10-30.pth")
    torch.save({"model_ema": STATE}, tmp_path / "ema-10-30.pth")
    assert "it holds model_ema" in refused(tmp_path / "ema-10-30.pth")
    torch.save([1, 2], tmp_path / "list-10-30.pth")
    assert "it holds no tensors" in refused(tmp_path / "list-10-30.pth")
    with pytest.raises(UsageError, match="avit-small needs --checkpoint FILE.* small-10-75.pth"):
        load_backbone("avit-small")


@pytest.mark.parametrize(
    "name", ["checkpoint.pth", "tiny.pth", "tiny-30.pth", "tiny-ten-30.pth", "tiny-0-30.pth"]
)
def test_a_name_that_says_no_gate_is_answered_with_what_to_give(name, tmp_path):
    told = refused(training_file(tmp_path / name))
    assert f"the name of {tmp_path / name} does not end in its gate's scale and centre" in told
    assert "as tiny-10-30.pth; give --gate SCALE,CENTRE" in told and "--gate 10,30" in told


COMMANDS = (
    ("export", "rungs"),
    ("planner", "plan", "--images", "sample", "--max-risk", "0.1"),
    ("planner", "study", "--images", "sample", "--max-risk", "0.1", "--candidates", "px=32"),
    ("adaptation", "distil", "--images", "sample", "--recipe", "px=32", "--out", "x"),
    *[
        ("adaptation", "study", "--images", "sample", "--recipes", "px=32", "--out", "x")
        + ("--test", "sample")
    ],
)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda words: " ".join(words[:2]))
@pytest.mark.parametrize(
    ("model", "gate", "message"),
    [
        ("avit-tiny", "10", "error: --gate '10' is no scale above 0 and a centre, as --gate 10,30"),
        ("static-vit", "10,30", "error: --gate goes with --model avit-tiny or avit-small"),
    ],
)
def test_every_command_takes_a_gate(command, model, gate, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = commands.run(*command, "--model", model, "--gate", gate)
    assert result.code == 2 and message in result.err, result.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("gate", ["a,b", "10,30,1", "0,30", "-1,30", "inf,3", "3,nan", ""])
def test_a_gate_that_is_none_is_refused(gate):
    result = run_export("rungs", "--model", "avit-tiny", "--gate", gate)
    assert result.code == 2 and "is no scale above 0 and a centre" in " ".join(result.err.split())


# --- exported ------------------------------------------------------------------------------------


def test_a_checkpoint_is_exported_from_the_command_line(tmp_path):
    """Few patches and blocks in the cheap rung: a whole one takes half a minute to export."""
    file = training_file(tmp_path / "tiny-10-2.5.pth", state(classes=7))
    images = write_images(tmp_path / "images", "a.png", "b.png")
    low, static = "px=32,depth=3,halt", "px=32,depth=3,halt,int8=static"
    given = ("--low", low, "--high", "px=32", "--beside", static, "--fit-images", images)
    out = tmp_path / "onnx"
    result = run_export(
        *("rungs", "--model", "avit-tiny", "--checkpoint", file, "--out", out, *given)
    )
    assert result.code == 0, result.err
    assert "halt by sigmoid(10 x - 2.5)" in " ".join(result.err.split())
    graphs = GraphSet.load(out)
    assert (graphs.backbone, graphs.classes, graphs.layers) == ("avit-tiny", 7, 12)
    assert graphs.about["source"]["gate"] == [10.0, 2.5]
    assert set(graphs.graphs) == {"depth3_halt", "full", "depth3_halt_int8static"}
    notes = json.loads((out / "graphs.json").read_text())["graphs"]
    assert notes["depth3_halt"]["checks"] and "tokens" not in notes["full"]
    for name in ("depth3_halt", "depth3_halt_int8static"):
        kept = notes[name]["tokens"]
        assert 1 < kept["min"] <= kept["mean"] <= kept["max"] <= kept["all"] == 5
        assert 1 <= kept["blocks_per_patch"] <= kept["blocks_per_patch_public"] <= 3
    found = ask(graphs.high.file, sample_images(2, 32, seed=0))
    backbone: Backbone = load_backbone("avit-tiny", checkpoint=file)
    truth = backbone.reference(torch.from_numpy(sample_images(2, 32, seed=0)), 32)
    for name, value in truth.items():
        np.testing.assert_allclose(found[name], value.numpy(), rtol=1e-4, atol=1e-4, err_msg=name)
