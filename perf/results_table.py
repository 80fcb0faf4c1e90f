"""The README's table of results, made from the committed summaries of `perf/results/`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from report.words import recipe_words

from .compare import load_summary, read_json
from .figures import PerfError, doubts_of

BEGIN = "<!-- perf/results: begin, made by python -m perf table -->"
END = "<!-- perf/results: end -->"
_NONE = "–"

Summary = Mapping[str, Any]


def results_table(folder: Path) -> str:
    """A Markdown table with one row for each summary, in the order of the files' names.

    Args:
        folder: its *.json files are summaries; those that name another `kind` are passed over.

    Raises:
        PerfError: a file is no summary, or there is none.
    """
    files = sorted(folder.glob("*.json"))
    summaries = [load_summary(file) for file in files if "kind" not in read_json(file)]
    if not summaries:
        raise PerfError(f"{folder}: no summary; copy a build/perf/summary.json there")
    lines = [_line(list(_COLUMNS)), _line(["---"] * len(_COLUMNS))]
    lines += [_line([show(summary) for show in _COLUMNS.values()]) for summary in summaries]
    return "\n".join(lines)


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
    after = rest.split(END)[1]
    updated = f"{before}{BEGIN}\n{results_table(folder)}\n{END}{after}"
    if updated == text:
        return False
    readme.write_text(updated, encoding="utf-8")
    return True


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _median(summary: Summary, key: str) -> float | None:
    spread = summary.get(key)
    return None if spread is None else spread["median"]


def _ratio(summary: Summary, key: str) -> str:
    value = _median(summary, key)
    return _NONE if value is None else f"{value:.2f}"


def _device(summary: Summary) -> str:
    device = (summary.get("environment") or {}).get("device") or _NONE
    return device if summary.get("complete") else f"{device} (cut short)"


def _model(summary: Summary) -> str:
    model = summary.get("model")
    if not model:
        return _NONE
    rungs = " / ".join(recipe_words(model[rung]) for rung in ("low", "high"))
    rungs = rungs.replace(" px", "\N{NO-BREAK SPACE}px")  # a number is never parted from its unit
    return f"{model['backbone']}, {rungs}"


def _adaptive(key: str) -> Callable[[Summary], str]:
    def show(summary: Summary) -> str:
        value = ((summary.get("answers") or {}).get("adaptive") or {}).get(key)
        return _NONE if value is None else f"{100 * value:.1f} %"

    return show


def _speedup(load: str) -> Callable[[Summary], str]:
    """Speed-up, bound and efficiency under a load, `c1` or `saturated`, if they can be true."""

    def show(summary: Summary) -> str:
        speed, bound, efficiency = (
            _ratio(summary, f"{name}_{load}") for name in ("speedup", "bound", "cascade_efficiency")
        )
        if speed == _NONE:
            return _NONE
        if doubts_of(summary, load):
            return "not believed"
        return f"{speed}× (bound {bound}×, efficiency {efficiency})"

    return show


_COLUMNS: Mapping[str, Callable[[Summary], str]] = {
    "device": _device,
    "model, rungs": _model,
    "escalated": _adaptive("escalation_rate"),
    "agreement": _adaptive("agreement_with_high"),
    "speed-up, one request in flight": _speedup("c1"),
    "speed-up, saturated": _speedup("saturated"),
    "router overhead": lambda summary: (
        "not believed" if doubts_of(summary, "c1") else _ratio(summary, "router_overhead_c1")
    ),
    "memory ratio": lambda summary: _ratio(summary, "peak_memory_ratio"),
    "command": lambda summary: f"`{summary['command']}`",
}
