"""What `AnswerCache` runs, what it keeps, and what `collect` makes of it."""

import json
import os
import threading
import tracemalloc
from dataclasses import replace

import numpy as np
import onnxruntime as ort
import pytest

from bundle.graphs import GraphsError, GraphSet
from calibration import answers as module
from calibration.answers import BATCH, CHUNK, AnswerCache, Asked
from calibration.chunks import AnswersError
from calibration.images import open_images
from calibration.outputs import Outputs, OutputsError, asked, collect
from calibration.running import run_session
from calibration.source import ImagesError
from imaging import Preprocessing, decode, pixels_sha256
from routing import RungOutputs
from tests.unit.calibration_outputs import with_reference
from tests.unit.image_files import MemorySource, write_images
from tests.unit.onnx_files import write_rung_set

COUNT = 2 * CHUNK + 40  # three files of each graph, the last of them short


class StoppedError(Exception):
    """What a test interrupts a run with."""


@pytest.fixture
def graphs(tmp_path):
    return GraphSet.load(write_rung_set(tmp_path / "onnx"))


@pytest.fixture
def fill(graphs, tmp_path):
    """Let the rungs, or what else is asked, answer from one folder."""

    def fill(source, progress=lambda count, resumed: None, graphs=graphs, what=None, rows=None):
        cache = AnswerCache(tmp_path / "answers", source, graphs)
        return cache.fill(asked(graphs) if what is None else what, rows, progress)

    return fill


@pytest.fixture
def read(graphs, tmp_path):
    """What the rungs, or what else is asked, have answered."""

    def read(source, graphs=graphs, what=None, rows=None, folder="answers"):
        cache = AnswerCache(tmp_path / folder, source, graphs)
        return cache.read(asked(graphs) if what is None else what, rows)

    return read


def files_of(tmp_path, graph=None, source=None, graphs=None):
    """The files of a graph's answers, or of everything."""
    if graph is None:
        return sorted((tmp_path / "answers").rglob("*.npz"))
    cache = AnswerCache(tmp_path / "answers", source, graphs)
    return sorted((tmp_path / "answers" / cache.key(graph)).iterdir(), key=first_row)


def first_row(file):
    return int(file.name.split("-")[0])


def stop_after(images):
    """A progress callback that interrupts once so many images are done."""
    done = []

    def progress(count, resumed):
        done.append(count)
        if sum(done) >= images:
            raise StoppedError

    return progress


def assert_same(one, other):
    """Whether two `Answered` hold the same bits."""
    assert one.outputs.keys() == other.outputs.keys()
    for name, outputs in one.outputs.items():
        for field in ("embedding", "cls_layers", "logits"):
            first, second = (getattr(found, field) for found in (outputs, other.outputs[name]))
            assert (first is None) == (second is None)
            if first is not None:
                assert first.dtype == second.dtype
                np.testing.assert_array_equal(first, second)
    for field, values in vars(one.pictures).items():
        np.testing.assert_array_equal(values, getattr(other.pictures, field))


def at_once(graphs, source, folder):
    """The answers of a run of its own that nothing stops."""
    cache = AnswerCache(folder, source, graphs)
    cache.fill(asked(graphs))
    return cache.read(asked(graphs))


def test_outputs_are_those_of_the_sessions_image_by_image(graphs, tmp_path):
    source, done, out = MemorySource(20), [], tmp_path / "made" / "outputs.json"
    cache = AnswerCache(tmp_path / "answers", source, graphs)
    assert collect(cache, out, lambda *told: done.append(told)) == []
    outputs = Outputs.load(out)
    assert done == [(16, False), (4, False)] and len(outputs) == 20
    images = [source[index] for index in range(20)]
    preprocessing = Preprocessing.from_dict(graphs.preprocessing)
    image = np.stack([preprocessing(decode(item.data)) for item in images])
    for name, rung in (("vit_low", outputs.low), ("vit_high", outputs.high)):
        session = ort.InferenceSession(str(graphs.files[name]))
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
    assert outputs.made.graphs == graphs.fingerprints()
    assert [file.name for file in out.parent.iterdir()] == ["outputs.json"]


