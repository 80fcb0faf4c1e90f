"""The study of designs: each division makes a plan of its own, and a better use of images shows."""

import json
import sys

import pytest

from calibration.certify import Goal
from planner import __main__ as command
from planner.study import Design, designs, study, to_no_alignment, to_the_mean
from tests.unit.plan_workplace import MS, QUIET, FakeWorkshop, TwoColours, make_request

GOAL = Goal(0.2, 0.9, "ltt")
IMAGES = 240


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    request = make_request(
        tmp_path_factory.mktemp("study"), source=TwoColours(IMAGES), candidates="px=4; px=2"
    )
    return study(request, FakeWorkshop(), QUIET)


def test_every_graph_answers_every_image_and_has_its_price(prepared):
    assert set(prepared.pairs) == {
        (low, high) for low in ("px4", "px2") for high in ("full", "int8static")
    }
    assert all(len(outputs) == IMAGES for outputs in prepared.pairs.values())
    assert (prepared.full, prepared.ms["full"]) == ("full", MS["full"])


def test_a_speed_up_lies_between_none_and_that_of_the_cheap_graph_alone(prepared):
    for design in designs():
        speedup = prepared.speedup(design, GOAL, 0)
        assert 1 <= speedup <= prepared.ms["full"] / min(prepared.ms.values())
        assert speedup == prepared.speedup(design, GOAL, 0)
    assert prepared.speedup(designs()[0], Goal(0.001, 0.99, "ltt"), 0) == 1  # nothing can certify


def test_an_alignment_that_takes_a_shift_back_is_worth_more_than_none(prepared):
    shares = (0.1, 0.3, 0.6)  # what is left over would be a test split: it is in no part
    found = {
        align: prepared.speedup(Design("", shares, align), GOAL, 0)
        for align in (to_the_mean, to_no_alignment, None)
    }
    assert min(found[to_no_alignment], found[to_the_mean]) > found[None]


def test_the_command_prints_a_figure_for_each_design_and_risk(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "Workshop", FakeWorkshop)
    monkeypatch.setattr(command.given, "source", lambda *_: TwoColours(IMAGES))
    line = ["study", "--model", "tiny", "--images", "two", "--max-risk", "0.3", "--max-risk", "0.2"]
    line += ["--candidates", "px=4", "--highs", "fp32", "--divisions", "2", "--json"]
    line += ["--cache", str(tmp_path / "cache"), "--answers", str(tmp_path / "answers")]
    monkeypatch.setattr(sys, "argv", ["planner", *line])
    with pytest.raises(SystemExit) as stop:
        command.main()
    assert not stop.value.code
    content = json.loads(capsys.readouterr().out)
    assert content["images"] == IMAGES
    for design in designs():
        assert {risk: len(values) for risk, values in content[design.name].items()} == {
            "0.3": 2,
            "0.2": 2,
        }
