"""Which figures of a run compare with another run's, and whether the runs were made alike.

Absolute times of two runs do not, on a shared machine: its speed may have changed between them. So
only ratios compare whose requests took turns, and of them only those that can be true. Throughput
and latency under perf_analyzer's loads come from passes of their own, one after the other: they
are in the report, and in no ratio.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .figures import Spread, doubts_of, load_of
from .systems import HIGH

DISTURBED = "the machine was too busy for a figure"
_SETTINGS = ("environment", "model", "certificate", "images", "suite", "fidelity")

Summary = Mapping[str, Any]


@dataclass(frozen=True)
class Figure:
    """A figure of one run.

    Attributes:
        spread: its runs; None where it cannot be compared.
        problem: why not; empty where it can.
        exact: whether it is a share that was counted, so that any difference is one.
    """

    spread: Spread | None
    problem: str = ""
    exact: bool = False


def figures(summary: Summary) -> Iterator[tuple[str, Figure]]:
    """Every figure of a run, by name.

    Args:
        summary: content of summary.json; any section may be missing or None.
    """
    for key, value in summary.items():
        if isinstance(value, Mapping) and "values" in value:
            yield key, _in_turn(summary, value, load_of(key))
    for system, answer in (summary.get("answers") or {}).items():
        for key, words in (("agreement_with_high", "agreement"), ("escalation_rate", "escalated")):
            if answer.get(key) is not None:
                yield f"{words}, {system}", Figure(Spread.of([answer[key]]), exact=True)
        if answer.get("cost_ratio") is not None and system != HIGH:
            name = f"cost / static high's, {system}"
            yield name, _in_turn(summary, answer["cost_ratio"], "c1")
    for system, found in (summary.get("memory") or {}).items():
        for key, words in (("peak_pss_mib", "peak PSS, MiB"), ("gpu_mib", "GPU memory, MiB")):
            if found and found.get(key) is not None:
                yield f"{words}, {system}", Figure(Spread.of([found[key]]))


def _in_turn(summary: Summary, content: Mapping[str, Any], load: str | None) -> Figure:
    if load is not None and doubts_of(summary, load):
        return Figure(None, DISTURBED)
    return Figure(_spread(content))


def _spread(content: Mapping[str, Any]) -> Spread:
    return Spread.of(content["values"])


def warnings(before: Summary, after: Summary) -> list[str]:
    """One line for each way in which the runs were not made alike."""
    lines = []
    for name, summary in (("first", before), ("second", after)):
        if not summary.get("complete"):
            lines.append(f"the {name} run was cut short")
    for key in _SETTINGS:
        lines += _differences(key, before.get(key), after.get(key))
    return lines


def _differences(name: str, first: Any, second: Any) -> list[str]:
    if first == second:
        return []
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        keys = dict.fromkeys((*first, *second))
        return [
            line
            for key in keys
            for line in _differences(f"{name} {key}", first.get(key), second.get(key))
        ]
    return [f"{name} differs: {_short(first)} against {_short(second)}"]


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
