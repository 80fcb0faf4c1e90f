"""Serve what a road left, ask it about unseen crops, measure it, write what came of it."""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import version
from typing import Any

import numpy as np
from rich.console import Console

from bundle.graphs import GraphSet
from calibration.images import SampleImages
from imaging import Preprocessing
from perf.environment import cpu_name
from perf.repository import with_alternatives
from perf.target import Target
from routing import Calibration
from server import TritonServer

from .page import write_page
from .plan_summary import summarise_plan
from .roads import PLAN, TEST_CROPS, TEST_SEED, Road
from .serve import image_pool, measure, measure_saturated, query
from .steps import OUT
from .summary import Served, summarise
from .systems import recipes, resolutions_px, served_systems

START_S = 300.0  # every instance of every graph of a plan is loaded
SUMMARY, PAGE = OUT / "summary.json", OUT / "index.html"

console = Console(stderr=True)


def serve_and_measure(road: Road) -> dict[str, Any]:
    """Do it, and write summary.json and index.html.

    Returns:
        The content of summary.json.
    """
    console.rule(f"[bold]{road.last_title}", align="left")
    rung_set, calibration = GraphSet.load(road.onnx), Calibration.load(road.artifact)
    systems, labels = served_systems(rung_set), rung_set.labels or ()
    crops = list(SampleImages(TEST_CROPS, TEST_SEED))
    pool = image_pool(crops, Preprocessing.from_dict(rung_set.preprocessing))
    repository, saturated = road.repository, None
    if road.plan is not None:
        repository = with_alternatives(repository, rung_set, PLAN / "served")
    with console.status("starting tritonserver"):
        server = TritonServer(repository, free_ports=True, timeout_s=START_S, stop_patience_s=0)
        server.start()
    try:
        own = query(server, crops)
        with Target(server.grpc_url, server.http_url, server) as target:
            alone = measure(target, systems, pool)
            if road.plan is not None:
                saturated = measure_saturated(target, systems, pool)
        environment = {"triton_version": server.version, **describe_machine()}
    finally:
        server.stop()
    certificate = calibration.certificate or {}
    truth = np.array([labels.index(crop.label) for crop in crops])
    served = Served.of(own, truth, alone, saturated, systems)
    summary = summarise(
        rung_set.backbone, resolutions_px(rung_set), served, alone, certificate, environment
    )
    if saturated is not None:
        rungs = (rung_set.low.record.recipe, rung_set.high.record.recipe)
        summary["plan"] = summarise_plan(
            recipes(rung_set), rungs, certificate, served.agreement(), saturated
        )
        summary["disturbed"] = summary["disturbed"] or summary["plan"]["disturbed"]
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
