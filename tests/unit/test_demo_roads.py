"""`make demo`: which commands it runs, which it need not run again, and what it then serves."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from bundle import config
from demo import __main__ as demo
from demo import roads, run, steps
from tests.unit.perf_workplace import write_repository, write_rungs


class Commands:
    """Stands in for `subprocess`: notes each command and makes what it was asked for."""

    def __init__(self, chosen=True, failing=None):
        self.lines = []
        self.chosen = chosen
        self.failing = failing

    def run(self, line):
        assert line[:2] == [sys.executable, "-m"]
        self.lines.append(line[2:])
        if line[3] == self.failing:
            return CompletedProcess(line, 1)
        out = Path(line[line.index("--out") + 1])
        if line[3] == "plan":
            out.mkdir(parents=True)
            chosen = {"low": "vit_low"} if self.chosen else None
            (out / "plan.json").write_text(json.dumps({"chosen": chosen}))
            Path(line[line.index("--cache") + 1]).mkdir(parents=True, exist_ok=True)
            return CompletedProcess(line, 0 if self.chosen else 1)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text("made")
        return CompletedProcess(line, 0)

    @property
    def verbs(self):
        return [" ".join(line[:2]) for line in self.lines]

    def option(self, verb, name):
        """The value of an option, each time that the command ran."""
        return [line[line.index(name) + 1] for line in self.lines if " ".join(line[:2]) == verb]


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """The demo at work in an empty folder, in which no server can start."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(steps, "ROOT", tmp_path)  # whose code tests change
    return tmp_path


def prepare(monkeypatch, *arguments, code=0, **how):
    commands = Commands(**how)
    monkeypatch.setattr(steps, "subprocess", commands)
    monkeypatch.setattr(sys, "argv", ["demo", "--prepare", *arguments])
    with pytest.raises(SystemExit) as ended:
        demo.main()
    assert ended.value.code == code
    return commands


def test_prepare_makes_the_repository_and_serves_nothing(elsewhere, monkeypatch, capsys):
    assert prepare(monkeypatch).verbs == [
        *("calibration sample", "export rungs", "calibration collect"),
        *("calibration fit", "calibration report", "export repository"),
    ]
    printed = capsys.readouterr().out
    for place in ("onnx", "calibration.json", "report.html", "model_repository"):
        assert f"build/demo/{place}" in printed
    assert not (elsewhere / "build/demo/summary.json").exists()
    assert prepare(monkeypatch).verbs == []  # nothing was done again


def test_a_step_that_fails_ends_the_preparation(elsewhere, monkeypatch, capsys):
    commands = prepare(monkeypatch, code=2, failing="fit")
    assert commands.verbs[-1] == "calibration fit"
    printed = capsys.readouterr()
    assert printed.out == ""
    assert re.search(r"^error: `python -m calibration fit .*` failed with exit", printed.err, re.M)


@pytest.mark.parametrize(
    ("options", "model", "low", "high", "beside"),
    [
        ([], "dinov2-small", "px=112", "px=224", ["px=140", "px=168", "px=196", "tome=8"]),
        (["--model", "static-vit"], "static-vit", "px=32", "px=64", ["px=48", "tome=8"]),
    ],
)
def test_the_demo_exports_two_resolutions_and_what_a_user_could_serve_instead(
    elsewhere, monkeypatch, options, model, low, high, beside
):
    (export,) = (line for line in prepare(monkeypatch, *options).lines if line[1] == "rungs")
    said = dict(zip(export[2::2], export[3::2], strict=True))
    assert (said["--model"], said["--low"], said["--high"]) == (model, low, high)
    assert [export[i + 1] for i, word in enumerate(export) if word == "--beside"] == beside


def test_a_plan_takes_the_place_of_export_collect_and_fit(elsewhere, monkeypatch, capsys):
    commands = prepare(monkeypatch, "--plan")
    assert commands.verbs == [
        *("calibration sample", "planner plan", "calibration report", "export repository")
    ]
    assert commands.option("planner plan", "--max-risk") == ["0.05"]
    assert commands.option("export repository", "--instances") == commands.option(
        "planner plan", "--instances"
    )  # priced as served
    assert "build/demo/plan/model_repository" in capsys.readouterr().out
    assert prepare(monkeypatch, "--plan").verbs == []  # nothing was done again


def test_the_commands_shown_can_be_typed(elsewhere, monkeypatch, capsys):
    commands = prepare(monkeypatch, "--plan")
    shown = capsys.readouterr().err.replace("\n", " ")
    (candidates,) = commands.option("planner plan", "--candidates")
    assert f"--candidates '{candidates}'" in re.sub(" +", " ", shown)


