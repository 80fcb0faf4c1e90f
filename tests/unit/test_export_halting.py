"""Halting tokens answer as A-ViT's equations, written down twice in NumPy, image by image."""

from __future__ import annotations

import copy
import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from rich.console import Console

from bundle.graphs import Graph, GraphSet
from bundle.recipe import Recipe, RecipeError
from export import onnx_graph
from export.align import align, bake_alignment
from export.backbones import Backbone, RungModule
from export.errors import UsageError
from export.graphs import export_graphs
from export.kept_tokens import kept_tokens, nothing_saved
from export.onnx_graph import COUNTS, check_versions
from export.parity import sample_images, structure_failures
from export.pretrained import pretrained
from export.recipes.halting import public_depth
from export.recipes.quantise import quantise
from export.request import GraphsRequest
from report.terminal import Bars
from routing import RungRecord
from tests.unit.export_tiny import LAYERS, PATCH, PX, save_tiny
from tests.unit.halting_equations import masking, removing
from tests.unit.quantised_files import ask, cosines
from tests.unit.test_export_align import alignment

pytestmark = pytest.mark.usefixtures("remembered_exports")

HEAD = "ViTForImageClassification"
BLOCKS = 6
PATCHES = (PX // PATCH) ** 2
HALT = Recipe(PX, halt=0.0)
IMAGES = sample_images(8, PX, seed=3)
GATES = ((1.0, 2.0), (4.0, 8.0))
NEVER, ALWAYS = (1.0, 1e6), (1.0, -1e6)
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}
# What batch mates may change, of values near 10: products are summed in another order.
ROUNDING = 1e-5

_SAVED: dict[str, Backbone] = {}


def halting(
    folder: Path, gate: tuple[float, float] | None = GATES[0], class_name: str = HEAD
) -> Backbone:
    """A copy of a tiny model of six blocks that came with a gate; saved and read once."""
    if class_name not in _SAVED:
        saved = save_tiny(folder / class_name, class_name, num_hidden_layers=BLOCKS)
        _SAVED[class_name] = pretrained(str(saved))
    found = _SAVED[class_name]
    return replace(found, model=copy.deepcopy(found.model), gate=gate)


@torch.inference_mode()
def in_torch(backbone: Backbone, recipe: Recipe = HALT, images=IMAGES) -> dict[str, np.ndarray]:
    answers = backbone.rung(recipe).eval()(torch.from_numpy(images))
    found = zip(backbone.output_shapes(recipe), answers, strict=True)
    return {name: answer.numpy() for name, answer in found}


def exported(backbone: Backbone, file: Path, recipe: Recipe = HALT) -> onnx.ModelProto:
    names = list(backbone.output_shapes(recipe))
    return onnx_graph.export_onnx(backbone.rung(recipe), PX, names, file, 20)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> tuple[Backbone, onnx.ModelProto]:
    """A model under a gate by which tokens halt at many blocks, and its graph."""
    folder = tmp_path_factory.mktemp("mixed")
    backbone = halting(folder)
    return backbone, exported(backbone, folder / "halt.onnx")


def close(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], case: object) -> None:
    assert found.keys() >= expected.keys()
    for name, value in expected.items():
        if name in COUNTS:
            np.testing.assert_array_equal(found[name], value, err_msg=f"{case}: {name}")
        else:
            np.testing.assert_allclose(found[name], value, **TOLERANCE, err_msg=f"{case}: {name}")


# --- the equations -------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", GATES)
def test_removing_and_masking_answer_as_the_equations(gate, tmp_path):
    backbone = halting(tmp_path, gate)
    removed, masked = (make(backbone.model, gate, IMAGES) for make in (removing, masking))
    # Some images are done early and some never are, and tokens leave at several blocks.
    alive = removed["tokens"]
    assert (alive[:, 3] == 0).any() and (alive[:, -1] > 1).any()
    assert len({tuple(row) for row in alive}) == len(IMAGES)
    assert len(np.unique(removed["patches"])) >= 3
    counted = masked.pop("counted")
    close(in_torch(backbone), {**masked, **removed}, "removed")
    close(in_torch(backbone, Recipe(PX)), masked, "masked")
    # As published, tokens go on after their image is done.
    assert (removed["patches"] <= counted).all() and removed["patches"].sum() < counted.sum()
    found = public_depth(backbone.rung(HALT), torch.from_numpy(IMAGES))
    assert found == pytest.approx(counted.mean(), rel=1e-6)
    close(masked, {name: removed[name] for name in masked}, "the two")


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_the_graph_answers_as_the_equations_at_any_batch(batch, mixed):
    backbone, graph = mixed
    assert structure_failures("halt", graph, PX, backbone.output_shapes(HALT)) == []
    found = ask(graph, IMAGES[:batch])
    close(found, removing(backbone.model, backbone.gate, IMAGES[:batch]), batch)
    assert [found[name].dtype for name in COUNTS] == [np.int32] * 2


