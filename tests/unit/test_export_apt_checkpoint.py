"""A state in the public layout of APT answers as the equations say, and is read strictly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from bundle.graphs import GraphSet
from bundle.manifest import sha256_file
from bundle.recipe import Recipe
from export import parity
from export.errors import UsageError
from export.timm_checkpoint import load
from tests.unit.export_tiny import run_export
from tests.unit.patch_sizes_models import detail, normalised, pictures
from tests.unit.patch_sizes_reference import answers
from tests.unit.quantised_files import ask
from tests.unit.timm_files import HEADS, NAME, PX, WIDTH, checkpoint

pytestmark = pytest.mark.usefixtures("remembered_exports")

State = dict[str, torch.Tensor]
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


def apt_state() -> State:
    """A plain ViT's tensors, the class token moved, copies beside them and the new weights."""
    state = checkpoint()
    mixed = {
        "cls_token": state.pop("cls_token"),
        "patch_embed.proj.weight": state["patch_embed.proj.weight"].clone(),
        "patch_embed.proj.bias": state["patch_embed.proj.bias"].clone(),
        "base_pos_embed": state["pos_embed"].clone(),
        "base_mini_pos_embed": torch.randn(1, 4, WIDTH),
        **detail(WIDTH),
    }
    return {**{f"mixed_patch.{key}": value for key, value in mixed.items()}, **state}


def saved(folder: Path, state: State, prefix: str = "net.", **more: object) -> Path:
    """As Lightning keeps it."""
    named = {f"{prefix}{key}": value for key, value in state.items()}
    torch.save({"epoch": 1, "state_dict": named, **more}, folder / "last.ckpt")
    return folder / "last.ckpt"


def truths(levels: np.ndarray, image: torch.Tensor, bits: tuple[float, ...]) -> list[dict]:
    state = {key: value.double().numpy() for key, value in apt_state().items()}
    pairs = zip(levels, image.double().numpy(), strict=True)
    return [answers(state, HEADS, picture, pixels, bits) for picture, pixels in pairs]


@pytest.mark.parametrize("prefix", ["net.", "net._orig_mod."])
@pytest.mark.parametrize("bits", [(4.0,), (4.0, 3.0)])
@torch.inference_mode()
def test_a_fine_tuned_state_answers_as_the_equations(prefix, bits, tmp_path):
    backbone = load(f"timm:{NAME}", saved(tmp_path, apt_state(), prefix))
    levels = pictures(8, PX)
    image = normalised(levels, backbone)
    recipe = Recipe(PX, apt=bits)
    found = dict(zip(backbone.output_shapes(recipe), backbone.rung(recipe)(image), strict=True))
    assert len(found["tokens"].unique()) > 2
    for index, truth in enumerate(truths(levels, image, bits)):
        for key, value in truth.items():
            np.testing.assert_allclose(found[key][index].numpy(), value, **TOLERANCE, err_msg=key)


@torch.inference_mode()
def test_without_apt_it_is_the_plain_vit(tmp_path):
    state = load(f"timm:{NAME}", saved(tmp_path, apt_state()))
    torch.save(checkpoint(), tmp_path / "plain.pth")
    plain = load(f"timm:{NAME}", tmp_path / "plain.pth")
    assert plain.detail is None
    image = torch.randn(3, 3, PX, PX, generator=torch.Generator().manual_seed(1))
    own, whole = (one.rung(Recipe(PX))(image) for one in (state, plain))
    for found, truth in zip(own, whole, strict=True):
        assert torch.equal(found, truth)


