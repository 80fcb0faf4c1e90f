"""The stages of a run, in their order: each measures one thing and adds it to the record."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bundle.graphs import GraphSet
from calibration.images import ImageSource
from imaging import Preprocessing
from routing import Calibration, Overrides, escalation_mask

from . import cascade
from .analyzer_install import Analyzer
from .attribution import attribute, scoring_ms, together
from .backend import measure_backend
from .cascade import one_in_flight, saturated
from .figures import PerfError
from .harness import Asker, cut, is_a_loss
from .images import ImageSets, Pool, choose_sets, read_pool, score_pool, sent_under_load
from .loads import (
    COMPARED,
    Level,
    LoadRunner,
    Measured,
    closed_levels,
    most_in_flight,
    open_levels,
)
from .locust_runs import run_locust
from .memory import MEASURED, MemoryUse, PeakLoad, memory_figures, peak_memory
from .perf_analyzer import InputData, write_bytes, write_tensors
from .record import Record
from .suites import Suite
from .systems import (
    ADAPTIVE,
    ENSEMBLE,
    ESCALATION,
    HIGH,
    LOW,
    System,
    systems,
    threshold_for,
)
from .target import Target


@dataclass(frozen=True, eq=False)
class Bench:
    """A server, the images it is asked about, and the systems that answer.

    Attributes:
        target: the server.
        rung_set: the rungs it serves.
        calibration: the artifact it decides with.
        pool: all images.
        scores: FP32 (N,), the router's, in oracle units.
        sets: rows of the pool.
        systems: what can be asked.
        suite: how much is measured.
    """

    target: Target
    rung_set: GraphSet
    calibration: Calibration
    pool: Pool
    scores: NDArray[np.float32]
    sets: ImageSets
    systems: Sequence[System]
    suite: Suite

    @property
    def asker(self) -> Asker:
        """Sends the pool's images."""
        return Asker(self.target, self.pool, self.rung_set.classes is not None)

    @property
    def metered_asker(self) -> Asker:
        """The same, with the CPU time of a server of ours."""
        has_head = self.rung_set.classes is not None
        return Asker(self.target, self.pool, has_head, self.target.meter())

    def system(self, name: str) -> System | None:
        """The system of this name, if it can be asked."""
        return next((system for system in self.systems if system.name == name), None)

    @property
    def escalated(self) -> NDArray[np.bool_]:
        """Which images of the pool escalate at the calibrated threshold, BOOL (N,)."""
        return escalation_mask(self.scores, self.calibration.threshold, Overrides())

    def escalation_rate(self, rows: Sequence[int]) -> float:
        """Share of these images that escalate, 0..1."""
        return float(self.escalated[np.asarray(rows)].mean())


def read_images(record: Record, source: ImageSource, preprocessing: Preprocessing) -> Pool:
    """Read and decode the pool.

    Raises:
        PerfError: no image can be read.
    """
    with record.stage("read images", len(source)) as bar:
        pool = read_pool(source, preprocessing, bar.advance)
    for line in pool.unreadable:
        record.note(f"left out {line}")
    return pool


def prepare_bench(
    record: Record,
    target: Target,
    rung_set: GraphSet,
    calibration: Calibration,
    pool: Pool,
    suite: Suite,
    set_names: Sequence[str],
) -> Bench:
    """Score the pool and choose the sets.

    Raises:
        PerfError: too few images for a set.
        ClientError: the server does not answer as it should.
    """
    with record.stage("score images", len(pool)) as bar:
        scores = score_pool(target.grpc_url, pool, bar.advance)
    escalated = escalation_mask(scores, calibration.threshold, Overrides())
    sets = choose_sets(escalated, suite.mixed, suite.shares, suite.set_size, set_names)
    record.summary["images"] = {
        "source": pool.title,
        "pool": len(pool),
        "sets": {
            name: {"images": len(rows), "escalation_rate": sets.escalation_rate[name]}
            for name, rows in sets.rows.items()
        },
    }
    threshold_30 = threshold_for(scores[np.asarray(sets.rows["mixed"])], 0.3)
    candidates = systems(rung_set, target.models, calibration.threshold, threshold_30)
    return Bench(target, rung_set, calibration, pool, scores, sets, candidates, suite)


