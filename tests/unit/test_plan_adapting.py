"""Adapted candidates in a whole plan on tiny graphs: those that are given, and those it trains."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import onnxruntime as ort
import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from adaptation.request import AdaptationError
from adaptation.request import Request as Lesson
from bundle.adapted import Adapted
from bundle.graphs import GraphSet
from bundle.prints import among
from bundle.recipe import Recipe
from calibration.certify import Goal, allowed_errors, images_needed, one_per_group
from calibration.fidelity import Fidelity
from calibration.splits import SplitError
from planner import result
from planner.adapting import MOST_RECIPES, set_aside, wanted
from planner.checks import certify_groups, check_recipes, images_for
from planner.graphs import exported
from planner.parts import Parts
from planner.plan import make_plan
from planner.request import PlanError
from planner.study import study
from planner.workshop import Workshop
from report.terminal import Bars
from tests.unit.export_tiny import PX, save_tiny
from tests.unit.plan_workplace import (
    QUIET,
    SIZE,
    FakeWorkshop,
    TwoColours,
    make_request,
    plan,
    write_state,
)

pytestmark = [
    pytest.mark.usefixtures("remembered_fits"),
    pytest.mark.usefixtures("remembered_exports"),
]

IMAGES = 700
LEARNED = range(30, 90)
PX4 = Recipe(4)


class Saying(Bars):
    """Bars that keep what was said."""

    def __init__(self):
        super().__init__(Console(quiet=True))
        self.lines = []

    def say(self, line):
        self.lines.append(line)


# --- states that the user names ---------------------------------------------------------------


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A plan with an adapted candidate, its state, and what was said."""
    folder = tmp_path_factory.mktemp("given")
    state = write_state(folder / "a state", PX4, TwoColours(IMAGES), LEARNED)
    named = f"px=4,adapted={state.folder},int8=static,align; px=4"
    bars, workshop = Saying(), FakeWorkshop()
    planned = make_plan(make_request(folder, candidates=named), workshop, bars)
    return planned, state, bars.lines


def test_an_adapted_candidate_is_one_among_all_under_the_key_of_its_state(given):
    planned, state, _ = given
    name = f"px4_adapted{state.key}_int8static"
    assert planned.lows[0].removesuffix("_align") == name and planned.lows[1:] == ["px4"]
    assert planned.chosen.candidate.low == planned.lows[0]
    content = result.to_dict(planned, list(planned.notes))
    recipe = f"px=4,adapted={state.key},int8=static"
    assert content["chosen"]["low_recipe"].removesuffix(",align") == recipe
    assert content["graphs"][planned.lows[0]]["adapted"] == {"minutes": 3.0, "images": 60}
    assert content["graphs"]["px4"]["adapted"] is None and content["adaptation"] is None
    assert "adapt" not in content["images"]
    assert f"px=4,adapted={state.key}: adapted in 3.0 minutes to 60 images" in content["notes"][0]
    assert str(state.folder) not in json.dumps(content)


