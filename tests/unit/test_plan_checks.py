"""Recipes as a user writes them, and what a plan refuses before it exports anything."""

from dataclasses import replace

import pytest
from rich.console import Console

from bundle.recipe import Recipe
from calibration.certify import Goal, images_needed
from calibration.fidelity import FidelityError
from calibration.fit import MIN_IMAGES
from calibration.images import open_images
from planner.checks import (
    Asked,
    check_images,
    check_recipes,
    choices_for,
    images_for,
)
from planner.plan import make_plan
from planner.request import PlanError, default_candidates, recipes
from report.terminal import Bars
from tests.unit.image_files import write_images
from tests.unit.plan_workplace import (
    QUIET,
    SIZE,
    FakeWorkshop,
    TwoColours,
    make_request,
    tiny_backbone,
)

GOAL = Goal(0.05, 0.9, "ltt")
CLS_HEADS = ("ViTForImageClassification", "DeiTForImageClassification", "ViTModel")
OTHER_HEADS = ("Dinov2ForImageClassification", "DeiTForImageClassificationWithTeacher")


class Saying(Bars):
    """Bars that keep what was said."""

    def __init__(self):
        super().__init__(Console(quiet=True))
        self.lines = []

    def say(self, line):
        self.lines.append(line)


def check(request, model="ViTForImageClassification", bars=QUIET):
    return check_recipes(request, tiny_backbone(model), bars)


@pytest.fixture
def refuse(tmp_path):
    """What a whole plan is refused with, after nothing but loading the model."""

    def refuse(model="ViTForImageClassification", **changes):
        workshop, source = FakeWorkshop(model=model), TwoColours(changes.pop("images", 700))
        with pytest.raises((PlanError, FidelityError)) as error:
            make_plan(make_request(tmp_path, source=source, **changes), workshop, QUIET)
        assert set(workshop.used) <= {"load"}
        assert source.read == [] and "\n" not in str(error.value)
        return str(error.value)

    return refuse


@pytest.mark.parametrize("model", OTHER_HEADS)
def test_align_is_refused_by_name_where_the_head_reads_more_than_the_cls_token(refuse, model):
    message = refuse(model, candidates="px=4; px=4,tome=2,align; px=2,align")
    for recipe in ("px=4,tome=2,align", "px=2,align"):
        assert f"--candidates {recipe}: align does not reach this model's head" in message
    assert "px=4:" not in message and "leave align out" in message


@pytest.mark.parametrize("model", [*CLS_HEADS, *OTHER_HEADS])
def test_default_candidates_are_aligned_where_that_reaches_the_head(tmp_path, model):
    bars = Saying()
    asked = check(make_request(tmp_path, candidates=None), model, bars)
    reaches = model in CLS_HEADS
    assert all(recipe.align == reaches for recipe in asked.lows) and asked.lows
    said = [line for line in bars.lines if "head" in line]
    assert said == list(asked.notes)
    assert len(said) == (0 if reaches else 1)


@pytest.mark.parametrize("candidates", [None, "px=4,align"])
def test_a_head_that_is_fitted_here_is_reached_whatever_the_model_has(tmp_path, candidates):
    request = make_request(tmp_path, head_images=tmp_path, candidates=candidates)
    asked = check(request, OTHER_HEADS[0])
    assert all(recipe.align for recipe in asked.lows) and asked.lows
    assert asked.task == "classes" and not asked.notes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"candidates": "px=4,depth=3"}, "px=4,depth=3: depth=3 must be between 1 and 2; the"),
        # Every recipe that is wrong is named at once.
        ({"candidates": "depth=7", "beside": "px=99"}, "--candidates depth=7"),
        ({"candidates": "depth=7", "beside": "px=99"}, "--beside px=99"),
        ({"candidates": "px=9"}, "--candidates px=9: px=9 looks at more than the full rung's 8"),
        ({"candidates": "px=0"}, "--candidates px=0: px=0 is no positive multiple"),
        ({"candidates": "px=1,tome=4"}, "px=1,tome=4: tome=4 has one patch at 1 px"),
        ({"highs": "fp32; depth=0"}, "--highs depth=0: depth=0 must be between"),
        ({"beside": "px=16"}, "--beside px=16: px=16 looks at more"),
        ({"px": 100}, "--px 100: px=100 is too large"),
        ({"candidates": "px=4; px=04"}, "px=4 is named more than once"),
        ({"candidates": "px=4,tome=1; tome=1,px=4"}, "px=4,tome=1 is named more than once"),
        ({"candidates": "px=4", "px": None, "highs": "px=8; fp32"}, "fp32 is named more than once"),
        ({"candidates": f"px={SIZE}", "px": None}, "--candidates names the full model itself"),
        ({"candidates": "tome=0"}, "--candidates names the full model itself"),
        ({"candidates": "px=4; px=8,align"}, "--candidates names the full model itself"),
        ({"candidates": "; "}, "give --candidates and --highs"),
        ({"highs": ""}, "give --candidates and --highs"),
        ({"beside": "px=6; px=6"}, "px=6 is named more than once"),
    ],
    ids=str,
)
def test_what_the_model_cannot_do_is_refused_before_the_first_export(refuse, changes, message):
    assert message in refuse(**changes)


