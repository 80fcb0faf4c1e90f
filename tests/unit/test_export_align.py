"""A baked alignment answers as `routing.Alignment` and the model's own head do."""

from __future__ import annotations

import base64
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx.external_data_helper import uses_external_data

from bundle.alignment import Alignment
from bundle.graphs import GraphSet
from bundle.manifest import sha256_file
from bundle.prints import joined
from bundle.recipe import Recipe
from export import onnx_graph
from export.align import align, bake_alignment
from export.errors import UsageError
from export.graphs import export_graphs
from export.onnx_graph import check_versions
from export.parity import sample_images, structure_failures
from export.pretrained import pretrained
from export.recipes.half import to_half
from export.recipes.quantise import quantise
from export.request import GraphsRequest
from export.shared_weights import share_weights
from routing import RungOutputs
from tests.unit.export_tiny import LAYERS, PX, QUIET, WIDTH, run_export, save_tiny
from tests.unit.image_files import write_images
from tests.unit.quantised_files import ask

pytestmark = pytest.mark.usefixtures("remembered_exports")

IMAGES = sample_images(8, PX, seed=8)
KINDS = {
    "fp32": lambda model: model,
    "int8=static": lambda model: quantise(model, sample_images(8, PX, seed=9)),
    "int8": quantise,
    "fp16": to_half,
}
TOLERANCE = {"fp16": 2e-2}  # its head computes in FP16


def export(folder: Path, class_name: str, px: int = 8) -> onnx.ModelProto:
    backbone = pretrained(str(save_tiny(folder / "model", class_name)))
    names = list(backbone.output_shapes())
    return onnx_graph.export_onnx(backbone.rung(Recipe(px)), PX, names, folder / "graph.onnx", 20)


def alignment(layers: int = LAYERS) -> Alignment:
    rng = np.random.default_rng(2)
    weights = rng.normal(size=((1 + layers) * WIDTH, WIDTH)) / WIDTH**0.5
    bias = rng.normal(size=WIDTH)
    hashes, cross_fitted = np.array(["c" * 64]), np.zeros((1, WIDTH), np.float32)
    arrays = weights.astype(np.float32), bias.astype(np.float32)
    return Alignment(*arrays, "a", "b", "px=8", "", hashes, cross_fitted)


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> onnx.ModelProto:
    return export(tmp_path_factory.mktemp("vit"), "ViTForImageClassification")


@pytest.fixture(scope="module", params=KINDS)
def pair(request, graph) -> tuple[onnx.ModelProto, onnx.ModelProto, float]:
    """(as it was, aligned, tolerance of the logits)."""
    model = KINDS[request.param](graph)
    return model, bake_alignment(model, alignment()), TOLERANCE.get(request.param, 1e-5)


def head_of(graph: onnx.ModelProto) -> tuple[np.ndarray, np.ndarray]:
    """Weights (D, C) and bias of the tiny model's head, from the FP32 graph."""
    arrays = {i.name: onnx.numpy_helper.to_array(i) for i in graph.graph.initializer}
    return arrays["model.classifier.weight"].T, arrays["model.classifier.bias"]


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_the_graph_answers_as_the_map_and_the_head_do(pair, graph, batch):
    model, aligned, tolerance = pair
    before, after = ask(model, IMAGES[:batch]), ask(aligned, IMAGES[:batch])
    outputs = RungOutputs(before["embedding"], before["cls_layers"], before["logits"])
    expected = alignment().embedding(outputs)
    np.testing.assert_allclose(after["embedding"], expected, rtol=1e-5, atol=1e-5)
    weights, bias = head_of(graph)
    np.testing.assert_allclose(
        after["logits"], expected @ weights + bias, rtol=tolerance, atol=tolerance
    )
    np.testing.assert_array_equal(after["cls_layers"], before["cls_layers"])
    assert np.abs(after["logits"] - before["logits"]).max() > 0.1


def test_the_contract_the_version_limits_and_the_argument_stay(pair, graph):
    model, aligned, _ = pair
    bytes_before = model.SerializeToString(deterministic=True)
    again = bake_alignment(model, alignment())
    assert model.SerializeToString(deterministic=True) == bytes_before
    assert again.SerializeToString(deterministic=True) == aligned.SerializeToString(
        deterministic=True
    )
    check_versions(aligned)
    onnx.checker.check_model(aligned, full_check=True)
    shapes = {"embedding": (WIDTH,), "cls_layers": (LAYERS + 1, WIDTH), "logits": (3,)}
    assert structure_failures("vit_low", aligned, PX, shapes) == []


