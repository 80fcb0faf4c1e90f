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
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .analyzer_install import Analyzer, PerfAnalyzerError
from .systems import System

_NO_STATISTICS = "failed to find the requested model version"
WARMUP_REQUESTS = 4
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


def write_inputs(path: Path, images: Sequence[bytes] | Sequence[NDArray[np.float32]]) -> InputData:
    """Write what is sent as `image_bytes`, encoded images, or as `image`, tensors (3, H, W)."""
    steps = []
    for image in images:
        if isinstance(image, bytes):
            # An element of a serialised BYTES tensor starts with its length, 4 bytes little-endian.
            name, content, shape = "image_bytes", struct.pack("<I", len(image)) + image, [1]
        else:
            name, content, shape = "image", image.astype("<f4").tobytes(), list(image.shape)
        encoded = base64.b64encode(content).decode("ascii")
        steps.append({name: {"content": {"b64": encoded}, "shape": shape}})
    path.write_text(json.dumps({"data": steps}))
    return InputData(path, len(steps))


@dataclass(frozen=True)
class Level:
    """One system under one load: requests always in flight, or arriving at a rate.

    perf_analyzer sends no request parameters over HTTP, nor floating-point ones over gRPC.

    Attributes:
        system: what is asked.
        set_name: `easy`, `hard` or `mixed`.
        concurrency: requests in flight (closed loop); 0 in an open loop.
        rate_per_s: mean rate of a Poisson process, however many are in flight (open loop).
        protocol: `grpc` or `http`.
        shared_memory: `none` or `system`.
    """

    system: System
    set_name: str = "mixed"
    concurrency: int = 0
    rate_per_s: float | None = None
    protocol: str = "grpc"
    shared_memory: str = "none"

    @property
    def slug(self) -> str:
        """Names its raw files."""
        load = f"c{self.concurrency}" if self.concurrency else f"rate{self.rate_per_s:.3g}"
        shm = "-shm" if self.shared_memory == "system" else ""
        return f"{self.system.name}-{self.set_name}-{load}-{self.protocol}{shm}"


@dataclass(frozen=True)
class Pass:
    """One pass in numbers, without its warm-up.

    Attributes:
        requests: how many the figures stand on.
        throughput_per_s: requests per second. Not perf_analyzer's own figure, which divides by
            whole seconds: of a closed loop concurrency / mean latency (Little's law), of an open
            loop the rate of its arrivals.
        latency_ms: `mean`, `p50`, `p95` and `p99`.
        delayed: share of an open loop's requests that were sent later than planned, because this
            machine could not keep up; 0..1.
        server: Triton's times during the pass, warm-up included, by model.
        server_cpu_ms: CPU time of the server's processes per request; None for a remote server.
    """

    requests: int
    throughput_per_s: float
    latency_ms: Mapping[str, float]
    delayed: float = 0.0
    server: Mapping[str, Counter[str]] = field(default_factory=dict)
    server_cpu_ms: float | None = None


def run(
    level: Level,
    url: str,
    inputs: InputData,
    rounds: int,
    analyzer: Analyzer,
    report: Path,
    timeout_s: float = 120.0,
) -> Pass:
    """Measure one pass, after a warm-up of its own.

    Args:
        level: the system and its load.
        url: HOST:PORT of the protocol's endpoint.
        inputs: what to send.
        rounds: how often each item is sent and measured; perf_analyzer wants at least as many
            requests as are in flight, or arrive a second.
        analyzer: the program.
        report: where to keep its CSV report.
        timeout_s: limit in seconds; a pass that has not ended is made once more.

    Raises:
        PerfAnalyzerError: it failed (its own message), or wrote no report.
    """
    report.parent.mkdir(parents=True, exist_ok=True)
    arguments = ["-m", level.system.model, "-u", url, "-i", level.protocol]
    arguments += ["--input-data", str(inputs.path), "-f", str(report), "--verbose-csv"]
    if level.shared_memory != "none":
        arguments += ["--shared-memory", level.shared_memory]
    for name, value in level.system.parameters.items():
        kind = "int" if isinstance(value, int) else "string"
        arguments += ["--request-parameter", f"{name}:{value}:{kind}"]
    closed = ["--concurrency-range", str(level.concurrency or 1)]
    # Asynchronous: its default is a few threads that each wait for their answer, which no more
    # lets requests arrive than a closed loop does.
    poisson = ["--request-distribution", "poisson", "--async"]
    rate = level.rate_per_s
    loop = closed if rate is None else ["--request-rate-range", f"{rate:.4f}", *poisson]
    # The warm-up is a closed loop: an open one has to have more requests than arrive a second.
    warm_up, count = max(WARMUP_REQUESTS, level.concurrency), rounds * inputs.items
    _call(analyzer, [*arguments, *closed, "--request-count", str(warm_up)], timeout_s)
    said = _call(analyzer, [*arguments, *loop, "--request-count", str(count)], timeout_s)
    try:
        latency_ms = read_report(report.read_text())
    except (OSError, ValueError) as error:
        raise PerfAnalyzerError(f"perf_analyzer on {level.system.model}: {error}") from None
    throughput = rate or level.concurrency * 1e3 / latency_ms["mean"]
    return Pass(count, throughput, latency_ms, delayed_share(said))


def read_report(text: str) -> dict[str, float]:
    """The latencies of a `--verbose-csv` report, whose times are microseconds, in milliseconds.

    Raises:
        ValueError: there is no row of results, or a column is missing.
    """
    row = next(csv.DictReader(io.StringIO(text)), None)
    columns = {"mean": "Avg latency", **{p: f"{p} latency" for p in ("p50", "p95", "p99")}}
    if row is None or not set(columns.values()) <= set(row):
        raise ValueError("the CSV report of perf_analyzer has no row of latencies")
    return {name: float(row[column]) / 1e3 for name, column in columns.items()}


def _call(analyzer: Analyzer, arguments: list[str], timeout_s: float) -> str:
    """Run it and return what it printed; a second time where it did not end, or saw no statistics.

    Version 2.50 may wait for ever in an open loop over HTTP, where the server has answered all; and
    it may look at the server's statistics before those of a short pass are in them.
    """
    model, url = arguments[1], arguments[3]
    for is_last in (False, True):
        try:
            ran = subprocess.run(
                [str(analyzer.path), *arguments],
                env=analyzer.environment(url),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                encoding="utf-8",
                errors="replace",
                timeout=timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired:
            continue
        except OSError as error:
            raise PerfAnalyzerError(f"perf_analyzer does not start: {error.strerror}") from None
        if ran.returncode == 0:
            return ran.stdout
        reason = failure(ran.stdout)
        if is_last or _NO_STATISTICS not in reason:
            raise PerfAnalyzerError(f"perf_analyzer on {model} at {url}: {reason}")
    raise PerfAnalyzerError(f"perf_analyzer on {model}: not done within {timeout_s:g} s, twice")


def failure(output: str) -> str:
    """The line in which perf_analyzer says why it failed, of its stdout and stderr."""
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
