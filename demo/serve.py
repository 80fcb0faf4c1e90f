"""Query the served demo, and measure it: one request in flight, and of a plan saturated."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress

from calibration.images import SourceImage
from client import GrpcClient, HttpClient, Prediction
from imaging import Preprocessing, decode
from perf.cpu import on_same_cores
from perf.harness import ONE_BY_ONE, Answer, Asker, Load, Paired, believed, cut, take_turns
from perf.images import Pool
from perf.target import Target
from server import TritonServer

from .errors import DemoError
from .systems import CORE, NEVER, RUNG, asked, name_of

console = Console(stderr=True)

SHARES = 5  # of the crops; a figure is the median of theirs
TURNS = 3  # of saturated spans, each a part of the crops
IN_FLIGHT = 16


@dataclass(frozen=True, eq=False)
class Measured:
    """What was measured, and why it cannot be believed where it cannot.

    Attributes:
        paired: shares of the crops, each with every system's answers in the crops' order.
        doubts: one clause each; none: it can be believed.
        cpu_counts: whether CPU time was held against the clock, see `Paired.doubts`.
    """

    paired: Paired
    doubts: Sequence[str]
    cpu_counts: bool = True

    def classes(self, system: str) -> NDArray[np.int64]:
        """Top-1 class of each crop, (N,)."""
        return np.array([_top1(answer.logits) for answer in self._answers(system)])

    def _answers(self, system: str) -> list[Answer]:
        return [answer for share in self.paired.shares for answer in share[name_of(system)]]


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
        Progress(console=console) as progress,
    ):
        for name, client in (("gRPC", grpc), ("HTTP", http)):
            predictions[name] = [
                client.infer([crop.data])[0]
                for crop in progress.track(crops, description=f"over {name}")
            ]
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


def measure(target: Target, systems: Mapping[str, str], pool: Pool) -> Measured:
    """One request in flight: the systems of `CORE`, what escalations go to, and the router's cost.

    The systems take turns crop by crop.

    Args:
        target: the server, asked by nobody else.
        systems: the model to ask for each, see `systems.served_systems`.
        pool: the crops.
    """
    names = [name for name in (*CORE, RUNG) if name in systems]
    alone = [asked(name, systems) for name in names]
    asker, threads = Asker(target, pool, True, target.meter()), target.cpu_threads()
    shares = cut(range(len(pool)), SHARES)
    with Progress(console=console) as progress:
        task = progress.add_task("one at a time", total=len(pool) * (len(alone) + 1))

        def once() -> Paired:
            advance = _advance(progress, task)
            return take_turns(asker, [*alone, NEVER], shares, ONE_BY_ONE, advance)

        return Measured(*believed(once, threads == 1, _again(progress, task)), threads == 1)


def measure_saturated(target: Target, systems: Mapping[str, str], pool: Pool) -> Measured:
    """Many requests in flight: every system on spans of the crops, in turn, on the same cores.

    Args:
        target: the server, on this machine, asked by nobody else.
        systems: the model to ask for each, see `systems.served_systems`.
        pool: the crops.
    """
    every = [asked(name, systems) for name in systems]
    spans, load = cut(range(len(pool)), TURNS), Load(IN_FLIGHT, block=None)
    asker, threads = Asker(target, pool, True, target.meter()), target.cpu_threads()
    assert target.server is not None
    with (
        on_same_cores(target.server.process_ids(), threads or 1),
        Progress(console=console) as progress,
    ):
        task = progress.add_task("saturated", total=TURNS * len(every))

        def once() -> Paired:
            advance = _advance(progress, task)
            return take_turns(asker, every, spans, load, advance, warm_up=2 * IN_FLIGHT)

        counts = threads is not None
        return Measured(*believed(once, counts, _again(progress, task)), counts)


def _advance(progress: Progress, task: Any) -> Callable[[], None]:
    return lambda: progress.advance(task)


def _again(progress: Progress, task: Any) -> Callable[[str], None]:
    return lambda words: progress.reset(task, description=words)
