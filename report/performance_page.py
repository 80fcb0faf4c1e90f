"""The performance report: one summary.json in one self-contained file.

It is handed the summary after `perf.figures.conclude`, which leaves only ratios that can be true;
where one was not believed, the page says so.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from math import nan
from pathlib import Path
from typing import Any

from .figures import GREY, INK, OTHERS, Axis, Rule, Series, bars, chart
from .frontier import Look, frontier
from .page import HIGH_COLOUR, LOW_COLOUR, render
from .words import amount, count_of

Summary = Mapping[str, Any]
Entry = Mapping[str, Any]

_PARTS = {
    "client and network": "#c9c5bb",
    "preprocess": "#d99a2b",
    "cheap rung": LOW_COLOUR,
    "scoring": "#7a7fd0",
    "router, BLS hops, ensemble": "#4c78a8",
    "full rung": HIGH_COLOUR,
    "queues": "#777777",
}
_FAMILIES = ("px", "tome", "depth", "apt", "halt")  # ways to be cheaper, each with its line
_VARYING = {"apt", "halt"}  # of these, those in which one image costs more than another
_GROUPS = {"kept": "kept low", "escalated": "escalated", "all": "all"}
_LOOKS = {  # of alternatives by the one part of a recipe in which they differ, then of systems
    "px": Look("static, fewer pixels", "#777777", "8"),
    "tome": Look("static, merged tokens", OTHERS[0], "H"),
    "depth": Look("static, fewer blocks", OTHERS[6], "8"),
    "apt": Look("static, flat areas in larger patches", OTHERS[3], "8"),
    "halt": Look("static, tokens halt", OTHERS[4], "H"),
    "other": Look("static, other", OTHERS[7], "p"),
    "static-low": Look("cheap rung", LOW_COLOUR, "s", above=True),
    "static-high": Look("full rung", HIGH_COLOUR, "s", above=True),
    "static-escalation": Look("full rung", "#c98b7a", "s", above=True),
    "ensemble": Look("adaptive from image bytes", OTHERS[5], "D", above=True),
    "others": Look("", INK, "o", above=True),
    "adaptive": Look("adaptive, as calibrated", HIGH_COLOUR, "o", 16, above=True),
}


def write_performance(path: Path, summary: Summary) -> None:
    """Write the page of what `perf.figures.conclude` gives; any section may be missing or None."""
    attribution = summary.get("attribution") or {}
    answers = summary.get("answers") or {}
    order = sorted(answers, key=system_order)
    render(
        path,
        "performance.html.j2",
        summary={key: value for key, value in summary.items() if value is not None},
        answers={name: answers[name] for name in order},
        numbers={name: str(number) for number, name in enumerate(order, 1)},
        frontier=_frontier(answers, order),
        varies=any(_ways(answers[name].get("recipe")) & _VARYING for name in order),
        groups={name: attribution[name] for name in _GROUPS if attribution.get(name)},
        group_names=_GROUPS,
        time_bars=_time_bars(attribution),
        closed_loop=_curves(summary, "closed", "p50", "throughput, images per second"),
        open_loop=_curves(summary, "open", "p95", "arrivals, images per second (Poisson)"),
        loads_by={loop: _by_system(summary, loop) for loop in ("closed", "open")},
        load_words=load_words,
    )


def system_order(system: str) -> tuple[int, str]:
    """Sorts statics from the cheap rung over the alternatives to the full one, then adaptive."""
    first = {"static-low": 0, "static-high": 2, "adaptive-0": 3, "adaptive": 4, "ensemble": 6}
    other = 1 if system.startswith("static-") else 5
    by_number = re.sub(r"\d+", lambda digits: digits[0].zfill(6), system)
    return first.get(system, other), by_number


def load_words(entry: Entry) -> str:
    """Images and load in a few words: `mixed images, 4 in flight, gRPC, shared memory`."""
    load = entry["load"]
    level = (
        f"{load['concurrency']} in flight"
        if load["loop"] == "closed"
        else f"{amount(load['rate_per_s'])} per second"
    )
    protocol = {"grpc": "gRPC", "http": "HTTP"}.get(load["protocol"], load["protocol"])
    memory = "" if load["shared_memory"] == "none" else ", shared memory"
    return f"{entry['set']} images, {level}, {protocol}{memory}"


def _frontier(answers: Summary, order: Sequence[str]) -> str | None:
    """How often each system agrees, and what that costs; None where no such pair is believed."""
    shown = {
        name: _point(str(number), name, answers)
        for number, name in enumerate(order, 1)
        if answers[name].get("agreement_with_high") is not None
        and "median" in (answers[name].get("cost_ratio") or {})
    }
    if not shown:
        return None
    lines = []
    for key in _FAMILIES:
        if any(point["kind"] == key for point in shown.values()):
            joined = [point for point in shown.values() if point["family"] in (key, "full")]
            joined.sort(key=lambda point: point["cost"])
            lines.append(("", _LOOKS[key].colour, joined))
    adaptive = [name for name in shown if name.startswith("adaptive")]
    adaptive.sort(key=lambda name: answers[name].get("escalation_rate") or 0.0)
    by_share = [shown[name] for name in adaptive]
    lines.append(("adaptive, by share escalated", INK, by_share))
    looks = _LOOKS
    if "static-escalation" in shown:  # then the full model is no rung of the planned cascade
        looks = {**_LOOKS, "static-high": _LOOKS["static-high"]._replace(name="full model")}
    most = max(point["spread"][1] for point in shown.values())
    return frontier(
        list(shown.values()),
        looks,
        lines,
        Axis("cost: time of a request / the full rung's", limits=(0, 1.1 * most)),
        "agreement with the full rung",
        Rule(1.0, colour=GREY, line=":"),
        by_share,
        "beaten by adaptive",
        size=(6.6, 4.4),
    )


def _point(mark: str, name: str, answers: Summary) -> Entry:
    """Where a system stands, as `frontier` draws it."""
    answer, family = answers[name], None
    if name.startswith("static-"):
        family = _family(answer, answers.get("static-high"))
    cost = answer["cost_ratio"]
    return {
        "mark": mark,
        "kind": name if name in _LOOKS else family or "others",
        "family": family,
        "cost": cost["median"],
        "spread": (cost["min"], cost["max"]),
        "acceptable": answer["agreement_with_high"],
    }


def _family(answer: Entry, full: Entry | None) -> str:
    """The one way in which a graph is cheaper, `other`, or `full`: where each line ends."""
    recipe = answer.get("recipe")
    if not recipe:
        return "other"
    whole = set(((full or {}).get("recipe") or "").split(",")) | {"fp32", "full"}
    ways = list(_ways(recipe, whole))
    if not ways:
        return "full"
    return ways[0] if len(ways) == 1 and ways[0] in _FAMILIES else "other"


def _ways(recipe: str | None, whole: Collection[str] = ()) -> set[str]:
    """The names of a recipe's parts, but for those of the whole model."""
    return {part.partition("=")[0] for part in (recipe or "").split(",") if part not in whole}


