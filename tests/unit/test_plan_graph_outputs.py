from dataclasses import replace

import numpy as np
import onnxruntime as ort
import pytest

from bundle.graphs import GraphSet
from calibration.source import ImagesError
from imaging import Preprocessing, decode
from planner import graph_outputs
from planner.candidates import FULL, shelf_graphs
from planner.graph_outputs import BATCH, OutputsCache
from tests.unit.image_files import MemorySource
from tests.unit.plan_workplace import LAYERS, D, write_shelf

COUNT = 2 * BATCH + 5


@pytest.fixture
def rung_set(tmp_path):
    return GraphSet.load(write_shelf(tmp_path / "shelf", "px=4", []))


@pytest.fixture
def get(tmp_path, rung_set):
    """Answers of a graph, `px4` if nothing else is said, from one folder."""

    def answers(source, rows=None, layers=False, graph="px4", rungs=rung_set, told=None):
        found = shelf_graphs(rungs)[graph]
        cache = OutputsCache(tmp_path / "cache", source, rungs)
        rows = range(len(source)) if rows is None else rows
        told = [] if told is None else told
        return cache.get(found.record, found.file, rows, layers, told.append)

    return answers


def assert_same(one, two):
    for name in ("embedding", "cls_layers", "logits"):
        first, second = getattr(one.outputs, name), getattr(two.outputs, name)
        assert (first is None) == (second is None)
        if first is not None:
            np.testing.assert_array_equal(first, second)
            assert first.dtype == second.dtype
    np.testing.assert_array_equal(one.rows, two.rows)
    np.testing.assert_array_equal(one.labels, two.labels)
    assert (one.names, one.hashes, one.groups) == (two.names, two.hashes, two.groups)


def test_answers_are_those_of_the_graph_for_the_rows_asked_for(get, rung_set):
    source, rows = MemorySource(COUNT), [3, 30, 4, 17]
    found = get(source, rows, layers=True)
    preprocessing = Preprocessing.from_dict(rung_set.preprocessing)
    image = np.stack([preprocessing(decode(source[row].data)) for row in rows])
    session = ort.InferenceSession(str(rung_set.files["vit_low"]))
    embedding, layers, logits = session.run(None, {"image": image})
    np.testing.assert_allclose(found.outputs.embedding, embedding, rtol=1e-5)
    np.testing.assert_allclose(found.outputs.cls_layers, layers, rtol=1e-5)
    np.testing.assert_allclose(found.outputs.logits, logits, rtol=1e-5, atol=1e-6)
    assert found.rows.tolist() == rows
    assert found.names == tuple(source.names[row] for row in rows)
    assert found.groups == tuple(source[row].group for row in rows)
    assert found.labels.tolist() == [3, 0, -1, 2]  # the model knows four of five classes


def test_a_second_time_nothing_runs_and_the_answers_are_the_same(get):
    source, told = MemorySource(COUNT), []
    first = get(source, layers=True, told=told)
    assert told == [BATCH, BATCH, 5] and len(source.read) == COUNT
    source.read.clear()
    told.clear()
    assert_same(get(source, layers=True, told=told), first)
    assert source.read == [] and told == [COUNT]


def test_what_is_not_asked_for_is_not_kept(get):
    source = MemorySource(4)
    assert get(source).outputs.cls_layers is None
    assert get(source, layers=True).outputs.cls_layers.shape == (4, LAYERS + 1, D)


def other_preprocessing(rungs):
    return replace(rungs, preprocessing={**rungs.preprocessing, "resample": "nearest"})


def other_labels(rungs):
    return replace(rungs, labels=rungs.labels[::-1])


@pytest.mark.parametrize(
    "change",
    [
        {"graph": FULL},
        {"rows": range(COUNT - 1)},
        {"rows": range(COUNT - 1, -1, -1)},
        {"layers": True},
        {"source": MemorySource(COUNT, fingerprint="second")},
        {"change": other_preprocessing},
        {"change": other_labels},
    ],
    ids=["graph", "fewer rows", "other order", "layers", "images", "preprocessing", "labels"],
)
def test_whatever_decides_an_answer_is_not_found_in_the_cache(get, rung_set, change):
    get(MemorySource(COUNT))
    source = change.pop("source", MemorySource(COUNT))
    rungs = change.pop("change", lambda rungs: rungs)(rung_set)
    found = get(source, rungs=rungs, **change)
    assert len(source.read) == len(found.rows) > 0


@pytest.mark.parametrize("code", ["code_sha256", "looks_sha256"])
def test_what_other_code_decoded_or_looked_at_is_not_found_in_the_cache(get, monkeypatch, code):
    get(MemorySource(4))
    monkeypatch.setattr(graph_outputs, code, lambda: "e" * 64)
    source = MemorySource(4)
    get(source)
    assert len(source.read) == 4


def test_a_graph_whose_shared_weights_differ_is_another(get, rung_set):
    get(MemorySource(4))
    source, record = MemorySource(4), replace(rung_set.low.record, weights_sha256="a" * 64)
    get(source, rungs=rung_set.adding(replace(rung_set.low, record=record)))
    assert len(source.read) == 4


def test_images_that_cannot_be_read_are_left_out(get):
    source = MemorySource(COUNT, broken=[0, 20], gone=[COUNT - 1])
    found = get(source, [0, 5, 20, 21, COUNT - 1])
    assert found.rows.tolist() == [5, 21]
    assert len(found.outputs) == len(found.hashes) == 2
    assert_same(get(source, [0, 5, 20, 21, COUNT - 1]), found)


def test_a_whole_batch_that_cannot_be_read_is_left_out(get):
    source = MemorySource(3 * BATCH, broken=range(BATCH, 2 * BATCH))
    found = get(source)
    assert found.rows.tolist() == [*range(BATCH), *range(2 * BATCH, 3 * BATCH)]
    assert found.outputs.embedding.shape == (2 * BATCH, D)


def test_images_on_which_the_graph_overflows_are_left_out(get, monkeypatch):
    from planner import graph_outputs as module

    original = module.run_session

    def overflowing(session, image, layers):
        outputs = original(session, image, layers)
        outputs.embedding[1] = np.inf
        return outputs

    monkeypatch.setattr(module, "run_session", overflowing)
    found = get(MemorySource(BATCH + 2))
    assert sorted(set(range(BATCH + 2)) - set(found.rows.tolist())) == [1, BATCH + 1]


def test_not_one_readable_image_is_one_line(get):
    with pytest.raises(ImagesError, match="none of 3 images can be read") as error:
        get(MemorySource(3, broken=range(3)))
    assert "\n" not in str(error.value)


def test_a_damaged_cache_file_is_made_again(get, tmp_path):
    first = get(MemorySource(COUNT))
    (file,) = (tmp_path / "cache").iterdir()
    file.write_bytes(file.read_bytes()[:-100])
    source = MemorySource(COUNT)
    assert_same(get(source), first)
    assert len(source.read) == COUNT
