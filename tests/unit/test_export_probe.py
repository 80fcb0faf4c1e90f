from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from PIL import Image
from rich.console import Console
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from bundle.graphs import GraphSet
from bundle.prints import among, no_looks
from calibration.images import FolderImages
from calibration.running import decode_ahead
from export.errors import UsageError
from export.graphs import export_graphs
from export.pretrained import pretrained
from export.probe import fit_linear, fit_probe
from export.request import GraphsRequest
from imaging import Preprocessing
from report.terminal import Bars
from tests.unit.export_tiny import PX, QUIET, save_tiny

pytestmark = pytest.mark.usefixtures("remembered_exports")

COLOURS = {"blue": (20, 40, 200), "green": (30, 180, 60), "red": (210, 30, 30)}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"), "Dinov2Model")


def write_images(root: Path, per_class: int = 8, colours: dict = COLOURS) -> Path:
    rng = np.random.default_rng(0)
    for name, colour in colours.items():
        (root / name).mkdir(parents=True)
        for index in range(per_class):
            pixels = np.clip(rng.normal(colour, 25, size=(24, 20, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{index}.png")
    return root


@pytest.mark.parametrize("classes", [2, 5])
def test_folding_keeps_scikit_learns_decision(classes):
    rng = np.random.default_rng(0)
    labels = np.arange(200) % classes
    embeddings = rng.normal(3.0, 2.0, size=(200, 12)) * np.linspace(0.1, 9, 12)
    embeddings[:, 0] += labels
    embeddings[:, 1] = 4.0  # a constant feature must not divide by zero
    embeddings = embeddings.astype(np.float32)
    weight, bias, accuracy = fit_linear(embeddings, labels)
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    model.fit(embeddings.astype(np.float64), labels)

    logits = embeddings @ weight.T + bias
    assert logits.shape == (200, classes)
    probability = np.exp(logits - logits.max(axis=1, keepdims=True))
    probability /= probability.sum(axis=1, keepdims=True)
    expected = model.predict_proba(embeddings.astype(np.float64))
    np.testing.assert_allclose(probability, expected, rtol=1e-4, atol=1e-6)
    assert accuracy == pytest.approx((logits.argmax(axis=1) == labels).mean())


def test_both_rungs_carry_the_probe(model, tmp_path):
    root = write_images(tmp_path / "images")
    (root / ".cache").mkdir()
    (root / "red" / ".DS_Store").write_bytes(b"x")
    out = tmp_path / "onnx"
    graphs = export_graphs(pretrained(str(model)), GraphsRequest(out, head_images=root), QUIET)
    assert graphs.classes == 3
    assert (out / "labels.txt").read_text().splitlines() == sorted(COLOURS)
    head = graphs.about["head"]
    assert head["images"] == 24
    assert head["training_accuracy"] >= 0.9
    assert head["skipped"] == []
    # The images the head knows are on record, so that nothing is certified on them.
    source = FolderImages(root)
    preprocessing = Preprocessing.from_dict(graphs.preprocessing)
    (seen,) = decode_ahead(source, [range(24)], preprocessing)
    hashes, looks = [image.sha256 for image in seen], np.stack([image.look for image in seen])
    assert among(hashes, no_looks(24), GraphSet.load(out).learned()).all()
    assert among(["0" * 64] * 24, looks, GraphSet.load(out).learned()).all()

    backbone = pretrained(str(model))
    probe = fit_probe(backbone, PX, root, QUIET)
    weight, bias = probe.linear.weight.detach().numpy(), probe.linear.bias.detach().numpy()
    image = np.random.default_rng(1).normal(size=(4, 3, PX, PX)).astype(np.float32)
    for name in ("px8", "full"):
        session = ort.InferenceSession(out / f"{name}.onnx", providers=["CPUExecutionProvider"])
        embedding, logits = session.run(["embedding", "logits"], {"image": image})
        np.testing.assert_allclose(logits, embedding @ weight.T + bias, rtol=1e-3, atol=1e-3)


def test_a_probe_takes_the_place_of_the_models_own_head(tmp_path):
    backbone = pretrained(str(save_tiny(tmp_path / "model", "ViTForImageClassification")))
    root = write_images(tmp_path / "images", colours=dict(list(COLOURS.items())[:2]))
    probe = fit_probe(backbone, PX, root, QUIET)
    replaced = backbone.with_probe(probe.linear, probe.labels)
    assert (backbone.classes, replaced.classes) == (3, 2)
    assert replaced.labels == ("blue", "green")
    assert replaced.output_shapes()["logits"] == (2,)


def test_unreadable_files_are_skipped_and_listed(model, tmp_path):
    root = write_images(tmp_path / "images")
    (root / "blue" / "0.png").unlink()
    (root / "blue" / os.fsdecode(b"caf\xe9.png")).write_bytes(b"not an image")
    (root / "green").rename(root / os.fsdecode(b"gr\xfcn"))
    (root / "blue" / "notes.txt").write_text("no image")
    (root / "loose.png").write_bytes((root / "blue" / "1.png").read_bytes())
    said = io.StringIO()
    bars = Bars(Console(file=said, width=200))
    probe = fit_probe(pretrained(str(model)), PX, root, bars)
    assert (
        "skipped blue/caf\\xe9.png: not a JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF or HEIC image"
        in said.getvalue()
    )
    assert "skipped 1 file of other kinds (.txt 1): blue/notes.txt" in said.getvalue()
    assert "skipped 1 images in no class folder" in said.getvalue()
    assert probe.record["skipped"] == ["blue/caf\\xe9.png"]
    assert probe.labels == ("blue", "gr\\xfcn", "red")
    assert probe.record["images"] == 23


def test_too_many_unreadable_files(model, tmp_path):
    root = write_images(tmp_path / "images")
    for index in range(2):
        (root / "blue" / f"{index}.png").write_bytes(b"")
    with pytest.raises(UsageError, match="2 of 24 files cannot be read.*blue/0.png: .*empty"):
        fit_probe(pretrained(str(model)), PX, root, QUIET)


def test_a_class_that_lost_all_its_images(model, tmp_path):
    root = write_images(tmp_path / "images", per_class=30)
    (root / "white").mkdir()
    (root / "white" / "0.png").write_bytes(b"")
    with pytest.raises(UsageError, match="no readable image of class white"):
        fit_probe(pretrained(str(model)), PX, root, QUIET)


def test_a_folder_without_classes_is_refused(model, tmp_path):
    one = write_images(tmp_path / "one", colours={"red": COLOURS["red"]})
    empty = write_images(tmp_path / "empty")
    (empty / "white").mkdir()
    (empty / "white/0.psd").write_bytes(b"8BPS")
    for root, message in (
        (one, "has 1 class folders; .* at least two"),
        (one / "red", "has 0 class folders"),
        (empty, r"white holds no image; skipped 1 file of other kinds \(.psd 1\): white/0.psd"),
    ):
        with pytest.raises(UsageError, match=message):
            fit_probe(pretrained(str(model)), PX, root, QUIET)
