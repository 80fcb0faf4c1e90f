"""Serve what a road left, ask it about unseen crops, measure it, write what came of it."""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import version
from typing import Any

from rich.console import Console

from calibration.sample import crops as sample_crops
from imaging import Preprocessing
from perf.environment import cpu_name
from perf.measure.deployment import with_alternatives
from routing import Calibration, RungSet
from server import TritonServer

from .page import write_page
from .plan_summary import summarise_plan
from .roads import PLAN, TEST_CROPS, TEST_SEED, Road
from .saturated import measure_saturated
from .serve import ask_beside, image_tensors, measure, measure_overhead, query
from .steps import OUT
from .summary import summarise
from .systems import CORE, RUNG, recipes, resolutions_px, served_systems

START_S = 300.0  # every instance of every graph of a plan is loaded
SUMMARY, PAGE = OUT / "summary.json", OUT / "index.html"

console = Console(stderr=True)


def serve_and_measure(road: Road) -> dict[str, Any]:
    """Do it, and write summary.json and index.html.

    Returns:
        The content of summary.json.
    """
    console.rule(f"[bold]{road.last_title}", align="left")
    rung_set, calibration = RungSet.load(road.onnx), Calibration.load(road.artifact)
    systems, labels = served_systems(rung_set), rung_set.labels or ()
    alone = {name: model for name, model in systems.items() if name in (*CORE, RUNG)}
    crops = list(sample_crops(TEST_CROPS, TEST_SEED))
    tensors = image_tensors(crops, Preprocessing.from_dict(rung_set.preprocessing))
    repository, folder = road.repository, OUT / "perf"
    if road.plan is not None:
        repository = with_alternatives(repository, rung_set, PLAN / "served")
    with console.status("starting tritonserver"):
        server = TritonServer(repository, free_ports=True, timeout_s=START_S)
        server.start()
    try:
        served = query(server, crops, labels)
        if road.plan is not None:
            served = ask_beside(server, systems, tensors, served)
        passes = measure(server, alone, tensors, folder)
        overhead = measure_overhead(server, tensors)
        if road.plan is not None:
            saturated = measure_saturated(server, systems, tensors, folder)
        environment = {"triton_version": server.version, **describe_machine()}
    finally:
        server.stop()
    certificate = calibration.certificate or {}
    measured = (served, passes, overhead, certificate, environment)
    summary = summarise(rung_set.backbone, resolutions_px(rung_set), *measured)
    if road.plan is not None:
        rungs = (rung_set.rungs["vit_low"].recipe, rung_set.rungs["vit_high"].recipe)
        summary["plan"] = summarise_plan(
            recipes(rung_set), rungs, certificate, served.agreement(), saturated
        )
    SUMMARY.write_text(json.dumps(summary, indent=2) + "\n")
    data = [crop.data for crop in crops]
    report = str(road.report.relative_to(OUT))
    plan = None if road.plan is None else str(road.plan.relative_to(OUT))
    write_page(PAGE, summary, served, calibration.threshold, data, labels, report, plan)
    return summary


def describe_machine() -> dict[str, object]:
    """What the figures depend on."""
    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "onnxruntime": version("onnxruntime-gpu"),
    }
