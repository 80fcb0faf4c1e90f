"""The research script's tables, ours beside the source's: what `make original` shows.

The source's figures are another machine's, measured in one process without a server: milliseconds
and megabytes do not compare, the ratios do.
"""

from __future__ import annotations

from typing import Any

from rich.table import Table

from .figures import TOO_BUSY, cascade_bound
from .systems import ADAPTIVE, HIGH, LOW

# The script's own figures. Latency in ms, memory in MB.
SOURCE = {
    "forward_ms": {"vit_low": 1.8, "vit_high": 8.7},
    "latency_ms": {LOW: 2.5, HIGH: 8.8, ADAPTIVE: 2.894},
    "memory_mb": {LOW: 30.0, HIGH: 68.0, ADAPTIVE: 61.8},
    "escalation_rate": 0.095,
    "speedup": 3.3,
}
NOTES = (
    "Absolute figures are another machine's; the ratios are what compares.",
    "The source's memory is of one process without a server; ours (PSS) has tritonserver, a "
    "process per model and its Python in it.",
    "The source's 2.894 ms lies below its own parts (2.8 + 0.095 x 9.6 = 3.7 ms), so its speed-up "
    "is above what those allow; its bound is computed here from its static latencies.",
)


def original_rows(result: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Each figure's name, ours, and the source's."""
    source = result["source"]
    ours = {name: spread["median"] for name, spread in result["latency_ms"].items()}
    theirs = source["latency_ms"]
    rows = [
        (f"forward pass, {result['px'][name]} px", f"{ms:.2f} ms", f"{their_ms:g} ms")
        for (name, ms), their_ms in zip(
            result["forward_ms"].items(), source["forward_ms"].values(), strict=True
        )
    ]
    forward = [figures["forward_ms"] for figures in (result, source)]
    rows.append(_ratio("forward pass, high / low", "vit_high", "vit_low", *forward))
    for name, title in ((LOW, "static low"), (HIGH, "static high"), (ADAPTIVE, "adaptive")):
        use, memory_mb = result["memory"][name], source["memory_mb"][name]
        memory = f"{use['peak_pss_mib']:.0f} MiB (weights {use['weights_mib']:.0f})"
        rows += [
            (f"{title}: average latency", f"{ours[name]:.2f} ms", f"{theirs[name]:g} ms"),
            (f"{title}: peak memory", memory, f"{memory_mb:g} MB"),
        ]
    rate, speedup = source["escalation_rate"], source["speedup"]
    bound = cascade_bound(theirs[LOW], theirs[HIGH], rate)
    ratios = [
        _ratio("average latency, static high / low", HIGH, LOW, ours, theirs),
        ("escalated", f"{result['escalation_rate']:.1%}", f"{rate:.1%}"),
        ("speed-up over static high", f"{result['speedup']['median']:.2f}x", f"{speedup:g}x"),
        ("cascade bound", f"{result['bound']['median']:.2f}x", f"{bound:.2f}x"),
    ]
    if result["doubts"]:
        ratios = [
            (title, mine if title == "escalated" else "not believed", their)
            for title, mine, their in ratios
        ]
    return [*rows, *ratios]


def _ratio(
    title: str, high: str, low: str, ours: dict[str, float], theirs: dict[str, float]
) -> tuple[str, str, str]:
    return title, f"{ours[high] / ours[low]:.1f}x", f"{theirs[high] / theirs[low]:.1f}x"


def original_table(result: dict[str, Any]) -> Table:
    """Our figures beside the source's, with what to keep in mind."""
    title = f"{result['backbone']}, {result['images']['count']} {result['images']['source']}"
    notes = list(result["notes"])
    if result["doubts"]:
        notes.append(f"In turn, {TOO_BUSY}: {'; '.join(result['doubts'])}.")
    table = Table(title=title, caption="\n".join(notes), caption_justify="left")
    table.add_column("")
    table.add_column(result["environment"]["device"], justify="right")
    table.add_column("source", justify="right")
    for row in original_rows(result):
        table.add_row(*row)
    return table
