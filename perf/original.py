"""The tables of the research script that this project began with, measured anew.

`static-vit` at 32 and 64 px: a forward pass alone, each rung over 2,000 images, the cascade over
the same images. Beside every figure stands that script's, measured on another machine and in one
process without a server: milliseconds and megabytes do not compare, the ratios do.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from bundle.graphs import GraphSet
from imaging import Preprocessing
from routing import RUNGS, Calibration

from .environment import environment
from .figures import PerfError
from .harness import ONE_BY_ONE, Asker, Paired, believed, cut, take_turns
from .images import Pool, open_pool_source, read_pool
from .memory import CASCADES, MemoryUse, PeakLoad, peak_memory, serving
from .original_table import NOTES, SOURCE, original_table
from .repository import assembled, undisturbed
from .systems import ADAPTIVE, HIGH, LOW, System
from .target import Target

IMAGES = 2000
SEED = 32  # the artifact is calibrated on crops of another seed
ROUNDS = 5  # into which the images are cut, one value of a spread each
FORWARD_RUNS = 300
FORWARD_WARMUP = 20
SYSTEMS = (
    System(LOW, "cheap rung always", "vit_low"),
    System(HIGH, "full rung always", "vit_high"),
    System(ADAPTIVE, "adaptive, calibrated threshold", "router"),
)

Progressed = Callable[[str, int], None]
"""Called with a stage's title and the number of its steps each time one of them is done."""


def measure_original(build: Path, images: int, on_progress: Progressed) -> dict[str, Any]:
    """Measure all three tables.

    Args:
        build: folder with onnx/, calibration.json and model_repository/, as `make original` makes.
        images: number of sample crops.
        on_progress: called after each step.

    Returns:
        JSON types; `kind` is `original`.

    Raises:
        PerfError: the repository is missing.
        GraphsError, CalibrationError: the rungs or the artifact are missing or do not fit.
        ServerError, ClientError: the server does not start or does not answer.
    """
    if images < ROUNDS:
        raise PerfError(f"--images {images} are too few; give at least {ROUNDS}")
    rung_set = GraphSet.load(build / "onnx")
    calibration = Calibration.load(build / "calibration.json")
    calibration.check_rungs(rung_set.files)
    repository = assembled(build / "model_repository")
    forward_ms = measure_forward(rung_set, on_progress)
    pool = _read(rung_set, images, on_progress)
    has_head = rung_set.classes is not None
    with tempfile.TemporaryDirectory(dir=build, prefix="original-") as folder:  # weights are links
        served = undisturbed(repository, Path(folder) / "model_repository")
        paired, doubts, version = _latencies(served, pool, has_head, on_progress)
        memory = _memory(served, rung_set, pool, on_progress)
    return {
        "kind": "original",
        "environment": environment(version, None),
        "backbone": rung_set.backbone,
        "px": {name: rung_set.rungs[name].px for name in RUNGS},
        "threshold": calibration.threshold,
        "images": {"source": pool.title, "count": len(pool)},
        "forward_ms": forward_ms,
        "latency_ms": {s.name: paired.cost(s.name).to_dict() for s in SYSTEMS},
        "memory": {name: use.to_dict() for name, use in memory.items()},
        "escalation_rate": paired.escalation_rate(ADAPTIVE),
        "speedup": paired.speedup().to_dict(),
        "bound": paired.bound().to_dict(),
        "disturbed": bool(doubts),
        "doubts": doubts,
        "source": SOURCE,
        "notes": list(NOTES),
    }


def measure_forward(rung_set: GraphSet, on_progress: Progressed) -> dict[str, float]:
    """Median time in ms of one forward pass, on one thread: one random image, no server, no data.

    The rungs take turns.

    Args:
        rung_set: the exported rungs.
        on_progress: called after each pass of both.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    sessions = {
        name: ort.InferenceSession(
            str(rung_set.files[name]), options, providers=["CPUExecutionProvider"]
        )
        for name in RUNGS
    }
    image = np.random.default_rng(0).standard_normal((1, *rung_set.image_shape), dtype=np.float32)
    times: dict[str, list[float]] = {name: [] for name in RUNGS}
    for _ in range(FORWARD_WARMUP + FORWARD_RUNS):
        for name in RUNGS:
            times[name].append(_forward_ms(sessions[name], image))
        on_progress("forward passes", FORWARD_WARMUP + FORWARD_RUNS)
    return {name: statistics.median(column[FORWARD_WARMUP:]) for name, column in times.items()}


def _forward_ms(session: ort.InferenceSession, image: NDArray[np.float32]) -> float:
    start = time.perf_counter()
    session.run(None, {"image": image})
    return 1e3 * (time.perf_counter() - start)


def _read(rung_set: GraphSet, images: int, on_progress: Progressed) -> Pool:
    source = open_pool_source("sample", SEED, images)
    preprocessing = Preprocessing.from_dict(rung_set.preprocessing)
    return read_pool(source, preprocessing, lambda: on_progress("cut and decode images", images))


def _latencies(
    repository: Path, pool: Pool, has_head: bool, on_progress: Progressed
) -> tuple[Paired, list[str], str]:
    """One server, the systems in turn on each image; why not to believe it; Triton's version."""
    with (
        serving(repository, CASCADES[ADAPTIVE]) as server,
        Target(server.grpc_url, server.http_url, server) as target,
    ):
        asker = Asker(target, pool, has_head, target.meter())
        shares = cut(range(len(pool)), ROUNDS)

        def on_turn() -> None:
            on_progress("the three systems in turn", len(SYSTEMS) * len(pool))

        def measure() -> Paired:
            return take_turns(asker, SYSTEMS, shares, ONE_BY_ONE, on_turn, warm_up=FORWARD_WARMUP)

        cpu_counts = target.cpu_threads() == 1
        paired, doubts = believed(measure, cpu_counts, again=lambda words: None)
        return paired, doubts, target.version


def _memory(
    repository: Path, rung_set: GraphSet, pool: Pool, on_progress: Progressed
) -> dict[str, MemoryUse]:
    load = PeakLoad(pool, range(len(pool)), concurrency=1)
    found = {}
    for system in SYSTEMS:
        found[system.name] = peak_memory(system, repository, rung_set, load)
        on_progress("peak memory", len(SYSTEMS))
    return found


def run_original(build: Path, out: Path, images: int = IMAGES) -> dict[str, Any]:
    """Measure with bars on stderr, keep the result as JSON, show it on stdout.

    Args:
        build: as in `measure_original`.
        out: file to write.
        images: number of sample crops.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        tasks: dict[str, TaskID] = {}

        def show(stage: str, steps: int) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=steps)
            progress.advance(tasks[stage])

        result = measure_original(build, images, show)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")
    Console().print(original_table(result))
    return result
