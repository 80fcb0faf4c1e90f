import json
import os
import threading
import tracemalloc
from dataclasses import replace

import numpy as np
import onnxruntime as ort
import pytest

from bundle.graphs import GraphsError, GraphSet
from calibration import collect as module
from calibration.collect import BATCH, PART, collect
from calibration.images import open_images
from calibration.npz import load_npz
from calibration.outputs import Outputs, OutputsError
from calibration.running import run_session
from calibration.source import ImagesError
from imaging import Preprocessing, decode, pixels_sha256
from routing import RungOutputs
from tests.unit.calibration_outputs import with_reference
from tests.unit.image_files import MemorySource, write_images
from tests.unit.onnx_files import write_rung_set

COUNT = 2 * PART + 40  # three parts, the last of them short


class StoppedError(Exception):
    """What a test interrupts a run with."""


@pytest.fixture
def rung_set(tmp_path):
    return GraphSet.load(write_rung_set(tmp_path / "onnx"))


@pytest.fixture
def out(tmp_path):
    return tmp_path / "made" / "outputs.npz"


def parts_of(out):
    return sorted(out.with_name("outputs.npz.parts").glob("*"))


def stop_after(images):
    """A progress callback that interrupts once so many images are done."""
    done = []

    def progress(count, resumed):
        done.append(count)
        if sum(done) >= images:
            raise StoppedError

    return progress


def assert_equal_files(first, second):
    one, other = load_npz(first), load_npz(second)
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype
        np.testing.assert_array_equal(one[name], other[name])


def test_outputs_are_those_of_the_sessions_image_by_image(rung_set, out):
    source, done = MemorySource(20), []
    unreadable = collect(rung_set, source, out, lambda *told: done.append(told))
    outputs = Outputs.load(out)
    assert unreadable == [] and done == [(16, False), (4, False)] and len(outputs) == 20
    images = [source[index] for index in range(20)]
    preprocessing = Preprocessing.from_dict(rung_set.preprocessing)
    image = np.stack([preprocessing(decode(item.data)) for item in images])
    for name, rung in (("vit_low", outputs.low), ("vit_high", outputs.high)):
        session = ort.InferenceSession(str(rung_set.files[name]))
        embedding, layers, logits = session.run(None, {"image": image})
        np.testing.assert_allclose(rung.embedding, embedding, rtol=1e-5)
        np.testing.assert_allclose(rung.logits, logits, rtol=1e-5, atol=1e-5)
        if name == "vit_low":
            np.testing.assert_allclose(rung.cls_layers, layers, rtol=1e-5)
    assert outputs.high.cls_layers is None
    assert outputs.names == source.names
    assert outputs.groups == tuple(item.group for item in images)
    assert outputs.hashes == tuple(pixels_sha256(decode(item.data)) for item in images)
    # The model knows four classes, the source five.
    np.testing.assert_array_equal(outputs.labels, np.array([0, 1, 2, 3, -1] * 4))
    assert (outputs.source, outputs.title) == (source.spec, source.title)
    assert outputs.rung_hashes == {name: rung_set.rungs[name].sha256 for name in rung_set.rungs}


def test_the_file_holds_what_is_returned_and_nothing_else_is_left(rung_set, out):
    collect(rung_set, MemorySource(COUNT), out)
    outputs = Outputs.load(out)
    stored = Outputs.load(out)
    np.testing.assert_array_equal(stored.low.cls_layers, outputs.low.cls_layers)
    assert stored.names == outputs.names == MemorySource(COUNT).names
    assert [file.name for file in out.parent.iterdir()] == ["outputs.npz"]


def test_a_headless_model_has_no_logits(tmp_path, out):
    rung_set = GraphSet.load(write_rung_set(tmp_path, classes=None))
    collect(rung_set, MemorySource(3), out)
    stored = Outputs.load(out)
    assert stored.low.logits is None and stored.high.logits is None
    assert stored.labels.tolist() == [-1, -1, -1]


