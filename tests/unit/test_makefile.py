"""`make install` in a folder of any name: the Makefile with packages that need no network."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def make(tmp_path: Path):
    """Runs make in a folder of this name, which is a clone with nothing to install."""

    def make(name: str, *arguments: str) -> tuple[Path, subprocess.CompletedProcess[str]]:
        clone = tmp_path / name
        (clone / "perf").mkdir(parents=True)
        (clone / "perf/__main__.py").touch()
        shutil.copy(ROOT / "Makefile", clone)
        for kind in ("", "-dev", "-wheels"):
            (clone / f"requirements{kind}.txt").touch()
        environment = {**os.environ, "PIP_NO_INDEX": "1"}
        command = ["make", f"PYTHON={sys.executable}", *arguments]
        return clone, subprocess.run(
            command, cwd=clone, env=environment, capture_output=True, text=True
        )

    return make


def test_a_clone_of_any_name_is_installed_and_no_shell_reads_its_path(make):
    clone, done = make('it\'s a "clone"; $HOME `touch run` $(touch run)', "install")
    assert done.returncode == 0, done.stderr
    assert (clone / ".venv/.installed").is_file()
    shown = 'source .venv/bin/activate && cd / && python -c "import sys; print(sys.prefix)"'
    activated = subprocess.run(["bash", "-c", shown], cwd=clone, capture_output=True, text=True)
    assert activated.stdout == f"{clone}/.venv\n", activated.stderr
    assert not list(clone.parent.rglob("run"))


def test_a_colon_is_refused_in_one_line_that_says_why(make):
    clone, done = make("a:b", "install")
    assert done.returncode != 0 and not (clone / ".venv").exists()
    assert done.stderr.startswith("error: Python makes no virtual environment below a path with ")
    assert "Traceback" not in done.stderr
