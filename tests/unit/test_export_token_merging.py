from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from export import onnx_graph
from export.backbones import RungModule
from export.families import blocks
from export.onnx_graph import check_versions
from export.parity import sample_images
from export.pretrained import pretrained
from export.recipes.smaller import bake_positions
from export.recipes.token_merging import MergingVit, match, merge
from tests.unit.export_tiny import LAYERS, PATCH, PX, WIDTH, save_tiny

pytestmark = pytest.mark.usefixtures("remembered_exports")

PATCHES = (PX // PATCH) ** 2
BARE = ("ViTModel", "DeiTModel", "Dinov2Model")
WITH_HEAD = (
    "ViTForImageClassification",
    "DeiTForImageClassificationWithTeacher",
    "Dinov2ForImageClassification",
)
R = 3


_SAVED: dict[str, PreTrainedModel] = {}


def tiny(class_name: str, folder: Path) -> PreTrainedModel:
    """A copy of the class's model, which is saved and read once."""
    if class_name not in _SAVED:
        _SAVED[class_name] = pretrained(str(save_tiny(folder / class_name, class_name))).model
    return copy.deepcopy(_SAVED[class_name])


def special_tokens(model: PreTrainedModel) -> int:
    return 2 if model.config.model_type == "deit" else 1


@torch.inference_mode()
def run(model: PreTrainedModel, images: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    """(hidden state before and after each block, logits or normalised CLS)."""
    output = model(images, output_hidden_states=True)
    answer = output.logits if "logits" in output else output.last_hidden_state[:, 0]
    return list(output.hidden_states), answer


@torch.inference_mode()
def run_merging(
    model: PreTrainedModel, r: int, images: torch.Tensor
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """As `run`, of the model that merges r pairs in each block."""
    module = MergingVit(model, images.shape[2], r, None)
    hidden = []
    module.blocks[0].register_forward_pre_hook(lambda _, given: hidden.append(given[0]))
    for block in module.blocks:
        block.register_forward_hook(lambda _, given, found: hidden.append(found[0]))
    embedding, cls_layers, *logits = module(images)
    assert torch.equal(cls_layers, torch.stack([tokens[:, 0] for tokens in hidden], dim=1))
    return hidden, logits[0] if logits else embedding


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.from_numpy(sample_images(8, PX, seed=3))


def merge_slowly(
    tokens: torch.Tensor, sizes: list[float], keys: torch.Tensor, special: int, pairs: int
) -> tuple[torch.Tensor, list[float]]:
    """One image, token by token, as the paper tells it: (N, D) and N sizes to what is left."""
    left = range(special, len(tokens), 2)
    right = range(special + 1, len(tokens), 2)
    partner, likeness = {}, {}
    for i in left:
        for j in right:
            cosine = float(keys[i] @ keys[j] / (keys[i].norm() * keys[j].norm()))
            if i not in likeness or cosine > likeness[i]:
                partner[i], likeness[i] = j, cosine
    leaving = sorted(left, key=lambda i: -likeness[i])[:pairs]
    merged, merged_sizes = [], []
    for j in range(len(tokens)):
        if j in leaving:
            continue
        group = [j, *(i for i in leaving if partner[i] == j)]
        size = sum(sizes[i] for i in group)
        merged.append(sum(sizes[i] * tokens[i] for i in group) / size)
        merged_sizes.append(size)
    return torch.stack(merged), merged_sizes


@pytest.mark.parametrize(
    ("tokens", "special", "pairs"), [(17, 1, 3), (18, 2, 8), (16, 1, 7), (5, 1, 1), (4, 2, 1)]
)
def test_merging_equals_the_slow_reference(tokens, special, pairs):
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(4, tokens, 6, generator=generator)
    keys = torch.randn(4, tokens, 5, generator=generator)
    sizes = torch.randint(1, 5, (4, tokens, 1), generator=generator).float()
    merged, merged_sizes = merge(hidden, sizes, match(keys, special, pairs))
    assert merged.shape == (4, tokens - pairs, 6)
    for image in range(4):
        truth, truth_sizes = merge_slowly(
            hidden[image], sizes[image, :, 0].tolist(), keys[image], special, pairs
        )
        torch.testing.assert_close(merged[image], truth)
        assert merged_sizes[image, :, 0].tolist() == truth_sizes


def test_sizes_sum_to_the_patches_and_special_tokens_stay_as_they_are():
    generator = torch.Generator().manual_seed(0)
    hidden, sizes = torch.randn(3, 18, 6, generator=generator), torch.ones(3, 18, 1)
    before = hidden
    # All keys alike: a special token that took part would be merged at once.
    for pairs in (8, 4, 2, 1):
        hidden, sizes = merge(hidden, sizes, match(torch.ones(*hidden.shape[:2], 4), 2, pairs))
        assert sizes.sum(dim=1).tolist() == [[18.0]] * 3
        assert sizes[:, :2].eq(1).all()
        assert torch.equal(hidden[:, :2], before[:, :2])
    assert hidden.shape == (3, 3, 6)
    torch.testing.assert_close(hidden[:, 2], before[:, 2:].mean(dim=1))


@pytest.mark.parametrize("class_name", BARE)
def test_a_block_merges_by_its_keys_between_attention_and_mlp(class_name, tmp_path, images):
    model = tiny(class_name, tmp_path)
    special = special_tokens(model)
    before, after = run_merging(model, R, images)[0][:2]
    block = blocks(model)[0]
    dinov2 = class_name == "Dinov2Model"
    with torch.inference_mode():
        normed = (block.norm1 if dinov2 else block.layernorm_before)(before)
        attended = block.attention(normed)[0]
        attended = before + (block.layer_scale1(attended) if dinov2 else attended)
        heads = block.attention.k_proj(normed).chunk(block.attention.num_attention_heads, dim=2)
        keys = sum(heads) / len(heads)
        for image in range(len(images)):
            ones = [1.0] * (special + PATCHES)
            merged, _ = merge_slowly(attended[image], ones, keys[image], special, R)
            normed = (block.norm2 if dinov2 else block.layernorm_after)(merged)
            change = block.mlp(normed)
            truth = merged + (block.layer_scale2(change) if dinov2 else change)
            torch.testing.assert_close(after[image], truth, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("class_name", BARE + WITH_HEAD)
def test_merging_nothing_is_the_librarys_forward(class_name, tmp_path, images):
    model = tiny(class_name, tmp_path)
    plain = RungModule(model, PX, None)(images)
    own = MergingVit(model, PX, 0, None)(images)
    assert len(own) == (2 if class_name in BARE else 3)
    for ours, librarys in zip(own, plain, strict=True):
        torch.testing.assert_close(ours, librarys, rtol=1e-5, atol=1e-5)


def test_a_probe_takes_the_place_of_the_models_own_head(tmp_path, images):
    probe, model = nn.Linear(WIDTH, 5), tiny("ViTForImageClassification", tmp_path)
    embedding, _, logits = MergingVit(model, PX, R, probe)(images)
    torch.testing.assert_close(logits, probe(embedding))


@pytest.mark.parametrize("class_name", BARE + WITH_HEAD)
def test_identical_patches_merge_without_a_trace(class_name, tmp_path):
    # What a merged token stands for must count in the attention of the next block, in the next
    # average, and in the mean that DINOv2's head takes: only then nothing changes.
    model = tiny(class_name, tmp_path)
    special = special_tokens(model)
    with torch.no_grad():
        model.base_model.embeddings.position_embeddings[:, special:] = 0
    dark, bright = -torch.ones(3, PATCH, PATCH), torch.linspace(0, 2, 48).view(3, PATCH, PATCH)
    image = dark.repeat(1, PX // PATCH, PX // PATCH)
    image[:, :PATCH] = bright.repeat(1, 1, PX // PATCH)
    plain, answer = run(model, image[None])
    merged, merged_answer = run_merging(model, R, image[None])
    assert [hidden.shape[1] for hidden in merged] != [hidden.shape[1] for hidden in plain]
    torch.testing.assert_close(merged_answer, answer, rtol=1e-4, atol=1e-5)
    for few, all_tokens in zip(merged, plain, strict=True):
        torch.testing.assert_close(few[:, :special], all_tokens[:, :special], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("class_name", BARE)
@pytest.mark.parametrize(("r", "patches"), [(1, [15, 14]), (3, [13, 10]), (1000, [8, 4])])
def test_each_block_merges_so_many_pairs_and_at_most_half(class_name, r, patches, tmp_path, images):
    model = tiny(class_name, tmp_path)
    merged, _ = run_merging(model, r, images)
    special = special_tokens(model)
    assert [hidden.shape[1] - special for hidden in merged] == [PATCHES, *patches]


def test_a_single_patch_is_the_plain_model(tmp_path, images):
    model = bake_positions(tiny("Dinov2ForImageClassification", tmp_path), PATCH)
    patch = images[:, :, :PATCH, :PATCH]
    torch.testing.assert_close(run_merging(model, R, patch)[1], run(model, patch)[1])


def test_the_given_model_stays_as_it_was(tmp_path, images):
    model = tiny("ViTForImageClassification", tmp_path)
    _, answer = run(model, images)
    assert not torch.allclose(answer, run_merging(model, R, images)[1])
    assert torch.equal(run(model, images)[1], answer)


OUTPUTS = ["embedding", "cls_layers", "logits"]


@pytest.fixture(scope="module", params=WITH_HEAD)
def exported(request, tmp_path_factory) -> tuple[MergingVit, Path]:
    folder = tmp_path_factory.mktemp("merging")
    module = MergingVit(tiny(request.param, folder), PX, R, None)
    # Both ends of the range of opsets.
    opset = 21 if request.param.startswith("ViT") else 18
    onnx_graph.export_onnx(module, PX, OUTPUTS, folder / "graph.onnx", opset)
    return module, folder / "graph.onnx"


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_the_graph_equals_torch_at_any_batch(exported, batch, images):
    module, file = exported
    session = ort.InferenceSession(file, providers=["CPUExecutionProvider"])
    answers = session.run(OUTPUTS, {"image": images[:batch].numpy()})
    with torch.inference_mode():
        truths = module(images[:batch])
    for answer, truth in zip(answers, truths, strict=True):
        np.testing.assert_allclose(answer, truth.numpy(), rtol=1e-4, atol=1e-4)


def test_the_graph_has_standard_operators_and_no_shape_that_depends_on_the_image(exported):
    graph = onnx.load(exported[1])
    check_versions(graph)
    assert graph.ir_version == {18: 8, 21: 10}[graph.opset_import[0].version]
    kinds = {node.op_type for node in graph.graph.node}
    assert not kinds & {"NonZero", "Compress", "Unique", "Loop", "If", "Scan", "SequenceAt"}
    inferred = onnx.shape_inference.infer_shapes(graph, strict_mode=True, data_prop=True)
    for value in inferred.graph.output:
        batch, *rest = value.type.tensor_type.shape.dim
        assert batch.dim_param and all(dim.dim_value > 0 for dim in rest)


def test_a_broken_image_spoils_no_other_answer(exported, images):
    session = ort.InferenceSession(exported[1], providers=["CPUExecutionProvider"])
    broken = images.numpy().copy()
    broken[2] = np.nan
    others = [0, 1, 3, 4, 5, 6, 7]
    before = session.run(OUTPUTS, {"image": images.numpy()})
    after = session.run(OUTPUTS, {"image": broken})
    for whole, spoilt in zip(before, after, strict=True):
        np.testing.assert_array_equal(whole[others], spoilt[others])
        assert np.isnan(spoilt[2]).any()


def test_weights_stay_constants_that_can_be_quantised(tmp_path):
    model = tiny("Dinov2ForImageClassification", tmp_path)

    def weighted_products(r: int) -> int:
        module = MergingVit(model, PX, r, None)
        graph = onnx_graph.export_onnx(module, PX, OUTPUTS, tmp_path / "graph.onnx", 18).graph
        constants = {tensor.name for tensor in graph.initializer}
        products = [node for node in graph.node if node.op_type in ("MatMul", "Gemm")]
        return sum(node.input[1] in constants for node in products)

    assert weighted_products(R) == weighted_products(0) == 6 * LAYERS + 1  # the head


class _Match(nn.Module):
    """The matching alone, each pixel a token and its channels the key."""

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(match(image.flatten(2).transpose(1, 2), 1, 5))


def test_equal_pairs_are_taken_in_the_order_of_the_tokens_in_torch_and_in_the_graph(tmp_path):
    # Keys along the axes: their cosines are exactly -1, 0 or 1, so that nearly all are equal.
    generator = torch.Generator().manual_seed(0)
    axes = torch.cat([torch.eye(3), -torch.eye(3)])
    images = axes[torch.randint(6, (4, 64), generator=generator)].transpose(1, 2).view(4, 3, 8, 8)
    names = ["sources", "targets", "kept"]
    onnx_graph.export_onnx(_Match(), 8, names, tmp_path / "match.onnx", 18)
    session = ort.InferenceSession(tmp_path / "match.onnx", providers=["CPUExecutionProvider"])
    answers = session.run(names, {"image": images.numpy()})
    for answer, truth in zip(answers, _Match()(images), strict=True):
        np.testing.assert_array_equal(answer, truth.numpy())
    keys = images.flatten(2).transpose(1, 2)
    for image in range(4):
        left, right = keys[image, 1::2], keys[image, 2::2]
        first = [i for i in range(len(left)) if any(torch.equal(left[i], key) for key in right)][:5]
        assert answers[0][image].tolist() == [64 * image + 1 + 2 * i for i in first]
