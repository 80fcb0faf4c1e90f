import tracemalloc
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bundle.prints import no_looks
from calibration.npz import NpzError, join_npz, load_npz, save_npz
from calibration.outputs import Outputs, OutputsError
from routing import RungOutputs

N, D, LAYERS, CLASSES = 7, 5, 3, 4


def make_outputs(head=True, reference=False):
    rng = np.random.default_rng(0)

    def values(*shape):
        return rng.normal(size=(N, *shape)).astype(np.float32)

    third = RungOutputs(values(D), None, values(CLASSES) if head else None)
    return Outputs(
        reference=third if reference else None,
        low=RungOutputs(values(D), values(LAYERS + 1, D), values(CLASSES) if head else None),
        high=RungOutputs(values(D), None, values(CLASSES) if head else None),
        labels=np.arange(N) - 1,
        names=tuple(f"{i}/caf\u00e9 \u72ac.png" for i in range(N)),
        groups=tuple(f"group {i // 2}" for i in range(N)),
        hashes=tuple(f"{i:064x}" for i in range(N)),
        looks=no_looks(N),
        rung_hashes={"vit_low": "a" * 64, "vit_high": "b" * 64},
        preprocessing_sha256="c" * 64,
        imaging_sha256="d" * 64,
        source="/some/folder",
        title="folder of images",
    )


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
    for field in (
        "names",
        "groups",
        "hashes",
        "rung_hashes",
        "preprocessing_sha256",
        "source",
        "title",
    ):
        assert getattr(first, field) == getattr(second, field)
    assert first.fingerprint() == second.fingerprint()


@pytest.mark.parametrize("reference", [True, False])
@pytest.mark.parametrize("head", [True, False])
def test_outputs_round_trip(tmp_path, head, reference):
    outputs = make_outputs(head, reference)
    outputs.save(tmp_path / "made" / "out.npz")
    assert_same(Outputs.load(tmp_path / "made/out.npz"), outputs)
    assert [file.name for file in (tmp_path / "made").iterdir()] == ["out.npz"]


def test_missing_outputs_say_what_to_run(tmp_path):
    with pytest.raises(OutputsError, match="run python -m calibration collect first"):
        Outputs.load(tmp_path / "out.npz")


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04 torn", b"\x93NUMPY", b"text", "folder", "npy"]
)
def test_what_is_no_npz_is_one_line(tmp_path, content):
    path = tmp_path / "out.npz"
    if content == "folder":
        path.mkdir()
    elif content == "npy":
        with path.open("wb") as file:
            np.save(file, np.zeros(3))
    else:
        path.write_bytes(content)
    with pytest.raises(OutputsError, match=r"out\.npz is not readable .*; collect again") as caught:
        Outputs.load(path)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "out.npz"
    make_outputs().save(path)
    return path


@given(data=st.data())
def test_a_truncated_file_is_never_read(saved, data):
    content = saved.read_bytes()
    length = data.draw(st.integers(0, len(content) - 1))
    path = saved.with_name("truncated.npz")
    path.write_bytes(content[:length])
    with pytest.raises(OutputsError):
        Outputs.load(path)


@settings(max_examples=300)
@given(data=st.data())
def test_a_flipped_bit_is_found_or_changes_nothing(saved, data):
    content = bytearray(saved.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path = saved.with_name("flipped.npz")
    path.write_bytes(content)
    try:
        loaded = Outputs.load(path)
    except OutputsError:
        return
    assert_same(loaded, make_outputs())


def change(saved, tmp_path, **arrays):
    """Write the saved arrays with some replaced; None removes one."""
    content = {**load_npz(saved), **arrays}
    save_npz(tmp_path / "out.npz", {k: v for k, v in content.items() if v is not None})
    return tmp_path / "out.npz"


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"embedding_high": np.zeros((N - 1, D))}, "embedding_high has N = 6, .* has N = 7"),
        ({"embedding_high": np.zeros((N, D + 1))}, "embedding_high has D = 6, .* has D = 5"),
        ({"cls_layers_low": np.zeros((N, 4, D + 1))}, "cls_layers_low has D = 6"),
        ({"cls_layers_low": np.zeros((N, D))}, r"cls_layers_low has shape \(7, 5\), not \(N, L"),
        ({"logits_high": np.zeros((N, CLASSES + 1))}, "logits_high has C = 5, .* has C = 4"),
        ({"logits_high": None}, "only one of the rungs has logits"),
        ({"labels": np.zeros(N + 1)}, "labels has N = 8"),
        ({"names": np.array(["one"])}, "names has N = 1"),
        ({"hashes": np.array("one")}, r"hashes has shape \(\)"),
        ({"cls_layers_low": None}, "holds no 'cls_layers_low'"),
        ({"title": None}, "holds no 'title'"),
        ({"rungs": np.array("{")}, "out.npz: "),
    ],
)
def test_arrays_that_do_not_belong_together_are_named(saved, tmp_path, arrays, message):
    with pytest.raises(OutputsError, match=message + ".*; collect again") as caught:
        Outputs.load(change(saved, tmp_path, **arrays))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["embedding_high", "cls_layers_low", "logits_low"])
