"""Throughput of everything the demo serves, with as many requests in flight as keep it busy.

A turn measures every system once, and ratios are taken within turns, so that a machine whose speed
drifts slows all of them alike. What answers with one graph costs the same for every image, so that
graphs beside the cascade are sent a part of the crops; the cascade always gets whole rounds.

Throughput is requests in flight over mean latency. The first requests find the server idle and
wait less, which flatters a pass by about 8 requests of however many it has. The cascade is sent the
most, so that its ratios to the others err against it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress

from perf.analyzer import Load, run, write_tensors
from server import TritonServer

from .systems import ADAPTIVE, CORE, RUNG

TURNS = 3
CONCURRENCY = 16
ADAPTIVE_ROUNDS = 2  # it is so fast that one round would be over in two seconds
PART = 2  # every second crop

console = Console(stderr=True)


def measure_saturated(
    server: TritonServer,
    systems: Mapping[str, str],
    tensors: Sequence[NDArray[np.float32]],
    folder: Path,
) -> dict[str, list[float]]:
    """Measure each system with perf_analyzer over gRPC, closed loop, tensors in shared memory.

    Args:
        server: on this machine.
        systems: the model to ask for each.
        tensors: the crops, each FP32 (3, H, W).
        folder: for perf_analyzer's reports.

    Returns:
        Images per second by system, one value per turn.
    """
    whole = write_tensors(folder / "crops.json", tensors)
    part = write_tensors(folder / "part.json", tensors[::PART])
    names = list(systems)
    found: dict[str, list[float]] = {name: [] for name in names}
    with Progress(console=console) as progress:
        task = progress.add_task("saturated", total=TURNS * len(names))
        for turn in range(TURNS):
            first = turn * len(names) // TURNS  # nobody is always first
            for name in names[first:] + names[:first]:
                progress.update(task, description=f"turn {turn + 1}: {name}")
                load = Load(
                    systems[name],
                    server.grpc_url,
                    whole if name in (*CORE, RUNG) else part,
                    concurrency=CONCURRENCY,
                    rounds=ADAPTIVE_ROUNDS if name == ADAPTIVE else 1,
                    warmup_requests=0,  # the server warmed itself up, and has answered hundreds
                    records=False,  # with shared memory they may hold NaN and break off
                    shared_memory="system",
                )
                path = folder / f"saturated-{turn + 1}-{name}.csv"
                found[name].append(run(load, csv_path=path).figures.throughput_per_s)
                progress.advance(task)
    for inputs in (whole, part):
        inputs.path.unlink()
    return found
