"""The rows of the report's tables about load: perf_analyzer's and Locust's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .words import NONE, Cell, Summary, amount, share, system_order

Entry = Mapping[str, Any]


def loads(summary: Summary, loop: str) -> list[dict[str, Any]]:
    """For each system one row per load of that loop, `closed` or `open`."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for entry in _sorted(summary.get("systems") or (), loop):
        latency = entry.get("latency_ms") or {}
        spreads = (
            entry.get("throughput_per_s"),
            *(latency.get(key) for key in ("p50", "p95", "p99")),
            entry.get("server_cpu_ms"),
        )
        groups.setdefault(entry["title"], []).append(
            {
                "load": load_words(entry),
                "requests": f"{entry['requests']:,}",
                "cells": [Cell.of(spread) for spread in spreads],
                "unstable": _unstable(entry),
            }
        )
    return [{"name": name, "rows": rows} for name, rows in groups.items()]


def _unstable(entry: Entry) -> str:
    """Why not to trust a run; empty where it is stable."""
    return "" if entry["stable"] else entry.get("unstable_reason") or "no reason given"


def server_times(summary: Summary) -> list[dict[str, Any]]:
    """For each system the server's own times of each model under each load."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for loop in ("closed", "open"):
        for entry in _sorted(summary.get("systems") or (), loop):
            for model, found in (entry.get("server_ms") or {}).items():
                groups.setdefault(entry["title"], []).append(
                    {
                        "load": load_words(entry),
                        "model": model,
                        "share": share(found.get("images_share")),
                        "times": [
                            amount(found.get(key)) for key in ("queue", "input", "infer", "output")
                        ],
                        "unstable": _unstable(entry),
                    }
                )
    return [{"name": name, "rows": rows} for name, rows in groups.items()]


def _sorted(systems: Sequence[Entry], loop: str) -> list[Entry]:
    def key(entry: Entry) -> tuple[Any, ...]:
        load = entry["load"]
        level = load["concurrency"] if loop == "closed" else load["rate_per_s"]
        plain = (entry["set"] != "mixed", load["protocol"] != "grpc", load["shared_memory"])
        return (*system_order(entry["system"]), *plain, entry["set"], level)

    return sorted((entry for entry in systems if entry["load"]["loop"] == loop), key=key)


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


def locust(summary: Summary) -> list[dict[str, Any]]:
    """One row per Locust run."""
    rows = []
    for run in summary.get("locust") or ():
        slo = run.get("slo")
        latency = run.get("latency_ms") or {}
        total = sum((run.get("paths") or {}).values())
        rows.append(
            {
                "users": f"{run['users']} {run['user']}-loop {run['protocol']}",
                "shape": run.get("shape") or "constant",
                "seconds": amount(run["seconds"]),
                "requests": f"{run['requests']:,}",
                "failures": f"{run['failures']:,}",
                "throughput": amount(run.get("throughput_per_s")),
                "latencies": [amount(latency.get(key)) for key in ("p50", "p95", "p99")],
                "high": share(run["paths"].get("high", 0) / total if total else None),
                "slo": NONE if slo is None else f"p95 ≤ {slo['p95_ms']:g} ms",
                "met": None if slo is None else slo["met"],
            }
        )
    return rows
