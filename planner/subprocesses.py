"""What the planner has the other folders do, each by its command line.

A planner runs them as a user would, and says which command it runs.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

Say = Callable[[str], None]


class PlanError(ValueError):
    """The planner cannot go on. One line that says what to do."""


def run(arguments: Sequence[object], say: Say) -> None:
    """Run `python -m ARGUMENTS`, its progress on this terminal.

    Raises:
        PlanError: it failed; what it said is on the terminal.
    """
    _run(arguments, say, stdout=subprocess.DEVNULL)


def run_json(arguments: Sequence[object], say: Say) -> dict[str, Any]:
    """Run `python -m ARGUMENTS`, its progress on this terminal, and read the JSON it prints.

    Raises:
        PlanError: it failed, or printed something else.
    """
    text = _run(arguments, say, stdout=subprocess.PIPE)
    try:
        return dict(json.loads(text))
    except ValueError:
        raise PlanError(f"`{_line(arguments)}` printed no JSON") from None


def _run(arguments: Sequence[object], say: Say, stdout: int) -> str:
    say(f"$ {_line(arguments)}")
    done = subprocess.run(
        [sys.executable, "-m", *map(str, arguments)], stdout=stdout, text=True, check=False
    )
    if done.returncode != 0:
        raise PlanError(f"`{_line(arguments)}` failed with exit code {done.returncode}")
    return done.stdout or ""


def _line(arguments: Sequence[object]) -> str:
    return " ".join(["python", "-m", *map(str, arguments)])
