"""Which systems are put under which loads."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from .loads import Level, Measured
from .suites import Suite
from .systems import ADAPTIVE, ENSEMBLE, HIGH, LOW, System

COMPARED = (LOW, HIGH, ADAPTIVE)


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


def saturated(measured: Sequence[Measured]) -> dict[str, Measured]:
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
    return {name: entry.throughput.median for name, entry in saturated(measured).items()}
