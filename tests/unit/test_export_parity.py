"""A graph that is not the model is refused, and every tensor that differs is named."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from bundle.recipe import Recipe
from export.backbones import Backbone
from export.errors import ExportError
from export.onnx_graph import export_onnx, strip_provenance
from export.parity import BATCHES, ParityError, check_parity, mixed_images
from export.pretrained import pretrained
from tests.unit.export_tiny import LAYERS, PX, WIDTH, save_tiny

LOW_PX = 8
OUTPUTS = ["embedding", "cls_layers", "logits"]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    folder = tmp_path_factory.mktemp("tiny")
    return pretrained(str(save_tiny(folder, "ViTForImageClassification")))


@pytest.fixture(scope="module")
def exported(backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> onnx.ModelProto:
    file = tmp_path_factory.mktemp("graph") / "vit_low.onnx"
    return export_onnx(backbone.rung(Recipe(LOW_PX)), PX, list(backbone.output_shapes()), file, 18)


@pytest.fixture
def graph(exported: onnx.ModelProto) -> onnx.ModelProto:
    """A copy to break."""
    copy = onnx.ModelProto()
    copy.CopyFrom(exported)
    return copy


@pytest.fixture
def check(backbone: Backbone, tmp_path: Path) -> Callable[..., list]:
    def run(model: onnx.ModelProto, reference: Callable | None = None, **options: float) -> list:
        file = tmp_path / "vit_low.onnx"
        file.write_bytes(model.SerializeToString())
        reference = reference or functools.partial(backbone.reference, px=LOW_PX)
        return check_parity("vit_low", file, PX, backbone.output_shapes(), reference, **options)

    return run


def change(name: str, how: Callable) -> Callable:
    """Changes an initializer of a graph."""

    def change(model: onnx.ModelProto) -> None:
        tensor = next(item for item in model.graph.initializer if item.name == name)
        tensor.CopyFrom(numpy_helper.from_array(how(numpy_helper.to_array(tensor)), name))

    return change


def append(model: onnx.ModelProto, name: str, op: str, *inputs: str, **fields) -> None:
    """Put one more node between an output and what computes it."""
    for node in model.graph.node:
        for names in (node.input, node.output):
            for index, value in enumerate(names):
                if value == name:
                    names[index] = f"{name}_before"
    model.graph.node.append(helper.make_node(op, [f"{name}_before", *inputs], [name], **fields))


def rename(model: onnx.ModelProto) -> None:
    append(model, "embedding", "Identity")
    model.graph.node[-1].output[0] = model.graph.output[0].name = "features"


def turn_round(model: onnx.ModelProto) -> None:
    outputs = list(model.graph.output)
    del model.graph.output[:]
    model.graph.output.extend(outputs[::-1])


def fix_the_batch(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    model.graph.output[1].type.tensor_type.shape.dim[0].dim_value = 2


def bake_the_batch(model: onnx.ModelProto) -> None:
    """Declared dynamic, but a Reshape inside knows the traced batch of 2."""
    model.graph.initializer.append(numpy_helper.from_array(np.array([2, WIDTH]), "traced_shape"))
    append(model, "embedding", "Reshape", "traced_shape")


def widen(model: onnx.ModelProto) -> None:
    append(model, "embedding", "Cast", to=TensorProto.DOUBLE)
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.DOUBLE


def reshape(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_value = PX + 1


# A ramp: LayerNorm would take a constant shift out again.
RAMP = np.linspace(-0.5, 0.5, WIDTH, dtype=np.float32)
MOVE_CLS = change("model.vit.embeddings.cls_token", lambda a: a + RAMP)
MOVE_BIAS = change("model.classifier.bias", lambda a: a + np.float32(0.125))
SPOIL_BIAS = change("model.classifier.bias", lambda a: a * np.float32(np.nan))


def test_a_faithful_graph_passes_and_is_recorded(check, graph, backbone):
    checks = check(graph)
    assert [(c.batch, c.output) for c in checks] == [(b, name) for b in BATCHES for name in OUTPUTS]
    assert all(0 <= c.max_abs_diff < 1e-4 for c in checks)
    # A comparison of a thing with itself would give exactly 0 everywhere.
    assert any(c.max_abs_diff > 0 for c in checks)
    shapes = [(WIDTH,), (LAYERS + 1, WIDTH), (3,)]
    assert backbone.output_shapes() == dict(zip(OUTPUTS, shapes, strict=True))
    with pytest.raises(ParityError, match="rtol 0, atol 0"):
        check(graph, rtol=0.0, atol=0.0)


@pytest.mark.parametrize(
    ("break_it", "tensors", "message"),
    [
        (MOVE_CLS, OUTPUTS, "vit_low cls_layers: differs by up to"),
        (MOVE_BIAS, ["logits"], "vit_low logits: differs by up to 0.125"),
        (SPOIL_BIAS, ["logits"], "logits: NaN or Inf"),
        (rename, ["embedding", "features"], "output is missing"),
        (turn_round, ["logits"], "in the order logits, cls_layers, embedding"),
        (fix_the_batch, ["image", "cls_layers"], "batch axis is fixed at 2"),
        (bake_the_batch, ["embedding"], "ONNX Runtime fails at batch 1"),
        (widen, ["embedding"], "vit_low embedding: type is DOUBLE, expected FLOAT"),
        (reshape, ["image"], "(3, 17, 16)"),
    ],
)
@pytest.mark.parametrize("may_differ", [0.0, 1.0])  # which is no licence for any of these
def test_every_tensor_that_differs_is_named(check, graph, break_it, tensors, message, may_differ):
    if may_differ and break_it in (MOVE_CLS, MOVE_BIAS):
        may_differ = 0.25  # every image differs
    break_it(graph)
    with pytest.raises(ParityError) as caught:
        check(graph, may_differ=may_differ)
    named = {failure.tensor for failure in caught.value.failures}
    assert set(tensors) <= named and (named == set(tensors) or break_it is bake_the_batch)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_the_worst_difference_of_each_output_is_told(check, graph):
    MOVE_CLS(graph)
    with pytest.raises(ParityError) as caught:
        check(graph)
    worst = {failure.tensor: failure.max_abs_diff for failure in caught.value.failures}
    assert list(worst) == OUTPUTS and min(worst.values()) > 0.01
    # The first of cls_layers is the CLS token plus its position: it moved by the ramp itself.
    assert worst["cls_layers"] >= 0.499


def answering_otherwise(backbone: Backbone, *rows: int, change: float) -> Callable:
    """A reference whose answer to some of the images is another one."""

    def reference(image: torch.Tensor) -> dict[str, torch.Tensor]:
        outputs = {name: t.clone() for name, t in backbone.reference(image, LOW_PX).items()}
        for row in (row for row in rows if row < len(image)):
            for value in outputs.values():
                value[row] += change * value[row].norm() / value[row].numel() ** 0.5
        return outputs

    return reference


@pytest.mark.parametrize("rows", [(0,), (2, 7)])
def test_a_few_images_may_differ_where_that_is_allowed(check, graph, backbone, rows):
    reference = answering_otherwise(backbone, *rows, change=0.2)
    checks = check(graph, reference, may_differ=0.25)
    left_out = {check.batch: check.near_ties for check in checks}
    assert left_out == {batch: sum(row < batch for row in rows) for batch in BATCHES}
    assert all(check.max_abs_diff < 1e-4 for check in checks)  # of the others
    with pytest.raises(ParityError, match="differs by up to"):
        check(graph, reference)


@pytest.mark.parametrize(
    ("rows", "change"), [((1, 2, 5), 0.2), ((4,), 3.0)], ids=["too many", "another embedding"]
)
def test_what_are_no_ties_is_refused_all_the_same(check, graph, backbone, rows, change):
    with pytest.raises(ParityError) as caught:
        check(graph, answering_otherwise(backbone, *rows, change=change), may_differ=0.25)
    assert [failure.tensor for failure in caught.value.failures] == OUTPUTS


@pytest.mark.parametrize("rung_px", [LOW_PX, PX])
def test_the_reference_is_the_librarys_own_hidden_states(backbone, rung_px):
    image = torch.randn(2, 3, rung_px, rung_px, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        output = backbone.model(image, output_hidden_states=True, interpolate_pos_encoding=True)
    reference = backbone.reference(image, rung_px)
    for layer, hidden in enumerate(output.hidden_states):
        assert torch.equal(reference["cls_layers"][:, layer], hidden[:, 0])
    assert len(output.hidden_states) == LAYERS + 1
    assert torch.equal(reference["logits"], output.logits)


@pytest.mark.parametrize(
    ("opset", "ir_version", "domain", "message"),
    [
        (22, 10, None, "the ceiling is opset 21"),
        (18, 10, None, r"the IR version that came with the opset \(8\)"),
        (21, 11, None, r"the IR version that came with the opset \(10\)"),
        (18, 8, "com.microsoft", "com.microsoft"),
    ],
)
def test_what_older_servers_do_not_load_is_refused(
    check, graph, opset, ir_version, domain, message
):
    assert [entry.version for entry in graph.opset_import] == [18] and graph.ir_version == 8
    graph.opset_import[0].version, graph.ir_version = opset, ir_version
    if domain:
        graph.opset_import.append(helper.make_opsetid(domain, 1))
    with pytest.raises(ExportError, match=message):
        check(graph)


def test_provenance_is_stripped(graph, exported):
    graph.doc_string = graph.graph.node[0].doc_string = "/home/someone/model.py"
    graph.graph.node[0].metadata_props.add(key="stack", value="/home/someone/model.py")
    graph.graph.output[0].metadata_props.add(key="stack", value="/home/someone/model.py")
    strip_provenance(graph)
    assert graph == exported
    assert b".py" not in exported.SerializeToString()


class _Counting(nn.Module):
    """How often each place is named, as graphs whose images keep tokens of their own count."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        named = torch.zeros_like(image[:, 0, 0, 0], dtype=torch.int64)
        return named.index_add(0, torch.zeros_like(named), torch.ones_like(named))


def test_what_the_exporter_says_of_empty_lists_is_silenced(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        export_onnx(_Counting(), 4, ["named"], tmp_path / "counting.onnx", 18)
    assert not [record.name for record in caplog.records if record.name.startswith("onnx_ir")]


def test_mixed_images_are_of_whole_levels_and_flat_to_different_extents():
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.1)
    images = mixed_images(8, PX, 0, mean, std)
    assert images.dtype == np.float32 and images.shape == (8, 3, PX, PX)
    levels = images * np.reshape(std, (3, 1, 1)) + np.reshape(mean, (3, 1, 1))
    np.testing.assert_allclose(255 * levels, (255 * levels).round(), atol=1e-3)
    assert levels.min() >= -1e-6 and levels.max() <= 1 + 1e-6
    flat = (images[:, :, :, :1] == images[:, :, :, 1:2]).all(axis=(1, 3)).sum(axis=1)
    assert sorted(flat) == [round(PX * share / 7) for share in range(8)]
    assert 0 < flat[0] < PX and flat[1] < flat[0] < flat[2]
