"""One pass of perf_analyzer: give it real images, run it, read the report it wrote.

perf_analyzer repeats one random input unless it is given data, and one input sends a router down
one path for ever. All images go into a *single* stream, as its steps: of several streams a model
without sequences is sent the first only.
"""

from __future__ import annotations

import base64
import csv
import io
import json
import re
import struct
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .analyzer_install import Analyzer, PerfAnalyzerError

# Most telling first: the server's own sentence, then what perf_analyzer says about itself.
_FAILURES = (
    re.compile(r"^Thread \[\d+\] had error: (.+)$", re.M),
    re.compile(r"^error: (.+)$", re.M),
    re.compile(r"^Error: (.+)$", re.M),
    re.compile(r"^((?:failed|Failed) .+)$", re.M),
    re.compile(r"^(.*error while loading shared libraries.*)$", re.M),
)


@dataclass(frozen=True)
class InputData:
    """A written input file.

    Attributes:
        path: the file.
        items: how many inputs it holds. They are sent in turn, so that a request count of
            k x items sends each of them k times, at any concurrency.
    """

    path: Path
    items: int


def write_tensors(path: Path, images: Sequence[NDArray[np.float32]]) -> InputData:
    """Write image tensors, FP32, each of shape (3, H, W), for an input named `image`.

    Raises:
        ValueError: no image, or one of another dtype.
    """
    if any(image.dtype != np.float32 for image in images):
        raise ValueError("image tensors must be float32")
    elements = [_element(np.asarray(i, dtype="<f4").tobytes(), i.shape) for i in images]
    return _write(path, "image", elements)


def write_bytes(path: Path, images: Sequence[bytes]) -> InputData:
    """Write encoded images for a BYTES input of shape [1] named `image_bytes`.

    Raises:
        ValueError: no image.
    """
    # Each element of a serialised BYTES tensor starts with its length, 4 bytes little-endian.
    elements = [_element(struct.pack("<I", len(image)) + image, (1,)) for image in images]
    return _write(path, "image_bytes", elements)


def _element(content: bytes, shape: Sequence[int]) -> dict[str, Any]:
    encoded = base64.b64encode(content).decode("ascii")
    return {"content": {"b64": encoded}, "shape": list(shape)}


def _write(path: Path, name: str, elements: Sequence[dict[str, Any]]) -> InputData:
    if not elements:
        raise ValueError("there is no image to write an input file from")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"data": [{name: element} for element in elements]}))
    return InputData(path, len(elements))


@dataclass(frozen=True)
class Load:
    """What one pass sends: a number of requests always in flight, or a rate of arrivals.

    Attributes:
        model: the model to measure.
        url: HOST:PORT of the protocol's endpoint.
        inputs: what to send. Every item is sent equally often.
        protocol: `grpc` or `http`.
        concurrency: requests in flight (closed loop).
        rate_per_s: if set, requests arrive at this mean rate as a Poisson process, however many are
            in flight (open loop); `concurrency` then has no meaning.
        rounds: how often each item is sent and measured.
        warmup_requests: sent in a pass of their own before that; at least one for each in flight. 0
            measures the connection's first request too.
        parameters: request parameters: str, int or bool. Over gRPC only, perf_analyzer has none
            over HTTP, and no floating-point ones: a threshold has to be a whole number.
        shared_memory: `none` or `system`.
        timeout_s: limit for the pass in seconds; one that has not ended is made once more.
    """

    model: str
    url: str
    inputs: InputData
    protocol: str = "grpc"
    concurrency: int = 1
    rate_per_s: float | None = None
    rounds: int = 1
    warmup_requests: int = 10
    parameters: Mapping[str, str | int | bool] = field(default_factory=dict)
    shared_memory: str = "none"
    timeout_s: float = 120.0

    @property
    def requests(self) -> int:
        """How many requests the figures stand on."""
        return self.rounds * self.inputs.items

    def __post_init__(self) -> None:
        """Refuse what perf_analyzer would drop silently or answer with its whole help text.

        Raises:
            ValueError: with the field's name.
        """
        if self.protocol not in ("grpc", "http"):
            raise ValueError(f"protocol must be grpc or http, not {self.protocol!r}")
        if self.shared_memory not in ("none", "system"):
            raise ValueError(f"shared_memory must be none or system, not {self.shared_memory!r}")
        if min(self.concurrency, self.rounds) < 1 or self.warmup_requests < 0:
            raise ValueError("concurrency and rounds start at 1, warmup_requests at 0")
        if self.rate_per_s is not None and not 0 < self.rate_per_s <= self.requests:
            raise ValueError("perf_analyzer wants at least as many requests as arrive a second")
        if self.parameters and self.protocol == "http":
            raise ValueError("perf_analyzer sends request parameters over gRPC only")
        for name, value in self.parameters.items():
            if not isinstance(value, str | int):
                # It accepts name:0.25:float and sends nothing.
                raise ValueError(f"{name}: perf_analyzer sends no {type(value).__name__} parameter")