def ask_in_turn(record: Record, bench: Bench) -> dict[str, float]:
    """Every system on every mixed image, the systems in turn.

    Returns:
        The median cost of each system's request in milliseconds.
    """
    rows, suite = bench.sets.rows["mixed"], bench.suite
    shares = cut(rows, min(suite.shares, len(rows))) * suite.repeats
    with record.stage("systems in turn", sum(map(len, shares)) * len(bench.systems)) as bar:
        measured = one_in_flight(bench.target, bench.metered_asker, bench.systems, shares, bar)
        _keep(record, bench, measured, bench.systems, rows * suite.repeats)
    paired = measured.paired
    expected, rate = bench.sets.escalation_rate["mixed"], paired.escalation_rate(ADAPTIVE)
    if abs(rate - expected) > 1.5 / len(rows):  # one image may lie on the threshold
        raise PerfError(
            f"{rate:.1%} of the mixed images escalated, {expected:.1%} do at the local artifact's "
            "threshold: the server has another one; give the --calibration it was assembled with"
        )
    return {system.name: paired.cost(system.name).median for system in bench.systems}


def saturate(record: Record, bench: Bench) -> None:
    """Static low, static high and the cascade saturated, on the same cores, spans in turn."""
    target, suite = bench.target, bench.suite
    if target.server is None:
        record.note("the server is not ours, so systems cannot be given the same cores: no figures")
        return
    rows, in_flight = bench.sets.rows["mixed"], suite.concurrency[-1]
    names = (LOW, HIGH, ESCALATION, ADAPTIVE)
    systems = [system for system in bench.systems if system.name in names]
    spans = [rows] * suite.spans
    with record.stage("saturated, in turn", suite.spans * len(systems)) as bar:
        measured = saturated(target, bench.metered_asker, systems, spans, in_flight, bar)
        _keep(record, bench, measured, systems, rows * suite.spans)


def _keep(
    record: Record,
    bench: Bench,
    measured: cascade.Measured,
    asked: Sequence[System],
    rows: Sequence[int],
) -> None:
    """Add what systems answered about these images, in this order."""
    record.doubt(measured.load, measured.doubts)
    disagrees = is_a_loss(bench.calibration.chosen_by)
    record.summary |= measured.sections(asked, disagrees, _labels(bench, rows))


def _labels(bench: Bench, rows: Sequence[int]) -> list[int] | None:
    """Class indices, where the model names classes and every image has a label that it knows."""
    known = bench.rung_set.labels if bench.rung_set.task == "classes" else None
    labels = [bench.pool.labels[row] for row in rows]
    if known is None or any(label not in known for label in labels):
        return None
    return [known.index(str(label)) for label in labels]


def attribute_costs(record: Record, bench: Bench) -> None:
    """Where an adaptive request spends its time."""
    ensemble = bench.system(ENSEMBLE)
    if ensemble is None:
        record.note("the server has no adaptive_vit: where the time goes is not measured")
        return
    paths = {"kept": bench.sets.rows.get("easy", []), "escalated": bench.sets.rows.get("hard", [])}
    scoring = scoring_ms(bench.calibration)
    found: dict[str, Any] = {"kept": None, "escalated": None}
    with record.stage("where the time goes", sum(map(len, paths.values()))) as bar:
        for name, rows in paths.items():
            if rows:
                found[name] = attribute(
                    bench.target, bench.asker, ensemble, rows, scoring, bar.advance
                )
        rate = bench.sets.escalation_rate["mixed"]
        found["all"] = together(found["kept"], found["escalated"], rate)
        record.summary["attribution"] = found


def load_with_perf_analyzer(
    record: Record, bench: Bench, analyzer: Analyzer, costs_ms: Mapping[str, float]
) -> None:
    """Closed loops, then open loops at parts of what the closed ones reached.

    Raises:
        PerfAnalyzerError: a pass failed.
    """
    folder, suite, target = record.folder / "perf_analyzer", bench.suite, bench.target
    for file in folder.glob("*.csv"):  # an earlier run's
        file.unlink()
    sent = {
        name: sent_under_load(rows, bench.escalated, suite.set_size)
        for name, rows in bench.sets.rows.items()
    }
    for name, rows in sent.items():
        record.summary["images"]["sets"][name]["under_load"] = {
            "images": len(rows),
            "escalation_rate": bench.escalation_rate(rows),
        }
    has_http, is_local = target.http_url is not None, target.server is not None
    levels = closed_levels(suite, bench.systems, sent, has_http, is_local)
    # The inputs hold the images as text, a hundred megabytes that nobody wants to keep.
    with tempfile.TemporaryDirectory(prefix="perf-inputs-") as scratch:
        inputs = _write_inputs(Path(scratch), bench.pool, sent)
        runner = LoadRunner(target, analyzer, inputs, folder, suite.pass_s, costs_ms)
        closed = _run_levels(record, runner, levels, suite.turns, "closed loop")
        for name, entry in most_in_flight(closed).items():
            if name in COMPARED and entry.instability():
                record.note(f"under load, {name} did not stabilise: {entry.instability()}")
        levels = open_levels(suite, bench.systems, closed)
        _run_levels(record, runner, levels, suite.turns, "open loop")


