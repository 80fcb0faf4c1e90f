"""The rows of the report's tables, as text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from report.words import count_of

from ..figures import doubts_of, load_of
from .words import (
    MISSING,
    NONE,
    NOT_BELIEVED,
    Cell,
    Spread,
    Summary,
    amount,
    between,
    fine,
    ratio,
    share,
    short_name,
    system_order,
    times,
)

Entry = Mapping[str, Any]

_BOUND = "1 ÷ (1/r + p), where r = {cost} of the full rung ÷ of the cheap rung, p = share escalated"
_CPU = "CPU time of the server per image, the full rung always ÷ adaptive"
_FIGURES: tuple[tuple[str, str, Callable[[float], str], str], ...] = (
    (
        "speedup_c1",
        "speed-up, one request in flight",
        times,
        "time of the full rung always ÷ time of adaptive",
    ),
    (
        "bound_c1",
        "cascade bound, one request in flight",
        times,
        _BOUND.format(cost="time"),
    ),
    (
        "cascade_efficiency_c1",
        "cascade efficiency, one request in flight",
        fine,
        "speed-up ÷ cascade bound",
    ),
    (
        "cpu_speedup_c1",
        "the same speed-up by CPU time, one request in flight",
        times,
        _CPU,
    ),
    (
        "speedup_saturated",
        "speed-up, saturated",
        times,
        "throughput of adaptive ÷ throughput of the full rung always, on the same cores",
    ),
    (
        "bound_saturated",
        "cascade bound, saturated",
        times,
        _BOUND.format(cost="1/throughput"),
    ),
    (
        "cascade_efficiency_saturated",
        "cascade efficiency, saturated",
        fine,
        "speed-up ÷ cascade bound",
    ),
    (
        "cpu_speedup_saturated",
        "the same speed-up by CPU time, saturated",
        times,
        _CPU,
    ),
    (
        "router_overhead_c1",
        "router overhead",
        fine,
        "time of adaptive told never to escalate ÷ time of the cheap rung always",
    ),
    (
        "ensemble_over_router",
        "ensemble over router",
        fine,
        "time of adaptive from image bytes ÷ time of adaptive from image tensors",
    ),
    (
        "peak_memory_ratio",
        "peak memory ratio",
        fine,
        "peak memory of a server with the cascade ÷ (of one with the cheap rung + of one with the "
        "full rung)",
    ),
)
_STANDIN = "server's time for a batch of {batch} in the full rung ÷ time of an ONNX Runtime session"


def derived(summary: Summary) -> list[dict[str, Any]]:
    """Every derived figure with its formula in words, if it can be true; agreement last."""
    rows = [
        _figure(summary.get(key), name, show, formula, _is_doubted(summary, load_of(key)))
        for key, name, show, formula in _FIGURES
    ]
    adaptive = (summary.get("answers") or {}).get("adaptive") or {}
    agreement = adaptive.get("agreement_with_high")
    formula = "images whose adaptive answer agrees with the full rung's ÷ all images"
    rows.append(
        {
            "name": "agreement with the full rung",
            "cell": Cell(MISSING if agreement is None else share(agreement)),
            "runs": NONE,
            "words": formula,
        }
    )
    return rows


def standin(summary: Summary) -> list[dict[str, Any]]:
    """The stand-in backend against ONNX Runtime; empty where not measured."""
    return [
        _figure(spread, f"batch {batch}", fine, _STANDIN.format(batch=batch))
        for batch in (1, 8)
        if (spread := summary.get(f"standin_over_ort_b{batch}")) is not None
    ]


def _figure(
    spread: Spread | None,
    name: str,
    show: Callable[[float], str],
    formula: str,
    doubted: bool = False,
) -> dict[str, Any]:
    cell = Cell(MISSING) if spread is None else _ratio_cell(spread, show, doubted)
    runs = NONE if spread is None else str(spread["runs"])
    return {"name": name, "cell": cell, "runs": runs, "words": formula}


def _is_doubted(summary: Summary, load: str | None) -> bool:
    return load is not None and bool(doubts_of(summary, load))


def _ratio_cell(spread: Spread | None, show: Callable[[float], str], doubted: bool) -> Cell:
    """A ratio, unless what it was taken of cannot be true."""
    return Cell(NOT_BELIEVED) if doubted and spread is not None else Cell.of(spread, show)


def answers(summary: Summary) -> list[dict[str, Any]]:
    """Every system's agreement and cost, which was measured with one request in flight."""
    found, doubted = summary.get("answers") or {}, _is_doubted(summary, "c1")
    return [
        {
            "name": answer["title"],
            "chosen": name == "adaptive",
            "agreement": share(answer.get("agreement_with_high")),
            "escalated": NONE
            if name.startswith("static-")
            else share(answer.get("escalation_rate")),
            "accuracy": share(answer.get("accuracy")),
            "cost": Cell.of(answer.get("cost_ms")),
            "ratio": _ratio_cell(answer.get("cost_ratio"), fine, doubted),
            "cpu": Cell.of(answer.get("cpu_ms")),
        }
        for name, answer in sorted(found.items(), key=lambda item: system_order(item[0]))
    ]


def attribution(found: Mapping[str, Any]) -> tuple[list[str], list[dict[str, Any]]]:
    """The columns, and for each part its time and its share in each of them."""
    groups = [name for name in ("kept", "escalated", "all") if found.get(name)]
    names = list(dict.fromkeys(part["name"] for name in groups for part in found[name]["parts"]))
    rows = []
    for part_name in names:
        cells = []
        for group in groups:
            total = found[group]["total_ms"]
            milliseconds = _part(found[group]["parts"], part_name)
            known = milliseconds is not None and total > 0
            cells.append(Cell(amount(milliseconds), share(milliseconds / total) if known else ""))
        rows.append({"name": part_name, "cells": cells})
    totals = [Cell(amount(found[group]["total_ms"])) for group in groups]
    return groups, [*rows, {"name": "whole request", "cells": totals}]


def _part(parts: Iterable[Entry], name: str) -> float | None:
    return next((part["ms"] for part in parts if part["name"] == name), None)


def memory(summary: Summary) -> list[dict[str, Any]]:
    """Peak memory of each system and the weights' share of it."""
    rows = []
    for name, found in (summary.get("memory") or {}).items():
        if not found:
            continue
        weights, peak = found.get("weights_mib"), found.get("peak_pss_mib")
        known = weights is not None and peak
        kinds = ("peak_pss_mib", "peak_rss_mib", "gpu_mib", "weights_mib")
        rows.append(
            {
                "name": short_name(name, summary),
                "sizes": [amount(found.get(kind)) for kind in kinds],
                "share": share(weights / peak if known else None),
            }
        )
    return rows


def facts(
    summary: Summary, shown: Iterable[tuple[str, Callable[[float], str], str, str]]
) -> list[Any]:
    """The boxes of the first screen: value, words, range; None for what was not measured."""
    boxes = []
    for key, show, words, load in shown:
        spread = summary.get(key)
        value = None if spread is None else show(spread["median"])
        runs = "" if spread is None else _runs(spread)
        if spread is not None and load and doubts_of(summary, load):
            value, runs = NONE, NOT_BELIEVED
        boxes.append({"value": value, "words": words, "range": runs})
    return boxes


def _runs(spread: Spread) -> str:
    runs = count_of(spread["runs"], "run")
    return f"{between(spread, ratio)}, {runs}" if spread["runs"] > 1 else runs
