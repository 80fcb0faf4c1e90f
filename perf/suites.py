"""How much `quick` and `full` measure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Suite:
    """One size of measurement."""

    name: str
    pool: int  # images that are scored, for the sets to be chosen from
    mixed: int  # images of the mixed set, each asked of every system one after the other
    shares: int  # parts of the mixed set, one value of a spread each
    repeats: int  # how often each share is measured
    set_size: int  # images of the easy and the hard set, at most, and of a load's inputs
    concurrency: tuple[int, ...]  # requests in flight of the closed loops, the last one saturated
    spans: int  # how often the mixed set is sent to each system saturated, in turn
    turns: int  # how often each load is measured, the loads taking turns
    pass_s: float  # about how long one pass of a load lasts, in seconds
    rates: tuple[float, ...]  # of the open loops, in parts of what the closed loop reached
    every_system: bool  # under load and in memory, or adaptive and what it is compared with
    memory_turns: int  # how often each system's memory is measured, on a fresh server each time
    locust_s: int  # seconds of one Locust run
    locust_shapes: bool  # whether the ramp, the spike and the open model are run as well


QUICK = Suite(
    name="quick",
    pool=120,
    mixed=40,
    shares=4,
    repeats=1,
    set_size=10,
    concurrency=(1, 4),
    spans=2,
    turns=2,
    pass_s=1.0,
    rates=(0.6,),
    every_system=False,
    memory_turns=1,
    locust_s=5,
    locust_shapes=False,
)
FULL = Suite(
    name="full",
    pool=400,
    mixed=120,
    shares=5,
    repeats=2,
    set_size=24,
    concurrency=(1, 2, 4, 8),
    spans=4,
    turns=4,
    pass_s=2.0,
    rates=(0.5, 0.9),
    every_system=True,
    memory_turns=3,
    locust_s=15,
    locust_shapes=True,
)
SUITES = {suite.name: suite for suite in (QUICK, FULL)}
