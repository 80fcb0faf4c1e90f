"""Ask about many files with N requests in flight, one image per request."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import aclosing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .errors import ClientError
from .grpc_clients import AsyncGrpcClient
from .http_client import HttpClient
from .messages import Prediction
from .stream import in_order


@dataclass(frozen=True)
class Question:
    """What to ask about every file: the options of the clients' `infer`.

    Attributes:
        policy: `auto`, `low` or `high`.
        threshold: in oracle units; None keeps the calibrated one.
        timeout_s: allowed per image, in seconds.
    """

    policy: str = "auto"
    threshold: float | None = None
    timeout_s: float = 60.0


@dataclass(frozen=True)
class Outcome:
    """What became of one file: a prediction or an error.

    Attributes:
        file: as found.
        prediction: None where `error` is set.
        error: one line, None where `prediction` is set.
        latency_ms: from sending the bytes to having read the answer, with all tries.
    """

    file: Path
    prediction: Prediction | None
    error: str | None
    latency_ms: float


@dataclass(frozen=True)
class Summary:
    """Figures over all files; None where no file was answered.

    Attributes:
        images: files asked about.
        errors: files without an answer.
        escalated: answers from the full rung.
        escalation_rate: share of the answers, 0..1.
        latency_ms_p50: median over the answers.
        latency_ms_p95: 95th percentile over the answers.
        images_per_s: answers per second of wall time.
    """

    images: int
    errors: int
    escalated: int
    escalation_rate: float | None
    latency_ms_p50: float | None
    latency_ms_p95: float | None
    images_per_s: float | None


def _outcome(
    file: Path, started: float, prediction: Prediction | None, error: Exception | None
) -> Outcome:
    latency_ms = (time.perf_counter() - started) * 1e3
    if isinstance(error, OSError):
        return Outcome(file, None, f"cannot read it: {error.strerror}", latency_ms)
    return Outcome(file, prediction, None if error is None else str(error), latency_ms)


async def ask_grpc(
    url: str,
    files: Sequence[Path],
    question: Question,
    concurrency: int,
    done: Callable[[], None],
    **options: Any,
) -> list[Outcome]:
    """Ask over gRPC, with asyncio.

    Args:
        url: HOST:PORT.
        files: images.
        question: the same for every file.
        concurrency: requests in flight, at least 1.
        done: called after each file.
        options: of the client, see `ClientBase`.

    Returns:
        One outcome per file, in the order of `files`. A refused file does not stop the rest.
    """

    async def ask(file: Path) -> Outcome:
        started, prediction, failure = time.perf_counter(), None, None
        try:
            image = file.read_bytes()
            started = time.perf_counter()
            (prediction,) = await client.infer([image], **asdict(question))
        except (ClientError, OSError) as error:
            failure = error
        done()
        return _outcome(file, started, prediction, failure)

    async with (
        AsyncGrpcClient(url, **options) as client,
        aclosing(in_order(files, ask, concurrency)) as outcomes,
    ):
        return [outcome async for outcome in outcomes]


def ask_http(
    url: str,
    files: Sequence[Path],
    question: Question,
    concurrency: int,
    done: Callable[[], None],
    **options: Any,
) -> list[Outcome]:
    """Ask over HTTP, with threads; arguments and result as `ask_grpc`."""

    def ask(client: HttpClient, file: Path) -> Outcome:
        started, prediction, failure = time.perf_counter(), None, None
        try:
            image = file.read_bytes()
            started = time.perf_counter()
            (prediction,) = client.infer([image], **asdict(question))
        except (ClientError, OSError) as error:
            failure = error
        return _outcome(file, started, prediction, failure)

    with (
        HttpClient(url, concurrency=concurrency, **options) as client,
        ThreadPoolExecutor(concurrency) as pool,
    ):
        futures = [pool.submit(ask, client, file) for file in files]
        try:
            for _ in as_completed(futures):
                done()
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [future.result() for future in futures]


def summarise(outcomes: Sequence[Outcome], wall_s: float) -> Summary:
    """Figures over all files.

    Args:
        outcomes: one per file.
        wall_s: seconds from the first request to the last answer.
    """
    answered = [o for o in outcomes if o.prediction is not None]
    escalated = sum(o.prediction.escalated for o in answered if o.prediction is not None)
    count = len(answered)
    p50, p95 = (
        (float(p) for p in np.percentile([o.latency_ms for o in answered], [50, 95]))
        if answered
        else (None, None)
    )
    return Summary(
        images=len(outcomes),
        errors=len(outcomes) - count,
        escalated=escalated,
        escalation_rate=escalated / count if count else None,
        latency_ms_p50=p50,
        latency_ms_p95=p95,
        images_per_s=count / wall_s if count and wall_s > 0 else None,
    )
