"""`apt` keeps the tokens, and gives the answers, that the equations in NumPy give."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import skimage.data
import torch
from torch import nn

from bundle.alignment import Alignment
from bundle.recipe import Recipe
from export import onnx_graph
from export.align import bake_alignment
from export.backbones import Backbone
from export.errors import UsageError
from export.graphs import CHOICES_MAY_DIFFER
from export.parity import ParityError, check_parity, mixed_images
from export.pretrained import pretrained
from export.recipes.patch_sizes import BINS, bins_of
from export.recipes.quantise import quantise
from export.recipes.smaller import downsample
from export.request import Texts
from export.static_vit import IMAGENET_MEAN, IMAGENET_STD
from tests.unit.export_tiny import run_export, save_tiny, save_tokenizer
from tests.unit.patch_sizes_models import (
    MODELS,
    PATCH,
    PX,
    THREE,
    TWO,
    backbone_of,
    by_the_equations,
    normalised,
    pictures,
    px_of,
    rung_of,
)
from tests.unit.patch_sizes_reference import bins, choose, entropies
from tests.unit.quantised_files import ask, cosines

pytestmark = pytest.mark.usefixtures("remembered_exports")

# Of all opsets that there may be, and with each kind of tokens.
OPSETS = {"ViT": 18, "DeiT, two heads": 19, "DINOv2": 20, "DINOv2 with registers": 21}


@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_torch_answers_as_the_equations(name, tmp_path):
    backbone = backbone_of(name, tmp_path)
    levels = pictures(8, px_of(name))
    module, names = rung_of(name, backbone), list(backbone.output_shapes(Recipe.parse(TWO)))
    found = dict(zip(names, module(normalised(levels, backbone)), strict=True))
    assert found["tokens"].dtype == found["patches"].dtype == torch.int32
    kept = found["tokens"][:, 0].tolist()
    scales = 2 + (MODELS[name][2] == THREE)
    assert len(set(kept)) > 3 and len(found["patches"].unique()) == scales
    for index, picture in enumerate(levels):
        for key, truth in by_the_equations(name, backbone, picture).items():
            np.testing.assert_allclose(
                found[key][index].numpy(), truth, rtol=1e-4, atol=1e-4, err_msg=f"{key} {index}"
            )


@pytest.fixture(scope="module", params=OPSETS)
def exported(request, tmp_path_factory) -> tuple[str, Backbone, Path]:
    folder = tmp_path_factory.mktemp("apt")
    backbone = backbone_of(request.param, folder)
    module, file = rung_of(request.param, backbone), folder / "graph.onnx"
    names = list(backbone.output_shapes(Recipe.parse(TWO)))
    onnx_graph.export_onnx(module, px_of(request.param), names, file, OPSETS[request.param])
    return request.param, backbone, file


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_the_graph_answers_as_torch_at_any_batch(exported, batch):
    name, backbone, file = exported
    images = normalised(pictures(8, px_of(name))[::-1][:batch].copy(), backbone)
    with torch.inference_mode():
        truths = rung_of(name, backbone)(images)
    for (key, answer), truth in zip(ask(file, images.numpy()).items(), truths, strict=True):
        np.testing.assert_allclose(answer, truth, rtol=1e-4, atol=1e-4, err_msg=key)


def test_an_images_answer_does_not_depend_on_its_batch_mates(exported):
    name, backbone, file = exported
    images = normalised(pictures(8, px_of(name)), backbone).numpy()
    together = ask(file, images)
    for index in range(8):
        alone = ask(file, images[index : index + 1])
        for key, answer in alone.items():
            # Products of other sizes add up in another order: that, and no more.
            np.testing.assert_allclose(answer[0], together[key][index], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("broken", [0, 5])
def test_numbers_that_are_none_spoil_no_other_answer(exported, broken):
    name, backbone, file = exported
    images = normalised(pictures(8, px_of(name)), backbone).numpy()
    before = ask(file, images)
    images[broken] = np.nan
    others = [index for index in range(8) if index != broken]
    for key, answer in ask(file, images).items():
        np.testing.assert_allclose(answer[others], before[key][others], rtol=2e-5, atol=2e-5)
    with torch.inference_mode():
        in_torch = rung_of(name, backbone)(torch.from_numpy(images))
    assert all(torch.isfinite(answer[others]).all() for answer in in_torch)


def test_no_attention_is_fused_and_versions_are_the_least(exported, tmp_path):
    name, _, file = exported
    graph = onnx.load(file)
    onnx_graph.check_versions(graph)
    assert [entry.version for entry in graph.opset_import] == [OPSETS[name]]
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    for model in (graph, onnx.load(tmp_path / "optimised.onnx")):
        kinds = {node.op_type for node in model.graph.node}
        assert "Softmax" in kinds and not [kind for kind in kinds if "Attention" in kind]


def test_mixed_images_show_a_graph_whose_coarse_cells_are_wrong(exported, tmp_path):
    name, backbone, file = exported
    px, recipe = px_of(name), Recipe.parse(MODELS[name][2]).at(px_of(name))
    model = onnx.load(file)
    tables = [item for item in model.graph.initializer if item.name.startswith("own.tables.")]
    assert len(tables) == len(recipe.apt)
    for table in tables:
        values = onnx.numpy_helper.to_array(table)
        table.CopyFrom(onnx.numpy_helper.from_array(values[:, ::-1].copy(), table.name))
    (tmp_path / "wrong.onnx").write_bytes(model.SerializeToString())
    transform = backbone.preprocessing(px)
    mixed = mixed_images(8, px, 0, transform.mean, transform.std)
    module, shapes = rung_of(name, backbone), backbone.output_shapes(recipe)

    @torch.inference_mode()
    def truth(images: torch.Tensor) -> dict[str, torch.Tensor]:
        return dict(zip(shapes, module(images), strict=True))

    def check(graph: Path, images: np.ndarray | None = None) -> list:
        return check_parity(
            "apt", graph, px, shapes, truth, may_differ=CHOICES_MAY_DIFFER, images=images
        )

    assert not any(record.near_ties for record in check(file, mixed))
    check(tmp_path / "wrong.onnx")  # noise alone has no flat areas
    with pytest.raises(ParityError, match="embedding: differs"):
        check(tmp_path / "wrong.onnx", mixed)


# --- no coarse cell, and nothing else ------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_without_a_coarse_cell_it_is_the_plain_model_bit_for_bit(name, tmp_path):
    backbone = backbone_of(name, tmp_path)
    images = normalised(pictures(8, px_of(name)), backbone)
    module = rung_of(name, backbone, "apt=0/0" if MODELS[name][2] == THREE else "apt=0")
    *answers, tokens, patches = module(images)
    plain = backbone.rung(Recipe(px_of(name)))(images)
    assert patches.eq(1).all() and tokens.eq(tokens[0]).all()
    for answer, truth in zip(answers, plain, strict=True):
        assert torch.equal(answer, truth)


def test_without_a_coarse_cell_the_graph_is_the_plain_one_bit_for_bit(tmp_path):
    backbone = backbone_of("ViT", tmp_path)
    images = normalised(pictures(8, PX)[:1].repeat(8, axis=0), backbone).numpy()
    found = []
    for recipe in (Recipe.parse(THREE).at(PX), Recipe(PX)):
        names, file = list(backbone.output_shapes(recipe)), tmp_path / "graph.onnx"
        onnx_graph.export_onnx(backbone.rung(recipe).eval(), PX, names, file, 18)
        found.append(ask(file, images))
    own, plain = found
    assert own["patches"].max() == 1
    for key, truth in plain.items():
        np.testing.assert_array_equal(own[key], truth, err_msg=key)


@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_flat_images_have_a_token_for_each_coarsest_cell(name, tmp_path):
    backbone = backbone_of(name, tmp_path)
    flat = np.full((2, 3, px_of(name), px_of(name)), 120, np.uint8)
    module = rung_of(name, backbone, "apt=9/9" if MODELS[name][2] == THREE else "apt=9")
    *_, tokens, patches = module(normalised(flat, backbone))
    scale = len(module.bits)
    assert patches.eq(2**scale).all()
    cells = patches.shape[1] // 4**scale
    special = {"Dei": 2, "DIN": 1 + 3 * ("registers" in name)}.get(name[:3], 1)
    assert tokens.tolist() == [[cells + special]] * 2


# --- entropies -----------------------------------------------------------------------------------


def gray(rows: list[list[int]]) -> np.ndarray:
    """A picture of one channel of levels, three times."""
    return np.repeat(np.array(rows, dtype=np.uint8)[None], 3, axis=0)


HALVES = [[0] * 4 + [200] * 4] * 8
CHECKERS = [[(x + y) % 2 * 255 for x in range(8)] for y in range(8)]
RAMP = [[x * 30 for x in range(8)]] * 8
ALL_DIFFER = [[3 * (8 * y + x) for x in range(8)] for y in range(8)]
BY_HAND = {"flat": ([[77] * 8] * 8, 0), "halves": (HALVES, 1), "checkers": (CHECKERS, 1)}
BY_HAND |= {"ramp": (RAMP, 3), "all differ": (ALL_DIFFER, 6)}


@pytest.mark.parametrize("case", BY_HAND)
def test_entropies_by_hand(case, tmp_path):
    rows, bits = BY_HAND[case]
    levels = np.tile(gray(rows), (1, PX // 8, PX // 8))
    assert entropies(levels, 8) == pytest.approx(bits, abs=1e-6)
    backbone = backbone_of("ViT", tmp_path)
    image = normalised(levels[None], backbone)
    for apt, cell in ((bits + 0.001, 2), (max(0, bits - 0.001), 1), (0, 1)):
        sides = rung_of("ViT", backbone, f"apt={apt:g}").sides(image)
        assert sides.eq(cell).all(), apt


# Where 512 / 255 taken first goes wrong, and white: 254.97 of 255.
PINNED = {(0, 250, 19): 298, (1, 215, 0): 253, (8, 188, 243): 281, (9, 102, 207): 172}
PINNED |= {(255, 255, 255): 511, (0, 0, 0): 0, (254, 255, 255): 511, (1, 1, 1): 2}


class _Bins(nn.Module):
    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return bins_of(image).to(torch.int32)


@pytest.fixture(scope="module")
def bins_graph(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("bins") / "bins.onnx"
    onnx_graph.export_onnx(_Bins(), 64, ["bins"], file, 18)
    return file


def test_each_level_is_in_its_bin_in_torch_and_in_the_graph(bins_graph):
    hard = np.array(list(PINNED), dtype=np.uint8).T  # (3, n)
    assert bins(hard[:, :, None])[:, 0].tolist() == list(PINNED.values())
    rng = np.random.default_rng(0)
    levels = rng.integers(0, 256, (100, 3, 64, 64), dtype=np.uint8)
    levels[0, :, 0, : len(PINNED)] = hard
    # Levels whose gray lies on the border of two bins, to within what FP32 holds.
    every = np.stack(np.meshgrid(*[np.arange(256)] * 3, indexing="ij")).reshape(3, -1)
    border = every[:, np.array([2989, 5870, 1140]) @ every % 159375 == 0][:, : 64 * 64]
    levels[1].reshape(3, -1)[:, : border.shape[1]] = border
    truth = np.stack([bins(picture) for picture in levels])
    assert truth.max() < BINS and border.shape[1] > 100
    # As an image comes back from being normalised: its levels are whole to within rounding.
    mean, std = (np.reshape(v, (3, 1, 1)).astype(np.float32) for v in (IMAGENET_MEAN, IMAGENET_STD))
    image = ((levels / 255 - mean) / std).astype(np.float32) * std + mean
    np.testing.assert_array_equal(bins_of(torch.from_numpy(image)).numpy(), truth)
    np.testing.assert_array_equal(ask(bins_graph, image)["bins"], truth)


def test_photographs_have_the_entropies_of_their_stored_levels(tmp_path):
    backbone, px = backbone_of("MSN", tmp_path), 384  # normalised by ImageNet's numbers
    photographs = [skimage.data.astronaut(), skimage.data.coffee(), skimage.data.rocket()]
    for photograph in photographs:
        levels = np.ascontiguousarray(photograph[:px, :px].transpose(2, 0, 1))
        image = normalised(levels[None], backbone)
        module = rung_of("MSN", backbone)
        module.px, module.patch_px = px, 8
        for bits in ((5.5,), (5.75, 4.0), (3.0, 5.0)):
            module.bits = bits
            truth = np.ones((px // 8, px // 8), dtype=int)
            for scale, chosen in enumerate(choose(levels, 8, bits)):
                truth[chosen.repeat(2**scale, 0).repeat(2**scale, 1)] = 2**scale
            np.testing.assert_array_equal(module.sides(image)[0].numpy(), truth)
            assert len(np.unique(truth)) == 1 + len(bits)


def test_entropies_of_a_smaller_image_are_those_of_whole_levels(tmp_path):
    backbone, px = backbone_of("ViT", tmp_path), PX // 2
    module = backbone.rung(Recipe.parse("px=16,apt=4"))
    transform = backbone.preprocessing(PX)
    image = torch.from_numpy(mixed_images(8, PX, 0, transform.mean, transform.std))
    smaller = downsample(image, px) * module.std + module.mean
    levels = (smaller * 255).round().clamp(0, 255).to(torch.uint8).numpy()
    *_, tokens, patches = module(image)
    for index, picture in enumerate(levels):
        fine, coarse = choose(picture, PATCH, (4.0,))
        assert int(tokens[index]) == 1 + fine.sum() + coarse.sum()
        truth = np.where(fine, 1, 2).ravel()
        np.testing.assert_array_equal(patches[index].numpy(), truth)
    assert tokens.unique().tolist() == [1 + 4, 1 + 2 + 8, 1 + 16]


# --- heads, fewer bits, alignment ----------------------------------------------------------------


@torch.inference_mode()
def test_a_linear_head_and_one_of_texts_follow_the_embedding(tmp_path):
    backbone = backbone_of("DINOv2", tmp_path).with_probe(nn.Linear(16, 5), tuple("abcde"))
    images = normalised(pictures(4, 56), backbone)
    embedding, _, logits, tokens, _ = rung_of("DINOv2", backbone)(images)
    torch.testing.assert_close(logits, backbone.probe(embedding))
    assert len(tokens.unique()) > 1
    saved = save_tokenizer(save_tiny(tmp_path / "clip", "CLIPModel", image_size=PX))
    backbone = pretrained(str(saved), Texts(("cat", "dog", "emu")))
    images = normalised(pictures(4, PX), backbone)
    embedding, _, logits, tokens, _ = backbone.rung(Recipe.parse(TWO).at(PX))(images)
    torch.testing.assert_close(embedding.norm(dim=1), torch.ones(4))
    torch.testing.assert_close(logits, backbone.probe(embedding))
    assert len(tokens.unique()) > 1


def test_static_int8_keeps_the_same_tokens(exported):
    name, backbone, file = exported
    images = normalised(pictures(8, px_of(name)), backbone).numpy()
    model = quantise(onnx.load(file), images)
    assert [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    whole, cheap = ask(file, images), ask(model, images)
    assert not np.array_equal(whole["embedding"], cheap["embedding"])
    assert cosines(whole["embedding"], cheap["embedding"]).min() > 0.95
    for count in ("tokens", "patches"):
        np.testing.assert_array_equal(whole[count], cheap[count])


def an_alignment(backbone: Backbone) -> Alignment:
    width = backbone.embedding_dim
    weights = np.random.default_rng(2).normal(size=((1 + backbone.layers) * width, width))
    arrays = weights.astype(np.float32), np.ones(width, np.float32)
    seen = np.array(["c" * 64]), np.zeros((1, width), np.float32)
    return Alignment(*arrays, "a", "b", TWO, "", *seen)


def test_an_alignment_leaves_the_counts_as_they_are(exported):
    name, backbone, file = exported
    if name != "ViT":  # the others' heads read more than the embedding
        with pytest.raises(UsageError, match="align needs a linear head"):
            bake_alignment(onnx.load(file), an_alignment(backbone))
        return
    aligned = bake_alignment(onnx.load(file), an_alignment(backbone))
    images = normalised(pictures(8, PX), backbone).numpy()
    before, after = ask(file, images), ask(aligned, images)
    assert list(after) == list(before) and not np.allclose(before["logits"], after["logits"])
    for count in ("tokens", "patches"):
        assert after[count].dtype == np.int32
        np.testing.assert_array_equal(before[count], after[count])


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "px", "message"),
    [
        ("apt=5", 36, "cells of 8 px do not divide 36 px; give px=32 or px=40"),
        ("px=12,apt=5", 32, "cells of 8 px do not divide 12 px; give px=8 or px=16"),
        ("apt=5/4", 40, "cells of 16 px do not divide 40 px; give px=32 or px=48"),
        ("apt=5/4", 8, "cells of 16 px do not divide 8 px; give px=16"),
        ("apt=5,tome=3", 32, "tome and apt both take tokens away; leave tome out"),
        ("apt=5,halt=1", 32, "apt and halt both take tokens away; leave apt out"),
        ("apt=5,int8", 32, "use int8=static, or none"),
        ("apt=5,fp16", 32, "needs FP32; use int8=static, or none"),
    ],
)
def test_what_cannot_be_is_one_line(recipe, px, message, tmp_path):
    backbone = backbone_of("ViT", tmp_path)
    backbone.check(Recipe.parse("apt=5"), 32)
    with pytest.raises(UsageError) as caught:
        backbone.check(Recipe.parse(recipe), px)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("class_name", "title"),
    [
        ("BeitModel", "BEiT"),
        ("Data2VecVisionModel", "Data2Vec"),
        ("DINOv3ViTModel", "DINOv3"),
        ("SiglipVisionModel", "SigLIP"),
    ],
)
def test_families_whose_tokens_carry_no_positions_are_refused(class_name, title, tmp_path):
    ran = run_export("rungs", "--model", save_tiny(tmp_path, class_name), "--low", "apt=5")
    assert ran.code == 2 and "Traceback" not in ran.err
    assert f"px=16,apt=5 is not for {title}: " in " ".join(ran.err.split())


@pytest.mark.parametrize("apt", ["9.1", "-1", "nan", "5/4/3", "", "five"])
def test_bits_that_are_none_are_refused(apt):
    ran = run_export("rungs", "--model", "static-vit", "--low", f"apt={apt}")
    assert ran.code == 2 and "Traceback" not in ran.err
    assert "must be one or two numbers of bits from 0 to 9" in " ".join(ran.err.split())
