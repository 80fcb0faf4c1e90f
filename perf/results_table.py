"""The README's table of results, made from the committed summaries of `perf/results/`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from report.words import recipe_words, setting

from .compare import load_summary, read_json
from .figures import PerfError, doubts_of

BEGIN = "<!-- perf/results: begin, made by python -m perf table -->"
END = "<!-- perf/results: end -->"
_NONE = "–"


def results_table(folder: Path) -> str:
    """A Markdown table with one row for each summary, in the order of the files' names.

    Args:
        folder: its *.json files are summaries; those that name another `kind` are passed over.

    Raises:
        PerfError: a file is no summary, or there is none.
    """
    files = sorted(folder.glob("*.json"))
    rows = [_row(load_summary(file)) for file in files if "kind" not in read_json(file)]
    if not rows:
        raise PerfError(f"{folder}: no summary; copy a build/perf/summary.json there")
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    cells = ([cell.replace("|", "\\|") for cell in line] for line in lines)
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def update_readme(readme: Path, folder: Path) -> bool:
    """Put the table between the two markers of a Markdown file.

    Args:
        readme: the file.
        folder: of the summaries.

    Returns:
        Whether that changed the file.

    Raises:
        PerfError: a marker is missing or stands there twice, or see `results_table`.
    """
    text = readme.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise PerfError(f"{readme}: needs the line {BEGIN} and after it {END}, once each")
    before, rest = text.split(BEGIN)
    updated = f"{before}{BEGIN}\n{results_table(folder)}\n{END}{rest.split(END)[1]}"
    readme.write_text(updated, encoding="utf-8")
    return updated != text


def _row(summary: Mapping[str, Any]) -> dict[str, str]:
    """Each column's text; of figures that cannot be true only that they cannot."""
    model, answers = summary.get("model"), summary.get("answers") or {}
    adaptive = answers.get("adaptive") or {}
    device = (summary.get("environment") or {}).get("device") or _NONE
    rungs = ""
    if model:
        rungs = " / ".join(recipe_words(model[rung]) for rung in ("low", "high"))
        if "reference" in model:
            rungs += f", beside {recipe_words(model['reference'])}"
        rungs = rungs.replace(" px", "\N{NO-BREAK SPACE}px")  # no number without its unit

    def percent(key: str) -> str:
        return _NONE if adaptive.get(key) is None else f"{100 * adaptive[key]:.1f} %"

    def ratio(key: str, load: str | None = None) -> str:
        if load is not None and doubts_of(summary, load):
            return "not believed"
        return f"{spread['median']:.2f}" if (spread := summary.get(key)) else _NONE

    def speedup(load: str) -> str:
        names = ("speedup", "bound", "cascade_efficiency")
        speed, bound, efficiency = (ratio(f"{name}_{load}", load) for name in names)
        if speed in (_NONE, "not believed"):
            return speed
        return f"{speed}× (bound {bound}×, efficiency {efficiency})"

    def certified() -> str:
        certificate = summary.get("certificate") or {}
        if not certificate.get("certified"):
            return _NONE
        return f"{setting(certificate['epsilon'])}, {certificate['n']:,} images"

    images = summary.get("images") or {}
    return {
        "images": f"{images['source']}, {images['pool']:,}" if images else _NONE,
        "risk certified": certified(),
        "device": device if summary.get("complete") else f"{device} (cut short)",
        "model, rungs": f"{model['backbone']}, {rungs}" if model else _NONE,
        "escalated": percent("escalation_rate"),
        "agreement": percent("agreement_with_high"),
        "speed-up, one request in flight": speedup("c1"),
        "speed-up, saturated": speedup("saturated"),
        "router overhead": ratio("router_overhead_c1", "c1"),
        "memory ratio": ratio("peak_memory_ratio"),
        "command": f"`{summary['command']}`",
    }
