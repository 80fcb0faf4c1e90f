"""`python -m perf run`: measure the deployed cascade beside what a user would run instead.

images ─► pool, scored by the router ─► easy, hard and mixed sets
server ─► systems in turn ─► saturated ─► where the time goes ─► loads ─► ONNX Runtime ─► ...
└────────► summary.json, report.html
"""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from bundle.graphs import GraphSet
from calibration.fidelity import Fidelity
from calibration.images import ImageSource
from imaging import Preprocessing
from routing import Calibration
from server import TritonServer

from . import stages
from .analyzer_install import Analyzer, find_analyzer
from .environment import environment
from .figures import PerfError
from .images import open_pool_source
from .record import Record
from .repository import assembled, with_alternatives
from .suites import Suite
from .target import Target


@dataclass(frozen=True)
class Options:
    """What the command line asks for.

    Attributes:
        images: `sample`, or a folder.
        seed: of sample crops.
        suite: how much to measure.
        sets: of `easy`, `hard` and `mixed`.
        onnx: folder of the rungs.
        calibration: the artifact.
        repository: the assembled model repository, for a server of our own.
        url: gRPC HOST:PORT of a server that already runs; None starts one.
        http_url: its HTTP HOST:PORT.
        out: folder for the summary, the report and raw files.
    """

    images: str
    seed: int
    suite: Suite
    sets: tuple[str, ...]
    onnx: Path
    calibration: Path
    repository: Path
    url: str | None
    http_url: str | None
    out: Path


@dataclass(frozen=True)
class Inputs:
    """Everything that is needed before a server is started."""

    analyzer: Analyzer
    rung_set: GraphSet
    calibration: Calibration
    source: ImageSource


def prepare(options: Options) -> Inputs:
    """Find everything, so that what is missing is said at once.

    Raises:
        PerfError: perf_analyzer or the repository is missing, or there is no cascade.
        GraphsError: no rungs.
        CalibrationError: no artifact, or one of other rungs.
        ImagesError: no images.
    """
    analyzer = find_analyzer()
    rung_set = GraphSet.load(options.onnx)
    calibration = Calibration.load(options.calibration)
    calibration.check_rungs(rung_set.files)
    if calibration.threshold is None:
        raise PerfError(
            "nothing was certified, so the router sends every image to the full rung and there is "
            "nothing to compare; python -m calibration fit --escalation-rate 0.1 makes a cascade"
        )
    if options.url is None:
        assembled(options.repository)
    source = open_pool_source(options.images, options.seed, options.suite.pool)
    options.out.mkdir(parents=True, exist_ok=True)
    return Inputs(analyzer, rung_set, calibration, source)


def measure(options: Options, console: Console) -> Record:
    """Measure everything; what was measured is kept whatever happens.

    Raises:
        PerfError, ServerError, ClientError: measuring cannot start, or could not go on.
    """
    inputs = prepare(options)
    with Record(options.out, console, _header(options, inputs)) as record:
        pool = stages.read_images(
            record, inputs.source, Preprocessing.from_dict(inputs.rung_set.preprocessing)
        )
        with _target(options, inputs, record) as target:
            record.summary["environment"] = _environment(options, inputs, target)
            if options.url is not None:
                target.check(inputs.rung_set, inputs.calibration, pool.tensors[0])
            bench = stages.prepare_bench(
                record,
                target,
                inputs.rung_set,
                inputs.calibration,
                pool,
                options.suite,
                options.sets,
            )
            costs = stages.ask_in_turn(record, bench)
            # Once more, while the clocks of a GPU are those it is measured at.
            record.summary["environment"] = _environment(options, inputs, target)
            stages.saturate(record, bench)
            stages.attribute_costs(record, bench)
            stages.load_with_perf_analyzer(record, bench, inputs.analyzer, costs)
            stages.compare_with_onnxruntime(record, bench)
            stages.load_with_locust(record, bench, options.images, options.seed)
        if options.url is None:
            stages.measure_peaks(record, bench, _served(options))
    return record


def _environment(options: Options, inputs: Inputs, target: Target) -> dict[str, Any]:
    found = environment(target.version, inputs.analyzer.version())
    if options.url is not None:
        found["device"] += " (the client's; the server is elsewhere)"
    return found


def _served(options: Options) -> Path:
    """The repository that a server of ours serves."""
    return options.out / "model_repository"


def _header(options: Options, inputs: Inputs) -> dict[str, Any]:
    return {
        "command": f"python -m perf {shlex.join(sys.argv[1:])}",
        "suite": options.suite.name,
        "model": model_section(inputs.rung_set),
        "certificate": inputs.calibration.certificate,
        "fidelity": Fidelity.of(inputs.calibration).agreement(),
    }


def model_section(rung_set: GraphSet) -> dict[str, Any]:
    """What is served; `reference` where the full rung is not the full model."""
    reference = rung_set.reference_record
    return {
        **({} if reference is None else {"reference": reference.recipe}),
        "backbone": rung_set.backbone,
        "image_shape": list(rung_set.image_shape),
        "low": rung_set.rungs["vit_low"].recipe,
        "high": rung_set.rungs["vit_high"].recipe,
        "embedding_dim": rung_set.embedding_dim,
        "classes": rung_set.classes,
    }


@contextlib.contextmanager
def _target(options: Options, inputs: Inputs, record: Record) -> Iterator[Target]:
    if options.url is not None:
        record.note("the server is not ours: its memory and its CPU time are not measured")
        with Target(options.url, options.http_url, None) as target:
            yield target
        return
    folder = with_alternatives(options.repository, inputs.rung_set, _served(options))
    if not inputs.rung_set.beside:
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
