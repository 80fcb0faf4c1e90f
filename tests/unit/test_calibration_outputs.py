"""`outputs.json`, the answers that it names, and what ties them to graphs."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bundle.graphs import GraphSet
from calibration.answers import AnswerCache
from calibration.chunks import NpzError, load_npz, save_npz
from calibration.outputs import Made, Outputs, OutputsError, collect, refer, wanted
from routing import RungOutputs
from tests.unit.calibration_outputs import FINGERPRINTS, outputs_of, with_reference
from tests.unit.image_files import MemorySource
from tests.unit.onnx_files import write_graph_set

N = 7
MADE = Made(FINGERPRINTS, "c" * 64, "d" * 64, "classes")


def assert_same(first, second):
    assert (first.reference is None) == (second.reference is None)
    for rung in ("low", "high", "truth"):
        for field in ("embedding", "cls_layers", "logits"):
            one, other = (getattr(getattr(outputs, rung), field) for outputs in (first, second))
            assert (one is None) == (other is None)
            if one is not None:
                assert one.dtype == other.dtype
                np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(first.labels, second.labels)
    for field in ("names", "groups", "hashes", "made", "source", "title"):
        assert getattr(first, field) == getattr(second, field)
    assert first.fingerprint() == second.fingerprint()


@pytest.mark.parametrize("reference", [True, False])
@pytest.mark.parametrize("classes", [4, None])
def test_what_refers_to_a_cache_is_found_where_both_were_moved(tmp_path, classes, reference):
    graphs = GraphSet.load(write_graph_set(tmp_path / "onnx", classes))
    graphs = with_reference(graphs) if reference else graphs
    cache = AnswerCache(tmp_path / "build/answers", MemorySource(20, broken=[4]), graphs)
    collect(cache, tmp_path / "build/all.json")
    refer(tmp_path / "build/some.json", cache, graphs, [9, 4, 2])
    (tmp_path / "build").rename(tmp_path / "moved")
    everything = Outputs.load(tmp_path / "moved/all.json")
    assert everything.made == Made.by(graphs) and len(everything) == 19
    assert (everything.reference is not None) == reference
    moved = AnswerCache(tmp_path / "moved/answers", MemorySource(20), graphs)
    assert_same(Outputs.of(moved.read(wanted(graphs)), graphs, moved), everything)
    # The broken image was row 4, so that row 9 is the ninth of those that can be read.
    assert_same(Outputs.load(tmp_path / "moved/some.json"), everything.rows(np.array([8, 2])))


def test_missing_outputs_say_what_to_run(tmp_path):
    with pytest.raises(OutputsError, match="run python -m calibration collect first"):
        Outputs.load(tmp_path / "out.json")


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04 torn", b"\xff", b"text", b"[]", b"{}", b'{"schema_version": 0}']
)
def test_what_is_no_outputs_file_is_one_line(tmp_path, content):
    path = tmp_path / "out.json"
    path.write_bytes(content)
    with pytest.raises(OutputsError, match=r"out\.json is not readable .*; coll") as caught:
        Outputs.load(path)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    graphs = GraphSet.load(write_graph_set(folder / "onnx"))
    collect(AnswerCache(folder / "answers", MemorySource(N), graphs), folder / "out.json")
    return folder / "out.json"


@pytest.fixture(scope="module")
def expected(saved):
    return Outputs.load(saved)


@pytest.fixture(scope="module")
def chunk(saved, expected):
    """The file of the cheap rung's answers, and what it holds."""
    key = json.loads(saved.read_text())["answers"]["vit_low"]
    (path,) = (saved.parent / "answers" / key).iterdir()
    return path, path.read_bytes()


@given(data=st.data())
def test_a_truncated_file_is_never_read(saved, chunk, data):
    path, content = chunk
    path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    with pytest.raises(OutputsError, match="lacks answers for 7 of 7 images; collect again"):
        Outputs.load(saved)


@settings(max_examples=300)
@given(data=st.data())
def test_a_flipped_bit_is_found_or_changes_nothing(saved, expected, chunk, data):
    path, content = chunk
    changed = bytearray(content)
    changed[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(changed)
    try:
        loaded = Outputs.load(saved)
    except OutputsError:
        return
    assert_same(loaded, expected)


@pytest.mark.parametrize(
    "arrays",
    [
        {"embedding": np.zeros((N - 1, 6), np.float32)},
        {"embedding": None},
        {"cls_layers": None},
        {"rows": None},
        {"rows": np.array(3)},
        {"logits": np.zeros((N + 1, 4), np.float32)},
    ],
)
def test_arrays_that_do_not_belong_together_are_not_answers(saved, chunk, arrays):
    path, content = chunk
    path.write_bytes(content)
    changed = {**load_npz(path), **arrays}
    save_npz(path, {name: values for name, values in changed.items() if values is not None})
    with pytest.raises(OutputsError, match="lacks answers for 7 of 7") as caught:
        Outputs.load(saved)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["embedding", "cls_layers", "logits"])
def test_an_image_whose_output_is_no_number_is_left_out(saved, expected, chunk, name):
    path, content = chunk
    path.write_bytes(content)
    arrays = load_npz(path)
    arrays[name][2, 0] = np.inf
    save_npz(path, arrays)
    assert_same(Outputs.load(saved), expected.rows(np.array([0, 1, 3, 4, 5, 6])))


def test_no_pickle_is_ever_loaded(tmp_path):
    np.savez(tmp_path / "out.npz", names=np.array([{}], dtype=object))
    with pytest.raises(NpzError, match="allow_pickle"):
        load_npz(tmp_path / "out.npz")


def test_the_truth_is_the_reference_and_without_one_the_full_rung():
    low, high, third = (RungOutputs(np.full((N, 2), i), None, None) for i in range(3))
    plain, with_one = outputs_of(low, high), outputs_of(low, high, reference=third)
    assert plain.truth is high and plain.truth_words == "full rung"
    assert with_one.truth is third and with_one.truth_words == "full FP32 model"
    some = with_one.rows(np.array([4, 1]))
    assert len(some.truth) == 2 and some.names == ("4.png", "1.png")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, None),
        ({"graphs": {**MADE.graphs, "vit_low": "e" * 64}}, "another vit_low"),
        ({"graphs": {**MADE.graphs, "reference": "e" * 64}}, "another reference"),
        ({"preprocessing_sha256": "e" * 64}, "another preprocessing"),
        ({"imaging_sha256": "e" * 64}, "other code of imaging/"),
        ({"task": "labels"}, "a model that answers labels and not classes"),
    ],
)
def test_what_outputs_were_made_otherwise_by_is_named(change, words):
    assert replace(MADE, **change).difference(MADE) == words


def test_the_file_is_small_and_holds_no_answer(saved):
    content = json.loads(saved.read_text())
    assert content["images"] == N and saved.stat().st_size < 2000