def test_answers_are_those_for_the_rows_asked_for_in_their_order(graphs, fill, read):
    source, rows = MemorySource(40), [3, 30, 4, 17]
    what = [Asked(graphs.low, True)]
    fill(source, what=what, rows=rows)
    assert sorted(source.read) == [3, 4, 17, 30]
    found = read(source, what=what, rows=rows)
    assert found.pictures.rows.tolist() == rows
    assert found.pictures.names == tuple(source.names[row] for row in rows)
    assert found.pictures.labels.tolist() == [3, 0, -1, 2]
    fill(source, what=what)
    assert_same(read(source, what=what).only(np.array(rows)), found)
    with pytest.raises(AnswersError, match="lacks answers for 40 of 40 images; collect again"):
        read(source)  # nobody asked the full rung


def test_rows_in_two_portions_are_those_of_all_at_once(graphs, fill, read, tmp_path):
    source = MemorySource(4 * BATCH)
    for rows in (range(2 * BATCH), range(4 * BATCH)):
        fill(source, rows=rows)
    assert len(source.read) == 4 * BATCH
    assert_same(read(source), at_once(graphs, MemorySource(4 * BATCH), tmp_path / "other"))


def test_images_are_decoded_once_for_two_graphs_and_again_for_a_third(graphs, fill, read):
    source = MemorySource(20)
    fill(source)
    assert len(source.read) == 20
    fill(source)
    assert len(source.read) == 20  # nothing runs a second time
    three = with_reference(graphs)
    fill(source, graphs=three)
    assert len(source.read) == 40
    assert read(source, graphs=three).outputs.keys() == {"vit_low", "vit_high", "reference"}


def test_a_graph_asked_for_later_runs_alone(graphs, fill, monkeypatch):
    fill(MemorySource(20))
    opened = []
    original = module.open_session
    monkeypatch.setattr(
        module, "open_session", lambda file: opened.append(file.name) or original(file)
    )
    fill(MemorySource(20), graphs=with_reference(graphs))
    assert opened == ["reference.onnx"]


def test_answers_with_layers_serve_whoever_wants_none_and_not_the_other_way(graphs, fill, read):
    source = MemorySource(4)
    fill(source, what=[Asked(graphs.low, False)])
    with pytest.raises(AnswersError):
        read(source, what=[Asked(graphs.low, True)])
    fill(source, what=[Asked(graphs.low, True)])
    assert len(source.read) == 8
    fill(source, what=[Asked(graphs.low, False)])
    assert len(source.read) == 8
    assert read(source, what=[Asked(graphs.low)]).outputs["vit_low"].cls_layers is None


def test_one_graph_under_two_names_runs_once_and_keeps_its_layers(tmp_path, fill, read):
    twins = GraphSet.load(write_rung_set(tmp_path / "twins", seeds=(1, 1)))
    source = MemorySource(20)
    fill(source, graphs=twins)
    outputs = read(source, graphs=twins).outputs
    assert outputs["vit_low"].cls_layers is not None and outputs["vit_high"].cls_layers is None
    np.testing.assert_array_equal(outputs["vit_low"].logits, outputs["vit_high"].logits)


def test_a_headless_model_has_no_logits(tmp_path, fill, read):
    graphs = GraphSet.load(write_rung_set(tmp_path / "headless", classes=None))
    fill(MemorySource(3), graphs=graphs)
    found = read(MemorySource(3), graphs=graphs)
    assert all(outputs.logits is None for outputs in found.outputs.values())
    assert found.pictures.labels.tolist() == [-1, -1, -1]


def test_labels_follow_the_names_of_the_set(graphs, fill, read):
    source = MemorySource(20)
    fill(source)
    turned = replace(graphs, labels=graphs.labels[::-1])
    fill(source, graphs=turned)
    assert len(source.read) == 20
    assert read(source, graphs=turned).pictures.labels.tolist() == [3, 2, 1, 0, -1] * 4


