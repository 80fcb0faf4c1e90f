"""Which figures of a run compare with another run's, and whether the runs were made alike.

Absolute times of two runs do not, on a shared machine: its speed may have changed between them. So
a throughput or a latency is divided by static high's of the same run under the same load. What has
no static high beside it cannot be compared, and static high itself, the yardstick, is left out. So
are open loops, whose rates follow from what each run reached.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .measure.systems import HIGH
from .spread import Spread

NOT_STABLE = "did not stabilise"
NO_YARDSTICK = "no static high under this load"
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
            yield key, Figure(_spread(value))
    for system, answer in (summary.get("answers") or {}).items():
        for key, words in (("agreement_with_high", "agreement"), ("escalation_rate", "escalated")):
            if answer.get(key) is not None:
                yield f"{words}, {system}", Figure(Spread.of([answer[key]]), exact=True)
        if answer.get("cost_ratio") is not None and system != HIGH:
            yield f"cost / static high's, {system}", Figure(_spread(answer["cost_ratio"]))
    yield from _load_figures(summary.get("systems") or ())
    for system, found in (summary.get("memory") or {}).items():
        for key, words in (("peak_pss_mib", "peak PSS, MiB"), ("gpu_mib", "GPU memory, MiB")):
            if found and found.get(key) is not None:
                yield f"{words}, {system}", Figure(Spread.of([found[key]]))


def _load_figures(systems: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, Figure]]:
    """Throughput and p50 of each system under each closed loop, over static high's."""
    closed = [entry for entry in systems if entry["load"]["loop"] == "closed"]
    yardsticks = {
        _load_words(entry): entry
        for entry in closed
        if entry["system"] == HIGH and entry["set"] == "mixed"  # all images cost it the same
    }
    for entry in closed:
        if entry["system"] == HIGH:
            continue
        load = _load_words(entry)
        where = f"{entry['system']}, {entry['set']} images, {load}"
        for words, get in (("throughput", _throughput), ("p50", _p50)):
            yield f"{words} / static high's, {where}", _over(entry, yardsticks.get(load), get)


def _over(
    entry: Mapping[str, Any],
    yardstick: Mapping[str, Any] | None,
    get: Callable[[Mapping[str, Any]], Mapping[str, Any] | None],
) -> Figure:
    """One figure of a run divided by static high's, turn by turn."""
    mine, full = get(entry), None if yardstick is None else get(yardstick)
    if yardstick is None or mine is None or full is None:
        return Figure(None, NO_YARDSTICK)
    if not (entry["stable"] and yardstick["stable"]):
        return Figure(None, NOT_STABLE)
    if mine["runs"] != full["runs"]:  # cut short within a turn
        return Figure(Spread.of([value / full["median"] for value in mine["values"]]))
    pairs = zip(mine["values"], full["values"], strict=True)
    return Figure(Spread.of([value / other for value, other in pairs]))


def _throughput(entry: Mapping[str, Any]) -> Mapping[str, Any] | None:
    return entry.get("throughput_per_s")


def _p50(entry: Mapping[str, Any]) -> Mapping[str, Any] | None:
    return (entry.get("latency_ms") or {}).get("p50")


def _load_words(entry: Mapping[str, Any]) -> str:
    load = entry["load"]
    memory = "" if load["shared_memory"] == "none" else ", shared memory"
    return f"{load['concurrency']} in flight, {load['protocol']}{memory}"


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