def test_the_last_block_that_runs_ends_every_token(tmp_path):
    backbone, recipe = halting(tmp_path), Recipe(PX, depth=2, halt=0.0)
    shallow = copy.deepcopy(backbone.model)
    shallow.config.num_hidden_layers = 2
    expected = removing(shallow, backbone.gate, IMAGES)
    close(in_torch(backbone, recipe), expected, "torch")
    graph = exported(backbone, tmp_path / "graph.onnx", recipe)
    assert structure_failures("halt", graph, PX, backbone.output_shapes(recipe)) == []
    close(ask(graph, IMAGES), expected, "graph")


FAMILIES = (
    *("ViTModel", "DeiTModel", "Dinov2Model", "CLIPVisionModel", HEAD),
    *("DeiTForImageClassification", "Dinov2WithRegistersModel", "CLIPVisionModelWithProjection"),
    *("ViTMSNForImageClassification", "ViTMAEModel"),
)


@pytest.mark.parametrize("class_name", FAMILIES)
def test_a_gate_that_never_halts_is_the_librarys_forward_bit_for_bit(class_name, tmp_path):
    backbone = halting(tmp_path, NEVER, class_name)
    with torch.inference_mode():
        plain = RungModule(backbone.model, PX, None)(torch.from_numpy(IMAGES))
    for recipe in (HALT, Recipe(PX)):
        found = in_torch(backbone, recipe)
        for (name, value), truth in zip(found.items(), plain, strict=False):
            assert np.array_equal(value, truth.numpy()), (recipe, name)
    counts = in_torch(backbone)
    assert (counts["tokens"] == counts["tokens"][0, 0]).all()
    assert (counts["patches"] == BLOCKS).all()


# One of each kind of tokens, norm and head.
IN_GRAPHS = FAMILIES[5:]


@pytest.mark.parametrize("class_name", IN_GRAPHS)
def test_every_family_halts_in_its_graph_as_in_torch(class_name, tmp_path):
    backbone = halting(tmp_path, GATES[1], class_name)
    recipe = Recipe(PX, depth=2, halt=0.0)
    expected = in_torch(backbone, recipe)
    special = 1 + ("DeiT" in class_name) + 3 * ("Registers" in class_name)
    assert (expected["tokens"][:, 0] == special + PATCHES).all()
    assert (expected["patches"] < 2).any() and len(np.unique(expected["tokens"][:, 1])) > 1
    close(
        ask(exported(backbone, tmp_path / "graph.onnx", recipe), IMAGES[:3]),
        {name: value[:3] for name, value in expected.items()},
        class_name,
    )


# --- images in a batch ---------------------------------------------------------------------------


def test_an_image_answers_the_same_whatever_its_batch_mates(mixed):
    backbone, graph = mixed
    together = in_torch(backbone), ask(graph, IMAGES)
    for row in range(len(IMAGES)):
        alone = in_torch(backbone, images=IMAGES[row : row + 1]), ask(graph, IMAGES[row : row + 1])
        for one, all_images in zip(alone, together, strict=True):
            for name, value in one.items():
                change = np.abs(value[0] - all_images[name][row]).max()
                assert change <= (0 if name in COUNTS else ROUNDING), (row, name)


def test_counts_and_layers_tell_one_story(mixed):
    _, graph = mixed
    found = ask(graph, IMAGES)
    tokens, patches, layers = found["tokens"], found["patches"], found["cls_layers"]
    blocks = np.arange(BLOCKS)
    running = tokens > 0
    # The class token is there as long as the image is, and a patch in as many blocks as it says.
    np.testing.assert_array_equal(
        tokens, (patches[:, :, None] > blocks).sum(axis=1) + running, strict=False
    )
    assert (tokens[:, 0] == 1 + PATCHES).all() and (np.diff(tokens, axis=1) <= 0).all()
    for row, block in zip(*np.nonzero(~running), strict=True):
        assert np.array_equal(layers[row, block + 1], layers[row, block])
    for row, block in zip(*np.nonzero(running), strict=True):
        assert not np.array_equal(layers[row, block + 1], layers[row, block])


def test_a_batch_that_stops_at_the_first_block_is_answered(tmp_path):
    backbone, recipe = halting(tmp_path, ALWAYS), Recipe(PX, depth=3, halt=0.0)
    graph = exported(backbone, tmp_path / "graph.onnx", recipe)
    first = in_torch(replace(backbone, gate=None), Recipe(PX, depth=1))
    for batch in (1, 3, 8):
        found = ask(graph, IMAGES[:batch])
        for name in ("embedding", "logits"):
            np.testing.assert_allclose(found[name], first[name][:batch], **TOLERANCE)
        assert (found["tokens"] == [1 + PATCHES, 0, 0]).all()
        assert (found["patches"] == 1).all()


