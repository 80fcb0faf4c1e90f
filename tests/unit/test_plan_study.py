"""The study of designs: each division makes a plan of its own, and a better use of images shows."""

import json
import sys

import pytest

from calibration.certify import Goal
from planner import __main__ as command
from planner.simulation import ABOVE, EQUAL, IMAGES, RULES, WAYS, Population, Way
from planner.study import Design, designs, study, to_no_alignment, to_the_mean
from tests.unit.plan_workplace import MS, QUIET, FakeWorkshop, TwoColours, make_request

GOAL = Goal(0.2, 0.9, "ltt")
PICTURES = 240


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    request = make_request(
        tmp_path_factory.mktemp("study"), source=TwoColours(PICTURES), candidates="px=4; px=2"
    )
    return study(request, FakeWorkshop(), QUIET)


def test_every_graph_answers_every_image_and_has_its_price(prepared):
    assert set(prepared.pairs) == {
        (low, high) for low in ("px4", "px2") for high in ("full", "int8static")
    }
    assert all(len(outputs) == PICTURES for outputs in prepared.pairs.values())
    assert (prepared.full, prepared.ms["full"]) == ("full", MS["full"])


def test_a_speed_up_lies_between_none_and_that_of_the_cheap_graph_alone(prepared):
    for design in designs():
        hopeless = Goal(0.001, 0.99, "ltt")  # so few images cannot certify it
        speedup, none = prepared.speedups(design, [GOAL, hopeless], 0)
        assert 1 <= speedup <= prepared.ms["full"] / min(prepared.ms.values())
        assert none == 1 and [speedup] == prepared.speedups(design, [GOAL], 0)


def test_an_alignment_that_takes_a_shift_back_is_worth_more_than_none(prepared):
    shares = (0.1, 0.3, 0.6)  # what is left over would be a test split: it is in no part
    found = {
        align: prepared.speedups(Design("", shares, align), [GOAL], 0)
        for align in (to_the_mean, to_no_alignment, None)
    }
    assert min(found[to_no_alignment], found[to_the_mean]) > found[None]


def test_a_division_of_fewer_images_uses_no_others(prepared):
    fit, certified = prepared._divide(Design("", (0.0, 0.25, 0.75), None), 3, 80)[1:]
    assert (len(fit), len(certified)) == (20, 60) and not set(fit) & set(certified)
    assert prepared.speedups(
        Design("", (0.0, 0.4, 0.6), None), [Goal(0.05, 0.9, "ltt")], 0, 30
    ) == [1]


@pytest.fixture(scope="module")
def population(prepared):
    return Population.of(prepared, 0)


@pytest.mark.parametrize("rule", RULES)
def test_a_simulated_plan_keeps_its_promise_however_delta_is_shared(population, rule):
    """The true risk is known: it is above ε in at most a tenth of the plans, and some slack."""
    goal = Goal(0.1, 0.9, "ltt")
    plans = [population.plan(Way("", rule=rule), 300, goal, seed) for seed in range(60)]
    assert sum(risk > goal.max_risk for _, risk in plans) <= 14  # 99.9 % of Bin(60, 0.1)
    bound = population.full_ms / min(population.ms.values())
    assert all(1 <= speedup <= bound for speedup, _ in plans)
    assert max(speedup for speedup, _ in plans) > 1.5
    assert plans[0] == population.plan(Way("", rule=rule), 300, goal, 0)


def test_a_rule_never_spends_more_than_delta_but_in_sequence():
    for rule, by_tests in RULES.items():
        for shares in by_tests:
            assert sum(shares) <= 1 + 1e-9 or (rule == "fixed sequence" and set(shares) == {1.0})


def test_more_images_are_worth_more(population):
    goal = Goal(0.1, 0.9, "ltt")
    few, many = (
        [population.plan(Way("", rule=EQUAL), n, goal, seed)[0] for seed in range(12)]
        for n in (60, 3000)
    )
    assert sum(many) > sum(few)
    assert population.plan(Way(""), 20, Goal(0.01, 0.9, "ltt"), 0) == (1.0, 0.0)


def run(tmp_path, monkeypatch, capsys, *more):
    monkeypatch.setattr(command, "Workshop", FakeWorkshop)
    monkeypatch.setattr(command.given, "source", lambda *_: TwoColours(PICTURES))
    line = ["study", "--model", "tiny", "--images", "two", "--max-risk", "0.3", "--max-risk", "0.2"]
    line += ["--candidates", "px=4", "--highs", "fp32", "--divisions", "2", *more]
    line += ["--cache", str(tmp_path / "cache"), "--answers", str(tmp_path / "answers")]
    monkeypatch.setattr(sys, "argv", ["planner", *line])
    with pytest.raises(SystemExit) as stop:
        command.main()
    assert not stop.value.code
    return capsys.readouterr().out


def counts(by_risk):
    return {risk: len(values) for risk, values in by_risk.items()}


def test_the_command_prints_a_figure_for_each_design_and_risk(tmp_path, monkeypatch, capsys):
    content = json.loads(run(tmp_path, monkeypatch, capsys, "--json", "--used", "200"))
    assert content["images"] == PICTURES
    for design in designs():
        assert counts(content[design.name]) == {"0.3": 2, "0.2": 2}


def test_the_command_simulates_every_number_of_images_and_way(tmp_path, monkeypatch, capsys):
    content = json.loads(run(tmp_path, monkeypatch, capsys, "--json", "--simulate"))
    for name in (f"{images:,} images, {way.name}" for images in IMAGES for way in WAYS):
        assert counts(content[name]) == {"0.3": 2, "0.2": 2}
        assert all(0 <= share <= 1 for (share,) in content[name + ABOVE].values())


def test_the_command_prints_a_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "designs", lambda: designs()[3:4])
    shown = run(tmp_path, monkeypatch, capsys, "--used", "200")
    assert (
        "2 divisions of 200 images" in " ".join(shown.split()) and "residual, cross-fitted" in shown
    )