def test_another_risk_plans_anew_on_the_same_graphs(elsewhere, monkeypatch):
    first = prepare(monkeypatch, "--plan")
    second = prepare(monkeypatch, "--plan", "--risk", "0.02")
    assert second.verbs == ["planner plan", "calibration report", "export repository"]
    assert second.option("planner plan", "--max-risk") == ["0.02"]
    caches = [commands.option("planner plan", "--cache") for commands in (first, second)]
    assert caches[0] == caches[1] and Path(caches[0][0]).is_dir()


def test_other_code_starts_another_cache_and_drops_the_old_one(elsewhere, monkeypatch):
    (old,) = prepare(monkeypatch, "--plan").option("planner plan", "--cache")
    Path("routing").mkdir()
    Path("routing/signals.py").write_text("changed")
    (new,) = prepare(monkeypatch, "--plan").option("planner plan", "--cache")
    assert new != old and Path(new).is_dir() and not Path(old).exists()


def test_how_candidates_are_priced_is_part_of_a_plan_but_not_of_its_cache(elsewhere, monkeypatch):
    (old,) = prepare(monkeypatch, "--plan").option("planner plan", "--cache")
    Path("perf").mkdir()
    Path("perf/serving.py").write_text("changed")
    again = prepare(monkeypatch, "--plan")
    assert again.verbs[0] == "planner plan"
    assert again.option("planner plan", "--cache") == [old]


@pytest.mark.parametrize("more", [(), ("--plan",)])
def test_pages_are_drawn_again_when_what_draws_them_has_changed(elsewhere, monkeypatch, more):
    prepare(monkeypatch, *more)
    assert prepare(monkeypatch, *more).verbs == []
    Path("report").mkdir()
    Path("report/figures.py").write_text("changed")
    again = prepare(monkeypatch, *more).verbs
    assert "calibration report" in again and ("planner plan" in again) == bool(more)


def test_both_roads_share_the_head_crops_and_spoil_nothing_of_each_other(elsewhere, monkeypatch):
    prepare(monkeypatch)
    assert "calibration sample" not in prepare(monkeypatch, "--plan").verbs
    assert prepare(monkeypatch).verbs == []


def test_a_plan_that_chooses_nothing_ends_in_one_line(elsewhere, monkeypatch, capsys):
    prepare(monkeypatch, "--plan", code=2, chosen=False)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    (line,) = errors
    assert "no certified cascade is cheaper" in line and "build/demo/plan/plan.html" in line


def test_a_plan_that_fails_names_its_command_whatever_an_earlier_one_found(
    elsewhere, monkeypatch, capsys
):
    prepare(monkeypatch, "--plan", code=2, chosen=False)
    capsys.readouterr()
    prepare(monkeypatch, "--plan", code=2, failing="plan")
    assert re.search(r"^error: `python -m planner plan .*` failed", capsys.readouterr().err, re.M)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--risk", "0.02"], "add --plan"),
        (["--plan", "--risk", "2"], "between 0 and 1"),
        (["--model", "resnet"], "static-vit"),
    ],
)
def test_an_option_that_means_nothing_is_refused(elsewhere, monkeypatch, arguments, said, capsys):
    assert prepare(monkeypatch, *arguments, code=2).lines == []
    assert said in capsys.readouterr().err


def test_another_model_is_planned_for_with_graphs_of_its_own(elsewhere, monkeypatch):
    commands = prepare(monkeypatch, "--plan", "--model", "static-vit")
    assert commands.option("planner plan", "--model") == ["static-vit"]
    assert commands.option("planner plan", "--px") == ["64"]
    (candidates,) = commands.option("planner plan", "--candidates")
    assert "px=32,int8=static,align" in candidates and "px=112" not in candidates
    assert "planner plan" in prepare(monkeypatch, "--plan").verbs


def test_the_test_crops_are_no_draw_of_the_others(elsewhere, monkeypatch):
    draws = [line for line in prepare(monkeypatch).lines if "--seed" in line]
    seeds = [line[line.index("--seed") + 1] for line in draws]
    assert len(set(seeds)) == 2 and str(roads.TEST_SEED) not in seeds


@pytest.mark.parametrize(
    "road", [roads.resolutions("static-vit"), roads.planned("static-vit", 0.1)]
)
def test_nothing_runs_beside_what_is_measured(tmp_path, road):
    road = replace(road, folder=tmp_path)
    rungs = write_rungs(tmp_path / "onnx", alternatives=(5,))
    repository = write_repository(tmp_path / "model_repository", rungs)
    for _ in range(2):  # an earlier demo's is no obstacle
        served = run._served(road, rungs)
        router = config.read(served / "router/config.pbtxt")
        assert config.parameter(router, "reference_check") == "off"
        assert (served / "px5").exists() == (road.plan is not None)
    assert (
        config.parameter(config.read(repository / "router/config.pbtxt"), "reference_check")
        != "off"
    )
