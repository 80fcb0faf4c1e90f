"""What changed between two runs, beyond noise.

Absolute times of two runs do not compare on a shared machine: its speed may have changed between
them. So only ratios compare whose requests took turns, and of them only those that can be true.
Throughput and latency under perf_analyzer's loads come from passes of their own, one after the
other: they are in the report, and in no ratio.

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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from report.terminal import table

from .figures import TOO_BUSY, PerfError, Spread, doubts_of, load_of
from .systems import HIGH

NAME = "summary.json"
SCHEMA_VERSION = 1
LEAST_RUNS = 4
_ALWAYS_THERE = ("command", "suite", "started")
_SETTINGS = ("environment", "model", "certificate", "images", "suite", "fidelity")

CHANGED = "changed"
DIFFERS = "differs"  # a count or a share without runs
SAME = "not beyond noise"
EQUAL = "equal"
TOO_FEW = "too few runs to say"
ONLY_BEFORE, ONLY_AFTER = "only in the first", "only in the second"
DISTURBED = TOO_BUSY
Summary = Mapping[str, Any]


@dataclass(frozen=True)
class Figure:
    """A figure of one run.

    Attributes:
        spread: its runs; None where it cannot be true.
        exact: whether it is a share that was counted, so that any difference is one.
    """

    spread: Spread | None
    exact: bool = False


@dataclass(frozen=True)
class Change:
    """One figure in both runs.

    Attributes:
        name: of the figure.
        before: the first run's; None where it is not there, or cannot be compared.
        after: the second run's, likewise.
        verdict: one of the words above.
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
    """Read a summary.json, or the one in a folder.

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
    except ValueError as error:
        raise PerfError(f"{file}: not a readable JSON file: {error}") from None
    if not isinstance(content, dict):
        raise PerfError(f"{file}: not a JSON object")
    return content


def figures(summary: Summary) -> Iterator[tuple[str, Figure]]:
    """Every figure of a run that another run's may be compared with; any section may be missing."""

    def in_turn(values: Sequence[float], load: str | None) -> Figure:
        doubted = load is not None and doubts_of(summary, load)
        return Figure(None if doubted else Spread.of(values))

    for key, value in summary.items():
        if isinstance(value, Mapping) and "values" in value:
            yield key, in_turn(value["values"], load_of(key))
    for system, answer in (summary.get("answers") or {}).items():
        for key, words in (("agreement_with_high", "agreement"), ("escalation_rate", "escalated")):
            if answer.get(key) is not None:
                yield f"{words}, {system}", Figure(Spread.of([answer[key]]), exact=True)
        if answer.get("cost_ratio") is not None and system != HIGH:
            yield f"cost / static high's, {system}", in_turn(answer["cost_ratio"]["values"], "c1")
    for system, found in (summary.get("memory") or {}).items():
        for key, words in (("peak_pss_mib", "peak PSS, MiB"), ("gpu_mib", "GPU memory, MiB")):
            if found and found.get(key) is not None:
                yield f"{words}, {system}", Figure(Spread.of([found[key]]))


def warnings(before: Summary, after: Summary) -> list[str]:
    """One line for each way in which the runs were not made alike."""
    lines = [
        f"the {name} run was cut short"
        for name, summary in (("first", before), ("second", after))
        if not summary.get("complete")
    ]
    for key in _SETTINGS:
        lines += _differences(key, before.get(key), after.get(key))
    return lines


def _differences(name: str, first: Any, second: Any) -> list[str]:
    if first == second:
        return []
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        keys = dict.fromkeys((*first, *second))
        found = (_differences(f"{name} {key}", first.get(key), second.get(key)) for key in keys)
        return [line for lines in found for line in lines]
    return [f"{name} differs: {str(first)[:60]} against {str(second)[:60]}"]


def compare(before: Summary, after: Summary) -> list[Change]:
    """Judge every figure that either of two summaries has."""
    first, second = dict(figures(before)), dict(figures(after))
    names = dict.fromkeys((*first, *second))
    return [_judge(name, first.get(name), second.get(name)) for name in names]


def _judge(name: str, first: Figure | None, second: Figure | None) -> Change:
    before = None if first is None else first.spread
    after = None if second is None else second.spread
    if first is None or second is None:
        verdict = ONLY_AFTER if first is None else ONLY_BEFORE
    elif before is None or after is None:
        verdict = DISTURBED
    elif len(before.values) == len(after.values) and all(
        map(math.isclose, before.values, after.values)  # apart from the rounding of a division
    ):
        verdict = EQUAL
    elif first.exact:
        verdict = DIFFERS
    elif min(len(before.values), len(after.values)) < LEAST_RUNS:
        verdict = TOO_FEW
    else:
        verdict = CHANGED if before.max < after.min or after.max < before.min else SAME
    return Change(name, before, after, verdict)


def render(changes: Sequence[Change], notes: Iterable[str]) -> list[RenderableType]:
    """What to print of `compare` and `warnings`: what was judged, and what could not be."""
    lines: list[RenderableType] = [Text(f"note: {note}", style="yellow") for note in notes]
    count = Counter(change.verdict for change in changes)
    order = (CHANGED, DIFFERS, SAME, TOO_FEW)
    shown = [change for verdict in order for change in changes if change.verdict == verdict]
    if shown:
        rows = [
            (c.name, _shown(c.before), _shown(c.after), _difference(c), c.verdict) for c in shown
        ]
        bold = range(count[CHANGED] + count[DIFFERS])
        headings = ("figure", "first", "second", "difference", "verdict")
        lines.append(table("", headings, rows, bold, left=(0, 4)))
    different = count[CHANGED] + count[DIFFERS]
    few = f"; {count[TOO_FEW]} have too few runs to say" if count[TOO_FEW] else ""
    conclusion = f"nothing changed beyond noise{few}"
    if different:
        conclusion = f"{different} of {len(changes)} figures changed"
    elif not {SAME, TOO_FEW, ONLY_BEFORE, ONLY_AFTER} & set(count):
        conclusion = "nothing changed"
    lines.append(Text(conclusion, style="bold"))
    if judged := count[CHANGED] + count[SAME]:
        expected = sum(change.chance for change in changes)
        lines.append(
            Text(
                f"{judged} figures compared by the ranges of their runs; if nothing had changed, "
                f"chance alone would set apart up to {expected:.1f} of them on average"
            )
        )
    for verdict in count:
        if verdict not in (*order, EQUAL):
            names = [change.name for change in changes if change.verdict == verdict]
            lines.append(Text(f"{verdict} ({len(names)}): {'; '.join(names)}", style="dim"))
    return lines


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
