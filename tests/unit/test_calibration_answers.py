"""What `AnswerCache` runs, what it keeps, and what `collect` makes of it."""

import os
import threading
import tracemalloc
from dataclasses import replace

import numpy as np
import onnxruntime as ort
import pytest

from bundle.graphs import GraphsError, GraphSet
from calibration import answers as module
from calibration.answers import BATCH, CHUNK, AnswerCache, Wanted
from calibration.chunks import MissingAnswersError
from calibration.images import ImagesError, open_images
from calibration.outputs import Outputs, OutputsError, collect, wanted
from imaging import Preprocessing, decode, pixels_sha256
from routing import RungOutputs
from tests.unit.answering import COUNT, assert_same
from tests.unit.calibration_outputs import with_reference
from tests.unit.image_files import MemorySource, write_images
from tests.unit.onnx_files import write_graph_set


def test_outputs_are_those_of_the_sessions_image_by_image(graph_set, tmp_path):
    source, done, out = MemorySource(20), [], tmp_path / "made" / "outputs.json"
    cache = AnswerCache(tmp_path / "answers", source, graph_set)
    assert collect(cache, out, done.append) == []
    outputs = Outputs.load(out)
    assert done == [16, 4] and len(outputs) == 20
    images = [source[index] for index in range(20)]
    preprocessing = Preprocessing.from_dict(graph_set.preprocessing)
    image = np.stack([preprocessing(decode(item.data)) for item in images])
    for name, rung in (("vit_low", outputs.low), ("vit_high", outputs.high)):
        session = ort.InferenceSession(str(graph_set.files[name]))
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
    assert outputs.made.graphs == graph_set.fingerprints()
    assert [file.name for file in out.parent.iterdir()] == ["outputs.json"]


def test_answers_are_those_for_the_rows_asked_for_in_their_order(graph_set, answering):
    source, rows = MemorySource(40), [3, 30, 4, 17]
    what = [Wanted(graph_set.low, True)]
    answering.fill(source, what=what, rows=rows)
    assert sorted(source.read) == [3, 4, 17, 30]
    found = answering.read(source, what=what, rows=rows)
    assert found.pictures.places.tolist() == rows
    assert found.pictures.names == tuple(source.names[row] for row in rows)
    assert found.pictures.labels.tolist() == [3, 0, -1, 2]
    answering.fill(source, what=what)
    assert_same(answering.read(source, what=what).only(np.array(rows)), found)
    with pytest.raises(
        MissingAnswersError, match="lacks answers for 40 of 40 images; collect again"
    ):
        answering.read(source)  # nobody asked the full rung


def test_rows_in_two_portions_are_those_of_all_at_once(graph_set, answering, tmp_path):
    source = MemorySource(4 * BATCH)
    for rows in (range(2 * BATCH), range(4 * BATCH)):
        answering.fill(source, rows=rows)
    assert len(source.read) == 4 * BATCH
    assert_same(answering.read(source), answering.at_once(4 * BATCH))


def test_images_are_decoded_once_for_two_graphs_and_again_for_a_third(graph_set, answering):
    source = MemorySource(20)
    answering.fill(source)
    assert len(source.read) == 20
    answering.fill(source)
    assert len(source.read) == 20  # nothing runs a second time
    three = with_reference(graph_set)
    answering.fill(source, graphs=three)
    assert len(source.read) == 40
    assert answering.read(source, graphs=three).outputs.keys() == {
        "vit_low",
        "vit_high",
        "reference",
    }


def test_a_graph_asked_for_later_runs_alone(graph_set, answering, monkeypatch):
    answering.fill(MemorySource(20))
    opened = []
    original = module.open_session
    monkeypatch.setattr(
        module, "open_session", lambda file: opened.append(file.name) or original(file)
    )
    answering.fill(MemorySource(20), graphs=with_reference(graph_set))
    assert opened == ["reference.onnx"]


def test_answers_with_layers_serve_whoever_wants_none_and_not_the_other_way(graph_set, answering):
    source = MemorySource(4)
    answering.fill(source, what=[Wanted(graph_set.low, False)])
    with pytest.raises(MissingAnswersError):
        answering.read(source, what=[Wanted(graph_set.low, True)])
    answering.fill(source, what=[Wanted(graph_set.low, True)])
    assert len(source.read) == 8
    answering.fill(source, what=[Wanted(graph_set.low, False)])
    assert len(source.read) == 8
    found = answering.read(source, what=[Wanted(graph_set.low)])
    assert found.outputs["vit_low"].cls_layers is None


