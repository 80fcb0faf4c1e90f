"""One headless run of Locust on perf/locustfile.py, in a process of its own.

Locust replaces threads and sockets by gevent's in the process that imports it, so this one never
does.
"""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .figures import PerfError

ROOT = Path(__file__).resolve().parents[1]
LOCUSTFILE = ROOT / "perf/locustfile.py"
LONGEST_EXTRA_S = 90.0  # to read the images, and to wait for the last answers
_TOTAL = "Aggregated"  # Locust's name for the row over all names
_ERROR = re.compile(r"/(?:ERROR|CRITICAL)/[^:]*: (.*)|: error: (.*)")


def run_locust(
    url: str,
    images_spec: str,
    folder: Path,
    *,
    protocol: str,
    user: str = "closed",
    shape: str | None = None,
    users: int,
    seconds: int,
    rate: float | None = None,
    on_second: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Run Locust and read its figures.

    Args:
        url: HOST:PORT of the protocol's endpoint, which is `grpc` or `http`.
        images_spec: a folder, `sample` or `sample:SEED`.
        folder: where to leave Locust's CSV files, HTML page and log.
        protocol: of the requests.
        user: `closed`, one request after the other, or `open`, a Poisson process of `rate` each.
        shape: `ramp`, `spike`, or None for all users from beginning to end.
        users: how many; of a shape, the most.
        seconds: how long.
        rate: requests per second.
        on_second: called about once a second.

    Returns:
        One entry of `locust` in summary.json. Failed requests are in it.

    Raises:
        PerfError: Locust failed, with its own line, or sent no request.
    """
    folder.mkdir(parents=True, exist_ok=True)
    prefix = folder / "-".join(filter(None, (protocol, user, shape)))
    files = [LOCUSTFILE, *([ROOT / f"perf/shapes/{shape}.py"] if shape else [])]
    # Locust takes a comma for the end of a file's name, and whose clone it is may have one in its.
    named = ",".join(os.path.relpath(file) for file in files)
    command = [sys.executable, "-m", "locust", "-f", named]
    command += ["--headless", "--only-summary", "--host", url, "--images", images_spec]
    command += ["--users", str(users), "--spawn-rate", str(users), "--run-time", f"{seconds}s"]
    command += ["--csv", str(prefix), "--csv-full-history", "--html", f"{prefix}.html"]
    command += ["--rate", str(rate)] if rate is not None else []
    command.append(f"{protocol.title()}{'Open' if user == 'open' else ''}User")
    log, stats = Path(f"{prefix}.log"), Path(f"{prefix}_stats.csv")
    stats.unlink(missing_ok=True)  # an earlier run's
    code = _call(command, log, seconds + LONGEST_EXTRA_S, on_second)
    try:
        figures = read_stats(stats)
    except PerfError:
        figures = None
    if code not in (0, 1) or not figures or not figures["requests"]:
        raise PerfError(f"Locust: {own_line(log.read_text(errors='replace'), code)}")
    entry = {"protocol": protocol, "user": user, "shape": shape, "users": users}
    return entry | {"seconds": float(seconds)} | figures


def _call(
    command: list[str], log: Path, timeout_s: float, on_second: Callable[[], None] | None
) -> int:
    """Run to the end, which is ours at the latest."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    deadline = time.monotonic() + timeout_s
    with log.open("w") as output:
        running = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,  # Locust listens to the keyboard
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            while time.monotonic() < deadline:
                try:
                    return running.wait(timeout=1.0)
                except subprocess.TimeoutExpired:
                    if on_second:
                        on_second()
        finally:
            running.kill()
            running.wait()
    raise PerfError(f"Locust: not done within {timeout_s:g} s; see {log}")


def read_stats(path: Path) -> dict[str, Any]:
    """Read Locust's `_stats.csv`.

    Returns:
        `requests` (all), `failures`, `throughput_per_s` (answered requests only), `latency_ms` and
        `paths`. Locust rounds percentiles above 100 ms to two digits.

    Raises:
        PerfError: no such file, or Locust did not live to write a row.
    """
    try:
        with path.open(newline="") as file:
            rows = {row["Name"]: row for row in csv.DictReader(file)}
        total = rows[_TOTAL]
        requests, failures = int(total["Request Count"]), int(total["Failure Count"])
        answered_share = (requests - failures) / requests if requests else 0.0
        return {
            "requests": requests,
            "failures": failures,
            "throughput_per_s": answered_share * float(total["Requests/s"]),
            "latency_ms": {
                f"p{part}": None if (text := total[f"{part}%"]) == "N/A" else float(text)
                for part in (50, 95, 99)
            },
            "paths": {
                name: int(rows[name]["Request Count"]) if name in rows else 0
                for name in ("low", "high")
            },
        }
    except (OSError, KeyError, TypeError, ValueError):
        raise PerfError(f"{path} holds no figures of a Locust run") from None


def own_line(log: str, code: int) -> str:
    """What Locust said about its failure: its first error, else its last line."""
    if found := _ERROR.search(log):
        return found[1] or found[2]
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return lines[-1] if lines else f"it ended with code {code} and said nothing"
