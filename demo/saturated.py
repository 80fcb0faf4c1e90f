"""Throughput of everything the demo serves, with as many requests in flight as keep it busy.

A turn measures every system once, and ratios are taken within turns, so that a machine whose speed
drifts slows all of them alike. What answers with one graph costs the same for every image, so that
graphs beside the cascade are sent a part of the crops; the cascade always gets whole rounds.
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
                    shared_memory="system",
                )
                path = folder / f"saturated-{turn + 1}-{name}.csv"
                records = run(load, csv_path=path).records
                assert records is not None
                found[name].append(steady_throughput(records.start_ns, CONCURRENCY))
                progress.advance(task)
    for inputs in (whole, part):
        inputs.path.unlink()
    return found


def steady_throughput(start_ns: NDArray[np.int64], concurrency: int) -> float:
    """Requests per second of a closed loop, without its beginning and its end.

    A server is not busy while the first requests arrive and while the last ones are answered, and
    the fewer requests a pass has, the more that counts. In between, each request waits for the
    answer to another, so the `concurrency`-th request after it is sent one cycle later.

    Args:
        start_ns: when each request was sent, nanoseconds, ascending; (N,), N more than twice
            `concurrency`.
        concurrency: requests in flight.
    """
    cycles = start_ns[2 * concurrency :] - start_ns[concurrency:-concurrency]
    return float(concurrency / (cycles.mean() / 1e9))
