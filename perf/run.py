"""`python -m perf run`: measure the deployed cascade beside what a user would run instead.

images ─► pool, scored by the router ─► easy, hard and mixed sets
server ─► systems in turn ─► saturated ─► where the time goes ─► loads ─► ONNX Runtime ─► ...
└────────► summary.json, report.html

Each stage measures one thing and adds it to the summary.
"""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from bundle.graphs import GraphSet
from bundle.placing import working_folder
from calibration.fidelity import Fidelity
from routing import Calibration, Overrides, escalation_mask
from server import TritonServer

from . import cascade
from .analyzer_install import Analyzer, find_analyzer
from .attribution import attribute, scoring_ms, together
from .backend import measure_backend
from .environment import environment
from .figures import PerfError
from .harness import Asker, cut, is_a_loss
from .images import Pool, choose_sets, load_pool, score_pool
from .images import sent_under_load as under_load
from .loads import COMPARED, LoadRunner, closed_levels, most_in_flight, open_levels
from .locust_runs import run_locust
from .memory import MEASURED, MemoryUse, memory_figures, peak_memory
from .perf_analyzer import write_inputs
from .record import Record
from .repository import assembled, with_alternatives
from .suites import Suite
from .systems import (
    ADAPTIVE,
    ENSEMBLE,
    ESCALATION,
    HIGH,
    LOW,
    System,
    model_section,
    systems,
    threshold_for,
)
from .target import Target

SEED = 21  # of sample crops; those of calibration's default seeds are others


@dataclass(frozen=True)
class Options:
    """What the command line asks for.

    Attributes:
        images: `sample`, or a folder.
        suite: how much to measure.
        onnx: folder of the rungs.
        calibration: the artifact.
        repository: the assembled model repository, for a server of our own.
        url: gRPC HOST:PORT of a server that already runs; None starts one.
        http_url: its HTTP HOST:PORT.
        out: folder for the summary, the report and raw files.
    """

    images: str
    suite: Suite
    onnx: Path
    calibration: Path
    repository: Path
    url: str | None
    http_url: str | None
    out: Path


@dataclass(frozen=True, eq=False)
class Bench:
    """A server, the images it is asked about, and the systems that answer.

    Attributes:
        options: what is asked for.
        record: where it is kept.
        target: the server.
        graphs: what it serves.
        calibration: the artifact it decides with.
        pool: all images.
        escalated: which of them escalate at the calibrated threshold, BOOL (N,).
        sets: rows of the pool, see `choose_sets`.
        systems: what can be asked, by name.
    """

    options: Options
    record: Record
    target: Target
    graphs: GraphSet
    calibration: Calibration
    pool: Pool
    escalated: NDArray[np.bool_]
    sets: Mapping[str, list[int]]
    systems: Mapping[str, System]

    def rate(self, rows: Sequence[int]) -> float:
        """Share of these images that escalate, 0..1."""
        return float(self.escalated[np.asarray(rows)].mean())

    def asker(self, metered: bool) -> Asker:
        """Sends the pool's images, reading the CPU time of a server of ours if asked to."""
        meter = self.target.meter() if metered else None
        return Asker(self.target, self.pool, self.graphs.classes is not None, meter)


