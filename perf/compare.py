"""What changed between two runs, beyond noise.

Absolute times of different runs do not compare on a shared machine, so ratios are compared whose
requests took turns; see `comparable`.

A figure that was measured several times has changed if the ranges of its runs do not overlap and
both have four runs or more. Where nothing has changed, ranges of four against four lie apart by
chance in at most 2 / C(8, 4) = 2.9 % of the figures, so the number of figures looked at belongs to
the answer. That is so for runs that could as well have been the other session's: what differs from
one start of the server to the next and stays so until it ends is called a change.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from .comparable import Figure, figures
from .figures import PerfError, Spread

NAME = "summary.json"
SCHEMA_VERSION = 1
LEAST_RUNS = 4
_ALWAYS_THERE = ("command", "suite", "started")

CHANGED = "changed"
DIFFERS = "differs"  # a count or a share without runs
SAME = "not beyond noise"
EQUAL = "equal"
TOO_FEW = "too few runs to say"
ONLY_BEFORE, ONLY_AFTER = "only in the first", "only in the second"
Summary = Mapping[str, Any]


@dataclass(frozen=True)
class Change:
    """One figure in both runs.

    Attributes:
        name: of the figure.
        before: the first run's; None where it is not there, or cannot be compared.
        after: the second run's, likewise.
        verdict: one of the words above, or why it cannot be compared.
    """

    name: str
    before: Spread | None
    after: Spread | None
    verdict: str

    @property
    def chance(self) -> float:
        """How likely this figure is to be called changed where nothing has, at most, 0..1."""
        if self.verdict not in (CHANGED, SAME) or self.before is None or self.after is None:
            return 0.0
        first, second = len(self.before.values), len(self.after.values)
        return 2 / math.comb(first + second, first)


def load_summary(path: Path) -> dict[str, Any]:
    """Read a summary.json.

    Args:
        path: the file, or a folder that holds one under that name.

    Raises:
        PerfError: it is missing, is no summary of ours, or has another schema version.
    """
    file = path / NAME if path.is_dir() else path
    content = read_json(file)
    if any(key not in content for key in _ALWAYS_THERE):
        raise PerfError(f"{file}: not a summary that `python -m perf run` wrote")
    version = content.get("schema_version")
    if version != SCHEMA_VERSION:
        raise PerfError(
            f"{file}: has schema version {version}, this code reads {SCHEMA_VERSION}; "
            "measure again with `python -m perf run`"
        )
    return content


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        PerfError: the file is missing or holds something else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PerfError(f"{file}: no such file; `python -m perf run` writes one") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        reason = " ".join(str(error).split())
        raise PerfError(f"{file}: not a readable JSON file: {reason}") from None
    if not isinstance(content, dict):
        raise PerfError(f"{file}: not a JSON object")
    return content


def compare(before: Summary, after: Summary) -> list[Change]:
    """Judge every figure that either run has.

    Args:
        before: content of the first run's summary.json.
        after: of the second's.
    """
    first, second = dict(figures(before)), dict(figures(after))
    names = dict.fromkeys((*first, *second))
    return [_judge(name, first.get(name), second.get(name)) for name in names]


def _judge(name: str, first: Figure | None, second: Figure | None) -> Change:
    before = None if first is None else first.spread
    after = None if second is None else second.spread
    if second is None:
        return Change(name, before, None, ONLY_BEFORE)
    if first is None:
        return Change(name, None, after, ONLY_AFTER)
    problem = first.problem or second.problem
    if before is None or after is None:
        return Change(name, before, after, problem)
    if _equal(before.values, after.values):
        return Change(name, before, after, EQUAL)
    if first.exact:
        return Change(name, before, after, DIFFERS)
    if min(len(before.values), len(after.values)) < LEAST_RUNS:
        return Change(name, before, after, TOO_FEW)
    apart = before.max < after.min or after.max < before.min
    return Change(name, before, after, CHANGED if apart else SAME)


def _equal(first: Sequence[float], second: Sequence[float]) -> bool:
    """Whether two runs' values are the same, apart from the rounding of a division."""
    return len(first) == len(second) and all(map(math.isclose, first, second))


def render(changes: Sequence[Change], notes: Iterable[str]) -> list[RenderableType]:
    """What to print: a table of what was judged, and what could not be.

    Args:
        changes: of `compare`.
        notes: of `comparable.warnings`.
    """
    lines: list[RenderableType] = [Text(f"note: {note}", style="yellow") for note in notes]
    order = (CHANGED, DIFFERS, SAME, TOO_FEW)
    shown = [change for verdict in order for change in changes if change.verdict == verdict]
    if shown:
        lines.append(_table(shown))
    lines.append(Text(_conclusion(changes), style="bold"))
    judged = [change for change in changes if change.verdict in (CHANGED, SAME)]
    if judged:
        expected = sum(change.chance for change in judged)
        lines.append(
            Text(
                f"{len(judged)} figures compared by the ranges of their runs; if nothing had "
                f"changed, chance alone would set apart up to {expected:.1f} of them on average"
            )
        )
    rest = [verdict for verdict in _verdicts(changes) if verdict not in (*order, EQUAL)]
    for verdict in rest:
        names = [change.name for change in changes if change.verdict == verdict]
        lines.append(Text(f"{verdict} ({len(names)}): {'; '.join(names)}", style="dim"))
    return lines


def _conclusion(changes: Sequence[Change]) -> str:
    count = _verdicts(changes)
    different = count.get(CHANGED, 0) + count.get(DIFFERS, 0)
    if different:
        return f"{different} of {len(changes)} figures changed"
    if not {SAME, TOO_FEW, ONLY_BEFORE, ONLY_AFTER} & set(count):
        return "nothing changed"
    few = f"; {count[TOO_FEW]} have too few runs to say" if TOO_FEW in count else ""
    return f"nothing changed beyond noise{few}"


def _verdicts(changes: Sequence[Change]) -> dict[str, int]:
    """How many figures got each verdict, in the order of their first."""
    return dict(Counter(change.verdict for change in changes))


def _table(changes: Sequence[Change]) -> Table:
    table = Table()
    table.add_column("figure")
    for column in ("first", "second", "difference"):
        table.add_column(column, justify="right")
    table.add_column("verdict")
    for change in changes:
        table.add_row(
            Text(change.name),
            _shown(change.before),
            _shown(change.after),
            _difference(change),
            change.verdict,
            style="bold" if change.verdict in (CHANGED, DIFFERS) else None,
        )
    return table


def _shown(spread: Spread | None) -> str:
    if spread is None:
        return ""
    if len(spread.values) == 1:
        return f"{spread.median:.4g}"
    return f"{spread.median:.4g} ({spread.min:.4g} to {spread.max:.4g})"


def _difference(change: Change) -> str:
    if change.before is None or change.after is None:
        return ""
    before, after = change.before.median, change.after.median
    if change.verdict == DIFFERS:
        return f"{100 * (after - before):+.1f} points"
    return "" if before == 0 else f"{after / before - 1:+.1%}"
