"""The report's other figures: where the time goes, and what happens under load."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from report.page import HIGH_COLOUR, LOW_COLOUR
from report.words import count_of

from .drawing import GREY, LEGEND, colour, new_figure, svg
from .words import Summary, amount, short_name, system_order

_PARTS = {
    "client and network": "#c9c5bb",
    "preprocess": "#d99a2b",
    "cheap rung": LOW_COLOUR,
    "scoring": "#7a7fd0",
    "router, BLS hops, ensemble": "#4c78a8",
    "full rung": HIGH_COLOUR,
    "queues": "#777777",
}
_GROUPS = {"kept": "kept low", "escalated": "escalated", "all": "all"}
_LEAST_WRITTEN = 0.06  # share of the longest bar below which its number does not fit inside

Entry = Mapping[str, Any]


def time_bars(attribution: Mapping[str, Any]) -> str | None:
    """The parts of a request's time, stacked; None where nothing was attributed."""
    groups = [(name, attribution[name]) for name in _GROUPS if attribution.get(name)]
    if not groups:
        return None
    figure, axes = new_figure(5.6, 1.3 + 0.8 * len(groups))
    longest = max(group["total_ms"] for _, group in groups)
    named: set[str] = set()
    for height, (_, group) in enumerate(groups):
        left = 0.0
        for part in group["parts"]:
            width = max(part["ms"], 0.0)  # a difference of two measurements can fall below 0
            label = None if part["name"] in named else part["name"]
            named.add(part["name"])
            shade = _PARTS.get(part["name"], GREY)
            axes.barh(height, width, left=left, height=0.62, color=shade, label=label)
            if width > _LEAST_WRITTEN * longest:
                middle = left + width / 2
                axes.text(middle, height, amount(width), ha="center", va="center", color="white")
            left += width
        end = f" {amount(group['total_ms'])} ms"
        axes.text(left, height, end, va="center", fontweight="bold")
    axes.set_yticks(
        range(len(groups)),
        [f"{_GROUPS[name]}\n{count_of(group['requests'], 'request')}" for name, group in groups],
    )
    axes.set(xlabel="mean time of a request, ms", ylim=(len(groups) - 0.5, -0.5))
    axes.set_xlim(0, 1.2 * longest)
    axes.grid(axis="x", color="#eeeeee")
    figure.legend(loc="outside upper left", ncols=4, columnspacing=1.2, handlelength=1, **LEGEND)
    return svg(figure)


def closed_loop(summary: Summary) -> str | None:
    """Throughput against latency, one curve per system; None where it was not measured."""
    entries = _usual(summary.get("systems") or (), "closed", "p50")
    return _curves(
        summary,
        entries,
        level="concurrency",
        x=lambda entry: entry["throughput_per_s"]["median"],
        y="p50",
        labels=("throughput, images per second", "latency p50, ms"),
    )


def open_loop(summary: Summary) -> str | None:
    """p95 against the rate of arrivals, one curve per system; None where not measured."""
    entries = _usual(summary.get("systems") or (), "open", "p95")
    return _curves(
        summary,
        entries,
        level="rate_per_s",
        x=lambda entry: entry["load"]["rate_per_s"],
        y="p95",
        labels=("arrivals, images per second (Poisson)", "latency p95, ms"),
    )


def _usual(systems: Iterable[Entry], loop: str, latency: str) -> list[Entry]:
    """The runs that compare: mixed images over gRPC without shared memory."""
    return [
        entry
        for entry in systems
        if entry["set"] == "mixed"
        and entry["load"]["loop"] == loop
        and entry["load"]["protocol"] == "grpc"
        and entry["load"]["shared_memory"] == "none"
        and entry.get("throughput_per_s")
        and (entry.get("latency_ms") or {}).get(latency)
    ]


def _curves(
    summary: Summary,
    entries: Sequence[Entry],
    level: str,
    x: Any,
    y: str,
    labels: tuple[str, str],
) -> str | None:
    if not entries:
        return None
    figure, axes = new_figure(5.6, 4.0)
    for system in sorted({entry["system"] for entry in entries}, key=system_order):
        own = [entry for entry in entries if entry["system"] == system]
        own.sort(key=lambda entry: entry["load"][level])
        _curve(axes, own, x, y, level, colour(system), short_name(system, summary))
    axes.set(xlabel=labels[0], ylabel=labels[1], yscale="log")
    axes.set_xlim(0, None)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.grid(color="#eeeeee")
    _legend(figure, any(not entry["stable"] for entry in entries), axes)
    return svg(figure)


def _curve(
    axes: Axes, entries: Sequence[Entry], x: Any, y: str, level: str, shade: str, label: str
) -> None:
    """A system's line; runs that did not stabilise are hollow."""
    across = [x(entry) for entry in entries]
    up = [entry["latency_ms"][y]["median"] for entry in entries]
    axes.plot(across, up, color=shade, linewidth=1.4, label=label)
    for at, height, entry in zip(across, up, entries, strict=True):
        face = shade if entry["stable"] else "white"
        axes.plot(at, height, "o", color=shade, markerfacecolor=face, markersize=6)
        if level == "concurrency" and len(entries) > 1:
            number = str(entry["load"]["concurrency"])
            axes.annotate(
                number, (at, height), (4, -9), textcoords="offset points", fontsize=7.5, color=shade
            )


def _legend(figure: Figure, some_unstable: bool, axes: Axes) -> None:
    if some_unstable:
        style = {"color": GREY, "markerfacecolor": "white", "markersize": 6}
        axes.plot([], [], "o", label="hollow: did not stabilise", **style)
    figure.legend(loc="outside upper left", ncols=2, columnspacing=1.2, **LEGEND)