@pytest.mark.parametrize("stop_at", [10, CHUNK - 1, CHUNK, CHUNK + 100, 2 * CHUNK, COUNT])
def test_a_rerun_continues_after_the_last_whole_file(graphs, fill, read, tmp_path, stop_at):
    with pytest.raises(StoppedError):
        fill(MemorySource(COUNT), stop_after(stop_at))
    kept = {file: file.stat().st_mtime_ns for file in files_of(tmp_path)}
    whole = min(COUNT, (stop_at + BATCH - 1) // BATCH * BATCH) // CHUNK * CHUNK
    whole = COUNT if stop_at == COUNT else whole
    assert len(kept) == 3 * ((whole + CHUNK - 1) // CHUNK)  # the pictures, and two graphs

    source, told = MemorySource(COUNT), []

    def progress(count, resumed):
        told.append((count, resumed))
        assert all(file.stat().st_mtime_ns == kept[file] for file in kept)

    fill(source, progress)
    assert sorted(source.read) == list(range(whole, COUNT))
    assert sum(count for count, resumed in told if resumed) == whole
    assert sum(count for count, _ in told) == COUNT
    assert_same(read(source), at_once(graphs, MemorySource(COUNT), tmp_path / "other"))


OTHERS = {
    "graph": lambda graphs, folder: GraphSet.load(write_rung_set(folder, seeds=(3, 4))),
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
    graphs, fill, read, tmp_path, monkeypatch, change
):
    count = 2 * BATCH
    fill(MemorySource(count))
    source = MemorySource(count, fingerprint="second" if change == "images" else "first")
    if change in CODE:
        monkeypatch.setattr(*CODE[change])
    others = OTHERS[change](graphs, tmp_path / "others") if change in OTHERS else graphs
    if change == "weights":  # there are none, so the files would be refused
        monkeypatch.setattr("bundle.graphs.Graph.fault", lambda graph: None)
    fill(source, graphs=others)
    assert sorted(source.read) == list(range(count))
    expected = at_once(others, MemorySource(count), tmp_path / "other")
    assert_same(read(source, graphs=others), expected)


def test_the_code_that_decodes_is_on_record(graphs, tmp_path, monkeypatch):
    monkeypatch.setattr("calibration.outputs.code_sha256", lambda: "e" * 64)
    cache = AnswerCache(tmp_path / "answers", MemorySource(BATCH), graphs)
    collect(cache, tmp_path / "outputs.json")
    assert Outputs.load(tmp_path / "outputs.json").made.imaging_sha256 == "e" * 64


def truncate(file):
    file.write_bytes(file.read_bytes()[:-50])


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 1
    file.write_bytes(content)


def empty(file):
    file.write_bytes(b"")


@pytest.mark.parametrize("damage", [truncate, flip, empty, os.unlink])
def test_only_a_torn_file_is_made_again(graphs, fill, read, tmp_path, damage):
    fill(MemorySource(COUNT))
    damage(files_of(tmp_path, graphs.high, MemorySource(COUNT), graphs)[1])
    source = MemorySource(COUNT)
    with pytest.raises(AnswersError, match=f"lacks answers for {CHUNK} of {COUNT} images"):
        read(source)
    fill(source)
    assert sorted(source.read) == list(range(CHUNK, 2 * CHUNK))
    assert_same(read(source), at_once(graphs, MemorySource(COUNT), tmp_path / "other"))


def test_a_few_unreadable_images_are_listed_in_order_and_skipped(fill, read):
    source = MemorySource(COUNT, broken=[300, 7], gone=[8, COUNT - 1])
    expected = [
        "7.png: not a JPEG, PNG or WEBP image",
        "8.png: cannot be read: No such file or directory",
        "300.png: not a JPEG, PNG or WEBP image",
        f"{COUNT - 1}.png: cannot be read: No such file or directory",
    ]
    assert fill(source) == fill(source) == expected
    assert len(source.read) == COUNT
    names = {line.split(":")[0] for line in expected}
    assert set(source.names) - set(read(source).pictures.names) == names


def test_unreadable_images_of_an_earlier_run_are_listed_too(fill, read):
    with pytest.raises(StoppedError):
        fill(MemorySource(COUNT, broken=[7]), stop_after(CHUNK))
    source = MemorySource(COUNT, broken=[7, 300])
    assert [line.split(":")[0] for line in fill(source)] == ["7.png", "300.png"]
    assert len(read(source).pictures) == COUNT - 2 and min(source.read) == CHUNK


@pytest.mark.parametrize(("count", "broken", "stops"), [(40, 2, False), (40, 3, True)])
def test_more_than_five_percent_unreadable_is_an_error(fill, read, count, broken, stops):
    source = MemorySource(count, broken=range(broken))
    if not stops:
        assert len(fill(source)) == broken
        assert len(read(source).pictures) == count - broken
        return
    with pytest.raises(ImagesError, match=r"3 of 40 images could not be read.*first: 0\.png: not"):
        fill(source)


def test_a_hopeless_run_stops_early_and_keeps_its_answers(fill, tmp_path):
    source = MemorySource(10 * CHUNK, broken=range(20, 20 + CHUNK))
    with pytest.raises(ImagesError, match=f"236 of {10 * CHUNK} images"):
        fill(source)
    assert len(source.read) <= CHUNK + 2 * BATCH and len(files_of(tmp_path)) == 3


def test_after_too_many_unreadable_images_only_their_files_are_read_again(fill, read):
    broken = range(CHUNK, CHUNK + 60)
    with pytest.raises(ImagesError):
        fill(MemorySource(COUNT, broken=broken))
    mended = MemorySource(COUNT)
    assert fill(mended) == []
    assert len(read(mended).pictures) == COUNT and min(mended.read) == CHUNK


def test_a_piece_without_a_readable_image_is_resumed(fill, read):
    count, broken = 30 * CHUNK, range(CHUNK, 2 * CHUNK)
    with pytest.raises(StoppedError):
        fill(MemorySource(count, broken=broken), stop_after(3 * CHUNK))
    source = MemorySource(count, broken=broken)
    assert len(fill(source)) == CHUNK
    assert min(source.read) == 3 * CHUNK
    assert len(read(source).pictures) == count - CHUNK


def test_no_image_is_an_error(fill):
    with pytest.raises(ImagesError, match="no image"):
        fill(MemorySource(0))


def test_files_of_a_folder_that_are_no_images_or_vanish_are_skipped(fill, read, tmp_path):
    folder = write_images(tmp_path / "images", *(f"class {i % 4}/{i:02d}.png" for i in range(60)))
    (folder / "class 1/01.png").write_text("no image")
    strange = os.fsdecode(b"class 2/line\nbreak \xe9.png")
    (folder / strange).write_bytes(b"")
    source = open_images(str(folder))
    key = source.fingerprint()
    (folder / "class 3/03.png").unlink()
    source.fingerprint = lambda: key  # it was there when the source was listed
    assert fill(source) == [
        "class 1/01.png: not a JPEG, PNG or WEBP image",
        r"'class 2/line\nbreak \udce9.png': the image is empty (0 bytes)",
        "class 3/03.png: cannot be read: No such file or directory",
    ]
    pictures = read(source).pictures
    assert len(pictures) == 58
    labels = [f"class {index}" for index in pictures.labels]
    assert labels == [name.split("/")[0] for name in pictures.names]


def test_a_name_that_is_not_unicode_survives(graphs, tmp_path):
    name = os.fsdecode(b"caf\xe9.png")
    source = open_images(str(write_images(tmp_path / "images", name)))
    collect(AnswerCache(tmp_path / "answers", source, graphs), tmp_path / "outputs.json")
    assert Outputs.load(tmp_path / "outputs.json").names == (name,)


def test_the_next_batch_is_decoded_while_the_graphs_run(fill, monkeypatch):
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
    fill(Source(3 * BATCH))
    assert waited[0]


def test_no_more_than_one_batch_is_decoded_ahead(fill):
    source, ahead = MemorySource(COUNT), []

    def progress(count, resumed):
        done = sum(ahead_of for ahead_of, _ in ahead) + count
        ahead.append((count, max(source.read) + 1 - done))

    fill(source, progress)
    assert max(more for _, more in ahead) <= BATCH


def test_memory_does_not_grow_with_the_number_of_images(fill, monkeypatch):
    def run_session(session, image, layers):
        rows = len(image)
        cls_layers = np.ones((rows, 13, 384), np.float32) if layers else None  # 20 kB an image
        return RungOutputs(np.ones((rows, 384), np.float32), cls_layers, None)

    monkeypatch.setattr(module, "run_session", run_session)
    peaks = {}
    for files in (2, 8):
        peaks[files] = []
        tracemalloc.start()
        fill(
            MemorySource(files * CHUNK, fingerprint=str(files)),
            lambda *told, found=peaks[files]: found.append(tracemalloc.get_traced_memory()[1]),
        )
        tracemalloc.stop()
    file_bytes = CHUNK * 15 * 384 * 4
    assert peaks[2][-1] > file_bytes  # the rows are seen
    assert peaks[8][-1] < peaks[2][-1] + file_bytes / 2


def test_an_onnx_file_that_is_not_the_exported_one_is_refused(graphs, fill):
    three = with_reference(graphs)
    for name in ("vit_high", "reference"):
        file = three.graphs[name].file
        content = file.read_bytes()
        file.write_bytes(graphs.low.file.read_bytes())
        with pytest.raises(GraphsError, match=rf"{name}\.onnx differs from its SHA-256"):
            fill(MemorySource(3), graphs=three)
        file.write_bytes(content)


def test_a_place_that_cannot_be_written_is_known_at_once(graphs, tmp_path):
    source = MemorySource(3)
    cache = AnswerCache(tmp_path / "answers", source, graphs)
    with pytest.raises(OutputsError, match="is a folder"):
        collect(cache, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputsError, match="cannot write"):
        collect(cache, tmp_path / "file" / "outputs.json")
    with pytest.raises(OSError, match="file/answers"):
        AnswerCache(tmp_path / "file/answers", source, graphs).fill(asked(graphs))
    assert source.read == []


def test_a_foreign_file_in_the_folder_stays(graphs, fill, read, tmp_path):
    fill(MemorySource(3))
    place = files_of(tmp_path, graphs.low, MemorySource(3), graphs)[0].parent
    (place / "notes.json").write_text(json.dumps("mine"))
    np.savez(place / "0-3-00000000.npz", mine=np.ones(3))
    fill(MemorySource(3))
    assert len(read(MemorySource(3)).pictures) == 3
    assert json.loads((place / "notes.json").read_text()) == "mine"


def test_an_image_on_which_a_graph_overflows_is_listed_and_left_out(fill, read, monkeypatch):
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
    assert fill(source) == fill(source) == lines  # a rerun knows it
    assert len(source.read) == len(source)
    assert read(source).pictures.names == tuple(name for name in source.names if name not in bad)


def test_a_reference_is_run_as_a_third_graph(graphs, tmp_path):
    three, source = with_reference(graphs), MemorySource(BATCH + 4)
    assert collect(AnswerCache(tmp_path / "answers", source, three), tmp_path / "o.json") == []
    outputs = Outputs.load(tmp_path / "o.json")
    preprocessing = Preprocessing.from_dict(three.preprocessing)
    image = np.stack([preprocessing(decode(source[index].data)) for index in range(len(source))])
    session = ort.InferenceSession(str(three.reference.file))
    embedding, _, logits = session.run(None, {"image": image})
    np.testing.assert_allclose(outputs.reference.embedding, embedding, rtol=1e-5)
    np.testing.assert_allclose(outputs.reference.logits, logits, rtol=1e-5, atol=1e-5)
    assert outputs.reference.cls_layers is None
    assert np.abs(outputs.reference.embedding - outputs.high.embedding).max() > 0.1
    assert outputs.made.graphs == three.fingerprints()
    assert set(outputs.made.graphs) == {"vit_low", "vit_high", "reference"}
