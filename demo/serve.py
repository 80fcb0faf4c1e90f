"""Query and measure the served demo: every crop over gRPC and HTTP, then perf_analyzer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.progress import Progress

from calibration.images import SourceImage
from client import GrpcClient, HttpClient, Prediction
from imaging import Preprocessing, decode
from perf.analyzer import Load, run
from perf.inputs import write_tensors
from server import TritonServer

from .summary import SYSTEMS, Pass, Served

SHARES = 5
NEVER_ESCALATE = 1_000_000_000  # far above any distance between embeddings
_MODELS = {"low": "vit_low", "high": "vit_high", "adaptive": "router", "adaptive_0": "router"}


class DemoError(RuntimeError):
    """Something the demo shows did not hold. One line."""


def query(server: TritonServer, crops: Sequence[SourceImage], labels: Sequence[str]) -> Served:
    """Ask for every crop, one request each: adaptive over gRPC and HTTP, static low and high.

    Raises:
        DemoError: gRPC and HTTP did not give the same answers.
    """
    predictions: dict[str, list[Prediction]] = {}
    passes = (("adaptive", "auto"), ("http", "auto"), ("low", "low"), ("high", "high"))
    with (
        GrpcClient(server.grpc_url) as grpc,
        HttpClient(server.http_url) as http,
        Progress() as progress,
    ):
        for name, policy in passes:
            client = http if name == "http" else grpc
            predictions[name] = [
                client.infer([crop.data], policy=policy)[0]
                for crop in progress.track(crops, description=f"{name:9}")
            ]
    classes = {
        name: np.array([prediction.logits.argmax() for prediction in answers])
        for name, answers in predictions.items()
    }
    escalated = {
        name: np.array([prediction.escalated for prediction in predictions[name]])
        for name in ("adaptive", "http")
    }
    same = np.array_equal(classes["adaptive"], classes["http"])
    if not same or not np.array_equal(escalated["adaptive"], escalated["http"]):
        raise DemoError("gRPC and HTTP gave different answers for the same crops")
    return Served(
        low=classes["low"],
        high=classes["high"],
        adaptive=classes["adaptive"],
        escalated=escalated["adaptive"],
        score=np.array([prediction.score for prediction in predictions["adaptive"]]),
        truth=np.array([labels.index(crop.label) for crop in crops]),
    )


def measure(
    server: TritonServer,
    crops: Sequence[SourceImage],
    preprocessing: Preprocessing,
    folder: Path,
) -> dict[str, list[Pass]]:
    """Measure each of `SYSTEMS` on the crops' tensors, in shares, taking turns.

    No request warms up: the server has answered hundreds, and a connection's first request costs
    every system the same.
    """
    tensors = [preprocessing(decode(crop.data)) for crop in crops]
    passes: dict[str, list[Pass]] = {system: [] for system in SYSTEMS}
    with Progress() as progress:
        task = progress.add_task("perf_analyzer", total=SHARES * len(SYSTEMS))
        for share in range(SHARES):
            inputs = write_tensors(folder / "crops.json", tensors[share::SHARES])
            turn = share % len(SYSTEMS)  # nobody is always first
            for system in SYSTEMS[turn:] + SYSTEMS[:turn]:
                progress.update(task, description=f"share {share + 1}: {system:10}")
                never = {"threshold": NEVER_ESCALATE} if system == "adaptive_0" else {}
                load = Load(
                    _MODELS[system],
                    server.grpc_url,
                    inputs,
                    warmup_requests=0,
                    parameters=never,
                    records=False,  # they would hold every image as text
                )
                figures = run(load, csv_path=folder / f"{share + 1}-{system}.csv").figures
                passes[system].append(
                    Pass(figures.requests, figures.latency_ms_p50, figures.throughput_per_s)
                )
                progress.advance(task)
    inputs.path.unlink()
    return passes
