"""The map from a cheap rung's last CLS tokens to the full model's embedding."""

from __future__ import annotations

import os

import numpy as np
import pytest

from bundle.alignment import LAYERS, Alignment, AlignmentError, tokens
from routing import RungOutputs

D, B = 4, 5


def outputs(layers=6, seed=0):
    rng = np.random.default_rng(seed)
    return RungOutputs(
        rng.normal(size=(B, D)).astype(np.float32),
        rng.normal(size=(B, layers + 1, D)).astype(np.float32),
        None,
    )


def alignment(count=LAYERS, **changes):
    rng = np.random.default_rng(1)
    fields = {
        "weights": rng.normal(size=((1 + count) * D, D)).astype(np.float32),
        "bias": rng.normal(size=D).astype(np.float32),
        "graph": "a" * 64,
        "reference": "b" * 64,
        "recipe": "px=112,int8=static",
        "image_prints": "AAECAwQFBgc=",
        "image_hashes": np.array(["c" * 64, "d" * 64]),
        "cross_fitted": rng.normal(size=(2, D)).astype(np.float32),
    }
    return Alignment(**{**fields, **changes})


def test_it_reads_the_embedding_and_the_tokens_before_the_last_blocks():
    answers = outputs()
    read = tokens(answers)
    assert read.shape == (B, (1 + LAYERS) * D) and read.dtype == np.float32
    np.testing.assert_array_equal(read[:, :D], answers.embedding)
    # The last block's own is the embedding before its normalisation.
    for place, layer in enumerate((-4, -3, -2), start=1):
        found = read[:, place * D : (place + 1) * D]
        np.testing.assert_array_equal(found, answers.cls_layers[:, layer])


@pytest.mark.parametrize(("layers", "read"), [(1, 1), (2, 2), (3, 3), (12, 3)])
def test_a_shallow_rung_gives_the_tokens_it_has(layers, read):
    assert tokens(outputs(layers)).shape == (B, (1 + read) * D)
    assert alignment(read).layers == read
    assert alignment(read).embedding(outputs(layers)).shape == (B, D)


def test_the_map_is_one_product_image_by_image():
    found = alignment().embedding(outputs())
    fitted = alignment()
    for row in range(B):
        expected = tokens(outputs())[row].astype(np.float64) @ fitted.weights + fitted.bias
        np.testing.assert_allclose(found[row], expected, rtol=1e-5, atol=1e-5)
    assert found.dtype == np.float32


def test_without_layers_there_is_nothing_to_align():
    with pytest.raises(ValueError, match="reads cls_layers"):
        tokens(RungOutputs(np.zeros((B, D), np.float32), None, None))


def test_a_file_gives_back_what_was_saved(tmp_path):
    saved = alignment()
    saved.save(tmp_path / "deeper" / "alignment.npz")
    loaded = Alignment.load(tmp_path / "deeper" / "alignment.npz")
    for name in ("weights", "bias", "image_hashes", "cross_fitted"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(saved, name))
    for array in (loaded.weights, loaded.bias, loaded.cross_fitted):
        assert array.dtype == np.float32
    for name in ("graph", "reference", "recipe", "image_prints"):
        assert getattr(loaded, name) == getattr(saved, name)
        assert type(getattr(loaded, name)) is str


def test_a_later_alignment_leaves_other_names_of_an_earlier_file_as_they_are(tmp_path):
    """A placed graph's alignment is a hard link to that of the planner's cache."""
    alignment().save(tmp_path / "one.npz")
    os.link(tmp_path / "one.npz", tmp_path / "placed.npz")
    alignment(recipe="px=98").save(tmp_path / "one.npz")
    assert Alignment.load(tmp_path / "placed.npz").recipe == alignment().recipe
    assert Alignment.load(tmp_path / "one.npz").recipe == "px=98"
    assert len(list(tmp_path.iterdir())) == 2


def test_a_missing_file_says_what_to_run(tmp_path):
    with pytest.raises(AlignmentError, match="run python -m calibration align first") as caught:
        Alignment.load(tmp_path / "alignment.npz")
    assert "\n" not in str(caught.value)


def write_text(path):
    path.write_text("not an archive")


def write_nothing(path):
    path.write_bytes(b"")


def write_half(path):
    alignment().save(path)
    path.write_bytes(path.read_bytes()[:200])


def write_another(path):
    np.savez(path, embedding=np.zeros(3))


def write_array(path):
    with path.open("wb") as file:
        np.save(file, np.zeros(3))


def write_pickles(path):
    np.savez(path, **{**vars(alignment()), "graph": np.array([{}], dtype=object)})


def write_other_shape(path):
    alignment(weights=np.zeros((7, D), np.float32)).save(path)


def write_other_bias(path):
    alignment(bias=np.zeros(D - 1, np.float32)).save(path)


def write_of_before(path):
    """As releases wrote it that did not cross-fit."""
    fields = dict(vars(alignment()))
    del fields["image_hashes"], fields["cross_fitted"]
    np.savez(path, **fields)


def write_embeddings_of_other_images(path):
    alignment(image_hashes=np.array(["c" * 64])).save(path)


@pytest.mark.parametrize(
    "write",
    [
        write_text,
        write_nothing,
        write_half,
        write_another,
        write_array,
        write_pickles,
        write_other_shape,
        write_other_bias,
        write_of_before,
        write_embeddings_of_other_images,
    ],
)
def test_another_file_is_refused_in_one_line(tmp_path, write):
    path = tmp_path / "alignment.npz"
    write(path)
    with pytest.raises(AlignmentError, match="is not readable .*; align again") as caught:
        Alignment.load(path)
    assert "\n" not in str(caught.value)
