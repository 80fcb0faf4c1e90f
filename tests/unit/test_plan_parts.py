"""Which image plays which part in a whole plan on tiny graphs: nothing tests what it has taught."""

import numpy as np
import pytest

from bundle.graphs import GraphSet
from bundle.prints import among, decode
from calibration.align import ALIGN_SHARE
from calibration.fit import without_learned
from calibration.splits import CERTIFIED, group_keys, split_by_group
from export.request import spread
from planner import result
from tests.unit.plan_workplace import FakeWorkshop, make_request, plan

pytestmark = pytest.mark.usefixtures("remembered_fits")

IMAGES = 700
ALIGNED = "px4_int8static_align"  # px=4,int8=static, the first candidate


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    return plan(make_request(tmp_path_factory.mktemp("plan")), FakeWorkshop())


def test_every_image_has_one_part(planned):
    content = result.to_dict(planned, [])
    parts = planned.parts
    positions = [parts.align, *(parts.rest[rows] for rows in parts.splits.values())]
    assert sorted(np.concatenate(positions)) == list(range(IMAGES))
    assert sum(v for k, v in content["images"].items() if k != "source") == IMAGES
    assert content["images"]["source"] == "two colours each"


def test_no_image_that_a_graph_has_learned_from_is_among_the_rest(planned):
    learned = planned.aligned[ALIGNED].alignment.image_prints
    outputs = next(iter(planned.pairs.values()))
    pictures = planned.parts.full.pictures
    for prints in (learned, planned.graphs.learned(planned.prices)):
        assert not among(outputs.hashes, outputs.looks, prints).any()
    assert len(outputs) == len(planned.parts.rest)
    for low, high in planned.pairs:  # as `fit` asks
        assert len(without_learned(outputs, planned.graphs.cast(low, high))) == len(outputs)
    # The ranges of int8 were learned from every eleventh image: all of those are in align.
    hashes = np.array(pictures.hashes)
    assert set(hashes[[0, IMAGES - 1]]) <= set(hashes[planned.parts.align])


def test_no_alignment_learns_from_what_the_export_has_learned_from(planned):
    ranges = planned.parts.full.pictures.only(spread(IMAGES))
    learned = planned.aligned[ALIGNED].alignment.image_prints
    assert not among(ranges.hashes, ranges.looks, learned).any()
    assert ALIGN_SHARE / 2 * IMAGES < len(decode(learned)[0]) < ALIGN_SHARE * IMAGES
    # In the folder stand both, and a later plan tells them apart.
    graphs = GraphSet.load(planned.graphs.reference.file.parent)
    taught = graphs.learned(["px4_int8static", "int8static", "full"])
    assert among(ranges.hashes, ranges.looks, taught).all()
    assert len(decode(taught)[0]) == len(ranges.places)
    both = decode(graphs.learned([ALIGNED]))[0]
    assert both == decode(taught)[0] | decode(learned)[0]


@pytest.fixture(scope="module")
def unhelped(tmp_path_factory):
    """A plan whose one alignment has nothing to add: its graph answers as the full model does."""
    workshop = FakeWorkshop()
    request = make_request(
        tmp_path_factory.mktemp("unhelped"), candidates="tome=2,align; px=4", beside=""
    )
    return plan(request, workshop), workshop


def test_where_an_alignment_does_not_help_the_graph_without_it_takes_its_place(unhelped):
    planned, workshop = unhelped
    content = result.to_dict(planned, [])
    assert not workshop.used["align"]
    assert planned.lows == ["tome2", "px4"]
    graph = content["graphs"]["tome2"]
    assert graph["recipe"] == "px=8,tome=2" and graph["alignment"]["helps"] is False
    assert planned.chosen.candidate.low == "tome2"
    served = GraphSet.load(planned.request.out / "onnx")
    assert served.low.record.recipe == "px=8,tome=2" and served.low.fitted_on == ""


def test_the_images_it_was_tried_on_are_fitted_on_and_test_nothing(unhelped):
    """The decision against it was made on them, so they may not certify what came of it."""
    planned, _ = unhelped
    parts = planned.parts
    pictures = parts.full.pictures
    taught = among(pictures.hashes, pictures.looks, planned.graphs.learned(planned.prices))
    np.testing.assert_array_equal(parts.align, np.flatnonzero(taught))
    assert len(parts.rest) == IMAGES - taught.sum()
    groups = group_keys(parts.full.pictures, "source")
    shares = {"align": ALIGN_SHARE, "rest": 1 - ALIGN_SHARE}
    tried = set(split_by_group(groups, shares, 0)["align"]) - set(parts.align)
    rows = {name: set(parts.rest[index]) for name, index in parts.splits.items()}
    assert len(tried) > 150 and tried <= rows["fit"]
    assert {name: len(found) for name, found in rows.items()} == {
        name: pytest.approx(share * len(parts.rest), abs=1) for name, share in CERTIFIED.items()
    }
    for tested in planned.tested:
        assert tested.fit.splits.keys() == parts.splits.keys()
        for name, index in parts.splits.items():
            np.testing.assert_array_equal(tested.fit.splits[name], index)


def test_where_one_alignment_helps_its_images_stay_out_of_everything(tmp_path):
    request = make_request(tmp_path, candidates="tome=2,align; px=4,align", beside="")
    planned = plan(request, FakeWorkshop())
    assert [planned.aligned[name].helps for name in planned.lows] == [False, True]
    shares = {"align": ALIGN_SHARE, "rest": 1 - ALIGN_SHARE}
    groups = group_keys(planned.parts.full.pictures, "source")
    assert set(split_by_group(groups, shares, 0)["align"]) <= set(planned.parts.align)
    aligned, _ = decode(planned.aligned["px4_align"].alignment.image_prints)
    assert aligned <= decode(planned.graphs.learned(planned.prices))[0]


def test_an_alignment_that_does_not_help_beside_its_own_graph_is_one_candidate(tmp_path):
    planned = plan(
        make_request(tmp_path, candidates="tome=2,align; tome=2; px=4", beside=""), FakeWorkshop()
    )
    assert planned.lows == ["tome2", "px4"]
