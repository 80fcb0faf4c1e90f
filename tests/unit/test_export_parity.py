from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from bundle.recipe import Recipe
from export.backbones import Backbone
from export.errors import ExportError
from export.onnx_graph import export_onnx, strip_provenance
from export.parity import BATCHES, ParityError, check_parity
from export.pretrained import pretrained
from tests.unit.export_tiny import LAYERS, PX, WIDTH, save_tiny

LOW_PX = 8


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    folder = tmp_path_factory.mktemp("tiny")
    return pretrained(str(save_tiny(folder, "ViTForImageClassification")))


@pytest.fixture(scope="module")
def graph(backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> onnx.ModelProto:
    file = tmp_path_factory.mktemp("graph") / "vit_low.onnx"
    rung = backbone.rung(Recipe(LOW_PX))
    return export_onnx(rung, PX, list(backbone.output_shapes()), file, 18)


@pytest.fixture
def check(backbone: Backbone, tmp_path: Path) -> Callable[[onnx.ModelProto], list]:
    def run(model: onnx.ModelProto, **tolerances: float) -> list:
        file = tmp_path / "vit_low.onnx"
        file.write_bytes(model.SerializeToString())
        reference = functools.partial(backbone.reference, px=LOW_PX)
        return check_parity("vit_low", file, PX, backbone.output_shapes(), reference, **tolerances)

    return run


def broken(graph: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(graph)
    return copy


def failing_tensors(error: ParityError) -> list[str]:
    return [failure.tensor for failure in error.failures]


def change_initializer(model: onnx.ModelProto, name: str, change: Callable) -> None:
    tensor = next(item for item in model.graph.initializer if item.name == name)
    tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor)), name))


def append_to_output(model: onnx.ModelProto, name: str, op: str, *inputs: str, **fields) -> None:
    """Put one more node between an output and what computes it."""
    for node in model.graph.node:
        for names in (node.input, node.output):
            for index, value in enumerate(names):
                if value == name:
                    names[index] = f"{name}_before"
    model.graph.node.append(helper.make_node(op, [f"{name}_before", *inputs], [name], **fields))


def test_a_faithful_graph_passes_and_is_recorded(check, graph, backbone):
    checks = check(graph)
    assert [(c.batch, c.output) for c in checks] == [
        (batch, name) for batch in BATCHES for name in ("embedding", "cls_layers", "logits")
    ]
    assert all(0 <= c.max_abs_diff < 1e-4 for c in checks)
    # A comparison of a thing with itself would give exactly 0 everywhere.
    assert any(c.max_abs_diff > 0 for c in checks)
    assert backbone.output_shapes() == {
        "embedding": (WIDTH,),
        "cls_layers": (LAYERS + 1, WIDTH),
        "logits": (3,),
    }


def test_a_changed_weight_names_every_output_it_reaches(check, graph):
    model = broken(graph)
    # A ramp: LayerNorm would take a constant shift out again.
    ramp = np.linspace(-0.5, 0.5, WIDTH, dtype=np.float32)
    change_initializer(model, "model.vit.embeddings.cls_token", lambda a: a + ramp)
    with pytest.raises(ParityError) as caught:
        check(model)
    assert failing_tensors(caught.value) == ["embedding", "cls_layers", "logits"]
    assert all(failure.max_abs_diff > 0.01 for failure in caught.value.failures)
    # The first of cls_layers is the CLS token plus its position: it moved by the ramp itself.
    assert caught.value.failures[1].max_abs_diff >= 0.499
    for name in ("embedding", "cls_layers", "logits"):
        assert f"vit_low {name}: differs by up to" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_only_the_outputs_that_differ_are_named(check, graph):
    model = broken(graph)
    change_initializer(model, "model.classifier.bias", lambda a: a + np.float32(0.125))
    with pytest.raises(ParityError) as caught:
        check(model)
    assert failing_tensors(caught.value) == ["logits"]
    assert caught.value.failures[0].max_abs_diff == pytest.approx(0.125, abs=1e-4)


def test_nan_is_a_failure(check, graph):
    model = broken(graph)
    change_initializer(model, "model.classifier.bias", lambda a: a * np.float32(np.nan))
    with pytest.raises(ParityError, match="logits: NaN or Inf"):
        check(model)


def test_zero_tolerance_fails(check, graph):
    with pytest.raises(ParityError, match="rtol 0, atol 0"):
        check(graph, rtol=0.0, atol=0.0)


def answering_otherwise(backbone: Backbone, *rows: int, change: float = 0.5) -> Callable:
    """A reference whose answer to some of the images is another one."""

    def reference(image: torch.Tensor) -> dict[str, torch.Tensor]:
        outputs = {name: t.clone() for name, t in backbone.reference(image, LOW_PX).items()}
        for row in (row for row in rows if row < len(image)):
            for value in outputs.values():
                value[row] += change * value[row].norm() / value[row].numel() ** 0.5
        return outputs

    return reference


def check_ties(graph: onnx.ModelProto, file: Path, reference: Callable, **options: float) -> list:
    file.write_bytes(graph.SerializeToString())
    shapes = {"embedding": (WIDTH,), "cls_layers": (LAYERS + 1, WIDTH), "logits": (3,)}
    return check_parity("vit_low", file, PX, shapes, reference, **options)


