"""Query the served demo, and measure it: one request in flight, and of a plan saturated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from calibration.images import SourceImage
from client import GrpcClient, HttpClient, Prediction
from imaging import Preprocessing, decode
from perf.cascade import Measured, one_in_flight, saturated
from perf.harness import Asker, cut
from perf.images import Pool
from perf.systems import ESCALATION, System
from perf.target import Target
from report.terminal import Bars
from server import TritonServer

from .errors import DemoError
from .systems import CORE, NEVER

bars = Bars(Console(stderr=True))

SHARES = 5  # of the crops; a figure is the median of theirs
TURNS = 3  # of saturated spans, each a part of the crops
IN_FLIGHT = 16


def classes(measured: Measured, system: str) -> NDArray[np.int64]:
    """Top-1 class that a system gave each crop, (N,)."""
    shares = measured.paired.shares
    return np.array([_top1(a.logits) for share in shares for a in share[system]])


@dataclass(frozen=True, eq=False)
class Asked:
    """The server's own decisions about the N crops, sent as image bytes.

    Attributes:
        classes: top-1, (N,).
        escalated: (N,).
        score: oracle units, (N,).
    """

    classes: NDArray[np.int64]
    escalated: NDArray[np.bool_]
    score: NDArray[np.float32]


def query(server: TritonServer, crops: Sequence[SourceImage]) -> Asked:
    """Ask for every crop, one request each, over gRPC and over HTTP.

    Raises:
        DemoError: gRPC and HTTP did not give the same answers.
    """
    predictions: dict[str, list[Prediction]] = {}
    with (
        GrpcClient(server.grpc_url) as grpc,
        HttpClient(server.http_url) as http,
    ):
        for name, client in (("gRPC", grpc), ("HTTP", http)):
            predictions[name] = []
            with bars.stage(f"over {name}", len(crops)) as bar:
                for crop in crops:
                    predictions[name] += client.infer([crop.data])
                    bar.advance()
    found = {
        name: Asked(
            np.array([_top1(prediction.logits) for prediction in answers]),
            np.array([prediction.escalated for prediction in answers]),
            np.array([prediction.score for prediction in answers]),
        )
        for name, answers in predictions.items()
    }
    one, other = found["gRPC"], found["HTTP"]
    same = np.array_equal(one.classes, other.classes)
    if not same or not np.array_equal(one.escalated, other.escalated):
        raise DemoError("gRPC and HTTP gave different answers for the same crops")
    return one


def _top1(logits: NDArray[np.float32] | None) -> int:
    assert logits is not None  # every graph of the demo has a head
    return int(logits.argmax())


def image_pool(crops: Sequence[SourceImage], preprocessing: Preprocessing) -> Pool:
    """The crops as the graphs take them."""
    tensors = [preprocessing(decode(crop.data)) for crop in crops]
    data = [crop.data for crop in crops]
    return Pool("crops", data, tensors, [crop.label for crop in crops], ())


def measure(target: Target, systems: Mapping[str, System], pool: Pool) -> Measured:
    """One request in flight: the systems of `CORE`, what escalations go to, and the router's cost.

    The systems take turns crop by crop.

    Args:
        target: the server, asked by nobody else.
        systems: what is served, see `systems.served_systems`.
        pool: the crops.
    """
    alone = [systems[name] for name in (*CORE, ESCALATION, NEVER) if name in systems]
    asker, shares = Asker(target, pool, True, target.meter()), cut(range(len(pool)), SHARES)
    with bars.stage("one at a time", len(pool) * len(alone)) as bar:
        return one_in_flight(target, asker, alone, shares, bar)


def measure_saturated(target: Target, systems: Mapping[str, System], pool: Pool) -> Measured:
    """Many requests in flight: every system on spans of the crops, in turn, on the same cores.

    Args:
        target: the server, on this machine, asked by nobody else.
        systems: what is served, see `systems.served_systems`.
        pool: the crops.
    """
    every = [system for name, system in systems.items() if name != NEVER]
    asker, spans = Asker(target, pool, True, target.meter()), cut(range(len(pool)), TURNS)
    with bars.stage("saturated", TURNS * len(every)) as bar:
        return saturated(target, asker, every, spans, IN_FLIGHT, bar)