def _time_bars(attribution: Summary) -> str | None:
    """The parts of a request's time, stacked; None where nothing was attributed."""
    groups = {name: attribution[name] for name in _GROUPS if attribution.get(name)}
    if not groups:
        return None
    rows = {
        f"{_GROUPS[name]}\n{count_of(group['requests'], 'request')}": {
            part["name"]: part["ms"] for part in group["parts"]
        }
        for name, group in groups.items()
    }
    totals = [group["total_ms"] for group in groups.values()]
    return bars(rows, totals, _PARTS, "mean time of a request, ms")


def _curves(summary: Summary, loop: str, latency: str, label: str) -> str | None:
    """Latency against throughput or arrivals, one curve a system; None where not measured.

    Only what compares is drawn: mixed images over gRPC without shared memory.
    """
    usual = [
        entry
        for entry in summary.get("systems") or ()
        if entry["set"] == "mixed"
        and entry["load"]["loop"] == loop
        and entry["load"]["protocol"] == "grpc"
        and entry["load"]["shared_memory"] == "none"
        and entry.get("throughput_per_s")
        and (entry.get("latency_ms") or {}).get(latency)
    ]
    if not usual:
        return None
    level, x = _LEVELS[loop]
    drawn = []
    for number, name in enumerate(sorted({e["system"] for e in usual}, key=system_order)):
        own = sorted((e for e in usual if e["system"] == name), key=lambda e: e["load"][level])
        fixed = {"static-low": LOW_COLOUR, "static-high": HIGH_COLOUR, "adaptive": INK}
        drawn.append(
            Series(
                own[0]["title"],
                [x(entry) for entry in own],
                [entry["latency_ms"][latency]["median"] for entry in own],
                fixed.get(name, OTHERS[number % len(OTHERS)]),
                "o",
                "-",
                size=12 if loop == "closed" else 6,
                hollow=[not entry["stable"] for entry in own],
                numbers=[str(e["load"]["concurrency"]) for e in own] if loop == "closed" else (),
            )
        )
    if any(not entry["stable"] for entry in usual):
        drawn.append(Series("hollow: did not stabilise", [nan], [nan], GREY, "o", hollow=[True]))
    return chart(
        drawn,
        Axis(label, limits=(0, None)),
        Axis(f"latency {latency}, ms", log=True),
        size=(5.6, 3.8),
    )


_LEVELS: Mapping[str, tuple[str, Callable[[Entry], float]]] = {
    "closed": ("concurrency", lambda entry: float(entry["throughput_per_s"]["median"])),
    "open": ("rate_per_s", lambda entry: float(entry["load"]["rate_per_s"])),
}


def _by_system(summary: Summary, loop: str) -> dict[str, list[Entry]]:
    """The runs of that loop by the system's title, the usual load first, lightest first."""

    def key(entry: Entry) -> tuple[Any, ...]:
        load = entry["load"]
        plain = (entry["set"] != "mixed", load["protocol"] != "grpc", load["shared_memory"])
        return (*system_order(entry["system"]), *plain, entry["set"], load[_LEVELS[loop][0]])

    found: dict[str, list[Entry]] = {}
    runs = (entry for entry in summary.get("systems") or () if entry["load"]["loop"] == loop)
    for entry in sorted(runs, key=key):
        found.setdefault(entry["title"], []).append(entry)
    return found
