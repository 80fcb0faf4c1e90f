"""What a cache of answers runs again: after a stop, for others, where a file or an image is bad."""

import json
import os
from dataclasses import replace

import numpy as np
import pytest

from bundle.graphs import GraphSet
from calibration import answers as module
from calibration.answers import BATCH
from calibration.chunks import MissingAnswersError
from calibration.images import ImagesError, open_images
from calibration.outputs import wanted
from calibration.running import run_session
from tests.unit.answering import (
    CHUNK,
    COUNT,
    StoppedError,
    assert_same,
    files_of,
    stop_after,
)
from tests.unit.image_files import MemorySource, write_images
from tests.unit.onnx_files import write_graph_set


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    monkeypatch.setattr(module, "CHUNK", CHUNK)


@pytest.mark.parametrize("stop_at", [10, CHUNK - 1, CHUNK, CHUNK + 17, 2 * CHUNK, COUNT])
def test_a_rerun_continues_after_the_last_whole_file(graph_set, answering, tmp_path, stop_at):
    with pytest.raises(StoppedError):
        answering.fill(MemorySource(COUNT), stop_after(stop_at))
    kept = {file: file.stat().st_mtime_ns for file in files_of(tmp_path)}
    whole = min(COUNT, (stop_at + BATCH - 1) // BATCH * BATCH) // CHUNK * CHUNK
    whole = COUNT if stop_at == COUNT else whole
    assert len(kept) == 3 * ((whole + CHUNK - 1) // CHUNK)  # the pictures, and two graphs

    source, told = MemorySource(COUNT), []

    def progress(count):
        told.append(count)
        assert all(file.stat().st_mtime_ns == kept[file] for file in kept)

    answering.fill(source, progress)
    assert sorted(source.read) == list(range(whole, COUNT))
    assert sum(told) == COUNT
    assert_same(answering.read(source), answering.at_once(COUNT))


OTHERS = {
    "graph": lambda graphs, folder: GraphSet.load(write_graph_set(folder, seeds=(3, 4))),
    "weights": lambda graphs, folder: with_low(graphs, weights_sha256="a" * 64),
    "preprocessing": lambda graphs, folder: replace(
        graphs, preprocessing={**graphs.preprocessing, "resample": "nearest"}
    ),
}


CODE = {
    "Pillow": ("calibration.answers.PIL.__version__", "0.0.1"),
    "numpy": ("calibration.answers.np.__version__", "0.0.1"),
    "runtime": ("calibration.answers.local_runtime", lambda: {"name": "other", "processor": None}),
    "imaging": ("calibration.answers.code_sha256", lambda: "e" * 64),
    "looks": ("calibration.answers.looks_sha256", lambda: "e" * 64),
}


def with_low(graphs, **changes):
    low = replace(graphs.low, record=replace(graphs.low.record, **changes))
    return replace(graphs, graphs={**graphs.graphs, low.name: low})


@pytest.mark.parametrize("change", [*OTHERS, *CODE, "images"])
def test_whatever_decides_an_answer_has_answers_of_its_own(
    graph_set, answering, tmp_path, monkeypatch, change
):
    count = 2 * BATCH
    answering.fill(MemorySource(count))
    source = MemorySource(count, fingerprint="second" if change == "images" else "first")
    if change in CODE:
        monkeypatch.setattr(*CODE[change])
    others = OTHERS[change](graph_set, tmp_path / "others") if change in OTHERS else graph_set
    if change == "weights":  # there are none, so the files would be refused
        monkeypatch.setattr("bundle.graphs.Graph.fault", lambda graph: None)
    answering.fill(source, graphs=others)
    assert sorted(source.read) == list(range(count))
    expected = answering.at_once(count, others)
    assert_same(answering.read(source, graphs=others), expected)


def truncate(file):
    file.write_bytes(file.read_bytes()[:-50])


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 1
    file.write_bytes(content)


def empty(file):
    file.write_bytes(b"")


@pytest.mark.parametrize("damage", [truncate, flip, empty, os.unlink])
def test_only_a_torn_file_is_made_again(graph_set, answering, tmp_path, damage):
    answering.fill(MemorySource(COUNT))
    damage(files_of(tmp_path, graph_set.high, MemorySource(COUNT), graph_set)[1])
    source = MemorySource(COUNT)
    with pytest.raises(MissingAnswersError, match=f"lacks answers for {CHUNK} of {COUNT} images"):
        answering.read(source)
    answering.fill(source)
    assert sorted(source.read) == list(range(CHUNK, 2 * CHUNK))
    assert_same(answering.read(source), answering.at_once(COUNT))


def test_a_few_unreadable_images_are_listed_in_order_and_skipped(answering):
    source = MemorySource(COUNT, broken=[60, 7], gone=[8, COUNT - 1])
    expected = [
        "7.png: not a JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF or HEIC image",
        "8.png: cannot be read: No such file or directory",
        "60.png: not a JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF or HEIC image",
        f"{COUNT - 1}.png: cannot be read: No such file or directory",
    ]
    assert answering.fill(source) == answering.fill(source) == expected
    assert len(source.read) == COUNT
    names = {line.split(":")[0] for line in expected}
    assert set(source.names) - set(answering.read(source).pictures.names) == names


def test_unreadable_images_of_an_earlier_run_are_listed_too(answering):
    with pytest.raises(StoppedError):
        answering.fill(MemorySource(COUNT, broken=[7]), stop_after(CHUNK))
    source = MemorySource(COUNT, broken=[7, 60])
    assert [line.split(":")[0] for line in answering.fill(source)] == ["7.png", "60.png"]
    assert len(answering.read(source).pictures) == COUNT - 2 and min(source.read) == CHUNK


@pytest.mark.parametrize(("count", "broken", "stops"), [(40, 2, False), (40, 3, True)])
def test_more_than_five_percent_unreadable_is_an_error(answering, count, broken, stops):
    source = MemorySource(count, broken=range(broken))
    if not stops:
        assert len(answering.fill(source)) == broken
        assert len(answering.read(source).pictures) == count - broken
        return
    with pytest.raises(ImagesError, match=r"3 of 40 images could not be read.*first: 0\.png: not"):
        answering.fill(source)


def test_a_hopeless_run_stops_early_and_keeps_its_answers(answering, tmp_path):
    source = MemorySource(10 * CHUNK, broken=range(8, 8 + CHUNK))
    with pytest.raises(ImagesError, match=f"{CHUNK - 8} of {10 * CHUNK} images"):
        answering.fill(source)
    assert len(source.read) <= CHUNK + 2 * BATCH and len(files_of(tmp_path)) == 3


def test_after_too_many_unreadable_images_only_their_files_are_read_again(answering):
    broken = range(CHUNK, CHUNK + 20)
    with pytest.raises(ImagesError):
        answering.fill(MemorySource(COUNT, broken=broken))
    mended = MemorySource(COUNT)
    assert answering.fill(mended) == []
    assert len(answering.read(mended).pictures) == COUNT and min(mended.read) == CHUNK


def test_a_piece_without_a_readable_image_is_resumed(answering):
    count, broken = 30 * CHUNK, range(CHUNK, 2 * CHUNK)
    with pytest.raises(StoppedError):
        answering.fill(MemorySource(count, broken=broken), stop_after(3 * CHUNK))
    source = MemorySource(count, broken=broken)
    assert len(answering.fill(source)) == CHUNK
    assert min(source.read) == 3 * CHUNK
    assert len(answering.read(source).pictures) == count - CHUNK


def test_files_of_a_folder_that_are_no_images_or_vanish_are_skipped(answering, tmp_path):
    folder = write_images(tmp_path / "images", *(f"class {i % 4}/{i:02d}.png" for i in range(60)))
    (folder / "class 1/01.png").write_text("no image")
    strange = os.fsdecode(b"class 2/line\nbreak \xe9.png")
    (folder / strange).write_bytes(b"")
    source = open_images(str(folder))
    key = source.fingerprint()
    (folder / "class 3/03.png").unlink()
    source.fingerprint = lambda: key  # it was there when the source was listed
    assert answering.fill(source) == [
        "class 1/01.png: not a JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF or HEIC image",
        r"class 2/line\nbreak \xe9.png: the image is empty (0 bytes)",
        "class 3/03.png: cannot be read: No such file or directory",
    ]
    pictures = answering.read(source).pictures
    assert len(pictures) == 58
    labels = [f"class {index}" for index in pictures.labels]
    assert labels == [name.split("/")[0] for name in pictures.names]


def test_a_foreign_file_in_the_folder_stays(graph_set, answering, tmp_path):
    answering.fill(MemorySource(3))
    place = files_of(tmp_path, graph_set.low, MemorySource(3), graph_set)[0].parent
    (place / "notes.json").write_text(json.dumps("mine"))
    np.savez(place / "0-3-00000000.npz", mine=np.ones(3))
    answering.fill(MemorySource(3))
    assert len(answering.read(MemorySource(3)).pictures) == 3
    assert json.loads((place / "notes.json").read_text()) == "mine"


def test_an_image_on_which_a_graph_overflows_is_listed_and_left_out(answering, monkeypatch):
    def overflowing(session, image, layers):
        outputs = run_session(session, image, layers)
        if not layers and len(image) == BATCH:  # the full rung, on the first image of each batch
            outputs.logits[0, 1] = np.nan
        return outputs

    monkeypatch.setattr(module, "run_session", overflowing)
    source = MemorySource(2 * BATCH + 3)
    monkeypatch.setattr(module, "MAX_UNREADABLE", 0.1)
    bad = [source.names[0], source.names[BATCH]]
    lines = [f"{name}: vit_high answers with NaN or Inf" for name in bad]
    assert answering.fill(source) == answering.fill(source) == lines  # a rerun knows it
    assert len(source.read) == len(source)
    assert answering.read(source).pictures.names == tuple(
        name for name in source.names if name not in bad
    )


def test_an_image_that_was_read_once_and_then_was_not_is_asked_about_again(graph_set, answering):
    """A folder on a network that fails for a moment, between the runs of two graph_set."""
    low, high = wanted(graph_set)
    answering.fill(MemorySource(30), what=[low], rows=range(8))
    (line,) = answering.fill(MemorySource(30, gone=[3]), what=[high])
    assert line.startswith("3.png")
    assert answering.fill(MemorySource(30)) == []
    assert len(answering.read(MemorySource(30)).pictures) == 30