def test_an_output_that_is_no_number_is_refused_and_its_image_named(saved, tmp_path, name):
    values = load_npz(saved)[name].copy()
    values[2, 0] = np.inf
    with pytest.raises(OutputsError, match=f"{name} of 2/.*png holds NaN or Inf"):
        Outputs.load(change(saved, tmp_path, **{name: values}))


ROWS = st.lists(st.integers(0, 5), min_size=1, max_size=5).filter(any)


@settings(max_examples=50)
@given(counts=ROWS, seed=st.integers(0, 99))
def test_a_joined_file_is_what_numpy_would_have_saved(tmp_path_factory, counts, seed):
    folder = tmp_path_factory.mktemp("join")
    rng = np.random.default_rng(seed)
    parts = [
        {
            "layers": rng.normal(size=(count, 3, 2)).astype(np.float32),
            "labels": rng.integers(-1, 9, size=count),
            "names": np.array(["\u72ac" * rng.integers(1, 9) for _ in range(count)], dtype=np.str_),
        }
        for count in counts
    ]
    files = [folder / f"{index}.npz" for index in range(len(parts))]
    for file, part in zip(files, parts, strict=True):
        save_npz(file, {**part, "left out": np.zeros(3)})
    out = folder / "joined.npz"
    join_npz(out, files, ("layers", "labels", "names"), {"title": np.array("words")})
    whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    np.savez(folder / "expected.npz", **whole, title=np.array("words"))
    found, expected = load_npz(out), load_npz(folder / "expected.npz")
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)
    with zipfile.ZipFile(out) as archive:
        assert archive.testzip() is None
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}


def test_joining_holds_one_part_in_memory(tmp_path):
    rows = np.ones((256, 1024), dtype=np.float32)  # 1 MiB
    files = [tmp_path / f"{index}.npz" for index in range(30)]
    for file in files:
        save_npz(file, {"rows": rows})
    tracemalloc.start()
    join_npz(tmp_path / "out.npz", files, ["rows"], {})
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * rows.nbytes
    assert load_npz(tmp_path / "out.npz")["rows"].shape == (30 * 256, 1024)


def test_a_write_that_fails_leaves_the_file_as_it_was(saved, tmp_path):
    path = change(saved, tmp_path)
    before = path.read_bytes()
    (tmp_path / "torn.npz").write_bytes(b"PK")
    with pytest.raises(zipfile.BadZipFile):
        join_npz(path, [saved, tmp_path / "torn.npz"], ["labels"], {})
    assert path.read_bytes() == before


def test_no_pickle_is_ever_loaded(tmp_path):
    np.savez(tmp_path / "out.npz", names=np.array([{}], dtype=object))
    with pytest.raises(NpzError, match="allow_pickle"):
        load_npz(tmp_path / "out.npz")


def test_the_truth_is_the_reference_and_without_one_the_full_rung():
    plain, with_one = make_outputs(), make_outputs(reference=True)
    assert plain.truth is plain.high and plain.truth_words == "full rung"
    assert with_one.truth is with_one.reference and with_one.truth_words == "full FP32 model"
    some = with_one.rows(np.array([4, 1]))
    np.testing.assert_array_equal(some.truth.logits, with_one.reference.logits[[4, 1]])
    assert some.names == (with_one.names[4], with_one.names[1])


def test_reference_arrays_that_do_not_belong_are_named(tmp_path):
    make_outputs(reference=True).save(tmp_path / "whole.npz")
    path = change(tmp_path / "whole.npz", tmp_path, embedding_reference=np.zeros((N - 1, D)))
    with pytest.raises(OutputsError, match="embedding_reference has N = 6"):
        Outputs.load(path)