# --- the graph -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "level",
    [ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED, ort.GraphOptimizationLevel.ORT_ENABLE_ALL],
)
def test_no_attention_is_fused_before_or_after_optimisation(level, mixed, tmp_path):
    """A fused kernel ends the process on an empty batch in many releases of ONNX Runtime."""
    _, graph = mixed
    check_versions(graph)
    assert graph.ir_version == 9
    options = ort.SessionOptions()
    options.graph_optimization_level = level
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3  # it warns that the file suits this machine alone
    ort.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    kinds = [set(), set()]
    for found, model in zip(kinds, (graph, onnx.load(tmp_path / "optimised.onnx")), strict=True):
        found |= {
            node.op_type for holder in (model.graph, *model.functions) for node in holder.node
        }
        assert "Softmax" in found and not {kind for kind in found if "Attention" in kind}
    assert "MatMul" in kinds[0] and not kinds[0] & {"If", "Loop", "Scan"}


def test_int8_with_static_scales_keeps_nearly_the_same_tokens(mixed):
    backbone, graph = mixed
    static = quantise(graph, sample_images(8, PX, seed=9))
    assert structure_failures("halt", static, PX, backbone.output_shapes(HALT)) == []
    found, truth = ask(static, IMAGES), ask(graph, IMAGES)
    assert cosines(found["embedding"], truth["embedding"]).mean() > 0.95
    assert (found["tokens"][:, 0] == 1 + PATCHES).all()
    assert found["tokens"].mean() == pytest.approx(truth["tokens"].mean(), rel=0.1)
    for row in range(len(IMAGES)):
        alone = ask(static, IMAGES[row : row + 1])
        np.testing.assert_allclose(alone["logits"][0], found["logits"][row], **TOLERANCE)


def test_an_alignment_leaves_the_counts(mixed):
    backbone, graph = mixed
    fitted = alignment(layers=2)
    aligned = bake_alignment(graph, fitted)
    assert structure_failures("halt", aligned, PX, backbone.output_shapes(HALT)) == []
    before, after = ask(graph, IMAGES), ask(aligned, IMAGES)
    for name in ("cls_layers", *COUNTS):
        np.testing.assert_array_equal(after[name], before[name])
    read = [before["embedding"], before["cls_layers"][:, -3:-1].reshape(len(IMAGES), -1)]
    expected = np.concatenate(read, axis=1) @ fitted.weights + fitted.bias
    np.testing.assert_allclose(after["embedding"], expected, rtol=1e-5, atol=1e-5)


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("class_name", "gate", "recipe", "message"),
    [
        (HEAD, None, "halt", "halt: no gate was trained for it; train one with python -m adaptat"),
        (HEAD, None, "halt=3", "no gate was trained for it; train one"),
        (HEAD, GATES[0], "halt=3", "--recipe px=16,halt=3, and give px=16,halt=3,adapted=DIR"),
        (HEAD, None, "px=8,halt=3,align", "--recipe px=8,halt=3, and give px=8,halt=3,adapted=DIR"),
        (HEAD, GATES[0], "halt=6,adapted=x", "tokens can halt after 1 to fewer than 6 blocks"),
        (HEAD, GATES[0], "depth=2,halt=2,adapted=x", "can halt after 1 to fewer than 2 blocks"),
        (HEAD, GATES[0], "halt,fp16", "what decides which tokens stay needs FP32; use int8=static"),
        (HEAD, GATES[0], "halt,int8", "let images that keep other tokens decide; use int8=static"),
        (HEAD, GATES[0], "tome=2", "tome and the model both take tokens away; leave tome out"),
        (HEAD, GATES[0], "tome=2,halt", "tome and the model both take tokens away"),
        (HEAD, GATES[0], "apt=5.5,halt", "apt and the model both take tokens away"),
        (HEAD, None, "tome=2,halt=3", "tome and halt both take tokens away; leave tome out"),
        (HEAD, None, "apt=5.5,halt=3", "apt and halt both take tokens away; leave apt out"),
        ("Dinov2ForImageClassification", GATES[0], "halt", "head, which reads tokens that halt"),
        ("CLIPForImageClassification", GATES[0], "halt", "head, which reads tokens that halt"),
        *[("DeiTForImageClassificationWithTeacher", GATES[0], "halt", "does not reach this model")],
        ("SiglipVisionModel", GATES[0], "halt", "is not for SigLIP: its pooling"),
        ("DINOv3ViTModel", GATES[0], "halt", "is not for DINOv3: its attention is told where"),
        ("BeitModel", GATES[0], "halt", "is not for BEiT: its attention is told where"),
    ],
)
def test_what_cannot_halt_is_refused_in_one_line(class_name, gate, recipe, message, tmp_path):
    backbone = halting(tmp_path, gate, class_name)
    with pytest.raises(UsageError) as caught:
        backbone.check(Recipe.parse(recipe), PX)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_head_that_will_be_fitted_reads_the_class_token_alone(tmp_path):
    """Whatever the model's own head reads, which that head takes the place of."""
    backbone = halting(tmp_path, None, "Dinov2ForImageClassification")
    recipe = Recipe.parse("halt=3,adapted=x")
    backbone.to_be_probed().check(recipe, PX)
    with pytest.raises(UsageError, match="reads tokens that halt"):
        backbone.check(recipe, PX)


