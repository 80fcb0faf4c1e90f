"""Loads measured by perf_analyzer in turn: closed and open loop, gRPC, HTTP, shared memory."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

from .analyzer_install import Analyzer
from .cpu import CpuMeter
from .figures import Spread
from .perf_analyzer import InputData, Level, Pass, run
from .record import Record
from .server_times import ms, since
from .suites import Suite
from .systems import ADAPTIVE, ENSEMBLE, HIGH, LOW, System
from .target import Target

COMPARED = (LOW, HIGH, ADAPTIVE)

# perf_analyzer's own criterion for its windows, here for the passes of one level.
STABLE_WITHIN = 0.10
MOST_DELAYED = 0.05
OPEN_REQUESTS = 60  # of a pass at least, for its percentiles
PASS_TIMEOUT_S = 300.0


@dataclass
class Passes:
    """A level and its passes so far."""

    level: Level
    passes: list[Pass] = field(default_factory=list)

    @property
    def throughput(self) -> Spread:
        """Images per second, one value per pass."""
        return Spread.of([p.throughput_per_s for p in self.passes])

    def _latency_ms(self, name: str) -> Spread:
        return Spread.of([p.latency_ms[name] for p in self.passes])

    def instability(self) -> str | None:
        """Why its figures should not be trusted; None if they may be."""
        figures = self.throughput if self.level.concurrency else self._latency_ms("p50")
        what = "throughput" if self.level.concurrency else "median latency"
        if len(self.passes) < 2:
            return "measured once"
        if figures.max > (1 + STABLE_WITHIN) * figures.min:
            return f"{what} differs by {figures.max / figures.min - 1:.0%} between its passes"
        delayed = max(p.delayed for p in self.passes)
        if delayed > MOST_DELAYED:
            return f"{delayed:.0%} of the requests were sent later than planned"
        return None

    def to_dict(self) -> dict[str, Any]:
        """Its entry in summary.json."""
        level, reason = self.level, self.instability()
        cpu = [p.server_cpu_ms for p in self.passes if p.server_cpu_ms is not None]
        return {
            "system": level.system.name,
            "title": level.system.title,
            "model": level.system.model,
            "set": level.set_name,
            "load": {
                "loop": "closed" if level.concurrency else "open",
                "concurrency": level.concurrency or None,
                "rate_per_s": level.rate_per_s,
                "protocol": level.protocol,
                "shared_memory": level.shared_memory,
            },
            "requests": sum(p.requests for p in self.passes),
            "stable": reason is None,
            "unstable_reason": reason,
            "throughput_per_s": self.throughput.to_dict(),
            "latency_ms": {
                name: self._latency_ms(name).to_dict() for name in ("mean", "p50", "p95", "p99")
            },
            "server_ms": self._server_ms(),
            "server_cpu_ms": Spread.of(cpu).to_dict() if cpu else None,
        }

    def _server_ms(self) -> dict[str, dict[str, float]]:
        images = sum(p.server[self.level.system.model]["images"] for p in self.passes)
        found: dict[str, dict[str, float]] = {}
        for model in sorted({name for p in self.passes for name in p.server}):
            times = [p.server[model] for p in self.passes if model in p.server]
            found[model] = {"images_share": sum(t["images"] for t in times) / images}
            for part in ("queue", "input", "infer", "output"):
                found[model][part] = median(ms(t, part) / t["requests"] for t in times)
        return found


@dataclass(frozen=True)
class LoadRunner:
    """Measures levels on one server.

    Attributes:
        target: the server.
        meter: of its CPU time; None for a server that is not ours.
        analyzer: perf_analyzer.
        inputs: for each set name its files: `image` and, for the ensemble, `image_bytes`.
        raw: folder for perf_analyzer's reports.
        pass_s: about how long a pass should last, in seconds.
        costs_ms: about what one request of each system costs, to choose the number of requests.
    """

    target: Target
    meter: CpuMeter | None
    analyzer: Analyzer
    inputs: Mapping[str, Mapping[str, InputData]]
    raw: Path
    pass_s: float
    costs_ms: Mapping[str, float]

    def measure(
        self, levels: Sequence[Level], turns: int, record: Record, title: str
    ) -> list[Passes]:
        """Measure the levels, each once in every turn, and add them to `systems` of the summary.

        Raises:
            PerfAnalyzerError: a pass failed.
        """
        before, measured = list(record.summary.get("systems", [])), [Passes(n) for n in levels]

        def keep() -> None:
            record.summary["systems"] = before + [p.to_dict() for p in measured if p.passes]

        with record.stage(title, len(levels) * turns) as bar:
            for turn in range(turns):
                shift = turn * len(levels) // turns  # nobody is always first
                for entry in measured[shift:] + measured[:shift]:
                    bar.describe(f"{title}, turn {turn + 1}: {entry.level.slug}")
                    entry.passes.append(self._pass(entry.level, turn))
                    keep()
                    bar.advance()
        return measured

    def _pass(self, level: Level, turn: int) -> Pass:
        inputs = self.inputs[level.set_name]["image_bytes" if level.system.takes_bytes else "image"]
        timeout_s = PASS_TIMEOUT_S
        if level.rate_per_s is None:
            # Below saturation more requests in flight are answered in the same time.
            wanted = 1e3 * self.pass_s / self.costs_ms[level.system.name]
            at_least = math.ceil(level.concurrency / inputs.items)  # perf_analyzer refuses fewer
            rounds = max(at_least, round(wanted / inputs.items))
        else:
            rounds = math.ceil(max(OPEN_REQUESTS, level.rate_per_s) / inputs.items)
            timeout_s += rounds * inputs.items / level.rate_per_s
        times, start = self.target.times(), time.perf_counter()
        before_s = 0.0 if self.meter is None else self.meter.read_s()
        url, report = self.target.url(level.protocol), self.raw / f"{level.slug}-{turn + 1}.csv"
        figures = run(level, url, inputs, rounds, self.analyzer, report, timeout_s)
        server, cpu_ms = since(times, self.target.times()), None
        if self.meter is not None:
            used_s = self.meter.used_s(before_s, time.perf_counter() - start)
            cpu_ms = 1e3 * used_s / server[level.system.model]["requests"]
        return replace(figures, server=server, server_cpu_ms=cpu_ms)


def closed_levels(
    suite: Suite, systems: Sequence[System], sets: Collection[str], http: bool, shared_memory: bool
) -> list[Level]:
    """The closed loops, a number of requests always in flight: over HTTP and shared memory, too."""
    by_name = {system.name: system for system in systems}
    adaptive = by_name[ADAPTIVE]
    ends = (suite.concurrency[0], suite.concurrency[-1])
    saturated = suite.concurrency[-1]
    curves = (*COMPARED, ENSEMBLE) if suite.every_system else COMPARED
    levels = [
        Level(by_name[name], concurrency=c)
        for c in suite.concurrency
        for name in curves
        if name in by_name
    ]
    if suite.every_system:  # of the others the ends of the curve
        others = [system for system in systems if system.name not in curves]
        levels += [Level(system, concurrency=c) for c in ends for system in others]
    elif ENSEMBLE in by_name:
        levels.append(Level(by_name[ENSEMBLE], concurrency=saturated))
    parts = [name for name in ("easy", "hard") if name in sets]
    levels += [Level(adaptive, name, concurrency=saturated) for name in parts]
    # perf_analyzer sends no request parameters over HTTP, and the adaptive one needs none.
    compared = [by_name[HIGH], adaptive] if suite.every_system else [adaptive]
    for system in compared:
        for concurrency in ends if suite.every_system else (saturated,):
            if http:
                levels.append(Level(system, concurrency=concurrency, protocol="http"))
            if shared_memory:
                levels.append(Level(system, concurrency=concurrency, shared_memory="system"))
    return levels


def open_levels(suite: Suite, systems: Sequence[System], measured: Sequence[Passes]) -> list[Level]:
    """The open loops: Poisson arrivals at parts of what the closed loop reached at most."""
    by_name = {system.name: system for system in systems}
    capacity = {name: m.throughput.median for name, m in most_in_flight(measured).items()}
    names = COMPARED if suite.every_system else (ADAPTIVE,)
    return [
        Level(by_name[name], rate_per_s=round(part * capacity[name], 2))
        for part in suite.rates
        for name in names
    ]


def most_in_flight(measured: Sequence[Passes]) -> dict[str, Passes]:
    """Of each system the closed loop on mixed images over plain gRPC with most in flight."""
    found: dict[str, Passes] = {}
    for entry in measured:
        level = entry.level
        if (level.set_name, level.protocol, level.shared_memory) != ("mixed", "grpc", "none"):
            continue
        best = found.get(level.system.name)
        if best is None or best.level.concurrency < level.concurrency:
            found[level.system.name] = entry
    return found