def measure(options: Options, console: Console) -> Record:
    """Measure everything; what was measured is kept whatever happens.

    What is missing is said at once, before a server is started.

    Raises:
        PerfError: perf_analyzer, the repository or images are missing, there is no cascade, or
            measuring could not go on.
        GraphsError, CalibrationError, ImagesError: no rungs, no artifact of theirs, no images.
        ServerError, ClientError: a server did not start, or did not answer.
    """
    analyzer = find_analyzer()
    graphs, calibration = GraphSet.load(options.onnx), Calibration.load(options.calibration)
    calibration.check_rungs(graphs.files)
    if calibration.threshold is None:
        raise PerfError(
            "nothing was certified, so the router sends every image to the full rung and there is "
            "nothing to compare; python -m calibration fit --escalation-rate 0.1 makes a cascade"
        )
    if options.url is None:
        assembled(options.repository)
    header = {
        "command": f"python -m perf {shlex.join(sys.argv[1:])}",
        "suite": options.suite.name,
        "model": model_section(graphs),
        "certificate": calibration.certificate,
        "fidelity": Fidelity.of(calibration).agreement(),
    }
    with Record(options.out, console, header) as record:
        limit = options.suite.pool
        pool = load_pool(graphs, options.images, limit, SEED, record.stage)
        if pool.note:
            record.note(pool.note)
        for line in pool.unreadable:
            record.note(f"left out {line}")
        with _target(options, graphs, record) as target:
            _describe(options, record, target, analyzer)
            if options.url is None:
                target.check_models()
            else:
                target.check(graphs, calibration, pool.tensors[0])
            bench = prepare_bench(options, record, target, graphs, calibration, pool)
            costs = ask_in_turn(bench)
            # Once more, while the clocks of a GPU are those it is measured at.
            _describe(options, record, target, analyzer)
            saturate(bench)
            attribute_costs(bench)
            load_with_perf_analyzer(bench, analyzer, costs)
            compare_with_onnxruntime(bench)
            load_with_locust(bench)
        if options.url is None:
            measure_peaks(bench)
    return record


def _describe(options: Options, record: Record, target: Target, analyzer: Analyzer) -> None:
    found = environment(target.version, analyzer.version())
    if options.url is not None:
        found["device"] += " (the client's; the server is elsewhere)"
    record.summary["environment"] = found


@contextlib.contextmanager
def _target(options: Options, graphs: GraphSet, record: Record) -> Iterator[Target]:
    if options.url is not None:
        record.note("the server is not ours: its memory and its CPU time are not measured")
        with Target(options.url, options.http_url, None) as target:
            yield target
        return
    folder = with_alternatives(options.repository, graphs, options.out / "model_repository")
    if not graphs.beside:
        record.note(
            "no other graph was exported, so there is none to compare with; "
            "export rungs --beside px=168 makes one"
        )
    server = TritonServer(folder, free_ports=True, stop_patience_s=0)
    try:
        with record.stage("start tritonserver", 1):
            server.start()
        with Target(server.grpc_url, server.http_url, server) as target:
            yield target
    finally:
        server.stop()


def prepare_bench(
    options: Options,
    record: Record,
    target: Target,
    graphs: GraphSet,
    calibration: Calibration,
    pool: Pool,
) -> Bench:
    """Score the pool and choose the sets.

    Raises:
        PerfError: too few images.
        ClientError: the server does not answer as it should.
    """
    suite = options.suite
    with record.stage("score images", len(pool)) as bar:
        scores = score_pool(target.grpc_url, pool, bar.advance)
    escalated = escalation_mask(scores, calibration.threshold, Overrides())
    sets = choose_sets(escalated, suite.mixed, suite.shares, suite.set_size)
    for name, what in (("easy", "stay cheap"), ("hard", "escalate")):
        if name not in sets:
            record.note(f"too few images {what}: the {name} set is left out; give more images")
    record.summary["images"] = {
        "source": pool.title,
        "pool": len(pool),
        "sets": {
            name: {"images": len(rows), "escalation_rate": float(escalated[rows].mean())}
            for name, rows in sets.items()
        },
    }
    threshold_30 = threshold_for(scores[np.asarray(sets["mixed"])], 0.3)
    found = systems(graphs, target.models, calibration.threshold, threshold_30)
    by_name = {system.name: system for system in found}
    return Bench(options, record, target, graphs, calibration, pool, escalated, sets, by_name)


def ask_in_turn(bench: Bench) -> dict[str, float]:
    """Every system on every mixed image, the systems in turn.

    Returns:
        The median cost of each system's request in milliseconds.
    """
    rows, suite = bench.sets["mixed"], bench.options.suite
    asked = list(bench.systems.values())
    shares = cut(rows, min(suite.shares, len(rows))) * suite.repeats
    with bench.record.stage("systems in turn", sum(map(len, shares)) * len(asked)) as bar:
        measured = cascade.one_in_flight(bench.target, bench.asker(True), asked, shares, bar)
        _keep(bench, measured, asked, rows * suite.repeats)
    paired = measured.paired
    expected, rate = bench.rate(bench.sets["mixed"]), paired.escalation_rate(ADAPTIVE)
    if abs(rate - expected) > 1.5 / len(rows):  # one image may lie on the threshold
        raise PerfError(
            f"{rate:.1%} of the mixed images escalated, {expected:.1%} do at the local artifact's "
            "threshold: the server has another one; give the --calibration it was assembled with"
        )
    return {system.name: paired.cost(system.name).median for system in asked}