def test_a_fidelity_that_needs_a_head_is_refused_for_a_model_without(refuse):
    message = refuse("ViTModel", fidelity="top1")
    assert message == "--fidelity top1 needs a head, the model has none; use cosine"


def test_recipes_get_the_resolution_of_the_full_model(tmp_path):
    asked = check(make_request(tmp_path, px=None, candidates="px=4,align; tome=2", beside="px=6"))
    assert asked.full == Recipe(SIZE)
    assert asked.lows == (Recipe(4, align=True), Recipe(SIZE, tome=2))
    assert asked.highs == (Recipe(SIZE), Recipe(SIZE, precision="int8=static"))
    assert asked.exported == (Recipe(4), Recipe(SIZE, tome=2), *asked.highs[1:], Recipe(6))


FULL = Recipe(SIZE)
PLAIN = Asked(FULL, (Recipe(4),), (FULL,), ())


@pytest.mark.parametrize("test_share", [None, 0.0, 0.4])
@pytest.mark.parametrize("goal", [GOAL, Goal(0.2, 0.9, "ltt"), Goal(0.02, 0.95, "ltt")], ids=str)
def test_as_many_images_as_are_asked_for_are_just_enough(tmp_path, goal, test_share):
    enough = images_for(goal, test_share)

    def warnings(count):
        source = TwoColours(count)
        request = make_request(tmp_path, goal=goal, source=source, test_share=test_share)
        return check_images(request, PLAIN, QUIET)

    if images_needed(goal) > MIN_IMAGES:  # else some can be lost
        assert "only just enough" in warnings(enough)[0]
    with pytest.raises(PlanError) as error:
        warnings(enough - 1)
    assert f"give about {enough:,} images" in str(error.value)
    assert warnings(10 * enough) == []


def test_the_number_needed_is_said_in_the_words_of_fit(refuse):
    message = refuse(images=60, goal=GOAL)
    assert images_needed(GOAL) == 45 and images_for(GOAL) == 69
    assert message == (
        "60 images are too few: a risk of at most 5 % with confidence 90 % takes 45 independent "
        "certify images even if none of them is lost, and there are 39; give about 69 images, or "
        "ask for a larger --max-risk or a smaller --confidence"
    )
    assert f"give about {images_for(GOAL, 0.4)} images" in refuse(
        images=100, goal=GOAL, test_share=0.4
    )


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (29, "29 images are too few to split, 30 are needed; give about 30 images"),
        (40, "40 groups are too few: split 'fit' gets 5 of them"),
    ],
)
def test_images_too_few_to_divide_are_refused_with_the_number_needed(refuse, images, words):
    test_share = 0.65 if images == 40 else None
    message = refuse(images=images, test_share=test_share)
    assert message.startswith(words) and "give about " in message


