"""Which image plays which part in a whole plan on tiny graphs: nothing tests what it has taught."""

import numpy as np
import pytest

from bundle.graphs import GraphSet
from bundle.prints import among, decode, encode
from calibration.answers import Wanted
from calibration.certify import Goal
from calibration.chunks import MissingAnswersError
from calibration.outputs import Outputs
from calibration.record import Fit
from export.request import spread
from planner import result
from planner.select import predict
from routing import Calibration
from tests.unit.calibrating import run
from tests.unit.plan_workplace import MS, FakeWorkshop, TwoColours, make_request, plan

pytestmark = pytest.mark.usefixtures("remembered_fits")

IMAGES = 700
ALIGNED = "px4_int8static_align"  # px=4,int8=static, the first candidate
PARTS = {"fit": 245, "certify": 455}
WITH_TEST = {"fit": 196, "certify": 364, "test": 140}
OTHERS = "px=4,int8=static,align; px=4; px=2"  # px=2 is no worse, and dearer


@pytest.fixture(scope="module", params=[None, 0.2], ids=["no test split", "a test split"])
def planned(tmp_path_factory, request):
    folder = tmp_path_factory.mktemp("plan")
    more = {"test_share": request.param, "answers": folder / "answers", "candidates": OTHERS}
    return plan(make_request(folder, **more), FakeWorkshop({**MS, "px2": 70.0}))


def prints_of(pictures, rows):
    return encode([pictures.hashes[row] for row in rows], pictures.looks[rows])


def test_every_image_has_one_part(planned):
    content, splits = result.to_dict(planned, []), planned.parts.splits
    images = PARTS if planned.request.test_share is None else WITH_TEST
    assert {name: len(rows) for name, rows in splits.items()} == images
    assert sorted(np.concatenate(list(splits.values()))) == list(range(IMAGES))
    assert content["images"] == {"source": "two colours each", **images}
    assert (
        content["measured_on"] == planned.parts.measured == ("test" if "test" in images else "fit")
    )


def test_nothing_certifies_or_measures_what_a_graph_has_learned_from(planned):
    splits = planned.parts.splits
    for tested in planned.tested:
        outputs = tested.outputs
        assert len(outputs) == IMAGES
        learned = planned.graphs.learned(planned.prices)
        taught = np.flatnonzero(among(outputs.hashes, outputs.looks, learned))
        assert taught.tolist() == splits["fit"].tolist()  # all of them, by the alignment
        assert {name: rows.tolist() for name, rows in tested.fit.splits.items()} == {
            name: rows.tolist() for name, rows in splits.items()
        }


def test_ranges_and_alignments_learn_from_fit_images(planned):
    outputs, rows = planned.tested[0].outputs, planned.parts.splits["fit"]
    graphs = planned.graphs.graphs
    ranges = prints_of(outputs, rows[spread(len(rows))])
    assert graphs["int8static"].fitted_on == graphs["px4_int8static"].fitted_on == ranges
    alignment = planned.aligned[ALIGNED].alignment
    assert decode(alignment.image_prints)[0] == decode(prints_of(outputs, rows))[0]
    assert alignment.image_hashes.tolist() == [outputs.hashes[row] for row in rows]


def test_what_fit_images_say_of_an_aligned_graph_is_cross_fitted(planned):
    alignment, rows = planned.aligned[ALIGNED].alignment, planned.parts.splits["fit"]
    tested = {entry.candidate.low: entry for entry in planned.tested}[ALIGNED]
    np.testing.assert_array_equal(tested.outputs.low.embedding[rows], alignment.cross_fitted)
    growth = planned.aligned[ALIGNED].growth
    if planned.parts.measured == "fit":
        assert planned.agreement[ALIGNED] == growth[-1].acceptable
    pair = (tested.candidate.low, tested.candidate.high)
    found = predict(
        {pair: tested.outputs.rows(rows)},
        planned.parts.groups[rows],
        planned.fidelity,
        planned.request.goal,
        planned.parts.certify_images,
        planned.ms,
        planned.ms["full"],
        planned.request.seed,
    )
    assert tested.candidate == found[0]


def test_certify_images_are_answered_only_by_the_graphs_of_shortlisted_cascades(planned):
    parts = planned.parts
    listed = {name for t in planned.tested for name in (t.candidate.low, t.candidate.high)}
    answered = {"fit": set(), "certify": set()}
    for split, names in answered.items():
        for name in planned.prices:
            try:
                parts.cache.read([Wanted(planned.graphs.graphs[name])], parts.rows(split))
                names.add(name)
            except MissingAnswersError:
                continue
    beside = {"px6"} if parts.measured == "fit" else set()  # these answer what is measured on
    assert answered["fit"] == {*planned.prices} - {"px6"} | beside
    assert answered["certify"] == {*listed, "full"}
    assert "px2" not in listed and ALIGNED in listed


