"""How much `quick` and `full` measure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Suite:
    """One size of measurement.

    Attributes:
        name: `quick` or `full`.
        pool: images that are scored, for the sets to be chosen from.
        mixed: images of the mixed set, each asked of every system one after the other.
        shares: parts of the mixed set, one value of a spread each.
        repeats: how often each share is measured.
        set_size: images of the easy and the hard set, at most, and of a load's inputs.
        concurrency: requests in flight of the closed loops, the last one called saturated.
        spans: how often the mixed set is sent to each system saturated, the systems taking turns.
        turns: how often each load is measured, the loads taking turns.
        pass_s: about how long one pass of a load lasts, in seconds.
        rates: of the open loops, in parts of the throughput that the closed loop reached.
        every_system: whether every system is put under load and has its memory measured, or the
            adaptive one and what it is compared with.
        backend_pairs: requests at batch 1 and 8 per round, each beside a run of ONNX Runtime.
        backend_rounds: rounds at batch 1 and 8.
        memory_turns: how often each system's memory is measured, on a fresh server each time.
        locust_s: seconds of one Locust run.
        locust_shapes: whether the ramp, the spike and the open model are run as well.
    """

    name: str
    pool: int
    mixed: int
    shares: int
    repeats: int
    set_size: int
    concurrency: tuple[int, ...]
    spans: int
    turns: int
    pass_s: float
    rates: tuple[float, ...]
    every_system: bool
    backend_pairs: tuple[int, int]
    backend_rounds: tuple[int, int]
    memory_turns: int
    locust_s: int
    locust_shapes: bool


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
    backend_pairs=(3, 1),
    backend_rounds=(5, 2),
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
    backend_pairs=(5, 2),
    backend_rounds=(12, 5),
    memory_turns=3,
    locust_s=15,
    locust_shapes=True,
)
SUITES = {suite.name: suite for suite in (QUICK, FULL)}
