"""`python -m demo`: export, calibrate, assemble, serve, query, measure, show."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from tritonclient.utils import InferenceServerException

from calibration.sample import crops as sample_crops
from client import ClientError
from imaging import Preprocessing
from perf.analyzer import PerfAnalyzerError
from perf.environment import cpu_name
from routing import Calibration, CalibrationError, RungSet, RungSetError
from server import ServerError, TritonServer

from .errors import DemoError
from .page import write_page
from .serve import image_tensors, measure, measure_overhead, query
from .steps import (
    ARTIFACT,
    BACKBONE,
    HIGH_PX,
    LOW_PX,
    ONNX,
    OUT,
    REPORT,
    REPOSITORY,
    prepare,
)
from .summary import summarise

ROOT = Path(__file__).resolve().parent.parent
TEST_CROPS, TEST_SEED = 200, 13  # a draw of their own, see steps.py

console = Console(stderr=True)


def serve_and_measure() -> dict[str, Any]:
    """Serve the repository, ask it about unseen crops, measure it, write the results."""
    console.rule("[bold]7/7 Serve, query and measure", align="left")
    rung_set = RungSet.load(ONNX)
    calibration = Calibration.load(ARTIFACT)
    labels = rung_set.labels
    crops = list(sample_crops(TEST_CROPS, TEST_SEED))
    with console.status("starting tritonserver"):
        server = TritonServer(REPOSITORY, free_ports=True)
        server.start()
    try:
        served = query(server, crops, labels)
        tensors = image_tensors(crops, Preprocessing.from_dict(rung_set.preprocessing))
        passes = measure(server, tensors, OUT / "perf")
        overhead = measure_overhead(server, tensors)
        environment = {"triton_version": server.version, **describe_machine()}
    finally:
        server.stop()
    resolutions_px = (LOW_PX, HIGH_PX)
    summary = summarise(
        BACKBONE, resolutions_px, served, passes, overhead, calibration.certificate, environment
    )
    (OUT / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    data = [crop.data for crop in crops]
    write_page(OUT / "index.html", summary, served, calibration.threshold, data, labels)
    return summary


def describe_machine() -> dict[str, object]:
    """What the figures depend on."""
    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "onnxruntime": version("onnxruntime-gpu"),
    }


def print_table(summary: dict[str, Any]) -> None:
    """The result on stdout."""
    table = Table(title=f"{summary['images']} unseen crops, {BACKBONE} at {LOW_PX}/{HIGH_PX} px")
    table.add_column("")
    for column in ("accuracy", "p50 latency", "images/s"):
        table.add_column(column, justify="right")
    names = {"low": "cheap rung always", "high": "full rung always", "adaptive": "adaptive"}
    for key, name in names.items():
        table.add_row(
            name,
            f"{summary['accuracy'][key]:.1%}",
            f"{summary['latency_ms_p50'][key]:.1f} ms",
            f"{summary['throughput_per_s'][key]:.1f}",
        )
    Console().print(table)
    print(
        f"{summary['speedup_vs_high']:.2f}x as fast as the full rung (bound "
        f"{summary['cascade_bound']:.2f}x, efficiency {summary['cascade_efficiency']:.2f}); "
        f"{summary['escalation_rate']:.1%} escalated; {summary['agreement_with_high']:.1%} "
        f"answered as the full rung; router overhead {summary['router_overhead']:.2f}"
    )
    certificate = summary["certificate"]
    print(
        f"certified before: risk at most {certificate['epsilon']:.0%} with confidence "
        f"{certificate['confidence']:.0%}; seen on these crops: {summary['realised_risk']:.1%}"
        if certificate["certified"]
        else "nothing is certified: every image goes to the full rung"
    )


def main(arguments: list[str] | None = None) -> None:
    """Run the demo, or its first six steps; a foreseeable error is one line and exit code 1."""
    parser = argparse.ArgumentParser(
        prog="python -m demo",
        description="Export, calibrate, serve, query and measure DINOv2 ViT-S/14 on crops of "
        "shipped photographs. Steps done before are not done again. Writes build/demo/.",
    )
    parser.add_argument(
        "--prepare",
        action="store_true",
        help="stop after step 6, with a model repository to serve or to measure",
    )
    only_prepare = parser.parse_args(arguments).prepare
    started = time.monotonic()
    os.chdir(ROOT)
    try:
        prepare()
        summary = None if only_prepare else serve_and_measure()
    except (
        CalibrationError,
        ClientError,
        DemoError,
        InferenceServerException,
        PerfAnalyzerError,
        RungSetError,
        ServerError,
    ) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("stopped; what was made so far is in build/demo", file=sys.stderr)
        sys.exit(130)
    seconds = time.monotonic() - started
    if summary is None:
        print(f"rungs in {ONNX}, calibration {ARTIFACT}, its report {REPORT}")
        print(f"took {seconds:.0f} s; serve with python -m server --repository {REPOSITORY}")
        return
    print_table(summary)
    print(f"took {seconds:.0f} s; open {OUT / 'index.html'} and {REPORT}")


if __name__ == "__main__":
    main()