def saturate(bench: Bench) -> None:
    """Static low, static high and the cascade saturated, on the same cores, spans in turn."""
    if bench.target.server is None:
        bench.record.note(
            "the server is not ours, so systems cannot be given the same cores: no figures"
        )
        return
    rows, suite = bench.sets["mixed"], bench.options.suite
    names = (LOW, HIGH, ESCALATION, ADAPTIVE)
    asked = [system for name, system in bench.systems.items() if name in names]
    with bench.record.stage("saturated, in turn", suite.spans * len(asked)) as bar:
        measured = cascade.saturated(
            *(bench.target, bench.asker(True), asked, [rows] * suite.spans),
            *(suite.concurrency[-1], bar),
        )
        _keep(bench, measured, asked, rows * suite.spans)


def _keep(
    bench: Bench, measured: cascade.Measured, asked: Sequence[System], rows: Sequence[int]
) -> None:
    """Add what systems answered about these images, in this order."""
    known = bench.graphs.labels if bench.graphs.task == "classes" else None
    labels = [bench.pool.labels[row] for row in rows]
    truth = None
    if known is not None and all(label in known for label in labels):
        truth = [known.index(str(label)) for label in labels]
    bench.record.doubt(measured.load, measured.doubts)
    disagrees = is_a_loss(bench.calibration.chosen_by)
    bench.record.summary |= measured.sections(asked, disagrees, truth)


def attribute_costs(bench: Bench) -> None:
    """Where an adaptive request spends its time."""
    ensemble, rows = bench.systems.get(ENSEMBLE), bench.sets
    if ensemble is None:
        bench.record.note("the server has no adaptive_vit: where the time goes is not measured")
        return
    paths = {"kept": rows.get("easy", []), "escalated": rows.get("hard", [])}
    scoring = scoring_ms(bench.calibration)
    found: dict[str, Any] = {"kept": None, "escalated": None}
    with bench.record.stage("where the time goes", sum(map(len, paths.values()))) as bar:
        for name, sent in paths.items():
            if sent:
                asker = bench.asker(False)
                found[name] = attribute(bench.target, asker, ensemble, sent, scoring, bar.advance)
        rate = bench.rate(bench.sets["mixed"])
        found["all"] = together(found["kept"], found["escalated"], rate)
        bench.record.summary["attribution"] = found


def load_with_perf_analyzer(
    bench: Bench, analyzer: Analyzer, costs_ms: Mapping[str, float]
) -> None:
    """Closed loops, then open loops at parts of what the closed ones reached.

    Raises:
        PerfAnalyzerError: a pass failed.
    """
    record, suite, target, pool = bench.record, bench.options.suite, bench.target, bench.pool
    folder = record.folder / "perf_analyzer"
    for file in folder.glob("*.csv"):  # an earlier run's
        file.unlink()
    # The inputs hold the images as text, a hundred megabytes that nobody wants to keep.
    with working_folder("inputs") as scratch:
        inputs = {}
        for name, rows in bench.sets.items():
            sent = under_load(rows, bench.escalated, suite.set_size)
            record.summary["images"]["sets"][name]["under_load"] = {
                "images": len(sent),
                "escalation_rate": bench.rate(sent),
            }
            tensors, encoded = scratch / name, scratch / f"{name}.bytes"
            inputs[name] = {
                "image": write_inputs(tensors, [pool.tensors[row] for row in sent]),
                "image_bytes": write_inputs(encoded, [pool.encoded[row] for row in sent]),
            }
        asked = list(bench.systems.values())
        has_http, is_local = target.http_url is not None, target.server is not None
        how = (folder, suite.pass_s, costs_ms)
        runner = LoadRunner(target, target.meter(), analyzer, inputs, *how)
        levels = closed_levels(suite, asked, bench.sets, has_http, is_local)
        closed = runner.measure(levels, suite.turns, record, "closed loop")
        for name, entry in most_in_flight(closed).items():
            if name in COMPARED and entry.instability():
                record.note(f"under load, {name} did not stabilise: {entry.instability()}")
        levels = open_levels(suite, asked, closed)
        runner.measure(levels, suite.turns, record, "open loop")


