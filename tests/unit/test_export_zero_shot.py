"""Heads of texts: what CLIP and SigLIP say of labels, as one linear layer on the embedding."""

from __future__ import annotations

import json

import numpy as np
import onnxruntime as ort
import pytest
import torch
import transformers

from bundle.alignment import Alignment, tokens
from bundle.graphs import GraphSet
from bundle.head import LinearHead
from bundle.recipe import Recipe
from export import zero_shot
from export.align import align
from export.errors import UsageError
from export.graphs import export_graphs
from export.parity import sample_images
from export.pretrained import load_backbone
from export.recipes.smaller import downsample
from export.request import GraphsRequest, Texts
from routing import RungOutputs
from tests.unit.export_tiny import (
    PROJECTION,
    PX,
    QUIET,
    WIDTH,
    run_export,
    save_tiny,
    save_tokenizer,
)

pytestmark = pytest.mark.usefixtures("remembered_exports")

IMAGES = sample_images(5, PX, seed=4)
LABELS = ("cat", "grey dog", "emu")
KINDS = ("CLIPModel", "SiglipModel")
PROMPTS = {"CLIPModel": "a photo of a {}.", "SiglipModel": "This is a photo of {}."}
PADDING = {
    "CLIPModel": {"padding": True},
    "SiglipModel": {"padding": "max_length", "max_length": 16},
}


@pytest.fixture(scope="module", params=KINDS)
def checkpoint(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / request.param
    return request.param, save_tokenizer(save_tiny(folder, request.param))


def run(file, images=IMAGES):
    session = ort.InferenceSession(file, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, {"image": images}), strict=True))


@torch.no_grad()
def library_answers(class_name, folder, px, prompt):
    """The library's own `image_embeds` and `logits_per_image`."""
    model = getattr(transformers, class_name).from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    sentences = [prompt.format(label) for label in LABELS]
    texts = tokenizer(sentences, return_tensors="pt", **PADDING[class_name])
    pixels = downsample(torch.from_numpy(IMAGES), px)
    texts = {name: texts[name] for name in ("input_ids", "attention_mask")}
    found = model(pixel_values=pixels, interpolate_pos_encoding=True, **texts)
    return found.image_embeds.numpy(), found.logits_per_image.numpy()


def test_graphs_answer_with_the_librarys_logits_per_image(checkpoint, tmp_path):
    class_name, folder = checkpoint
    options = ("--low", "px=8", "--labels", " cat,grey  dog,emu,", "--out", tmp_path)
    ran = run_export("rungs", "--model", folder, *options)
    assert ran.code == 0, ran.err
    graphs = GraphSet.load(tmp_path)
    assert (graphs.labels, graphs.classes, graphs.task) == (LABELS, 3, "classes")
    assert graphs.embedding_dim == (PROJECTION if class_name == "CLIPModel" else WIDTH)
    head = json.loads((tmp_path / "graphs.json").read_text())["head"]
    assert (head["kind"], head["labels"]) == ("zero-shot", list(LABELS))
    assert head["prompt"] == PROMPTS[class_name]
    for name, px in (("full", PX), ("px8", 8)):
        file = tmp_path / f"{name}.onnx"
        embedding, logits = library_answers(class_name, folder, px, PROMPTS[class_name])
        found = run(file)
        np.testing.assert_allclose(found["embedding"], embedding, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(found["logits"], logits, rtol=1e-4, atol=1e-4)
        assert np.allclose(np.linalg.norm(found["embedding"], axis=1), 1)
        # What calibration and alignments make of an embedding is what the graph does.
        linear = LinearHead.read(file)
        np.testing.assert_allclose(linear(embedding), logits, rtol=1e-4, atol=1e-4)


def test_a_file_of_labels_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "labels.txt").write_text("cat\ndog\n", "utf-8-sig")
    assert Texts.read(str(tmp_path / "labels.txt"), None).labels == ("cat", "dog")


def test_a_prompt_and_a_file_of_labels_and_merged_tokens(checkpoint, tmp_path):
    class_name, folder = checkpoint
    (tmp_path / "labels.txt").write_text("cat\n\ngrey dog\nemu\n")
    texts = Texts.read(str(tmp_path / "labels.txt"), "a {}")
    backbone = load_backbone(str(folder), texts)
    assert backbone.aligns and backbone.labels == LABELS
    recipes = [Recipe(PX), Recipe(PX, 1)]
    recipes += [Recipe(PX, tome=2)] if class_name == "CLIPModel" else []
    for recipe in recipes:
        with torch.no_grad():
            embedding, layers, logits = backbone.rung(recipe)(torch.from_numpy(IMAGES))
        assert torch.allclose(embedding.norm(dim=1), torch.ones(len(IMAGES)))
        assert layers.shape[2] == backbone.layer_dim == WIDTH
        torch.testing.assert_close(logits, backbone.probe(embedding))
        if recipe == Recipe(PX):
            truth = library_answers(class_name, folder, PX, "a {}")[1]
            np.testing.assert_allclose(logits, truth, rtol=1e-4, atol=1e-4)


