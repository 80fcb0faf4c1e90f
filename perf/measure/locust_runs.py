"""One headless Locust run, and what its CSV says."""

from __future__ import annotations

import csv
import io
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import PerfError

PERF = Path(__file__).resolve().parents[1]
USERS = {
    ("grpc", "closed"): "GrpcUser",
    ("http", "closed"): "HttpUser",
    ("grpc", "open"): "GrpcOpenUser",
    ("http", "open"): "HttpOpenUser",
}
SHAPES = ("ramp", "spike")
IMAGE_LIMIT = 200
EXIT_MISSED = 1  # its objective, or requests failed: a result
_POLL_S = 0.2
_GRACE_S = 60.0  # for its start, and for the last answers
_PERCENTILES = {"p50": "50%", "p95": "95%", "p99": "99%"}


def run_locust(
    url: str,
    images_spec: str,
    folder: Path,
    *,
    protocol: str,
    user: str = "closed",
    shape: str | None = None,
    users: int,
    seconds: float,
    rate: float | None = None,
    slo_p95_ms: float | None = None,
    on_second: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Run Locust and read what it measured.

    Args:
        url: HOST:PORT of the protocol.
        images_spec: a folder, `sample` or `sample:SEED`.
        folder: for its CSV files and its HTML report.
        protocol: `grpc` or `http`.
        user: `closed`, the next request after the answer; `open`, at a planned rate.
        shape: `ramp` or `spike` instead of all users at once.
        users: how many; with a shape at most.
        seconds: how long, whole seconds count.
        rate: requests per second of each open user.
        slo_p95_ms: an objective for the 95th percentile, milliseconds.
        on_second: called once for each second of it.

    Returns:
        An entry of the summary's `locust`. A missed objective and failed requests are results.

    Raises:
        PerfError: Locust could not measure; its own line.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = [PERF / "locustfile.py", *([PERF / "shapes" / f"{shape}.py"] if shape else [])]
    command = [sys.executable, "-m", "locust", "-f", ",".join(map(str, files))]
    command += ["--headless", "--only-summary", "--host", url, "--images", images_spec]
    command += ["--users", str(users), "--spawn-rate", str(users), "--run-time", f"{seconds:.0f}s"]
    command += ["--image-limit", str(IMAGE_LIMIT)]
    command += ["--csv", str(folder / "locust"), "--html", str(folder / "locust.html")]
    if rate is not None:
        command += ["--rate", f"{rate:g}"]
    if slo_p95_ms is not None:
        command += ["--slo-p95-ms", f"{slo_p95_ms:g}"]
    command.append(USERS[protocol, user])
    code = _run(command, folder / "locust.log", seconds, on_second or (lambda: None))
    if code not in (0, EXIT_MISSED):
        raise PerfError(f"Locust could not measure {url}: {_reason(folder / 'locust.log')}")
    entry = {"protocol": protocol, "user": user, "shape": shape, "users": users}
    slo = None if slo_p95_ms is None else {"p95_ms": slo_p95_ms, "met": code == 0}
    measured = parse_stats((folder / "locust_stats.csv").read_text(), protocol)
    return {**entry, "seconds": seconds, **measured, "slo": slo}


def _run(command: list[str], log: Path, seconds: float, on_second: Callable[[], None]) -> int:
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=PERF.parent, stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
    start, told = time.monotonic(), 0
    try:
        while process.poll() is None:
            elapsed = time.monotonic() - start
            if told < min(elapsed, seconds):
                on_second()
                told += 1
            if elapsed > seconds + _GRACE_S:
                raise PerfError(f"Locust did not end within {seconds + _GRACE_S:.0f} s; see {log}")
            time.sleep(_POLL_S)
        return process.returncode
    finally:
        process.kill()  # nothing where it has ended
        process.wait()


def _reason(log: Path) -> str:
    """Its last error line, without time and module."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "/ERROR/" in line or line.startswith("locust: error")]
    line = (errors or lines or ["it said nothing"])[-1]
    return re.sub(r"^\[.*?\] \S+/ERROR/\S+: ", "", line)


def parse_stats(text: str, protocol: str) -> dict[str, Any]:
    """Read Locust's `*_stats.csv`.

    Args:
        text: the file.
        protocol: whose requests count as paths.

    Returns:
        `requests`, `failures`, `throughput_per_s`, `latency_ms` (p50, p95, p99; None without a
        request) and `paths`, the number of answers by name (`low`, `high`).

    Raises:
        PerfError: it is no such file.
    """
    rows = list(csv.DictReader(io.StringIO(text)))
    total = next((row for row in rows if row.get("Name") == "Aggregated"), None)
    if total is None:
        raise PerfError("Locust's CSV has no row of totals; it ended before it measured")
    requests = int(total["Request Count"])
    return {
        "requests": requests,
        "failures": int(total["Failure Count"]),
        "throughput_per_s": float(total["Requests/s"]),
        "latency_ms": {
            name: float(total[column]) if requests else None
            for name, column in _PERCENTILES.items()
        },
        "paths": {
            row["Name"]: int(row["Request Count"]) - int(row["Failure Count"])
            for row in rows
            if row["Type"] == protocol and row["Name"] in ("low", "high")
        },
    }