def compare_with_onnxruntime(bench: Bench) -> None:
    """The served full rung beside ONNX Runtime without a server, at batch 1 and 8."""
    record, suite = bench.record, bench.options.suite
    if bench.target.server is None:
        record.note("the server is not ours: its backend is not compared with ONNX Runtime")
        return
    images = np.stack([bench.pool.tensors[row] for row in bench.sets["mixed"]])
    file = bench.graphs.files["vit_high"]
    plan = list(zip((1, 8), suite.backend_rounds, suite.backend_pairs, strict=True))
    with record.stage("backend and ONNX Runtime", sum(r * p for _, r, p in plan)) as bar:
        for batch, rounds, pairs in plan:
            if batch > len(images):
                record.note(f"{len(images)} images do not fill a batch of {batch}: not compared")
                continue
            how = (batch, rounds, pairs, bar.advance)
            ratios = measure_backend(bench.target, file, images, *how)
            record.summary[f"standin_over_ort_b{batch}"] = ratios.to_dict()


def load_with_locust(bench: Bench) -> None:
    """Locust users against the ensemble: gRPC and HTTP, and in the full suite the shapes."""
    if ENSEMBLE not in bench.systems:
        return
    options, suite, summary = bench.options, bench.options.suite, bench.record.summary
    users = suite.concurrency[-1]
    runs: list[dict[str, Any]] = [{"protocol": "grpc"}]
    if bench.target.http_url is not None:
        runs.append({"protocol": "http"})
    if suite.locust_shapes:
        # Half of what the ensemble reached on mixed images in a closed loop.
        reached = [
            entry["throughput_per_s"]["median"]
            for entry in summary["systems"]
            if (entry["system"], entry["set"]) == (ENSEMBLE, "mixed")
            and entry["load"]["loop"] == "closed"
        ]
        runs += [
            {"protocol": "grpc", "user": "open", "rate": max(reached) / 2 / users},
            {"protocol": "grpc", "shape": "ramp"},
            {"protocol": "grpc", "shape": "spike"},
        ]
    spec = f"sample:{SEED}" if options.images == "sample" else options.images
    with bench.record.stage("Locust", suite.locust_s * len(runs)) as bar:
        summary["locust"] = []
        for number, run in enumerate(runs, 1):
            name = "-".join(str(run[key]) for key in run if key != "rate")
            bar.describe(f"Locust: {name}")
            entry = run_locust(
                bench.target.url(run["protocol"]),
                spec,
                bench.record.folder / "locust" / f"{number}-{name}",
                users=users,
                seconds=suite.locust_s,
                on_second=bar.advance,
                **run,
            )
            summary["locust"].append(entry)


def measure_peaks(bench: Bench) -> None:
    """Peak memory of each system on servers of their own, under the same load.

    Raises:
        ServerError: a server did not start.
    """
    options, suite = bench.options, bench.options.suite
    rows = under_load(bench.sets["mixed"], bench.escalated, suite.set_size)
    how = (bench.graphs, bench.pool, rows, suite.concurrency[-1])
    names = MEASURED if suite.every_system else COMPARED
    peaks: dict[str, list[MemoryUse]] = {name: [] for name in names if name in bench.systems}
    repository = options.out / "model_repository"
    with bench.record.stage("peak memory", suite.memory_turns * len(peaks)) as bar:
        for _ in range(suite.memory_turns):
            for name, found in peaks.items():
                bar.describe(f"peak memory: {name}")
                found.append(peak_memory(bench.systems[name], repository, *how))
                bar.advance()
            bench.record.summary |= memory_figures(peaks)