def test_it_is_exported_checked_on_mixed_images_and_says_where_it_is_from(tmp_path, monkeypatch):
    checked, real = {}, parity.check_parity

    def check_parity(rung: str, *arguments: object, **options: object) -> list:
        checked[rung] = options["images"]
        return real(rung, *arguments, **options)

    monkeypatch.setattr(parity, "check_parity", check_parity)
    file = saved(tmp_path, apt_state())
    arguments = ["--model", f"timm:{NAME}", "--checkpoint", file, "--out", tmp_path / "onnx"]
    ran = run_export("rungs", *arguments, "--low", "apt=4")
    assert ran.code == 0, ran.err
    assert "last.ckpt was trained with patches of several sizes, for apt=BITS" in ran.err
    graphs = GraphSet.load(tmp_path / "onnx")
    assert graphs.about["source"]["sha256"] == sha256_file(file)
    assert checked["full"] is None
    kept = ask(graphs.low.file, checked["apt4"])["tokens"][:, 0]
    assert kept.min() == 1 + 4 and kept.max() == 1 + 16 and len(set(kept[:3])) > 1
    levels = pictures(8, PX)
    backbone = load(f"timm:{NAME}", file)
    image = normalised(levels, backbone)
    found = ask(graphs.low.file, image.numpy())
    for index, truth in enumerate(truths(levels, image, (4.0,))):
        for key, value in truth.items():
            np.testing.assert_allclose(found[key][index], value, **TOLERANCE, err_msg=key)


def without(key: str) -> Callable[[State], object]:
    return lambda state: state.pop(key)


def with_(key: str, *shape: int) -> Callable[[State], object]:
    return lambda state: state.update({key: torch.zeros(shape)})


MIXED = "mixed_patch."


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without(f"{MIXED}cls_token"), f"there is no {MIXED}cls_token, which a state of APT has"),
        (without(f"{MIXED}base_pos_embed"), f"there is no {MIXED}base_pos_embed, which a state"),
        (without("pos_embed"), "there is no pos_embed, which a state of APT has"),
        (without(f"{MIXED}zero_conv.bias"), f"there is no {MIXED}zero_conv.bias, which a state"),
        (without(f"{MIXED}patch_attn.weight"), f"there is no {MIXED}patch_attn.weight, which"),
        (without("blocks.1.norm1.weight"), "there is no blocks.1.norm1.weight, which"),
        (with_(f"{MIXED}more", 1), f"{MIXED}more is no tensor of APT; it maps onto nothing"),
        (with_("more", 1), "more is no tensor of a ViT or DeiT; it maps onto nothing"),
        (
            with_(f"{MIXED}patch_embed.proj.bias", WIDTH),
            f"{MIXED}patch_embed.proj.bias is not the same as patch_embed.proj.bias, which it is",
        ),
        (with_(f"{MIXED}base_pos_embed", 1, 5, WIDTH), f"{MIXED}base_pos_embed is not the same as"),
        (with_("cls_token", 1, 1, WIDTH), f"{MIXED}cls_token is not the same as cls_token"),
        (with_(f"{MIXED}zero_conv.weight", WIDTH, WIDTH, 1, 1), f"{MIXED}zero_conv.weight has the"),
        (with_(f"{MIXED}patch_attn.bias", 3), f"({WIDTH},) fits the class token"),
    ],
)
def test_what_is_not_such_a_state_is_refused_by_its_tensor(change, message, tmp_path):
    state = apt_state()
    change(state)
    with pytest.raises(UsageError) as caught:
        load(f"timm:{NAME}", saved(tmp_path, state))
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"--checkpoint {tmp_path / 'last.ckpt'}")


class Settings(dict):
    """What a training script may keep beside its weights."""


def test_a_file_of_more_than_tensors_says_how_to_keep_those_alone(tmp_path, monkeypatch):
    file = saved(tmp_path, apt_state(), hyper_parameters=Settings(lr=1))
    ran = run_export("rungs", "--model", f"timm:{NAME}", "--checkpoint", file)
    assert ran.code == 2 and "Traceback" not in ran.err
    with pytest.raises(UsageError) as caught:
        load(f"timm:{NAME}", file)
    said = str(caught.value)
    assert "it holds a " in said and "Settings, which would be run" in said and "\n" not in said
    (program,) = [part for part in said.split('"') if part.startswith("import torch;")]
    monkeypatch.chdir(tmp_path)
    exec(program)  # the line that it advises
    assert load(f"timm:{NAME}", tmp_path / "weights.pth").detail is not None
