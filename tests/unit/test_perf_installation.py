"""Finding perf_analyzer, or installing it."""

import shutil
import sys

import pytest

import perf.__main__ as command_line
from perf import analyzer_install as installation
from perf.analyzer_install import Analyzer, PerfAnalyzerError, find_analyzer
from tests.unit.perf_stand_in import StandIn

TRUE, FALSE = shutil.which("true"), shutil.which("false")


class FakePip:
    """Installs a program that starts, as the wheel of one system or the other lays it out."""

    def __init__(self, program=TRUE, place="bin/perf_analyzer", launcher=False):
        self.program, self.place, self.launcher = program, place, launcher
        self.requirements = []

    def __call__(self, requirement, target):
        self.requirements.append(requirement)
        path = target / self.place
        path.parent.mkdir(parents=True)
        shutil.copy(self.program, path)
        if self.launcher:
            (target / "bin").mkdir()
            (target / "bin" / "perf_analyzer").write_text("#!/usr/bin/env python\n")


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Nothing installed; a wheel that carries the two libraries; glibc as the test says."""
    carried = tmp_path / "nvidia_pytriton.libs"
    carried.mkdir()
    for name in ("libb64-98cb.so.0d", "libcudart-0952.so.12.6.77"):
        (carried / name).write_text(name)
    monkeypatch.setattr(installation, "_carried_libraries", lambda: carried)
    monkeypatch.setenv("PATH", "")

    def prepare(pip, glibc):
        monkeypatch.setattr(installation, "_pip_install", pip)
        monkeypatch.setattr(installation, "glibc_version", lambda: glibc)
        return tmp_path / "venv" / "perf_analyzer"

    return prepare


def test_an_older_system_gets_the_old_program_and_its_libraries(machine):
    pip = FakePip()
    folder = machine(pip, (2, 36))
    analyzer = installation.install(folder)
    assert pip.requirements == [installation.OLD_REQUIREMENT]
    assert analyzer == Analyzer(folder / "bin" / "perf_analyzer", folder / "lib")
    linked = {path.name: path.read_text() for path in (folder / "lib").iterdir()}
    assert linked == {
        "libb64.so.0d": "libb64-98cb.so.0d",
        "libcudart.so.12": "libcudart-0952.so.12.6.77",
    }
    assert analyzer.environment()["LD_LIBRARY_PATH"].split(":")[0] == str(folder / "lib")


def test_a_newer_system_gets_the_new_program_not_its_launcher(machine):
    pip = FakePip(place="perf_analyzer/bin/perf_analyzer", launcher=True)
    folder = machine(pip, (2, 39))
    assert installation.install(folder) == Analyzer(folder / "perf_analyzer/bin/perf_analyzer")
    assert pip.requirements == [installation.NEW_REQUIREMENT]


def test_installing_again_does_nothing(machine):
    pip = FakePip()
    folder = machine(pip, (2, 36))
    assert installation.install(folder) == installation.install(folder) == find_analyzer(folder)
    assert len(pip.requirements) == 1


def test_what_was_installed_and_does_not_start_is_told_and_replaced(machine):
    folder = machine(FakePip(program=FALSE), (2, 36))
    with pytest.raises(PerfAnalyzerError, match="does not start"):
        installation.install(folder)
    folder = machine(FakePip(place="bin/other"), (2, 39))  # PyPI's empty placeholder
    with pytest.raises(PerfAnalyzerError, match="no perf_analyzer for this system"):
        installation.install(folder)
    folder = machine(FakePip(), (2, 36))
    installation.install(folder)


def test_a_missing_library_is_told_and_leaves_no_installation(machine):
    folder = machine(FakePip(), (2, 36))
    (installation._carried_libraries() / "libb64-98cb.so.0d").unlink()
    with pytest.raises(PerfAnalyzerError, match="libb64"):
        installation.install(folder)
    with pytest.raises(PerfAnalyzerError, match="run python -m perf install"):
        find_analyzer(folder)


def test_one_on_path_is_preferred(tmp_path, monkeypatch):
    program = StandIn(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_analyzer(tmp_path / "elsewhere") == program.analyzer
    assert installation.install(tmp_path / "elsewhere") == program.analyzer


def test_a_broken_one_on_path_is_passed_over_by_all(machine, tmp_path, monkeypatch):
    folder = machine(FakePip(), (2, 36))
    shutil.copy(FALSE, tmp_path / "perf_analyzer")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PerfAnalyzerError, match="perf_analyzer does not start .*; run python -m"):
        find_analyzer(folder)
    installed = installation.install(folder)
    assert installed.path.is_relative_to(folder)
    assert find_analyzer(folder) == installed


# --- its version -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("program", "wheels", "version"),
    [
        ("bin/perf_analyzer", ["tritonclient-2.50.0"], "2.50.0"),
        ("perf_analyzer/bin/perf_analyzer", ["perf_analyzer-2.60.0"], "2.60.0"),
        # Its own wheel is believed before a client beside it.
        ("bin/perf_analyzer", ["tritonclient-2.50.0", "perf_analyzer-2.60.0"], "2.60.0"),
        ("bin/perf_analyzer", ["numpy-1.26.4"], ""),
        ("bin/perf_analyzer", [], ""),
    ],
)
def test_its_version_is_that_of_the_wheel_it_came_with(tmp_path, program, wheels, version):
    for wheel in wheels:
        (tmp_path / f"{wheel}.dist-info").mkdir()
    assert Analyzer(tmp_path / program).version() == version


# --- command line ------------------------------------------------------------------------------


def test_without_a_verb_the_help_is_shown(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["perf"])
    with pytest.raises(SystemExit) as left:
        command_line.main()
    printed = capsys.readouterr()
    assert (left.value.code, printed.err) == (2, "")
    assert "Usage:" in printed.out and "install" in printed.out