@pytest.mark.parametrize("whole", [True, False])
def test_images_that_teach_the_head_are_too_few_before_the_first_export(tmp_path, whole):
    names = [f"{label}/{i}.png" for label in ("ant", "bee", "cat") for i in range(60)]
    folder = write_images(tmp_path / "images", *names)
    head = folder if whole else folder / "ant"
    workshop = FakeWorkshop()
    request = make_request(
        tmp_path,
        source=open_images(str(folder)),
        head_images=head,
        candidates="px=4",
        highs="fp32",
        goal=GOAL,
    )
    teach = 180 if whole else 60
    if not whole:
        (folder.parent / "link").symlink_to(folder)  # another way to the same files
        request = replace(request, source=open_images(str(folder.parent / "link")))
        request = replace(request, goal=Goal(0.02, 0.9, "ltt"))  # 180 images would do, 120 do not
    with pytest.raises(PlanError) as error:
        make_plan(request, workshop, QUIET)
    assert (
        f"{teach} of these 180 images lie below --head-images, teach the head and are left out"
        in str(error.value)
    )
    assert "images that it does not learn from" in str(error.value)
    assert set(workshop.used) == {"load"}


def test_folders_count_as_one_where_they_are_groups(tmp_path):
    source = TwoColours(700)
    source.names = tuple(f"{index % 60:02d}/{index}.png" for index in range(700))
    request = make_request(tmp_path, source=source, goal=GOAL)
    assert check_images(request, PLAIN, QUIET) == []
    with pytest.raises(
        PlanError, match="700 images in 60 groups are too few: .* there are 39; give about 69 fold"
    ):
        check_images(replace(request, group_by="folder"), PLAIN, QUIET)


@pytest.mark.parametrize(("images", "choices"), [(44, 1), (45, 1), (58, 1), (59, 2), (72, 4)])
def test_no_more_cascades_are_tested_than_could_all_pass(images, choices):
    assert choices_for(images, GOAL, 4) == choices
    needed = images_needed(replace(GOAL, choices=choices))
    assert needed <= images or choices == 1


@pytest.mark.parametrize(
    ("goal", "words"),
    [(GOAL, "images are too few: a risk"), (Goal(0.2, 0.9, "ltt"), "images are too few to split")],
)
def test_images_that_turn_out_too_few_are_no_result(tmp_path, goal, words):
    """Some of them cannot be read, which shows only once the full model has answered them."""
    workshop = FakeWorkshop()
    enough = images_for(goal)
    plain = {"candidates": "px=4", "highs": "fp32", "beside": "", "goal": goal}
    request = make_request(tmp_path, source=TwoColours(enough, gone=[0]), **plain)
    with pytest.raises(PlanError, match=f"^{enough - 1} {words}"):
        make_plan(request, workshop, QUIET)
    assert workshop.made == ["full"] and not workshop.used["price"]
    assert not (tmp_path / "out").exists()


SMALL = Recipe(112, precision="int8=static", align=True)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("px=112,int8=static,align", [SMALL]),
        ("align, int8=static ,px=0112", [SMALL]),
        (" px=112 , align ;px=98; ", [Recipe(112, align=True), Recipe(98)]),
        ("fp32; int8=static", [Recipe(), Recipe(precision="int8=static")]),
        ("px=112; px=112,align", [Recipe(112), Recipe(112, align=True)]),
        ("", []),
        (" ; ", []),
    ],
)
def test_recipes_are_read_whatever_their_spaces_and_order(text, expected):
    assert recipes("--candidates", text) == tuple(expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("px=112,int8", "px=112,int8: with dynamic int8 .* use int8=static"),
        (
            "px=4; int8=static,align",
            "--highs int8=static,align: only cheap graphs, those of --cand",
        ),
        ("px=4; speed=9", "--highs speed=9: recipe .*'speed=9' is unknown"),
        ("px=four", "--highs px=four: 'px=four' in a recipe must be a whole number"),
    ],
)
def test_recipes_that_cannot_be_planned_are_one_line(text, message):
    with pytest.raises(PlanError, match=message) as error:
        recipes("--highs", text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("aligns", [True, False])
@pytest.mark.parametrize(
    ("patch_size", "px", "sizes"),
    [
        (14, 224, [112, 98, 84]),
        (16, 224, [112, 96, 80]),
        (8, 64, [32, 24]),
        (4, 8, [4]),
        (8, 8, []),
    ],
)
def test_default_candidates_are_smaller_and_hold_whole_patches(patch_size, px, sizes, aligns):
    found = default_candidates(patch_size, px, aligns)
    assert found == tuple(Recipe(size, precision="int8=static", align=aligns) for size in sizes)
