"""Loads measured by perf_analyzer in turn: closed and open loop, gRPC, HTTP, shared memory."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from .analyzer_install import Analyzer
from .figures import Spread
from .perf_analyzer import Figures, InputData, Load, run
from .server_times import ModelTimes, since
from .suites import Suite
from .systems import ADAPTIVE, ENSEMBLE, HIGH, LOW, System
from .target import Target

COMPARED = (LOW, HIGH, ADAPTIVE)

# perf_analyzer's own criterion for its windows, here for the passes of one level.
STABLE_WITHIN = 0.10
MOST_DELAYED = 0.05
WARMUP_REQUESTS = 4
OPEN_REQUESTS = 60  # of a pass at least, for its percentiles
PASS_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Level:
    """One system under one load.

    Attributes:
        system: what is asked.
        set_name: `easy`, `hard` or `mixed`.
        concurrency: requests in flight; 0 in an open loop.
        rate_per_s: mean rate of arrivals of an open loop.
        protocol: `grpc` or `http`.
        shared_memory: `none` or `system`.
    """

    system: System
    set_name: str = "mixed"
    concurrency: int = 0
    rate_per_s: float | None = None
    protocol: str = "grpc"
    shared_memory: str = "none"

    @property
    def slug(self) -> str:
        """Names its raw files."""
        load = f"c{self.concurrency}" if self.concurrency else f"rate{self.rate_per_s:.3g}"
        shm = "-shm" if self.shared_memory == "system" else ""
        return f"{self.system.name}-{self.set_name}-{load}-{self.protocol}{shm}"

    def to_dict(self) -> dict[str, Any]:
        """The level's part of its entry in summary.json."""
        return {
            "system": self.system.name,
            "title": self.system.title,
            "model": self.system.model,
            "set": self.set_name,
            "load": {
                "loop": "closed" if self.concurrency else "open",
                "concurrency": self.concurrency or None,
                "rate_per_s": self.rate_per_s,
                "protocol": self.protocol,
                "shared_memory": self.shared_memory,
            },
        }


@dataclass(frozen=True)
class Pass:
    """One pass of one level.

    Attributes:
        figures: perf_analyzer's.
        server: Triton's times during the pass, warm-up included, by model.
        server_cpu_ms: CPU time of the server's processes per request; None for a remote server.
    """

    figures: Figures
    server: Mapping[str, ModelTimes]
    server_cpu_ms: float | None


@dataclass
class Measured:
    """A level and its passes so far."""

    level: Level
    passes: list[Pass] = field(default_factory=list)

    @property
    def throughput(self) -> Spread:
        """Images per second, one value per pass."""
        return Spread.of([p.figures.throughput_per_s for p in self.passes])

    def instability(self) -> str | None:
        """Why its figures should not be trusted; None if they may be."""
        figures = self.throughput if self.level.concurrency else self._spread("latency_ms_p50")
        what = "throughput" if self.level.concurrency else "median latency"
        if len(self.passes) < 2:
            return "measured once"
        if figures.max > (1 + STABLE_WITHIN) * figures.min:
            return f"{what} differs by {figures.max / figures.min - 1:.0%} between its passes"
        delayed = max(p.figures.delayed for p in self.passes)
        if delayed > MOST_DELAYED:
            return f"{delayed:.0%} of the requests were sent later than planned"
        return None

    def _spread(self, name: str) -> Spread:
        return Spread.of([getattr(p.figures, name) for p in self.passes])

    def to_dict(self) -> dict[str, Any]:
        """Its entry in summary.json."""
        reason = self.instability()
        cpu = [p.server_cpu_ms for p in self.passes if p.server_cpu_ms is not None]
        return {
            **self.level.to_dict(),
            "requests": sum(p.figures.requests for p in self.passes),
            "stable": reason is None,
            "unstable_reason": reason,
            "throughput_per_s": self.throughput.to_dict(),
            "latency_ms": {
                name: self._spread(f"latency_ms_{name}").to_dict()
                for name in ("mean", "p50", "p95", "p99")
            },
            "server_ms": self._server_ms(),
            "server_cpu_ms": Spread.of(cpu).to_dict() if cpu else None,
        }

    def _server_ms(self) -> dict[str, dict[str, float]]:
        asked = self.level.system.model
        found: dict[str, dict[str, float]] = {}
        for model in sorted({name for p in self.passes for name in p.server}):
            times = [p.server[model] for p in self.passes if model in p.server]
            images = sum(p.server[asked].images for p in self.passes)
            found[model] = {"images_share": sum(t.images for t in times) / images}
            for part in ("queue", "input", "infer", "output"):
                found[model][part] = median(t.per_request_ms()[part] for t in times)
        return found