@pytest.mark.parametrize("rows", [(0,), (2, 7)])
def test_a_few_images_may_differ_where_that_is_allowed(graph, backbone, rows, tmp_path):
    reference = answering_otherwise(backbone, *rows, change=0.2)
    checks = check_ties(graph, tmp_path / "a.onnx", reference, may_differ=0.25)
    left_out = {check.batch: check.near_ties for check in checks}
    assert left_out == {batch: sum(row < batch for row in rows) for batch in BATCHES}
    assert all(check.max_abs_diff < 1e-4 for check in checks)  # of the others
    with pytest.raises(ParityError, match="differs by up to"):
        check_ties(graph, tmp_path / "a.onnx", reference)


def test_more_images_than_allowed_are_no_ties(graph, backbone, tmp_path):
    reference = answering_otherwise(backbone, 1, 2, 5, change=0.2)
    with pytest.raises(ParityError) as caught:
        check_ties(graph, tmp_path / "a.onnx", reference, may_differ=0.25)
    assert failing_tensors(caught.value) == ["embedding", "cls_layers", "logits"]


def test_an_image_whose_embedding_turns_away_is_no_tie(graph, backbone, tmp_path):
    with pytest.raises(ParityError, match="embedding: differs by up to"):
        reference = answering_otherwise(backbone, 4, change=3.0)
        check_ties(graph, tmp_path / "a.onnx", reference, may_differ=0.25)


def test_nan_is_no_tie(graph, backbone, tmp_path):
    model = broken(graph)
    change_initializer(model, "model.classifier.bias", lambda a: a * np.float32(np.nan))
    with pytest.raises(ParityError, match="logits: NaN or Inf"):
        reference = functools.partial(backbone.reference, px=LOW_PX)
        check_ties(model, tmp_path / "a.onnx", reference, may_differ=1.0)


def test_an_allowance_is_no_licence_for_a_graph_that_fails(graph, backbone, tmp_path):
    model = broken(graph)
    model.graph.initializer.append(numpy_helper.from_array(np.array([2, WIDTH]), "traced_shape"))
    append_to_output(model, "embedding", "Reshape", "traced_shape")
    with pytest.raises(ParityError, match="ONNX Runtime fails at batch 1"):
        reference = functools.partial(backbone.reference, px=LOW_PX)
        check_ties(model, tmp_path / "a.onnx", reference, may_differ=1.0)


def test_a_renamed_output(check, graph):
    model = broken(graph)
    append_to_output(model, "embedding", "Identity")
    model.graph.node[-1].output[0] = "features"
    model.graph.output[0].name = "features"
    with pytest.raises(ParityError) as caught:
        check(model)
    assert sorted(failing_tensors(caught.value)) == ["embedding", "features"]
    assert "output is missing" in str(caught.value)


def test_outputs_in_another_order(check, graph):
    model = broken(graph)
    outputs = list(model.graph.output)
    del model.graph.output[:]
    model.graph.output.extend(outputs[::-1])
    with pytest.raises(ParityError, match="in the order logits, cls_layers, embedding"):
        check(model)


def test_a_fixed_batch_axis(check, graph):
    model = broken(graph)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    model.graph.output[1].type.tensor_type.shape.dim[0].dim_value = 2
    with pytest.raises(ParityError) as caught:
        check(model)
    assert failing_tensors(caught.value) == ["image", "cls_layers"]
    assert "batch axis is fixed at 2" in str(caught.value)


def test_a_batch_baked_into_the_graph(check, graph):
    """Declared dynamic, but a Reshape inside knows the traced batch of 2."""
    model = broken(graph)
    shape = numpy_helper.from_array(np.array([2, WIDTH]), "traced_shape")
    model.graph.initializer.append(shape)
    append_to_output(model, "embedding", "Reshape", "traced_shape")
    with pytest.raises(ParityError, match="ONNX Runtime fails at batch 1"):
        check(model)


def test_a_wrong_type(check, graph):
    model = broken(graph)
    append_to_output(model, "embedding", "Cast", to=TensorProto.DOUBLE)
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.DOUBLE
    with pytest.raises(ParityError, match="vit_low embedding: type is DOUBLE, expected FLOAT"):
        check(model)


def test_a_wrong_shape(check, graph):
    model = broken(graph)
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_value = PX + 1
    with pytest.raises(ParityError, match=r"vit_low image: shape .* is \(3, 17, 16\)"):
        check(model)


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


@pytest.mark.parametrize(("opset", "ir_version"), [(22, 10), (18, 11)])
def test_versions_above_the_ceiling(check, graph, opset, ir_version):
    model = broken(graph)
    model.opset_import[0].version = opset
    model.ir_version = ir_version
    with pytest.raises(ExportError, match="the ceiling is opset 21, IR version 10"):
        check(model)


def test_custom_domains_are_refused(check, graph):
    model = broken(graph)
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    with pytest.raises(ExportError, match="com.microsoft"):
        check(model)


def test_exported_versions_are_below_the_ceiling(graph):
    assert [entry.version for entry in graph.opset_import] == [18]
    assert graph.ir_version <= 10


def test_provenance_is_stripped(graph):
    model = broken(graph)
    model.doc_string = model.graph.node[0].doc_string = "/home/someone/model.py"
    model.graph.node[0].metadata_props.add(key="stack", value="/home/someone/model.py")
    model.graph.output[0].metadata_props.add(key="stack", value="/home/someone/model.py")
    strip_provenance(model)
    assert model == graph
    assert b".py" not in graph.SerializeToString()