def test_the_splits_are_those_of_fit_on_what_the_plan_wrote(planned, tmp_path):
    """The same graphs, outputs and seed by `calibration fit`: the same splits and the same map."""
    out, ours = planned.request.out, planned.chosen.fit
    given = ["--max-risk", 0.2, "--signal", planned.chosen.candidate.signal]
    given += ["--seed", planned.request.seed, "--reference-images", 0]
    if planned.request.test_share is not None:
        given += ["--test-share", planned.request.test_share]
    where = ("--onnx", out / "onnx", "--outputs", out / "outputs.json")
    assert run(tmp_path, "fit", *given, *where, "--out", "again.json") == 0
    outputs = Outputs.load(out / "outputs.json")
    again = Fit.load(tmp_path / "again.json", outputs)
    for name, rows in ours.splits.items():
        np.testing.assert_array_equal(again.splits[name], rows)
    np.testing.assert_array_equal(again.scores, ours.scores)
    calibration = Calibration.load(tmp_path / "again.json")
    assert calibration.score_map == ours.calibration.score_map
    assert calibration.certificate["n"] == ours.calibration.certificate["n"]


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


def test_no_image_is_lost_to_an_alignment_that_does_not_help(unhelped):
    planned, _ = unhelped
    images = {name: len(rows) for name, rows in planned.parts.splits.items()}
    assert images == planned.chosen.fit.calibration.data["splits"] == PARTS
    outputs = planned.chosen.outputs
    assert len(outputs) == IMAGES and planned.chosen.candidate.high == "full"
    assert outputs.taught is None
    assert planned.aligned["tome2"].growth[-1].images == round(0.8 * PARTS["fit"])


def test_an_alignment_that_does_not_help_beside_its_own_graph_is_one_candidate(tmp_path):
    planned = plan(
        make_request(tmp_path, candidates="tome=2,align; tome=2; px=4", beside=""), FakeWorkshop()
    )
    assert planned.lows == ["tome2", "px4"]


def test_images_that_taught_the_head_have_no_part(tmp_path, unhelped):
    pictures = unhelped[0].chosen.outputs
    head = prints_of(pictures, np.arange(30, 60))
    request = make_request(tmp_path, candidates="px=4", beside="", goal=Goal(0.3, 0.9, "ltt"))
    planned = plan(request, FakeWorkshop(taught=head))
    assert not {*range(30, 60)} & {*planned.parts.rows()}
    left = len(planned.parts.places)
    assert left == sum(map(len, planned.parts.splits.values()))
    assert IMAGES - 40 < left <= IMAGES - 30  # some look like one of them
    for tested in planned.tested:
        assert len(tested.outputs) == left


def test_one_candidate_changed_is_one_export_and_the_others_keep_their_answers(tmp_path):
    workshop, source = FakeWorkshop(), TwoColours(IMAGES)
    more = {"source": source, "answers": tmp_path / "answers", "reference_images": 0}
    first = plan(make_request(tmp_path, **more), workshop)
    assert workshop.made == ["full", "px4_int8static", "px4", "int8static", "px6"]
    folder = first.graphs.reference.file.parent

    def files(names):
        cache = first.parts.cache
        places = [first.graphs.graphs[name] for name in names]
        folders = [tmp_path / "answers" / cache.key(graph) for graph in places]
        found = [*folder.glob("*.onnx"), *(f for place in folders for f in place.iterdir())]
        return {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in found}

    kept = [ALIGNED, "px4_int8static", "int8static", "px6", "full"]
    before = {file: found[0] for file, found in files(kept).items()}
    source.read.clear()
    other = make_request(tmp_path, candidates="px=4,int8=static,align; px=5", **more)
    second = plan(other, workshop)
    assert workshop.made[5:] == ["px5"] and workshop.used["align"] == 1
    assert second.lows == [ALIGNED, "px5"]
    after = {file: found[0] for file, found in files(kept).items()}
    assert after.items() >= before.items()
    new = set(after) - set(before)
    assert {file.name for file in new} == {"px5.onnx"}
    assert len(source.read) <= IMAGES + 32  # what px5 answers, and what is priced
    assert [first.agreement[name] for name in kept[:1]] == [second.agreement[n] for n in kept[:1]]