@dataclass(frozen=True)
class Figures:
    """One pass in numbers, without its warm-up.

    Attributes:
        requests: how many the figures stand on.
        throughput_per_s: requests per second. Not perf_analyzer's own figure, which divides by
            whole seconds: of a closed loop concurrency / mean latency (Little's law), of an open
            loop the rate of its arrivals.
        latency_ms_mean: milliseconds, as the following.
        latency_ms_p50: median.
        latency_ms_p95: 95th percentile.
        latency_ms_p99: 99th percentile.
        delayed: share of an open loop's requests that were sent later than planned, because this
            machine could not keep up; 0..1.
    """

    requests: int
    throughput_per_s: float
    latency_ms_mean: float
    latency_ms_p50: float
    latency_ms_p95: float
    latency_ms_p99: float
    delayed: float = 0.0


def run(load: Load, analyzer: Analyzer, csv_path: Path | None = None) -> Figures:
    """Measure one pass.

    Args:
        load: what to send.
        analyzer: the program.
        csv_path: where to keep perf_analyzer's CSV report; dropped if not given.

    Raises:
        PerfAnalyzerError: it failed (its own message), or wrote no report.
    """
    with tempfile.TemporaryDirectory(prefix="perf_analyzer_") as scratch:
        report = csv_path or Path(scratch) / "report.csv"
        report.parent.mkdir(parents=True, exist_ok=True)
        if load.warmup_requests:
            # In a closed loop: an open one has to have more requests than arrive a second.
            warmup = max(load.warmup_requests, load.concurrency)  # it refuses fewer than in flight
            _call(analyzer, load, _arguments(replace(load, rate_per_s=None), warmup, report))
        said = _call(analyzer, load, _arguments(load, load.requests, report))
        try:
            return read_report(report.read_text(), load, delayed_share(said))
        except (OSError, ValueError) as error:
            raise PerfAnalyzerError(f"perf_analyzer on {load.model}: {error}") from None


def read_report(text: str, load: Load, delayed: float = 0.0) -> Figures:
    """The figures of a `--verbose-csv` report, whose times are microseconds.

    Raises:
        ValueError: there is no row of results, or a column is missing.
    """
    row = next(csv.DictReader(io.StringIO(text)), None)
    if row is None or "Inferences/Second" not in row:
        raise ValueError("the CSV report of perf_analyzer has no result row")
    try:
        columns = ("Avg latency", *(f"p{p} latency" for p in (50, 95, 99)))
        mean_ms, p50, p95, p99 = (float(row[column]) / 1e3 for column in columns)
    except KeyError as error:
        raise ValueError(f"the CSV report of perf_analyzer has no column {error}") from None
    throughput = load.rate_per_s or load.concurrency * 1e3 / mean_ms
    return Figures(load.requests, throughput, mean_ms, p50, p95, p99, delayed)


def _arguments(load: Load, count: int, report: Path) -> list[str]:
    """The command line for `count` requests."""
    arguments = ["-m", load.model, "-u", load.url, "-i", load.protocol]
    arguments += ["--input-data", str(load.inputs.path)]
    if load.rate_per_s is None:
        arguments += ["--concurrency-range", str(load.concurrency)]
    else:
        # Asynchronous: its default is a few threads that each wait for their answer, which no more
        # lets requests arrive than a closed loop does.
        arguments += ["--request-rate-range", f"{load.rate_per_s:.4f}"]
        arguments += ["--request-distribution", "poisson", "--async"]
    arguments += ["--request-count", str(count)]
    if load.shared_memory != "none":
        arguments += ["--shared-memory", load.shared_memory]
    for name, value in load.parameters.items():
        kind = {bool: "bool", int: "int"}.get(type(value), "string")
        text = str(value).lower() if kind == "bool" else str(value)
        arguments += ["--request-parameter", f"{name}:{text}:{kind}"]
    return [*arguments, "-f", str(report), "--verbose-csv"]


def _call(analyzer: Analyzer, load: Load, arguments: list[str]) -> str:
    """Run it and return what it printed; a second time where it did not end.

    Version 2.50 may wait for ever in an open loop over HTTP, where the server has answered all.
    """
    try:
        return _call_once(analyzer, load, arguments)
    except subprocess.TimeoutExpired:
        pass
    try:
        return _call_once(analyzer, load, arguments)
    except subprocess.TimeoutExpired:
        raise PerfAnalyzerError(
            f"perf_analyzer on {load.model}: not done within {load.timeout_s:g} s, twice"
        ) from None


def _call_once(analyzer: Analyzer, load: Load, arguments: list[str]) -> str:
    try:
        ran = subprocess.run(
            [str(analyzer.path), *arguments],
            env=analyzer.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            timeout=load.timeout_s,
            check=False,
        )
    except OSError as error:
        raise PerfAnalyzerError(f"perf_analyzer does not start: {error.strerror}") from None
    if ran.returncode != 0:
        said = failure(ran.stdout)
        raise PerfAnalyzerError(f"perf_analyzer on {load.model} at {load.url}: {said}")
    return ran.stdout


def failure(output: str) -> str:
    """The line in which perf_analyzer says why it failed.

    Args:
        output: its stdout and stderr.
    """
    said, usage, _ = f"\n{output}".partition("\nUsage:")
    for pattern in _FAILURES:
        if found := pattern.search(said):
            return found[1].strip()
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    if lines:
        return lines[-1]
    # Release 2.60 refuses an option without a word about which.
    return "it refused its options and printed its usage" if usage else "it said nothing"


def delayed_share(output: str) -> float:
    """Share of an open loop's requests that perf_analyzer says it sent late, 0..1."""
    found = re.search(r"([\d.]+)% of the requests were delayed", output)
    return float(found[1]) / 100 if found else 0.0