@pytest.mark.parametrize("stop_at", [10, PART - 1, PART, PART + 100, 2 * PART, COUNT])
def test_a_rerun_continues_after_the_last_whole_part(rung_set, out, tmp_path, stop_at):
    with pytest.raises(StoppedError):
        collect(rung_set, MemorySource(COUNT), out, stop_after(stop_at))
    kept = {part: part.stat().st_mtime_ns for part in parts_of(out)}
    whole = min(COUNT, (stop_at + BATCH - 1) // BATCH * BATCH) // PART * PART
    whole = COUNT if stop_at == COUNT else whole
    assert not out.exists() and len(kept) == (whole + PART - 1) // PART

    source, told = MemorySource(COUNT), []

    def progress(count, resumed):
        told.append((count, resumed))
        assert all(part.stat().st_mtime_ns == kept[part] for part in kept)

    collect(rung_set, source, out, progress)
    assert sorted(source.read) == list(range(whole, COUNT))
    assert sum(count for count, resumed in told if resumed) == whole
    assert sum(count for count, _ in told) == COUNT
    collect(rung_set, MemorySource(COUNT), tmp_path / "at once.npz")
    assert_equal_files(out, tmp_path / "at once.npz")
    assert not parts_of(out)


def test_a_rerun_of_a_finished_run_whose_parts_were_not_joined_runs_no_rung(
    rung_set, out, monkeypatch
):
    with pytest.raises(StoppedError):
        collect(rung_set, MemorySource(COUNT), out, stop_after(COUNT))

    def refuse(*arguments, **options):
        raise AssertionError("a rung ran")

    monkeypatch.setattr(module, "run_session", refuse)
    collect(rung_set, MemorySource(COUNT), out)
    outputs = Outputs.load(out)
    assert len(outputs) == COUNT


def other_rungs(rung_set, tmp_path):
    return GraphSet.load(write_rung_set(tmp_path / "other", seeds=(3, 4)))


def other_preprocessing(rung_set, tmp_path):
    return replace(rung_set, preprocessing={**rung_set.preprocessing, "resample": "nearest"})


def other_labels(rung_set, tmp_path):
    return replace(rung_set, labels=rung_set.labels[::-1])


@pytest.mark.parametrize("change", [other_rungs, other_preprocessing, other_labels])
def test_a_run_with_another_identity_starts_anew(rung_set, out, tmp_path, change):
    with pytest.raises(StoppedError):
        collect(rung_set, MemorySource(COUNT), out, stop_after(2 * PART))
    source, changed = MemorySource(COUNT), change(rung_set, tmp_path)
    collect(changed, source, out)
    assert sorted(source.read) == list(range(COUNT))
    collect(changed, MemorySource(COUNT), tmp_path / "at once.npz")
    assert_equal_files(out, tmp_path / "at once.npz")


def test_other_images_start_anew_even_if_they_are_fewer(rung_set, out):
    with pytest.raises(StoppedError):
        collect(rung_set, MemorySource(COUNT), out, stop_after(COUNT))
    source = MemorySource(PART, fingerprint="second")
    collect(rung_set, source, out)
    outputs = Outputs.load(out)
    assert len(source.read) == len(outputs) == PART and not parts_of(out)


@pytest.mark.parametrize(
    ("what", "other"),
    [
        ("PIL.__version__", "0.0.1"),
        ("code_sha256", lambda: "e" * 64),
        ("looks_sha256", lambda: "e" * 64),
    ],
)
def test_another_library_and_other_code_start_anew(rung_set, out, monkeypatch, what, other):
    with pytest.raises(StoppedError):
        collect(rung_set, MemorySource(COUNT), out, stop_after(COUNT))
    monkeypatch.setattr(f"calibration.collect.{what}", other)
    source = MemorySource(COUNT)
    collect(rung_set, source, out)
    assert len(source.read) == COUNT


def test_the_code_that_decodes_is_on_record(rung_set, out, monkeypatch):
    monkeypatch.setattr(module, "code_sha256", lambda: "e" * 64)
    collect(rung_set, MemorySource(BATCH), out)
    assert Outputs.load(out).imaging_sha256 == "e" * 64


def truncate(part):
    part.write_bytes(part.read_bytes()[:-50])


def flip(part):
    content = bytearray(part.read_bytes())
    content[len(content) // 3] ^= 1
    part.write_bytes(content)


def empty(part):
    part.write_bytes(b"")


@pytest.mark.parametrize("damage", [truncate, flip, empty, os.unlink])
def test_only_a_torn_part_is_made_again(rung_set, out, tmp_path, damage):
    with pytest.raises(StoppedError):
        collect(rung_set, MemorySource(COUNT), out, stop_after(COUNT))
    damage(parts_of(out)[1])
    source = MemorySource(COUNT)
    collect(rung_set, source, out)
    assert sorted(source.read) == list(range(PART, 2 * PART))
    collect(rung_set, MemorySource(COUNT), tmp_path / "at once.npz")
    assert_equal_files(out, tmp_path / "at once.npz")


def test_a_few_unreadable_images_are_listed_in_order_and_skipped(rung_set, out):
    source = MemorySource(COUNT, broken=[300, 7], gone=[8, COUNT - 1])
    unreadable = collect(rung_set, source, out)
    outputs = Outputs.load(out)
    assert unreadable == [
        "7.png: not a JPEG, PNG or WEBP image",
        "8.png: cannot be read: No such file or directory",
        "300.png: not a JPEG, PNG or WEBP image",
        f"{COUNT - 1}.png: cannot be read: No such file or directory",
    ]
    assert set(source.names) - set(outputs.names) == {line.split(":")[0] for line in unreadable}


def test_unreadable_images_of_an_earlier_run_are_listed_too(rung_set, out):
    with pytest.raises(StoppedError):
        collect(rung_set, MemorySource(COUNT, broken=[7]), out, stop_after(PART))
    source = MemorySource(COUNT, broken=[7, 300])
    unreadable = collect(rung_set, source, out)
    outputs = Outputs.load(out)
    assert [line.split(":")[0] for line in unreadable] == ["7.png", "300.png"]
    assert len(outputs) == COUNT - 2 and min(source.read) == PART


@pytest.mark.parametrize(("count", "broken", "stops"), [(40, 2, False), (40, 3, True)])
def test_more_than_five_percent_unreadable_is_an_error(rung_set, out, count, broken, stops):
    source = MemorySource(count, broken=range(broken))
    if not stops:
        assert len(collect(rung_set, source, out)) == broken
        assert len(Outputs.load(out)) == count - broken
        return
    with pytest.raises(ImagesError, match=r"3 of 40 images could not be read.*first: 0\.png: not"):
        collect(rung_set, source, out)
    assert not out.exists()


def test_a_hopeless_run_stops_early_and_keeps_its_parts(rung_set, out):
    source = MemorySource(10 * PART, broken=range(20, 20 + PART))
    with pytest.raises(ImagesError, match=f"236 of {10 * PART} images"):
        collect(rung_set, source, out)
    assert len(source.read) <= PART + 2 * BATCH and len(parts_of(out)) == 1


def test_after_too_many_unreadable_images_only_their_parts_are_read_again(rung_set, out):
    broken = range(PART, PART + 60)
    with pytest.raises(ImagesError):
        collect(rung_set, MemorySource(COUNT, broken=broken), out)
    mended = MemorySource(COUNT)
    unreadable = collect(rung_set, mended, out)
    outputs = Outputs.load(out)
    assert len(outputs) == COUNT and unreadable == []
    assert min(mended.read) == PART


def test_a_part_without_a_readable_image_is_joined_and_resumed(rung_set, out):
    count, broken = 30 * PART, range(PART, 2 * PART)
    with pytest.raises(StoppedError):
        collect(rung_set, MemorySource(count, broken=broken), out, stop_after(3 * PART))
    source = MemorySource(count, broken=broken)
    unreadable = collect(rung_set, source, out)
    outputs = Outputs.load(out)
    assert min(source.read) == 3 * PART
    assert len(unreadable) == PART and len(outputs) == count - PART


def test_no_image_is_an_error(rung_set, out):
    with pytest.raises(ImagesError, match="no image"):
        collect(rung_set, MemorySource(0), out)


def test_files_of_a_folder_that_are_no_images_or_vanish_are_skipped(rung_set, out, tmp_path):
    folder = write_images(tmp_path / "images", *(f"class {i % 4}/{i:02d}.png" for i in range(60)))
    (folder / "class 1/01.png").write_text("no image")
    strange = os.fsdecode(b"class 2/line\nbreak \xe9.png")
    (folder / strange).write_bytes(b"")
    source = open_images(str(folder))
    (folder / "class 3/03.png").unlink()
    unreadable = collect(rung_set, source, out)
    outputs = Outputs.load(out)
    assert unreadable == [
        "class 1/01.png: not a JPEG, PNG or WEBP image",
        r"'class 2/line\nbreak \udce9.png': the image is empty (0 bytes)",
        "class 3/03.png: cannot be read: No such file or directory",
    ]
    assert len(outputs) == 58
    labels = [f"class {index}" for index in outputs.labels]
    assert labels == [name.split("/")[0] for name in outputs.names]


def test_a_name_that_is_not_unicode_survives(rung_set, out, tmp_path):
    name = os.fsdecode(b"caf\xe9.png")
    collect(rung_set, open_images(str(write_images(tmp_path / "images", name))), out)
    assert Outputs.load(out).names == (name,)


def test_the_next_batch_is_decoded_while_the_rungs_run(rung_set, out, monkeypatch):
    decoded = threading.Event()

    class Source(MemorySource):
        def __getitem__(self, index):
            image = super().__getitem__(index)
            if index == 2 * BATCH - 1:
                decoded.set()
            return image

    waited = []

    def run_session(session, image, layers):
        waited.append(decoded.wait(timeout=20))
        return original(session, image, layers)

    original = module.run_session
    monkeypatch.setattr(module, "run_session", run_session)
    collect(rung_set, Source(3 * BATCH), out)
    assert waited[0]


def test_no_more_than_one_batch_is_decoded_ahead(rung_set, out, monkeypatch):
    source, ahead = MemorySource(COUNT), []

    def progress(count, resumed):
        done = sum(ahead_of for ahead_of, _ in ahead) + count
        ahead.append((count, max(source.read) + 1 - done))

    collect(rung_set, source, out, progress)
    assert max(more for _, more in ahead) <= BATCH


def test_memory_does_not_grow_with_the_number_of_images(rung_set, out, monkeypatch):
    def run_session(session, image, layers):
        rows = len(image)
        cls_layers = np.ones((rows, 13, 384), np.float32) if layers else None  # 20 kB an image
        return RungOutputs(np.ones((rows, 384), np.float32), cls_layers, None)

    monkeypatch.setattr(module, "run_session", run_session)
    peaks = {}
    for parts in (2, 8):
        peaks[parts] = []
        tracemalloc.start()
        collect(
            rung_set,
            MemorySource(parts * PART),
            out,
            lambda *told, found=peaks[parts]: found.append(tracemalloc.get_traced_memory()[1]),
        )
        tracemalloc.stop()
    part_bytes = PART * 15 * 384 * 4
    assert peaks[2][-1] > part_bytes  # the rows are seen
    assert peaks[8][-1] < peaks[2][-1] + part_bytes / 2


def test_an_onnx_file_that_is_not_the_exported_one_is_refused(rung_set, out):
    rung_set.files["vit_high"].write_bytes(rung_set.files["vit_low"].read_bytes())
    with pytest.raises(GraphsError, match=r"vit_high\.onnx differs from its SHA-256"):
        collect(rung_set, MemorySource(3), out)


def test_a_place_that_cannot_be_written_is_known_at_once(rung_set, tmp_path):
    source = MemorySource(3)
    with pytest.raises(OutputsError, match="is a folder"):
        collect(rung_set, source, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputsError, match="cannot write"):
        collect(rung_set, source, tmp_path / "file" / "outputs.npz")
    assert source.read == []


def test_nothing_but_parts_is_deleted(rung_set, out):
    kept = out.with_name("outputs.npz.parts") / "notes.json"
    kept.parent.mkdir(parents=True)
    kept.write_text(json.dumps("mine"))
    collect(rung_set, MemorySource(3), out)
    assert out.is_file() and json.loads(kept.read_text()) == "mine"


def test_an_image_on_which_a_rung_overflows_is_listed_and_left_out(rung_set, out, monkeypatch):
    def overflowing(session, image, layers):
        outputs = run_session(session, image, layers)
        if not layers and len(image) == BATCH:  # the full rung, on the first image of each batch
            outputs.logits[0, 1] = np.nan
        return outputs

    monkeypatch.setattr("calibration.collect.run_session", overflowing)
    source = MemorySource(2 * BATCH + 3)
    monkeypatch.setattr("calibration.collect.MAX_UNREADABLE", 0.1)
    lines = collect(rung_set, source, out)
    bad = [source.names[0], source.names[BATCH]]
    assert lines == [f"{name}: a rung answers with NaN or Inf" for name in bad]
    assert Outputs.load(out).names == tuple(name for name in source.names if name not in bad)


def test_a_reference_is_run_as_a_third_session(rung_set, out):
    rungs, source = with_reference(rung_set), MemorySource(BATCH + 4)
    assert collect(rungs, source, out) == []
    outputs = Outputs.load(out)
    preprocessing = Preprocessing.from_dict(rungs.preprocessing)
    image = np.stack([preprocessing(decode(source[index].data)) for index in range(len(source))])
    session = ort.InferenceSession(str(rungs.reference.file))
    embedding, _, logits = session.run(None, {"image": image})
    np.testing.assert_allclose(outputs.reference.embedding, embedding, rtol=1e-5)
    np.testing.assert_allclose(outputs.reference.logits, logits, rtol=1e-5, atol=1e-5)
    assert outputs.reference.cls_layers is None
    assert np.abs(outputs.reference.embedding - outputs.high.embedding).max() > 0.1
    assert outputs.rung_hashes == rungs.fingerprints()
    assert set(outputs.rung_hashes) == {"vit_low", "vit_high", "reference"}


def test_parts_without_the_reference_are_made_anew(rung_set, out, tmp_path):
    with pytest.raises(StoppedError):
        collect(rung_set, MemorySource(COUNT), out, stop_after(COUNT))
    source, rungs = MemorySource(COUNT), with_reference(rung_set)
    collect(rungs, source, out)
    assert sorted(source.read) == list(range(COUNT))
    assert len(Outputs.load(out).reference) == COUNT


def test_a_reference_that_is_not_the_exported_file_is_refused(rung_set, out):
    rungs = with_reference(rung_set)
    rungs.reference.file.write_bytes(rungs.files["vit_low"].read_bytes())
    with pytest.raises(GraphsError, match=r"reference\.onnx differs from its SHA-256"):
        collect(rungs, MemorySource(3), out)