def test_what_only_the_old_head_read_is_gone(pair):
    _, aligned, _ = pair
    graph = aligned.graph
    read = {name for node in graph.node for name in node.input}
    read |= {output.name for output in graph.output}
    assert all(read & set(node.output) for node in graph.node)
    assert {item.name for item in graph.initializer} <= read
    # The normalisation of all tokens was the head's alone; one token's is left, the embedding.
    norms = [n for n in graph.node if n.op_type == "LayerNormalization"]
    assert len(norms) == 2 * LAYERS + 1


def test_weights_beside_the_graph_stay_there(graph, tmp_path):
    files = [tmp_path / name for name in ("low.onnx", "high.onnx")]
    for file in files:
        onnx.save(graph, file)
    share_weights(files, tmp_path / "weights.bin")
    model = onnx.load(files[0], load_external_data=False)
    aligned = bake_alignment(model, alignment())
    (tmp_path / "aligned.onnx").write_bytes(aligned.SerializeToString())
    outside = {i.name for i in aligned.graph.initializer if uses_external_data(i)}
    assert outside and "align_weights" not in outside
    expected = ask(bake_alignment(graph, alignment()), IMAGES)
    for name, value in ask(tmp_path / "aligned.onnx", IMAGES).items():
        np.testing.assert_array_equal(value, expected[name])


def test_a_graph_without_a_head_or_without_a_bias_and_one_that_reads_fewer_layers(graph, tmp_path):
    model = export(tmp_path, "Dinov2Model")
    fitted = alignment(layers=1)
    before, after = ask(model, IMAGES), ask(bake_alignment(model, fitted), IMAGES)
    layer = before["cls_layers"][:, -2]
    expected = np.concatenate([before["embedding"], layer], axis=1) @ fitted.weights + fitted.bias
    np.testing.assert_allclose(after["embedding"], expected, rtol=1e-5, atol=1e-5)
    assert set(after) == {"embedding", "cls_layers"}
    unbiased = onnx.ModelProto()
    unbiased.CopyFrom(graph)
    (head,) = (node for node in unbiased.graph.node if "logits" in node.output)
    del head.input[2:]
    after = ask(bake_alignment(unbiased, alignment()), IMAGES)
    expected = after["embedding"] @ head_of(graph)[0]
    np.testing.assert_allclose(after["logits"], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "class_name", ["Dinov2ForImageClassification", "DeiTForImageClassificationWithTeacher"]
)
@pytest.mark.parametrize("change", [lambda model: model, quantise], ids=["fp32", "int8"])
def test_a_head_that_reads_more_than_the_cls_token_is_refused(class_name, change, tmp_path):
    model = change(export(tmp_path, class_name))
    with pytest.raises(UsageError, match="align needs a linear head on the CLS token") as caught:
        bake_alignment(model, alignment())
    assert "\n" not in str(caught.value)


def test_an_aligned_graph_still_answers_image_by_image(graph):
    model = bake_alignment(quantise(graph, IMAGES), alignment())
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    together = session.run(["embedding", "logits"], {"image": IMAGES})
    for row in range(len(IMAGES)):
        alone = session.run(["embedding", "logits"], {"image": IMAGES[row : row + 1]})
        for one, all_images in zip(alone, together, strict=True):
            np.testing.assert_allclose(one[0], all_images[row], rtol=1e-4, atol=1e-4)


# --- in a folder of graphs --------------------------------------------------------------------

LEARNED = base64.b64encode(bytes(37)).decode()  # of one image
INT8 = "px8_int8static"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    model = save_tiny(folder / "tiny", "ViTForImageClassification")
    request = GraphsRequest(
        folder / "onnx",
        beside=(Recipe(12), Recipe(8, precision="int8=static")),
        fit_images=write_images(folder / "images", "a.png"),
    )
    export_graphs(pretrained(str(model)), request, QUIET)
    return folder / "onnx"


@pytest.fixture
def graphs(exported: Path, tmp_path: Path) -> GraphSet:
    return GraphSet.load(shutil.copytree(exported, tmp_path / "onnx"))


def fitted(graphs: GraphSet, name: str) -> Alignment:
    """An alignment as `calibration align` would give it, but for its numbers."""
    record = graphs.graphs[name].record
    changes = {"graph": record.fingerprint, "recipe": record.recipe, "image_prints": LEARNED}
    return replace(alignment(), **changes)


