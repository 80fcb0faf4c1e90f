"""Query the served demo and measure it with one request in flight."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import tritonclient.grpc as triton
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress

from calibration.images import SourceImage
from client import GrpcClient, HttpClient, Prediction
from imaging import Preprocessing, decode
from perf.analyzer import Load, run, write_tensors
from server import TritonServer

from .errors import DemoError
from .summary import Pass, Served
from .systems import HIGH, RUNG

console = Console(stderr=True)

SHARES = 5
NEVER_ESCALATE = 1e9  # far above any distance between embeddings
BATCH, CLIENTS = 8, 2  # of requests for answers that nobody times


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
        Progress(console=console) as progress,
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


def ask_beside(
    server: TritonServer,
    systems: Mapping[str, str],
    tensors: Sequence[NDArray[np.float32]],
    served: Served,
) -> Served:
    """Ask the graphs that `query` does not reach, each its model directly.

    Args:
        server: that has them.
        systems: the model to ask for each, see `systems.served_systems`.
        tensors: the N crops, each FP32 (3, H, W).
        served: what `query` returned; its `high` is what the router escalates to.

    Returns:
        The same with the answers of every graph, `high` those of the full FP32 model.
    """
    answers = {RUNG: served.high}
    others = [model for model in systems.values() if model not in ("vit_low", "router", RUNG)]
    batches = [np.stack(tensors[i : i + BATCH]) for i in range(0, len(tensors), BATCH)]
    logits = [triton.InferRequestedOutput("logits")]
    with (
        triton.InferenceServerClient(server.grpc_url) as client,
        ThreadPoolExecutor(CLIENTS) as threads,
        Progress(console=console) as progress,
    ):

        def ask(model: str, batch: NDArray[np.float32]) -> NDArray[np.int64]:
            image = triton.InferInput("image", list(batch.shape), "FP32")
            image.set_data_from_numpy(batch)
            answer = client.infer(model, [image], outputs=logits).as_numpy("logits")
            return np.asarray(answer.argmax(axis=1))

        for model in progress.track(others, description="graphs   "):
            asked = threads.map(ask, [model] * len(batches), batches)
            answers[model] = np.concatenate(list(asked))
    high = answers.pop(systems[HIGH])
    return replace(served, high=high, beside=answers)


def image_tensors(
    crops: Sequence[SourceImage], preprocessing: Preprocessing
) -> list[NDArray[np.float32]]:
    """The crops as image tensors, each FP32 (3, H, W)."""
    return [preprocessing(decode(crop.data)) for crop in crops]


def measure_overhead(
    server: TritonServer, tensors: Sequence[NDArray[np.float32]]
) -> list[tuple[float, float]]:
    """Latency in ms of static low and of the router told never to escalate, crop by crop.

    The two requests of a pair follow each other at once, so that what a shared machine does to
    one it does to the other; passes of seconds differ by more than the router costs.
    """
    pairs = []
    outputs = [triton.InferRequestedOutput(name) for name in ("embedding", "logits")]
    with (
        triton.InferenceServerClient(server.grpc_url) as client,
        Progress(console=console) as progress,
    ):
        for index, tensor in enumerate(progress.track(tensors, description="overhead ")):
            image = triton.InferInput("image", [1, *tensor.shape], "FP32")
            image.set_data_from_numpy(tensor[np.newaxis])

            def latency_ms(model: str, image: triton.InferInput = image) -> float:
                never = {"threshold": NEVER_ESCALATE} if model == "router" else None
                start = time.perf_counter()
                client.infer(model, [image], outputs=outputs, parameters=never)
                return 1e3 * (time.perf_counter() - start)

            if index % 2:  # nobody is always first
                router, low = latency_ms("router"), latency_ms("vit_low")
            else:
                low, router = latency_ms("vit_low"), latency_ms("router")
            pairs.append((low, router))
    return pairs


def measure(
    server: TritonServer,
    systems: Mapping[str, str],
    tensors: Sequence[NDArray[np.float32]],
    folder: Path,
) -> dict[str, list[Pass]]:
    """Measure each system with perf_analyzer on the crops, in shares, taking turns.

    No request warms up: the server has answered hundreds, and a connection's first request costs
    every system the same.

    Args:
        server: that has them.
        systems: the model to ask for each.
        tensors: the crops, each FP32 (3, H, W).
        folder: for perf_analyzer's reports.
    """
    names = list(systems)
    passes: dict[str, list[Pass]] = {name: [] for name in names}
    with Progress(console=console) as progress:
        task = progress.add_task("perf_analyzer", total=SHARES * len(names))
        for share in range(SHARES):
            inputs = write_tensors(folder / "crops.json", tensors[share::SHARES])
            turn = share % len(names)  # nobody is always first
            for name in names[turn:] + names[:turn]:
                progress.update(task, description=f"share {share + 1}: {name:10}")
                load = Load(
                    systems[name],
                    server.grpc_url,
                    inputs,
                    warmup_requests=0,
                    records=False,  # they would hold every image as text
                )
                figures = run(load, csv_path=folder / f"{share + 1}-{name}.csv").figures
                passes[name].append(
                    Pass(figures.requests, figures.latency_ms_p50, figures.throughput_per_s)
                )
                progress.advance(task)
    inputs.path.unlink()
    return passes