@pytest.mark.parametrize("text", ["halt=0", "halt=-1", "halt=x", "halt=inf", "halt=nan", "halt="])
def test_a_depth_that_is_none_is_no_recipe(text):
    with pytest.raises(RecipeError):
        Recipe.parse(text)


# --- what is recorded ----------------------------------------------------------------------------


def exporting(backbone: Backbone, out: Path, low: str | None = None) -> tuple[GraphSet, str]:
    """The graphs, and what was said."""
    said = io.StringIO()
    request = GraphsRequest(out, None if low is None else Recipe.parse(low))
    export_graphs(backbone, request, Bars(Console(file=said, width=200)))
    return GraphSet.load(out), said.getvalue()


def test_the_record_says_what_images_kept(tmp_path):
    backbone = halting(tmp_path)
    graphs, said = exporting(backbone, tmp_path / "out", "halt")
    assert "tokens" not in graphs.high.notes and "nothing is saved" not in said
    images = sample_images(16, PX, seed=1)
    removed, masked = (make(backbone.model, backbone.gate, images) for make in (removing, masking))
    tokens = removed["tokens"].mean(axis=1)
    expected = {"mean": tokens.mean(), "min": tokens.min(), "max": tokens.max()}
    expected |= {"all": 1 + PATCHES, "blocks_per_patch": removed["patches"].mean()}
    expected |= {"blocks_per_patch_public": masked["counted"].mean()}
    assert graphs.low.notes["tokens"] == pytest.approx(expected, rel=1e-5)
    # `align` writes the record again, and its graph counts on.
    aligned = align(graphs, "halt", replace(alignment(), graph=graphs.low.record.fingerprint))
    before, after = (ask(aligned.graphs[name].file, IMAGES) for name in ("halt", "halt_align"))
    np.testing.assert_array_equal(after["tokens"], before["tokens"])
    assert not np.allclose(after["embedding"], before["embedding"])
    assert GraphSet.load(tmp_path / "out").low.notes["tokens"] == graphs.low.notes["tokens"]


def test_a_model_with_a_gate_halts_in_its_cheap_rung_and_a_gate_that_never_does_is_told(tmp_path):
    saved = pretrained(str(save_tiny(tmp_path / "two blocks", HEAD)))
    graphs, said = exporting(replace(saved, gate=NEVER), tmp_path / "out")
    assert (graphs.low.record.recipe, graphs.high.record.recipe) == ("px=8,halt", f"px={PX}")
    assert said.count("note: no token of 16 synthetic images halts before the last block of ") == 1
    assert "px8_halt: nothing is saved" in said
    assert graphs.low.notes["tokens"] == {
        **dict.fromkeys(("mean", "min", "max", "all"), 1 + 4),
        **dict.fromkeys(("blocks_per_patch", "blocks_per_patch_public"), LAYERS),
    }


def test_tokens_of_cells_are_told_too():
    recipe = Recipe(PX, apt=(5.5, 4.0))
    patches = np.ones((3, 64), np.int32)
    patches[0, :4], patches[1, :16] = 2, 4
    found = kept_tokens(recipe, np.array([[64 - 3 + 1], [64 - 15 + 1], [64 + 1]]), patches)
    assert found == {"mean": 59.0, "min": 50.0, "max": 65.0, "all": 65.0}
    record = RungRecord(px=PX, recipe=str(recipe), sha256="0" * 64, size_bytes=1)
    graph = Graph("apt", record, Path("apt.onnx"))
    assert nothing_saved(graph) is None
    notes = {"tokens": found, "fidelity": {"images": "3 fit"}}
    assert nothing_saved(replace(graph, notes=notes)) is None
    notes["tokens"] = kept_tokens(recipe, np.array([[65]]), patches[2:])
    told = nothing_saved(replace(graph, notes=notes))
    assert told == "no cell of 3 fit images is flat enough for apt: nothing is saved"
    noise = {**notes, "fidelity": {"images": "3 synthetic"}}
    assert nothing_saved(replace(graph, notes=noise)) is None