class LoadRunner:
    """Measures levels on one server.

    Args:
        target: the server.
        analyzer: perf_analyzer.
        inputs: for each set name its files: `image` and, for the ensemble, `image_bytes`.
        raw: folder for perf_analyzer's reports.
        pass_s: about how long a pass should last, in seconds.
        costs_ms: about what one request of each system costs, to choose the number of requests.
    """

    def __init__(
        self,
        target: Target,
        analyzer: Analyzer,
        inputs: Mapping[str, Mapping[str, InputData]],
        raw: Path,
        pass_s: float,
        costs_ms: Mapping[str, float],
    ) -> None:
        self._target = target
        self._meter = target.meter()
        self._analyzer = analyzer
        self._inputs = inputs
        self._raw = raw
        self._pass_s = pass_s
        self._costs_ms = costs_ms

    def measure(
        self,
        levels: Sequence[Level],
        turns: int,
        before_pass: Callable[[Level, int, Sequence[Measured]], None],
        after_pass: Callable[[], None],
    ) -> list[Measured]:
        """Measure the levels, each once in every turn.

        Args:
            levels: what to measure.
            turns: how often.
            before_pass: called with the level, the turn and what was measured so far.
            after_pass: called after each pass.

        Raises:
            PerfAnalyzerError: a pass failed.
        """
        measured = [Measured(level) for level in levels]
        for turn in range(turns):
            shift = turn * len(levels) // max(1, turns)  # nobody is always first
            for entry in measured[shift:] + measured[:shift]:
                before_pass(entry.level, turn, measured)
                entry.passes.append(self._pass(entry.level, turn))
                after_pass()
        return measured

    def _pass(self, level: Level, turn: int) -> Pass:
        times, start = self._target.times(), time.perf_counter()
        before_s = 0.0 if self._meter is None else self._meter.read_s()
        csv_path = self._raw / f"{level.slug}-{turn + 1}.csv"
        figures = run(self._load(level), self._analyzer, csv_path)
        server = since(times, self._target.times())
        cpu_ms = None
        if self._meter is not None:
            used_s = self._meter.used_s(before_s, time.perf_counter() - start)
            cpu_ms = 1e3 * used_s / server[level.system.model].requests
        return Pass(figures, server, cpu_ms)

    def _load(self, level: Level) -> Load:
        kind = "image_bytes" if level.system.takes_bytes else "image"
        inputs = self._inputs[level.set_name][kind]
        if level.rate_per_s is None:
            # Below saturation more requests in flight are answered in the same time.
            wanted = 1e3 * self._pass_s / self._costs_ms[level.system.name]
            at_least = math.ceil(level.concurrency / inputs.items)  # perf_analyzer refuses fewer
            rounds = max(at_least, round(wanted / inputs.items))
            arrivals_s = 0.0
        else:
            wanted = max(OPEN_REQUESTS, level.rate_per_s)
            rounds = math.ceil(wanted / inputs.items)
            arrivals_s = rounds * inputs.items / level.rate_per_s
        return Load(
            level.system.model,
            self._target.url(level.protocol),
            inputs,
            protocol=level.protocol,
            concurrency=level.concurrency or 1,
            rate_per_s=level.rate_per_s,
            rounds=rounds,
            warmup_requests=WARMUP_REQUESTS,
            parameters=level.system.parameters,
            shared_memory=level.shared_memory,
            timeout_s=PASS_TIMEOUT_S + arrivals_s,
        )


def closed_levels(
    suite: Suite, systems: Sequence[System], sets: Collection[str], http: bool, shared_memory: bool
) -> list[Level]:
    """The closed loops: a number of requests always in flight.

    Args:
        suite: how much.
        systems: everything that can be asked.
        sets: names of the sets there are.
        http: whether HTTP can be measured.
        shared_memory: whether the server shares this machine's memory.
    """
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


def open_levels(
    suite: Suite, systems: Sequence[System], measured: Sequence[Measured]
) -> list[Level]:
    """The open loops: Poisson arrivals at parts of what the closed loop reached at most."""
    by_name = {system.name: system for system in systems}
    capacity = saturated_throughput(measured)
    names = COMPARED if suite.every_system else (ADAPTIVE,)
    return [
        Level(by_name[name], rate_per_s=round(part * capacity[name], 2))
        for part in suite.rates
        for name in names
    ]


def most_in_flight(measured: Sequence[Measured]) -> dict[str, Measured]:
    """Of each system the closed loop on mixed images over plain gRPC with most in flight."""
    found: dict[str, Measured] = {}
    for entry in measured:
        level = entry.level
        if (level.set_name, level.protocol, level.shared_memory) != ("mixed", "grpc", "none"):
            continue
        best = found.get(level.system.name)
        if best is None or best.level.concurrency < level.concurrency:
            found[level.system.name] = entry
    return found


def saturated_throughput(measured: Sequence[Measured]) -> Mapping[str, float]:
    """Median images per second of each system there."""
    return {name: entry.throughput.median for name, entry in most_in_flight(measured).items()}