def hashes(folder: Path) -> dict[str, str]:
    return {file.name: sha256_file(file) for file in folder.iterdir()}


def test_the_aligned_graph_stands_beside_its_graph(graphs):
    folder = graphs.low.file.parent
    others = {n: h for n, h in hashes(folder).items() if n != "graphs.json"}
    before = ask(graphs.graphs[INT8].file, IMAGES)
    made = align(graphs, INT8, fitted(graphs, INT8))
    aligned = made.graphs[f"{INT8}_align"]
    assert GraphSet.load(folder) == made and made.roles == graphs.roles
    assert aligned.record.recipe == "px=8,int8=static,align" and aligned.fault() is None
    assert onnx.load(aligned.file).ir_version == 9  # what comes with its opset, 20
    expected = alignment().embedding(RungOutputs(before["embedding"], before["cls_layers"], None))
    answered = ask(aligned.file, IMAGES)["embedding"]
    np.testing.assert_allclose(answered, expected, rtol=1e-5, atol=1e-5)
    # The images that it has learned from join those of its graph.
    ranges = graphs.graphs[INT8].fitted_on
    assert len(base64.b64decode(ranges)) == 37  # what int8=static learned from
    assert aligned.fitted_on == joined(ranges, LEARNED)
    assert (made.graphs[INT8].fitted_on, made.learned()) == (ranges, "")
    # Everything else lies as it did, with no temporary file among it.
    found = hashes(folder)
    assert {name: found[name] for name in others} == others
    assert set(found) == {*others, "graphs.json", aligned.file.name, f"{INT8}_align.npz"}
    # What it was aligned by lies beside it.
    beside = made.graphs[f"{INT8}_align"].alignment()
    assert beside.image_prints == LEARNED and made.graphs[INT8].alignment() is None
    np.testing.assert_array_equal(beside.weights, alignment().weights)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("px9", "--graph px9: no cheap graph of that name; there are px8, px12, px8_int8static"),
        ("full", "--graph full: no cheap graph of that name"),
        ("px12", "the alignment was fitted on another graph than px12 (px=8)"),
    ],
)
def test_an_alignment_that_cannot_be_baked_is_refused(graphs, name, message):
    before = hashes(graphs.low.file.parent)
    with pytest.raises(UsageError) as caught:
        align(graphs, name, fitted(graphs, "px8"))
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
    assert hashes(graphs.low.file.parent) == before


def test_an_alignment_of_a_graph_or_weights_that_changed_since_is_refused(graphs):
    file = graphs.low.file.with_name("weights.bin")
    weights = file.read_bytes()
    file.write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    with pytest.raises(UsageError, match=r"weights\.bin differs from its SHA-256 in graphs\.json"):
        align(graphs, "px8", fitted(graphs, "px8"))
    file.write_bytes(weights[:-9])
    with pytest.raises(UsageError, match=r"weights\.bin was cut short: it has [\d,]+ of [\d,]+"):
        align(graphs, "px8", fitted(graphs, "px8"))
    file.write_bytes(weights)
    with pytest.raises(UsageError, match="fitted on another graph than px8"):
        align(graphs, "px8", replace(fitted(graphs, "px8"), graph="0" * 64))
    made = align(graphs, "px8", fitted(graphs, "px8"))
    with pytest.raises(UsageError, match=r"px8_align is aligned already \(px=8,align\)"):
        align(made, "px8_align", fitted(made, "px8_align"))


def test_the_command_makes_the_aligned_graph_the_cheap_rung(graphs, tmp_path):
    folder, file = graphs.low.file.parent, tmp_path / "alignment.npz"
    fitted(graphs, "px8").save(file)
    command = ("align", "--onnx", folder, "--alignment", file)
    done = run_export(*command)
    assert (done.code, done.err) == (0, "") and "wrote px8_align in" in done.out
    made = GraphSet.load(folder)
    assert (made.low.name, made.high.name, made.learned()) == ("px8_align", "full", LEARNED)
    assert list(made.beside) == ["px8", "px12", INT8]
    for arguments, message in (
        ((*command, "--graph", "px12"), "error: the alignment was fitted on another graph"),
        (("align", "--onnx", folder, "--alignment", tmp_path / "no.npz"), "error: no "),
        (("align", "--onnx", tmp_path, "--alignment", file), "error: no graphs.json in "),
    ):
        done = run_export(*arguments)
        assert done.code == 2 and done.err.startswith(message)
        assert len(done.err.splitlines()) == 1
