import io

import numpy as np
import onnxruntime as ort
import pytest
from PIL import Image

from calibration.collect import Outputs, OutputsError, collect
from calibration.images import ImagesError, SourceImage, list_folder, read_folder
from calibration.sample import crops, photographs, write
from imaging import Preprocessing, decode
from routing import RungSet
from tests.unit.onnx_files import write_rung_set


def png(colour):
    buffer = io.BytesIO()
    Image.new("RGB", (10, 12), colour).save(buffer, "PNG")
    return buffer.getvalue()


def source(index, data=None):
    label = f"class {index % 4}"
    return SourceImage(f"{index}.png", f"{index}.png", label, data or png((index, 50, 200)))


@pytest.fixture
def rung_set(tmp_path):
    return RungSet.load(write_rung_set(tmp_path / "onnx"))


def test_outputs_are_those_of_the_sessions(rung_set):
    done = []
    outputs, unreadable = collect(rung_set, map(source, range(20)), "test", done.append)
    assert unreadable == [] and sum(done) == 20 and len(outputs) == 20
    preprocessing = Preprocessing.from_dict(rung_set.preprocessing)
    image = np.stack([preprocessing(decode(source(i).data)) for i in range(20)])
    for name, rung in (("vit_low", outputs.low), ("vit_high", outputs.high)):
        session = ort.InferenceSession(str(rung_set.files[name]))
        embedding, layers, logits = session.run(None, {"image": image})
        np.testing.assert_allclose(rung.embedding, embedding, rtol=1e-5)
        np.testing.assert_allclose(rung.logits, logits, rtol=1e-5, atol=1e-5)
        if name == "vit_low":
            np.testing.assert_allclose(rung.cls_layers, layers, rtol=1e-5)
    assert outputs.high.cls_layers is None
    np.testing.assert_array_equal(outputs.labels, np.arange(20) % 4)


def test_outputs_round_trip(rung_set, tmp_path):
    outputs, _ = collect(rung_set, map(source, range(5)), "test")
    outputs.save(tmp_path / "out.npz")
    loaded = Outputs.load(tmp_path / "out.npz")
    np.testing.assert_array_equal(loaded.low.cls_layers, outputs.low.cls_layers)
    assert loaded.names == outputs.names and loaded.fingerprint() == outputs.fingerprint()
    assert loaded.rung_hashes == outputs.rung_hashes and loaded.source == "test"


def test_a_headless_model_has_no_logits(tmp_path):
    rung_set = RungSet.load(write_rung_set(tmp_path, classes=None))
    outputs, _ = collect(rung_set, map(source, range(3)), "test")
    assert outputs.low.logits is None
    outputs.save(tmp_path / "out.npz")
    assert Outputs.load(tmp_path / "out.npz").high.logits is None


def test_a_few_unreadable_images_are_listed_and_skipped(rung_set):
    items = [source(i, b"not an image" if i == 7 else None) for i in range(40)]
    outputs, unreadable = collect(rung_set, items, "test")
    assert len(outputs) == 39 and "7.png" not in outputs.names
    assert unreadable == ["7.png: not a JPEG, PNG or WEBP image"]


def test_many_unreadable_images_are_an_error(rung_set):
    items = [source(i, b"x" if i % 10 == 0 else None) for i in range(40)]
    with pytest.raises(ImagesError, match="4 of 40 images could not be read"):
        collect(rung_set, items, "test")
    with pytest.raises(ImagesError, match="none of 0"):
        collect(rung_set, [], "test")


def test_outputs_that_are_missing_or_damaged_say_what_to_run(tmp_path):
    with pytest.raises(OutputsError, match="collect first"):
        Outputs.load(tmp_path / "out.npz")
    (tmp_path / "out.npz").write_bytes(b"PK\x03\x04 torn")
    with pytest.raises(OutputsError, match="collect again"):
        Outputs.load(tmp_path / "out.npz")


def test_folders_are_listed_recursively_with_labels(tmp_path):
    for name in ("a/1.png", "a/2.PNG", "b/1.jpeg", "b/c/deep.webp", "top.jpg", "a/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    files = list_folder(tmp_path)
    labels = {image.name: image.label for image in read_folder(tmp_path, files)}
    assert labels == {
        "a/1.png": "a",
        "a/2.PNG": "a",
        "b/1.jpeg": "b",
        "b/c/deep.webp": None,
        "top.jpg": None,
    }


def test_empty_and_missing_folders_are_errors(tmp_path):
    with pytest.raises(ImagesError, match="no such folder"):
        list_folder(tmp_path / "nowhere")
    with pytest.raises(ImagesError, match="no .jpg"):
        list_folder(tmp_path)


def test_sample_crops_are_seeded_and_of_the_documented_size():
    first, again = list(crops(30, seed=5)), list(crops(40, seed=5))[:30]
    assert first == again
    assert {c.data for c in first}.isdisjoint(c.data for c in crops(30, seed=6))
    shortest = {file.stem: min(Image.open(file).size) for file in photographs()}
    for crop in first:
        image = Image.open(io.BytesIO(crop.data))
        side = image.size[0]
        assert image.size == (side, side) and image.format == "JPEG"
        assert 0.15 * shortest[crop.label] - 1 <= side <= shortest[crop.label]


def test_sample_writes_one_folder_per_photograph_and_overwrites_nothing(tmp_path):
    write(tmp_path / "out", 12, seed=0)
    expected = {crop.name: crop.data for crop in crops(12, seed=0)}
    written = {
        path.relative_to(tmp_path / "out").as_posix(): path.read_bytes()
        for path in list_folder(tmp_path / "out")
    }
    assert written == expected
    with pytest.raises(ImagesError, match="not empty"):
        write(tmp_path / "out", 12, seed=0)