def test_others_of_their_groups_have_no_part_either(given):
    planned, state, _ = given
    cache, request = planned.parts.cache, replace(planned.parts.request, group_by="folder")

    class Foldered:
        """The same answers, of images in folders of four."""

        graphs, fill = cache.graphs, staticmethod(cache.fill)

        def read(self, wanted):
            pictures = cache.read(wanted).pictures
            names = tuple(f"{int(name[:4]) // 4}/{name}" for name in pictures.names)
            return SimpleNamespace(pictures=replace(pictures, names=names))

    parts = Parts.divide(request, Foldered(), "", state.image_prints, QUIET)
    folders = {place // 4 for place in parts.places.tolist()}
    assert folders and not folders & {place // 4 for place in LEARNED}


def test_images_that_a_given_state_learned_from_have_no_part(given):
    planned, state, said = given
    left = IMAGES - len(planned.parts.places)
    assert not {*LEARNED} & {*planned.parts.rows()} and len(LEARNED) <= left < len(LEARNED) + 20
    what = "images, or others of their group, taught an adapted graph its weights"
    assert said.count(f"{left} {what} and are left out") == 1
    for tested in planned.tested:
        outputs = tested.outputs
        assert not among(outputs.hashes, outputs.looks, state.image_prints).any()
        assert len(outputs) == sum(map(len, planned.parts.splits.values()))


@pytest.mark.parametrize("option", ["highs", "beside"])
def test_states_of_full_graphs_and_of_those_to_compare_with_are_left_out_for_too(tmp_path, option):
    state = write_state(tmp_path / "state", Recipe(6), TwoColours(IMAGES), LEARNED)
    changes = {"candidates": "px=4", option: f"fp32; px=6,adapted={state.folder}"}
    if option == "beside":
        changes[option] = f"px=6,adapted={state.folder}"
    planned = make_plan(make_request(tmp_path, **changes), FakeWorkshop(), QUIET)
    assert f"px6_adapted{state.key}" in planned.prices
    assert not {*LEARNED} & {*planned.parts.rows()}


def test_a_study_leaves_the_same_images_out(tmp_path):
    state = write_state(tmp_path / "state", PX4, TwoColours(IMAGES), LEARNED)
    request = make_request(tmp_path, candidates=f"px=4,adapted={state.folder}", highs="fp32")
    found = study(request, FakeWorkshop(), QUIET)
    ((_, outputs),) = found.pairs.items()
    assert not among(outputs.hashes, outputs.looks, state.image_prints).any()
    assert len(found.groups) < IMAGES - len(LEARNED) + 1


def test_every_state_that_does_not_fit_is_named_before_anything_is_exported(tmp_path):
    source, workshop = TwoColours(IMAGES), FakeWorkshop()
    other = write_state(tmp_path / "other", Recipe(6), source, range(5))
    strange = replace(write_state(tmp_path / "strange", PX4, source, range(5)), teacher="e" * 64)
    strange.save()
    twice = write_state(tmp_path / "twice", Recipe(2), source, range(5))
    again = write_state(tmp_path / "again", Recipe(2), source, range(5))
    folders = (other.folder, strange.folder, tmp_path / "nowhere")
    named = [f"px=4,adapted={folder}" for folder in folders]
    named += [f"px=2,adapted={state.folder}" for state in (twice, again)]
    request = make_request(tmp_path, candidates="; ".join(named))
    with pytest.raises(PlanError) as error:
        make_plan(request, workshop, QUIET)
    message = str(error.value)
    assert (
        f"--candidates {named[0]}: the state in {other.folder} is of px=6, not of px=4" in message
    )
    assert f"{strange.folder} was trained by another model" in message
    assert "nowhere" in message and "python -m adaptation distil" in message
    assert f"{named[-1]} is named more than once" in message and "\n" not in message
    assert set(workshop.used) == {"load"}


def test_images_that_are_too_few_without_those_a_state_learned_from_are_no_result(tmp_path):
    source, workshop = TwoColours(120), FakeWorkshop()
    state = write_state(tmp_path / "state", PX4, source, range(70))
    request = make_request(
        tmp_path,
        source=source,
        candidates=f"px=4,adapted={state.folder}",
        goal=Goal(0.05, 0.9, "ltt"),
    )
    with pytest.raises(PlanError, match="too few.* that no adapted candidate has learned from"):
        make_plan(request, workshop, QUIET)
    assert workshop.made == ["full"]


# --- states that the plan trains ----------------------------------------------------------------

CANDIDATES = "px=4,int8=static,align; px=4; px=2; px=6,int8=static; tome=2"
# int8 loses about 4 % of the images, so that more than one cascade is worth a test.
GOAL = Goal(0.07, 0.9, "ltt")
DEAR = {"full": 80.0, "int8static": 20.0, "px2": 500.0, "px6_int8static": 500.0, "tome2": 500.0}


def adapting(folder, **changes):
    fields = {"candidates": CANDIDATES, "beside": "", "adapt_minutes": 6.0, "goal": GOAL}
    return make_request(folder, answers=folder / "answers", **(fields | changes))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A plan that trained, its workshop, its request and its plan.json."""
    workshop = FakeWorkshop(DEAR)
    request = adapting(tmp_path_factory.mktemp("trained"))
    planned = plan(request, workshop)
    return SimpleNamespace(
        planned=planned,
        workshop=workshop,
        request=request,
        content=result.to_dict(planned, list(planned.notes)),
    )


def test_only_recipes_of_the_shortlist_are_trained_and_get_all_minutes(trained):
    (lesson,) = trained.workshop.lessons
    assert (lesson.recipe, lesson.minutes, lesson.px) == (PX4, 6.0, SIZE)
    assert (lesson.seed, lesson.group_by, lesson.resume) == (0, "source", False)
    assert lesson.out.parent == trained.request.cache


def test_minutes_are_shared_equally_among_a_few_recipes(tmp_path, monkeypatch):
    monkeypatch.setattr("planner.plan.wanted", lambda *_: (PX4, Recipe(2)))
    workshop = FakeWorkshop(DEAR)
    planned = make_plan(adapting(tmp_path), workshop, QUIET)
    first, second = workshop.lessons
    assert (first.recipe, second.recipe) == (PX4, Recipe(2))
    assert first.minutes == second.minutes == 3.0
    assert first.out != second.out and first.places == second.places
    assert len(planned.states) == 2 and len(planned.lows) == 5 + 3


def test_recipes_of_the_shortlist_are_wanted_in_its_order_each_once_and_not_again(trained):
    (key,) = trained.planned.states
    listed = [
        SimpleNamespace(low=name)
        for name in (f"px4_adapted{key}", "px2", "px6_int8static", "px2", "tome2")
    ]
    graphs, offered = trained.planned.graphs, (PX4, Recipe(2), Recipe(6), Recipe(SIZE, tome=2))
    given = (offered, listed, {}, graphs, Fidelity("top1"), lambda pair: True)
    assert wanted(*given) == (Recipe(2), Recipe(6)) and MOST_RECIPES == 2


def test_images_to_adapt_to_are_set_aside_and_nothing_else_sees_them(trained):
    planned, (lesson,) = trained.planned, trained.workshop.lessons
    aside = {*lesson.places}
    assert planned.parts.set_aside == lesson.places and len(aside) == 350
    rows = {*planned.parts.rows()}
    assert not rows & aside and rows | aside == {*range(IMAGES)}
    assert trained.content["images"]["adapt"] == 350
    graphs = planned.graphs
    for tested in planned.tested:
        outputs = tested.outputs
        assert len(outputs) == len(planned.parts.places)
        assert not among(outputs.hashes, outputs.looks, graphs.left_out(planned.lows)).any()
    keys = {name: planned.parts.cache.key(graphs.graphs[name]) for name in planned.prices}
    answered = {name: _answered(trained.request.answers / key) for name, key in keys.items()}
    assert keys["tome2"] == keys["full"] and answered["full"] >= aside
    others = [answered[name] for name in keys.keys() - {"full", "tome2"}]  # no answer of theirs
    assert all(others) and not aside & set().union(*others)


def _answered(folder):
    """Places of the images that a graph has answered."""
    found = set()
    for file in folder.glob("*.npz"):
        with np.load(file) as arrays:
            found |= {*arrays["rows"].tolist()}
    return found


def test_adapted_twins_have_the_precision_and_the_alignment_of_their_plain_graphs(trained):
    planned = trained.planned
    (key,) = planned.states
    plain = ["px4_int8static_align", "px4", "px2", "px6_int8static", "tome2"]
    adapted = [name.removesuffix("_align") for name in planned.lows if key in name]
    assert [name for name in planned.lows if key not in name][:2] == plain[:2]
    assert adapted == [f"px4_adapted{key}_int8static", f"px4_adapted{key}"]
    aligned = {name.removesuffix("_align") for name in planned.aligned}
    assert aligned == {"px4_int8static", f"px4_adapted{key}_int8static"}


def test_all_candidates_are_priced_in_one_run_and_tested_together(trained):
    planned, content = trained.planned, trained.content
    assert trained.workshop.priced[-1] == sorted(planned.prices)
    assert {*planned.lows} <= {*trained.workshop.priced[-1]}
    assert {c.low for c in planned.candidates} == {*planned.lows}
    count = len(planned.tested)
    adapted = [entry for entry in content["tested"] if "adapted=" in entry["low_recipe"]]
    assert adapted and count > 1
    independent = one_per_group(planned.parts.groups, planned.parts.splits["certify"], 0)
    goal = replace(trained.request.goal, choices=count)
    for entry in content["tested"]:
        certificate = entry["certificate"]
        assert certificate["choices"] == count
        assert certificate["allowed"] == allowed_errors(len(independent), goal)


def test_the_adapted_graph_that_is_best_is_chosen_and_written(trained):
    planned, content = trained.planned, trained.content
    (key,) = planned.states
    assert key in planned.chosen.candidate.low
    served = GraphSet.load(trained.request.out / "onnx")
    assert served.low.adapted_on == planned.states[key].image_prints
    assert served.low.record.recipe == content["chosen"]["low_recipe"]
    assert content["graphs"][planned.chosen.candidate.low]["adapted"] == {
        "minutes": 6.0,
        "images": 350,
    }
    (found,) = content["adaptation"]["trained"]
    assert (found["recipe"], found["adapted"]) == ("px=4", key)
    assert content["adaptation"]["minutes"] == 6.0
    assert found["line"] in content["notes"] and "adapted in 6.0 minutes to 350" in found["line"]
    assert "adapted to images of neither split" in content["goal"]["procedure"]


def test_a_plan_made_again_trains_nothing_and_prices_once(trained, tmp_path):
    workshop = FakeWorkshop(DEAR)
    again = plan(replace(trained.request, out=tmp_path / "again"), workshop)
    assert not workshop.lessons and +workshop.used == {"load": 1, "price": 1}
    assert again.chosen.candidate == trained.planned.chosen.candidate
    assert list(again.notes) == list(trained.planned.notes)


@pytest.mark.parametrize(
    "changes",
    [{"seed": 1}, {"adapt_minutes": 7.0}, {"source": TwoColours(IMAGES, seed=1)}, {"model": "x"}],
    ids=["seed", "minutes", "images", "model"],
)
def test_what_a_state_depends_on_trains_anew(trained, tmp_path, changes):
    workshop = FakeWorkshop(DEAR)
    make_plan(replace(trained.request, **changes), workshop, QUIET)
    assert workshop.lessons
    assert {x.out for x in workshop.lessons}.isdisjoint(x.out for x in trained.workshop.lessons)


def test_a_training_that_was_stopped_is_gone_on_with_in_its_folder(tmp_path):
    workshop = FakeWorkshop(DEAR, helps=KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        make_plan(adapting(tmp_path), workshop, QUIET)
    # The best state so far lies there: it is not the last word.
    (stopped,) = workshop.lessons
    write_state(stopped.out, PX4, stopped.source, stopped.rows, minutes=0.1)
    # Prices differ from run to run; the recipes stay the same.
    workshop = FakeWorkshop({**DEAR, "px4": 700.0, "px4_int8static_align": 700.0, "tome2": 7.0})
    planned = make_plan(adapting(tmp_path), workshop, QUIET)
    assert [lesson.out for lesson in workshop.lessons] == [stopped.out]
    (state,) = planned.states.values()
    assert state.about["minutes"] == 6.0


def test_adapting_that_does_not_help_leaves_the_plan_as_it_was(tmp_path):
    workshop = FakeWorkshop(DEAR, helps=False)
    planned = make_plan(adapting(tmp_path), workshop, QUIET)
    assert len(planned.parts.rows()) == 350 and not planned.states
    assert workshop.used["price"] == 1 and all("adapted" not in low for low in planned.lows)
    assert planned.chosen is not None and "adapted" not in planned.chosen.candidate.low
    (note,) = [note for note in planned.notes if "does not help" in note]
    assert note.startswith("px=4: adapting does not help (on 35 held-out images")
    content = result.to_dict(planned, list(planned.notes))
    assert content["adaptation"]["trained"][0]["adapted"] is None
    assert "adapted to images" not in content["goal"]["procedure"]
    again = FakeWorkshop(DEAR)  # it would help now, and is known not to
    make_plan(adapting(tmp_path), again, QUIET)
    assert not again.lessons


def test_a_training_that_cannot_be_is_a_note_and_is_tried_again(tmp_path, monkeypatch):
    monkeypatch.setattr("planner.plan.wanted", lambda *_: (PX4, Recipe(2)))
    said = "3 minutes are too few: …; give --minutes 5 or more"
    workshop = FakeWorkshop(DEAR, helps=AdaptationError(said))
    planned = make_plan(adapting(tmp_path), workshop, QUIET)
    assert planned.chosen is not None
    for recipe in ("px=4", "px=2"):
        assert (
            f"{recipe} is not adapted: 3 minutes are too few: …; give --adapt 5 or more "
            "(of --adapt 6 each of 2 recipes gets 3)"
        ) in planned.notes
    again = FakeWorkshop(DEAR)
    make_plan(adapting(tmp_path), again, QUIET)
    assert again.lessons


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapt_minutes": 0.0}, "--adapt 0 is no time to train in: give 2 minutes or more, 1 for"),
        ({"adapt_minutes": -1.0}, "--adapt -1 is no time to train in"),
        ({"adapt_minutes": 1.5}, "--adapt 1.5 is no time to train in: give 2 minutes or more"),
        ({"adapt_minutes": float("nan")}, "--adapt nan is no time to train in"),
        ({"adapt_minutes": float("inf")}, "--adapt inf is no time to train in"),
        ({"candidates": "int8=static"}, "--adapt has nothing to train: no candidate"),
        ({"source": TwoColours(98)}, "98 groups of images are too few for --adapt: it gets 49 of"),
        (
            {"source": TwoColours(130), "goal": Goal(0.05, 0.9, "ltt")},
            "130 images are too few: .*--adapt takes 50% of them; give about 137 images, leave "
            "--adapt out, or ask for a larger --max-risk",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",  # no address of an object
)
def test_silly_minutes_and_too_few_images_are_refused_before_anything_is_exported(
    tmp_path, changes, message
):
    workshop, request = FakeWorkshop(), adapting(tmp_path, **changes)
    request.source.read.clear()
    with pytest.raises(PlanError, match=message) as error:
        make_plan(request, workshop, QUIET)
    assert set(workshop.used) == {"load"} and not request.source.read
    assert "\n" not in str(error.value)


def test_a_cache_that_no_recipe_could_name_is_refused_before_anything_is_exported(tmp_path):
    workshop = FakeWorkshop()
    with pytest.raises(PlanError, match="has a comma"):
        make_plan(adapting(tmp_path, cache=tmp_path / "a,b"), workshop, QUIET)
    assert set(workshop.used) == {"load"}


def test_as_many_images_as_are_asked_for_are_just_enough_with_a_part_to_adapt_to():
    for goal in (Goal(0.05, 0.9, "ltt"), Goal(0.2, 0.9, "ltt")):
        enough = images_for(goal, adapts=True)
        needed, few = images_needed(goal), tuple(map(str, range(enough - 1)))
        assert certify_groups((*few, "more"), None, 0, True) >= needed
        try:
            assert certify_groups(few, None, 0, True) < needed
        except SplitError:  # too few to adapt to
            assert enough == 99


def test_a_group_is_never_divided_and_few_groups_are_refused():
    groups = [str(row % 120) for row in range(600)]
    aside, rest = set_aside(groups, 0)
    assert len(aside) == len(rest) == 300
    assert not {groups[row] for row in aside} & {groups[row] for row in rest}
    assert set_aside(groups, 1)[0].tolist() != aside.tolist()
    with pytest.raises(SplitError, match="98 groups of images are too few for --adapt"):
        set_aside([str(row % 98) for row in range(600)], 0)


def test_where_no_cascade_can_be_certified_the_best_that_may_be_served_are_trained(trained):
    planned = trained.planned
    offered = (Recipe(2), PX4, Recipe(SIZE, tome=2))
    pairs = {
        (low, "full"): planned.parts.outputs(low, ["full"], planned.graphs, "fit", QUIET)[
            low, "full"
        ]
        for low in ("px2", "px4", "tome2")
    }
    fidelity = Fidelity("top1")
    given = (offered, [], pairs, planned.graphs, fidelity)
    found = wanted(*given, lambda pair: True)
    assert found[0] == Recipe(SIZE, tome=2) and len(found) == MOST_RECIPES
    assert wanted(*given, lambda pair: pair[0] == "px2") == (Recipe(2),)


# --- with torch ---------------------------------------------------------------------------------


def test_a_state_that_a_candidate_names_is_what_its_graph_holds(tmp_path):
    model = save_tiny(tmp_path / "model", "ViTModel")
    request = make_request(
        tmp_path,
        model=str(model),
        px=PX,
        candidates=f"px=8,adapted={tmp_path / 'state'}",
        beside="",
    )
    workshop = Workshop()
    backbone = workshop.load(request)
    module = backbone.trainable(Recipe(8))
    with torch.no_grad():
        module.alignment.bias.add_(1.0)
    (tmp_path / "state").mkdir()
    save_file(module.weights(), tmp_path / "state/adapted.safetensors")
    state = Adapted(*(tmp_path / "state", Recipe(8), backbone.weights_sha256, PX, "", "")).save()
    asked = check_recipes(request, backbone, QUIET)
    assert asked.states == {state.key: state}
    backbone = replace(backbone, adapted=asked.states)
    graphs = exported(request, asked.full, asked.lows, backbone, workshop, QUIET)
    image = np.zeros((1, 3, PX, PX), np.float32)
    session = ort.InferenceSession(graphs.graphs[f"px8_adapted{state.key}"].file)
    (found,) = session.run(["embedding"], {"image": image})
    with torch.inference_mode():
        plain = backbone.rung(Recipe(8))(torch.from_numpy(image))[0].numpy()
    np.testing.assert_allclose(found, plain + 1, atol=1e-4)


def test_an_unfinished_training_is_resumed(tmp_path):
    model = save_tiny(tmp_path / "model", "ViTForImageClassification")
    request = make_request(tmp_path, model=str(model))
    workshop = Workshop()
    backbone = workshop.load(request)
    lesson = Lesson(
        recipe=Recipe(8), source=TwoColours(60), out=tmp_path / "state", epochs=1, cache=tmp_path
    )
    lesson.out.mkdir()
    (lesson.out / ".unfinished.pt").write_bytes(b"half a file")
    graphs = SimpleNamespace(fitted_on="")
    with pytest.raises(AdaptationError, match=r"\.unfinished\.pt is not readable"):
        workshop.adapt(backbone, graphs, lesson, Fidelity("top1"), QUIET)
