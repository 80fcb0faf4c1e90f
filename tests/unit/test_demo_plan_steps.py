"""`make demo PLAN=1`: which commands it runs, and which it need not run again."""

import json
import re
import sys
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from demo import __main__ as demo
from demo import roads, steps


class Commands:
    """Stands in for `subprocess`: notes each command and makes what it was asked for."""

    def __init__(self, chosen=True):
        self.lines = []
        self.chosen = chosen

    def run(self, line):
        assert line[:2] == [sys.executable, "-m"]
        self.lines.append(line[2:])
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
    monkeypatch.setattr(demo, "ROOT", tmp_path)
    return tmp_path


def prepare(monkeypatch, *arguments, chosen=True):
    commands = Commands(chosen)
    monkeypatch.setattr(steps, "subprocess", commands)
    demo.main(["--prepare", *arguments])
    return commands


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
    with pytest.raises(SystemExit) as ended:
        prepare(monkeypatch, "--plan", chosen=False)
    assert ended.value.code == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    (line,) = errors
    assert "no certified cascade is cheaper" in line and "build/demo/plan/plan.html" in line


def test_a_plan_that_fails_names_its_command_whatever_an_earlier_one_found(
    elsewhere, monkeypatch, capsys
):
    with pytest.raises(SystemExit):
        prepare(monkeypatch, "--plan", chosen=False)
    capsys.readouterr()

    class Failing(Commands):
        def run(self, line):
            return CompletedProcess(line, 1) if line[3] == "plan" else super().run(line)

    monkeypatch.setattr(steps, "subprocess", Failing())
    with pytest.raises(SystemExit):
        demo.main(["--plan", "--prepare"])
    assert re.search(r"^error: `python -m planner plan .*` failed", capsys.readouterr().err, re.M)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--risk", "0.02"], "add --plan"), (["--plan", "--risk", "2"], "between 0 and 1")],
)
def test_a_risk_that_means_nothing_is_refused(arguments, said, capsys):
    with pytest.raises(SystemExit) as ended:
        demo.main(arguments)
    assert ended.value.code == 2 and said in capsys.readouterr().err


def test_another_model_is_planned_for_with_graphs_of_its_own(elsewhere, monkeypatch):
    commands = prepare(monkeypatch, "--plan", "--model", "static-vit")
    assert commands.option("planner plan", "--model") == ["static-vit"]
    assert commands.option("planner plan", "--px") == ["64"]
    (candidates,) = commands.option("planner plan", "--candidates")
    assert "px=32,int8=static,align" in candidates and "px=112" not in candidates
    assert "planner plan" in prepare(monkeypatch, "--plan").verbs


def test_the_test_crops_are_no_draw_of_the_others():
    seeds = (roads.HEAD_SEED, roads.CALIBRATION_SEED, roads.TEST_SEED)
    assert len(set(seeds)) == 3
