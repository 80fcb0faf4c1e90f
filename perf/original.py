"""The tables of the research script that this project began with, measured anew.

`static-vit` at 32 and 64 px: a forward pass alone, each rung over 2,000 images, the cascade over
the same images. Beside every figure stands that script's, measured on another machine and in one
process without a server: milliseconds and megabytes do not compare, the ratios do.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from rich.console import Console

from bundle.graphs import GraphSet
from bundle.placing import folder_beside
from report.terminal import Bars, table
from routing import RUNGS, Calibration

from .cascade import Measured, one_in_flight
from .environment import environment
from .figures import TOO_BUSY, PerfError, cascade_bound
from .harness import Asker, cut
from .images import Pool, load_pool
from .memory import CASCADES, peak_memory, serving
from .repository import assembled, undisturbed
from .systems import ADAPTIVE, HIGH, LOW, System
from .target import Target

SEED = 32  # of the crops; the artifact is calibrated on those of another seed
ROUNDS = 5  # into which the images are cut, one value of a spread each
FORWARD_RUNS = 300
FORWARD_WARMUP = 20
SYSTEMS = (
    System(LOW, "cheap rung always", "vit_low"),
    System(HIGH, "full rung always", "vit_high"),
    System(ADAPTIVE, "adaptive, calibrated threshold", "router"),
)

# The script's own figures. Latency in ms, memory in MB.
SOURCE = {
    "forward_ms": {"vit_low": 1.8, "vit_high": 8.7},
    "latency_ms": {LOW: 2.5, HIGH: 8.8, ADAPTIVE: 2.894},
    "memory_mb": {LOW: 30.0, HIGH: 68.0, ADAPTIVE: 61.8},
    "escalation_rate": 0.095,
    "speedup": 3.3,
}
NOTES = (
    "Absolute figures are another machine's; the ratios are what compares.",
    "The source's memory is of one process without a server; ours (PSS) has tritonserver, a "
    "process per model and its Python in it.",
    "The source's 2.894 ms lies below its own parts (2.8 + 0.095 x 9.6 = 3.7 ms), so its speed-up "
    "is above what those allow; its bound is computed here from its static latencies.",
)


def measure_original(build: Path, images: int, bars: Bars) -> dict[str, Any]:
    """Measure all three tables.

    Args:
        build: folder with onnx/, calibration.json and model_repository/, as `make original` makes.
        images: number of sample crops.
        bars: show what goes on.

    Returns:
        JSON types; `kind` is `original`.

    Raises:
        PerfError: the repository is missing.
        GraphsError, CalibrationError: the rungs or the artifact are missing or do not fit.
        ServerError, ClientError: the server does not start or does not answer.
    """
    if images < ROUNDS:
        raise PerfError(f"--images {images} are too few; give at least {ROUNDS}")
    graphs = GraphSet.load(build / "onnx")
    calibration = Calibration.load(build / "calibration.json")
    calibration.check_rungs(graphs.files)
    repository = assembled(build / "model_repository")
    forward_ms = measure_forward(graphs, bars)
    pool = load_pool(graphs, "sample", images, SEED, bars.stage)
    with folder_beside(repository) as folder:  # weights are links
        served = undisturbed(repository, folder / "served")
        measured, version = measure_in_turn(served, pool, graphs.classes is not None, bars)
        rows, memory = range(len(pool)), {}
        with bars.stage("peak memory", len(SYSTEMS)) as bar:
            for system in SYSTEMS:
                memory[system.name] = asdict(peak_memory(system, served, graphs, pool, rows, 1))
                bar.advance()
    paired = measured.paired
    return {
        "kind": "original",
        "environment": environment(version, None),
        "backbone": graphs.backbone,
        "px": {name: graphs.rungs[name].px for name in RUNGS},
        "threshold": calibration.threshold,
        "images": {"source": pool.title, "count": len(pool)},
        "forward_ms": forward_ms,
        "latency_ms": {s.name: paired.cost(s.name).to_dict() for s in SYSTEMS},
        "memory": memory,
        "escalation_rate": paired.escalation_rate(ADAPTIVE),
        "speedup": paired.speedup().to_dict(),
        "bound": paired.bound().to_dict(),
        "disturbed": bool(measured.doubts),
        "doubts": list(measured.doubts),
        "source": SOURCE,
        "notes": list(NOTES),
    }


def measure_forward(graphs: GraphSet, bars: Bars) -> dict[str, float]:
    """Median ms of a forward pass of each rung in turn: one thread, one random image, no server."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    providers = ["CPUExecutionProvider"]
    sessions = {
        name: ort.InferenceSession(str(graphs.files[name]), options, providers=providers)
        for name in RUNGS
    }
    image = np.random.default_rng(0).standard_normal((1, *graphs.image_shape), dtype=np.float32)
    times: dict[str, list[float]] = {name: [] for name in RUNGS}
    with bars.stage("forward passes", FORWARD_WARMUP + FORWARD_RUNS) as bar:
        for _ in range(FORWARD_WARMUP + FORWARD_RUNS):
            for name, session in sessions.items():
                start = time.perf_counter()
                session.run(None, {"image": image})
                times[name].append(1e3 * (time.perf_counter() - start))
            bar.advance()
    return {name: statistics.median(column[FORWARD_WARMUP:]) for name, column in times.items()}


