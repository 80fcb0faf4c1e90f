"""Commands a user would type, run in order; a command already run is not run again."""

from __future__ import annotations

import hashlib
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

ROOT = Path(__file__).resolve().parents[1]  # of the code; what is made lies where it is started
OUT = Path("build/demo")
# What every step depends on besides its command.
CODE = ("bundle", "calibration", "export", "imaging", "model_repository", "routing")

console = Console(stderr=True)


class DemoError(RuntimeError):
    """A step failed, or something the demo shows did not hold. One line."""


class Step(NamedTuple):
    """One command of the demo.

    Attributes:
        title: of its rule on the terminal.
        makes: the file or folder below `OUT`.
        command: what follows `python -m`, as it is typed.
        code: folders that its result depends on besides `CODE`.
    """

    title: str
    makes: Path
    command: str
    code: tuple[str, ...] = ()


class StepError(DemoError):
    """A command of the demo failed; what it printed is on the terminal."""

    def __init__(self, step: Step, code: int) -> None:
        super().__init__(f"`python -m {step.command}` failed with exit code {code}")
        self.step = step


def prepare(steps: Sequence[Step], out: Path = OUT) -> None:
    """Run the steps, which make what lies below `out`; one already done is not done again.

    Each finished step leaves a stamp: a hash over its command, the steps before it and the code.
    From the first step whose stamp is missing or differs, everything is made anew.

    Raises:
        StepError: a command failed.
    """
    stamps = out / "stamps"
    stamps.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(code_hash().encode())
    fresh = True
    for number, step in enumerate(steps, 1):
        digest.update(step.command.encode())
        if step.code:
            digest.update(code_hash(step.code).encode())
        stamp = stamps / "-".join(step.makes.relative_to(out).parts)
        fresh = fresh and stamp.is_file() and stamp.read_text() == digest.hexdigest()
        begin(number, steps, step.title)
        console.print(f"$ python -m {step.command}", style="dim", markup=False, highlight=False)
        if fresh and step.makes.exists():
            console.print("done before, nothing has changed")
            continue
        fresh = False
        stamp.unlink(missing_ok=True)
        if step.makes.is_dir():
            shutil.rmtree(step.makes)
        started = time.monotonic()
        done = subprocess.run([sys.executable, "-m", *shlex.split(step.command)])
        if done.returncode != 0:
            raise StepError(step, done.returncode)
        stamp.write_text(digest.hexdigest())
        console.print(f"took {time.monotonic() - started:.0f} s", style="dim")


def begin(number: int, steps: Sequence[Step], title: str) -> None:
    """Rule off what follows; serving and measuring come after the steps."""
    console.rule(f"[bold]{number}/{len(steps) + 1} {title}", align="left")


def code_hash(folders: Iterable[str] = CODE) -> str:
    """A hash over the files of these folders and the libraries they need."""
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    files = [path.relative_to(ROOT) for path in (*files, *ROOT.glob("requirements*.txt"))]
    files = [path for path in files if "__pycache__" not in path.parts]
    content = b"".join(str(path).encode() + (ROOT / path).read_bytes() for path in sorted(files))
    return hashlib.sha256(content).hexdigest()
