"""`python -m demo`: export, calibrate or plan, assemble, serve, query, measure, show."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from tritonclient.utils import InferenceServerException

from calibration.sample import crops as sample_crops
from client import ClientError
from imaging import Preprocessing
from perf.analyzer import PerfAnalyzerError
from perf.environment import cpu_name
from perf.errors import PerfError
from perf.measure.deployment import with_alternatives
from routing import Calibration, CalibrationError, RungSet, RungSetError
from server import ServerError, TritonServer

from .errors import DemoError
from .page import write_page
from .plan_summary import summarise_plan
from .roads import (
    BACKBONE,
    MAX_RISK,
    PLAN,
    TEST_CROPS,
    TEST_SEED,
    Road,
    planned,
    prepare_road,
    resolutions,
)
from .saturated import measure_saturated
from .serve import ask_graphs, image_tensors, measure, measure_overhead, query
from .steps import OUT
from .summary import summarise
from .systems import CORE, HIGH, RUNG, recipes, served_systems
from .tables import plan_table, result_table, sentences

ROOT = Path(__file__).resolve().parent.parent
START_S = 300.0  # every graph of a plan is loaded once for each instance

console = Console(stderr=True)


def serve_and_measure(road: Road) -> dict[str, Any]:
    """Serve the repository, ask it about unseen crops, measure it, write the results."""
    console.rule(f"[bold]{road.last_title}", align="left")
    rung_set = RungSet.load(road.onnx)
    calibration = Calibration.load(road.artifact)
    certificate = calibration.certificate
    crops = list(sample_crops(TEST_CROPS, TEST_SEED))
    tensors = image_tensors(crops, Preprocessing.from_dict(rung_set.preprocessing))
    systems = served_systems(rung_set)
    alone = {name: model for name, model in systems.items() if name in (*CORE, RUNG)}
    repository, folder = road.repository, OUT / "perf"
    if road.plan is not None:
        repository = with_alternatives(repository, rung_set, PLAN / "served")
    with console.status("starting tritonserver"):
        server = TritonServer(repository, free_ports=True, timeout_s=START_S)
        server.start()
    try:
        served = query(server, crops, rung_set.labels)
        if road.plan is not None:
            asked = [m for name, m in systems.items() if m not in ("vit_low", RUNG, "router")]
            answers = ask_graphs(server, asked, tensors)
            if systems[HIGH] != RUNG:
                answers[RUNG] = served.high
                served = replace(served, high=answers.pop(systems[HIGH]))
            served = replace(served, beside=answers)
        passes = measure(server, alone, tensors, folder)
        overhead = measure_overhead(server, tensors)
        saturated = (
            None if road.plan is None else measure_saturated(server, systems, tensors, folder)
        )
        environment = {"triton_version": server.version, **describe_machine()}
    finally:
        server.stop()
    return {}