def measure_in_turn(
    repository: Path, pool: Pool, has_head: bool, bars: Bars
) -> tuple[Measured, str]:
    """One server, the systems in turn on each image; and Triton's version."""
    with (
        serving(repository, CASCADES[ADAPTIVE]) as server,
        Target(server.grpc_url, server.http_url, server) as target,
        bars.stage("the three systems in turn", len(SYSTEMS) * len(pool)) as bar,
    ):
        asker, shares = Asker(target, pool, has_head, target.meter()), cut(range(len(pool)), ROUNDS)
        measured = one_in_flight(target, asker, SYSTEMS, shares, bar, warm_up=FORWARD_WARMUP)
        return measured, target.version


def run_original(build: Path, out: Path, images: int) -> None:
    """Measure with bars on stderr, keep the result as JSON in `out`, show it on stdout."""
    result = measure_original(build, images, Bars(Console(stderr=True)))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")
    title = f"{result['backbone']}, {result['images']['count']} {result['images']['source']}"
    headings = ("", result["environment"]["device"], "source")
    console = Console()
    console.print(table(title, headings, original_rows(result)))
    busy = f"In turn, {TOO_BUSY}: {'; '.join(result['doubts'])}."
    for note in [*result["notes"], *([busy] if result["doubts"] else [])]:
        console.print(note, markup=False, highlight=False)


def original_rows(result: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Each figure's name, ours, and the source's."""
    source = result["source"]
    ours = {name: spread["median"] for name, spread in result["latency_ms"].items()}
    theirs = source["latency_ms"]
    rows = [
        (f"forward pass, {result['px'][name]} px", f"{ms:.2f} ms", f"{their_ms:g} ms")
        for (name, ms), their_ms in zip(
            result["forward_ms"].items(), source["forward_ms"].values(), strict=True
        )
    ]
    forward = [figures["forward_ms"] for figures in (result, source)]
    rows.append(_ratio("forward pass, high / low", "vit_high", "vit_low", *forward))
    for name, title in ((LOW, "static low"), (HIGH, "static high"), (ADAPTIVE, "adaptive")):
        use, memory_mb = result["memory"][name], source["memory_mb"][name]
        memory = f"{use['peak_pss_mib']:.0f} MiB (weights {use['weights_mib']:.0f})"
        rows += [
            (f"{title}: average latency", f"{ours[name]:.2f} ms", f"{theirs[name]:g} ms"),
            (f"{title}: peak memory", memory, f"{memory_mb:g} MB"),
        ]
    rate, speedup = source["escalation_rate"], source["speedup"]
    bound = cascade_bound(theirs[LOW], theirs[HIGH], rate)
    ratios = [
        _ratio("average latency, static high / low", HIGH, LOW, ours, theirs),
        ("escalated", f"{result['escalation_rate']:.1%}", f"{rate:.1%}"),
        ("speed-up over static high", f"{result['speedup']['median']:.2f}x", f"{speedup:g}x"),
        ("cascade bound", f"{result['bound']['median']:.2f}x", f"{bound:.2f}x"),
    ]
    if result["doubts"]:
        ratios = [
            (title, mine if title == "escalated" else "not believed", their)
            for title, mine, their in ratios
        ]
    return [*rows, *ratios]


def _ratio(
    title: str, high: str, low: str, ours: dict[str, float], theirs: dict[str, float]
) -> tuple[str, str, str]:
    return title, f"{ours[high] / ours[low]:.1f}x", f"{theirs[high] / theirs[low]:.1f}x"