def test_one_graph_under_two_names_runs_once_and_keeps_its_layers(tmp_path, answering):
    twins = GraphSet.load(write_graph_set(tmp_path / "twins", seeds=(1, 1)))
    source = MemorySource(20)
    answering.fill(source, graphs=twins)
    outputs = answering.read(source, graphs=twins).outputs
    assert outputs["vit_low"].cls_layers is not None and outputs["vit_high"].cls_layers is None
    np.testing.assert_array_equal(outputs["vit_low"].logits, outputs["vit_high"].logits)


def test_a_headless_model_has_no_logits(tmp_path, answering):
    graphs = GraphSet.load(write_graph_set(tmp_path / "headless", classes=None))
    answering.fill(MemorySource(3), graphs=graphs)
    found = answering.read(MemorySource(3), graphs=graphs)
    assert all(outputs.logits is None for outputs in found.outputs.values())
    assert found.pictures.labels.tolist() == [-1, -1, -1]


def test_labels_follow_the_names_of_the_set(graph_set, answering):
    source = MemorySource(20)
    answering.fill(source)
    turned = replace(graph_set, labels=graph_set.labels[::-1])
    answering.fill(source, graphs=turned)
    assert len(source.read) == 20
    assert answering.read(source, graphs=turned).pictures.labels.tolist() == [3, 2, 1, 0, -1] * 4


def test_the_code_that_decodes_is_on_record(graph_set, tmp_path, monkeypatch):
    monkeypatch.setattr("calibration.outputs.code_sha256", lambda: "e" * 64)
    cache = AnswerCache(tmp_path / "answers", MemorySource(BATCH), graph_set)
    collect(cache, tmp_path / "outputs.json")
    assert Outputs.load(tmp_path / "outputs.json").made.imaging_sha256 == "e" * 64


def test_no_image_is_an_error(answering):
    with pytest.raises(ImagesError, match="no image"):
        answering.fill(MemorySource(0))


def test_a_name_that_is_not_unicode_survives(graph_set, tmp_path):
    name = os.fsdecode(b"caf\xe9.png")
    source = open_images(str(write_images(tmp_path / "images", name)))
    collect(AnswerCache(tmp_path / "answers", source, graph_set), tmp_path / "outputs.json")
    assert Outputs.load(tmp_path / "outputs.json").names == (name,)


def test_the_next_batch_is_decoded_while_the_graphs_run(answering, monkeypatch):
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
    answering.fill(Source(3 * BATCH))
    assert waited[0]


def test_no_more_than_one_batch_is_decoded_ahead(answering):
    source, ahead = MemorySource(COUNT), []

    def progress(count):
        done = sum(ahead_of for ahead_of, _ in ahead) + count
        ahead.append((count, max(source.read) + 1 - done))

    answering.fill(source, progress)
    assert max(more for _, more in ahead) <= BATCH


def test_memory_does_not_grow_with_the_number_of_images(answering, monkeypatch):
    def run_session(session, image, layers):
        rows = len(image)
        cls_layers = np.ones((rows, 13, 384), np.float32) if layers else None  # 20 kB an image
        return RungOutputs(np.ones((rows, 384), np.float32), cls_layers, None)

    monkeypatch.setattr(module, "run_session", run_session)
    peaks = {}
    for files in (2, 8):
        peaks[files] = []
        tracemalloc.start()
        answering.fill(
            MemorySource(files * CHUNK, fingerprint=str(files)),
            lambda _, found=peaks[files]: found.append(tracemalloc.get_traced_memory()[1]),
        )
        tracemalloc.stop()
    file_bytes = CHUNK * 15 * 384 * 4
    assert peaks[2][-1] > file_bytes  # the rows are seen
    assert peaks[8][-1] < peaks[2][-1] + file_bytes / 2


def test_an_onnx_file_that_is_not_the_exported_one_is_refused(graph_set, answering):
    three = with_reference(graph_set)
    for name in ("vit_high", "reference"):
        file = three.graphs[name].file
        content = file.read_bytes()
        file.write_bytes(graph_set.low.file.read_bytes())
        with pytest.raises(GraphsError, match=rf"{name}\.onnx differs from its SHA-256"):
            answering.fill(MemorySource(3), graphs=three)
        file.write_bytes(content)


def test_a_place_that_cannot_be_written_is_known_at_once(graph_set, tmp_path):
    source = MemorySource(3)
    cache = AnswerCache(tmp_path / "answers", source, graph_set)
    with pytest.raises(OutputsError, match="is a folder"):
        collect(cache, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputsError, match="cannot write"):
        collect(cache, tmp_path / "file" / "outputs.json")
    with pytest.raises(OSError, match="file/answers"):
        AnswerCache(tmp_path / "file/answers", source, graph_set).fill(wanted(graph_set))
    assert source.read == []


def test_a_reference_is_run_as_a_third_graph(graph_set, tmp_path):
    three, source = with_reference(graph_set), MemorySource(BATCH + 4)
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