def test_more_labels_than_are_read_at_once(checkpoint, monkeypatch):
    all_at_once = load_backbone(str(checkpoint[1]), Texts(LABELS)).probe.weight
    monkeypatch.setattr(zero_shot, "BATCH", 2)
    torch.testing.assert_close(
        load_backbone(str(checkpoint[1]), Texts(LABELS)).probe.weight, all_at_once
    )


def test_independent_labels_where_the_user_says_so(checkpoint):
    backbone = load_backbone(str(checkpoint[1]), Texts(LABELS))
    assert (backbone.task, backbone.answering("labels").task) == ("classes", "labels")


def test_an_alignment_reads_tokens_of_another_width(tmp_path):
    folder = save_tokenizer(save_tiny(tmp_path / "model", "CLIPModel"))
    request = GraphsRequest(tmp_path / "onnx", Recipe(8), Recipe(PX))
    graphs = export_graphs(load_backbone(str(folder), Texts(LABELS)), request, QUIET)
    found = run(graphs.low.file)
    outputs = RungOutputs(found["embedding"], found["cls_layers"], found["logits"])
    inputs = tokens(outputs)
    assert inputs.shape[1] == PROJECTION + 2 * WIDTH
    rng = np.random.default_rng(0)
    made = Alignment(
        rng.normal(size=(inputs.shape[1], PROJECTION)).astype(np.float32),
        rng.normal(size=PROJECTION).astype(np.float32),
        *(graphs.low.record.fingerprint, "b", "px=8", ""),
        *(np.array(["c" * 64]), np.zeros((1, PROJECTION), np.float32)),
        layer_dim=WIDTH,
    )
    made.save(tmp_path / "alignment.npz")
    again = Alignment.load(tmp_path / "alignment.npz")
    assert (again.layers, again.layer_dim) == (2, WIDTH)
    aligned = align(graphs, "px8", again).graphs["px8_align"]
    answers = run(aligned.file)
    expected = made.embedding(outputs)
    np.testing.assert_allclose(answers["embedding"], expected, rtol=1e-4, atol=1e-4)
    logits = LinearHead.read(aligned.file)(expected)
    np.testing.assert_allclose(answers["logits"], logits, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--labels", "cat"], "--labels names 1; give two or more"),
        (["--labels", "cat,dog,cat"], "--labels names 'cat' twice"),
        (["--labels", "none.txt"], "--labels none.txt: no such file"),
        (["--labels", "cat,dog", "--prompt", "a photo"], "--prompt 'a photo' has no {}"),
        (["--prompt", "a {}"], "--prompt is the sentence around --labels"),
        (
            ["--labels", "cat,dog", "--head", "linear", "--images", "x"],
            "--head linear and --labels are two heads",
        ),
    ],
)
def test_misuse_is_refused_before_the_model_is_loaded(options, message, tmp_path):
    ran = run_export("rungs", "--model", "no-such", *options, "--out", tmp_path / "onnx")
    assert ran.code == 2 and ran.err.startswith(f"error: {message}")
    assert len(ran.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("class_name", "tokenizer", "message"),
    [
        ("ViTModel", None, "needs a text tower, and .* is a ViTModel"),
        ("CLIPVisionModelWithProjection", None, "needs a text tower.*CLIPModel or SiglipModel"),
        ("CLIPModel", None, "has no tokenizer"),
        ("CLIPModel", ("cat", "dog", "photo"), None),
        ("CLIPModel", ("photo",), "does not tell two labels apart"),
        ("SiglipModel", tuple(f"word{i}" for i in range(99)), "is of another model"),
    ],
)
def test_what_has_no_use_for_texts_says_so_in_one_line(class_name, tokenizer, message, tmp_path):
    folder = save_tiny(tmp_path, class_name)
    if tokenizer is not None:
        save_tokenizer(folder, tokenizer)
    labels = ("cat", "dog") if len(tokenizer or "") < 9 else ("cat", "word98")
    if message is None:
        assert load_backbone(str(folder), Texts(labels)).classes == 2
        return
    with pytest.raises(UsageError, match=message) as caught:
        load_backbone(str(folder), Texts(labels))
    assert "\n" not in str(caught.value)


def test_a_text_that_is_too_long_is_named(checkpoint):
    class_name, folder = checkpoint
    long = " ".join(["grey"] * 20)
    with pytest.raises(UsageError, match=r"longer than the model's 16 tokens.*grey grey"):
        load_backbone(str(folder), Texts(("cat", long)))


@pytest.mark.parametrize("model", ["static-vit", "dinov2-small"])
def test_models_of_images_alone_are_refused_by_name(model):
    with pytest.raises(UsageError, match=f"{model} has none"):
        load_backbone(model, Texts(("cat", "dog")))