def _write_inputs(
    folder: Path, pool: Pool, sent: Mapping[str, Sequence[int]]
) -> dict[str, dict[str, InputData]]:
    return {
        name: {
            "image": write_tensors(folder / f"{name}.json", [pool.tensors[row] for row in rows]),
            "image_bytes": write_bytes(
                folder / f"{name}-bytes.json", [pool.encoded[row] for row in rows]
            ),
        }
        for name, rows in sent.items()
    }


def _run_levels(
    record: Record, runner: LoadRunner, levels: Sequence[Level], turns: int, title: str
) -> list[Measured]:
    before = list(record.summary.get("systems", []))
    with record.stage(title, len(levels) * turns) as bar:

        def before_pass(level: Level, turn: int, measured: Sequence[Measured]) -> None:
            bar.describe(f"{title}, turn {turn + 1}: {level.slug}")
            finished = [entry.to_dict() for entry in measured if entry.passes]
            record.summary["systems"] = before + finished

        measured = runner.measure(levels, turns, before_pass, bar.advance)
        record.summary["systems"] = before + [entry.to_dict() for entry in measured]
    return measured


def compare_with_onnxruntime(record: Record, bench: Bench) -> None:
    """The served full rung beside ONNX Runtime without a server, at batch 1 and 8."""
    if bench.target.server is None:
        record.note("the server is not ours: its backend is not compared with ONNX Runtime")
        return
    suite = bench.suite
    images = np.stack([bench.pool.tensors[row] for row in bench.sets.rows["mixed"]])
    file = bench.rung_set.files["vit_high"]
    plan = list(zip((1, 8), suite.backend_rounds, suite.backend_pairs, strict=True))
    with record.stage("backend and ONNX Runtime", sum(r * p for _, r, p in plan)) as bar:
        for batch, rounds, pairs in plan:
            if batch > len(images):
                record.note(f"{len(images)} images do not fill a batch of {batch}: not compared")
                continue
            ratios = measure_backend(
                bench.target.grpc_url, file, images, batch, rounds, pairs, bar.advance
            )
            record.summary[f"standin_over_ort_b{batch}"] = ratios.to_dict()


def load_with_locust(record: Record, bench: Bench, images: str, seed: int) -> None:
    """Locust users against the ensemble: gRPC and HTTP, and in the full suite the shapes."""
    target, suite = bench.target, bench.suite
    if bench.system(ENSEMBLE) is None:
        return
    users, rate = suite.concurrency[-1], _half_capacity(record)
    runs: list[dict[str, Any]] = [{"protocol": "grpc"}]
    if target.http_url is not None:
        runs.append({"protocol": "http"})
    if suite.locust_shapes:
        runs += [
            {"protocol": "grpc", "user": "open", "rate": rate / users},
            {"protocol": "grpc", "shape": "ramp"},
            {"protocol": "grpc", "shape": "spike"},
        ]
    spec = f"sample:{seed}" if images == "sample" else images
    with record.stage("Locust", suite.locust_s * len(runs)) as bar:
        record.summary["locust"] = []
        for number, options in enumerate(runs):
            name = "-".join(str(options[key]) for key in options if key != "rate")
            bar.describe(f"Locust: {name}")
            entry = run_locust(
                target.url(options["protocol"]),
                spec,
                record.folder / "locust" / f"{number + 1}-{name}",
                users=users,
                seconds=suite.locust_s,
                on_second=bar.advance,
                **options,
            )
            record.summary["locust"].append(entry)


def _half_capacity(record: Record) -> float:
    """Half of what the ensemble reached on mixed images in a closed loop, requests per second."""
    reached = [
        entry["throughput_per_s"]["median"]
        for entry in record.summary["systems"]
        if (entry["system"], entry["set"]) == (ENSEMBLE, "mixed")
        and entry["load"]["loop"] == "closed"
    ]
    return float(max(reached)) / 2


def measure_peaks(record: Record, bench: Bench, repository: Path) -> None:
    """Peak memory of each system on servers of their own, under the same load.

    Raises:
        ServerError: a server did not start.
    """
    turns, suite = bench.suite.memory_turns, bench.suite
    rows = sent_under_load(bench.sets.rows["mixed"], bench.escalated, suite.set_size)
    load = PeakLoad(bench.pool, rows, suite.concurrency[-1])
    names = MEASURED if suite.every_system else COMPARED
    measured = [system for system in bench.systems if system.name in names]
    peaks: dict[str, list[MemoryUse]] = {system.name: [] for system in measured}
    with record.stage("peak memory", turns * len(measured)) as bar:
        for _ in range(turns):
            for system in measured:
                bar.describe(f"peak memory: {system.name}")
                use = peak_memory(system, repository, bench.rung_set, load)
                peaks[system.name].append(use)
                bar.advance()
            record.summary |= memory_figures(peaks)
