"""Which images a fit may use of those that graphs have learned from, and with whose answers."""

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageOps

from bundle.graphs import GraphSet
from bundle.head import LinearHead
from bundle.prints import encode
from calibration.align import fit_alignment
from calibration.answers import AnswerCache
from calibration.fidelity import Fidelity
from calibration.images import SourceImage
from calibration.outputs import Outputs, usable, wanted
from export.align import align
from tests.unit.plan_workplace import write_shelf

CHEAP, ALIGNED = "px4_int8static", "px4_int8static_align"
HEAD = range(0, 8)
RANGES = range(8, 16)
LEARNED = [3, *range(15, 36)]  # by the alignment; 3 taught the head too, 15 the ranges
COPIES = {36: 20, 37: 21, 38: 9, 39: 0}  # of an aligned image twice, of ranges and of the head
IMAGES = 60


class Patterns:
    """Pictures that do not look alike, but for copies that are mirrored and of another size."""

    spec, title = "patterns", "random patterns"
    names = tuple(f"{index}.png" for index in range(IMAGES))

    def __len__(self):
        return IMAGES

    def __getitem__(self, index):
        rng = np.random.default_rng(COPIES.get(index, index))
        image = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).resize((64, 64))
        if index in COPIES:
            image = ImageOps.mirror(image).resize((48, 48))
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        return SourceImage(self.names[index], self.names[index], None, buffer.getvalue())

    def fingerprint(self):
        return "patterns"


def collected(folder, graphs):
    cache = AnswerCache(folder, Patterns(), graphs)
    cache.fill(wanted(graphs))
    return Outputs.of(cache.read(wanted(graphs)), graphs, cache)


@pytest.fixture
def learned(tmp_path):
    """Graphs whose head, ranges and alignment have learned from some images, and the outputs."""
    graphs = write_shelf(tmp_path / "onnx", ["px=4,int8=static", "int8=static"])
    outputs = collected(tmp_path / "answers", graphs)

    def prints(rows):
        return encode([outputs.hashes[row] for row in rows], outputs.looks[list(rows)])

    ranges = prints(RANGES)
    graphs = replace(graphs.adding(replace(graphs.low, fitted_on=ranges)), fitted_on=prints(HEAD))
    aligned = fit_alignment(
        outputs,
        np.array(LEARNED),
        np.array(outputs.names),
        (graphs.low.record.fingerprint, graphs.low.record.recipe),
        Fidelity("top1"),
        LinearHead.read(graphs.low.file),
        0,
    )
    graphs = align(graphs, CHEAP, aligned.alignment).cast(ALIGNED, "int8static")
    return graphs, collected(tmp_path / "answers", graphs), aligned.alignment


def rows_of(found):
    return [int(place) for place in found.places]


def test_each_image_goes_where_what_has_learned_from_it_lets_it(learned):
    graphs, outputs, _ = learned
    found = usable(outputs, graphs)
    # Out: what taught the head, in any form, and other forms of what the alignment has learned.
    out = {*HEAD, 39, 36, 37}
    assert rows_of(found) == [row for row in range(IMAGES) if row not in out]
    taught = {*RANGES, 38, *LEARNED} - out
    assert {row for row, was in zip(rows_of(found), found.taught, strict=True) if was} == taught


def test_only_answers_of_the_aligned_graph_for_what_it_learned_are_cross_fitted(learned):
    graphs, outputs, alignment = learned
    found = usable(outputs, graphs)
    places, before = found.places, outputs.rows(found.places)
    known = np.isin(places, LEARNED)
    expected = dict(zip(alignment.image_hashes.tolist(), alignment.cross_fitted, strict=True))
    cross_fitted = np.stack([expected[found.hashes[row]] for row in np.flatnonzero(known)])
    np.testing.assert_array_equal(found.low.embedding[known], cross_fitted)
    head = LinearHead.read(graphs.low.file)
    np.testing.assert_allclose(found.low.logits[known], head(cross_fitted), rtol=1e-5, atol=1e-5)
    assert (found.low.embedding != before.low.embedding).any(axis=1)[known].all()
    for field in ("embedding", "logits"):
        one, other = getattr(found.low, field), getattr(before.low, field)
        np.testing.assert_array_equal(one[~known], other[~known])
        np.testing.assert_array_equal(getattr(found.high, field), getattr(before.high, field))
        np.testing.assert_array_equal(getattr(found.truth, field), getattr(before.truth, field))
    np.testing.assert_array_equal(found.low.cls_layers, before.low.cls_layers)
    assert (found.hashes, found.groups, found.made) == (before.hashes, before.groups, before.made)


def test_without_its_file_nothing_says_what_an_aligned_graph_would_have_answered(learned):
    graphs, outputs, _ = learned
    graphs.low.alignment_file.unlink()
    found = usable(outputs, graphs)
    assert set(rows_of(found)) == set(range(IMAGES)) - {*HEAD, *RANGES, *LEARNED, *COPIES}
    assert not found.taught.any()


def test_a_set_of_graphs_takes_its_alignments_along(learned, tmp_path):
    graphs, outputs, alignment = learned
    there = graphs.place(tmp_path / "placed", [])
    files = {file.name for file in (tmp_path / "placed").glob("*.npz")}
    assert files == {f"{ALIGNED}.npz"}
    for placed in (there, GraphSet.load(tmp_path / "placed")):
        np.testing.assert_array_equal(placed.low.alignment().cross_fitted, alignment.cross_fitted)
        assert placed.high.alignment() is None
        np.testing.assert_array_equal(
            usable(outputs, placed).low.embedding, usable(outputs, graphs).low.embedding
        )
    graphs.cast(CHEAP, "int8static").place(tmp_path / "placed", [])  # the next set is not aligned
    assert not list((tmp_path / "placed").glob("*.npz"))


def test_ranges_alone_mark_and_graphs_that_learned_nothing_change_nothing(learned, tmp_path):
    graphs, _, _ = learned
    plain = replace(graphs.cast(CHEAP, "int8static"), fitted_on="")
    outputs = collected(tmp_path / "answers", plain)
    found = usable(outputs, plain)
    assert rows_of(found) == list(range(IMAGES))
    assert np.flatnonzero(found.taught).tolist() == [*RANGES, 38]
    np.testing.assert_array_equal(found.low.embedding, outputs.low.embedding)
    untaught = plain.cast("int8static", "full")
    of_others = collected(tmp_path / "answers", untaught)
    assert usable(of_others, untaught) is of_others and of_others.taught is None
