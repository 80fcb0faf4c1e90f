"""Read what perf_analyzer wrote. Pure: text and bytes in, figures out."""

from __future__ import annotations

import csv
import io
import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# The profile export carries every input and output of every request and copies BYTES inputs raw,
# so it is neither small nor valid UTF-8: a JSON parser would refuse it or take gigabytes. These
# three keys are all that is needed. Inside a string their quotes are escaped, so data cannot
# pass for a key.
_TOKEN = re.compile(
    rb'"timestamp":(?P<start>\d+)'
    rb'|"response_timestamps":\[(?P<ends>[\d,]*)\]'
    rb'|"escalated":(?P<escalated>true|false)'
)


class ParseError(ValueError):
    """A file is not what perf_analyzer writes. The message is one line."""


@dataclass(frozen=True, eq=False)
class Records:
    """Every request of one pass, ordered by start.

    Attributes:
        start_ns: when each request was sent, int64, shape (N,), Unix time in nanoseconds.
        end_ns: when its (last) response had arrived, int64, shape (N,).
        escalated: bool, shape (N,); None where the model has no such output.
    """

    start_ns: NDArray[np.int64]
    end_ns: NDArray[np.int64]
    escalated: NDArray[np.bool_] | None

    def __len__(self) -> int:
        return len(self.start_ns)

    @property
    def latency_ms(self) -> NDArray[np.float64]:
        """Send to response, milliseconds, shape (N,)."""
        return (self.end_ns - self.start_ns) / 1e6

    def after(self, count: int) -> Records:
        """Without the first `count` requests, the warm-up."""
        escalated = None if self.escalated is None else self.escalated[count:]
        return Records(self.start_ns[count:], self.end_ns[count:], escalated)


@dataclass(frozen=True)
class Figures:
    """One pass in numbers.

    Attributes:
        requests: how many the figures stand on.
        throughput_per_s: requests per second.
        latency_ms_mean: milliseconds, as the following.
        latency_ms_p50: median.
        latency_ms_p95: 95th percentile.
        latency_ms_p99: 99th percentile.
        escalation_rate: share of requests, 0..1; None where it is not known.
    """

    requests: int
    throughput_per_s: float
    latency_ms_mean: float
    latency_ms_p50: float
    latency_ms_p95: float
    latency_ms_p99: float
    escalation_rate: float | None


def parse_records(export: bytes | memoryview) -> Records:
    """Read the profile export of one load level.

    Args:
        export: the file's bytes, or a memory map of it.

    Returns:
        The requests ordered by start.

    Raises:
        ParseError: it holds no request, or one without a response.
    """
    starts: list[int] = []
    ends: list[int] = []
    escalated: list[bool] = []
    for token in _TOKEN.finditer(export):
        if token["start"] is not None:
            starts.append(int(token["start"]))
        elif token["ends"]:
            ends.append(int(token["ends"].rsplit(b",", 1)[-1]))
        elif token["escalated"] is not None:
            escalated.append(token["escalated"] == b"true")
    if not starts:
        raise ParseError("the profile export holds no request")
    if len(ends) != len(starts):
        raise ParseError(
            f"the profile export holds {len(starts)} requests but {len(ends)} responses"
        )
    order = np.argsort(np.asarray(starts, dtype=np.int64), kind="stable")
    return Records(
        start_ns=np.asarray(starts, dtype=np.int64)[order],
        end_ns=np.asarray(ends, dtype=np.int64)[order],
        escalated=np.asarray(escalated)[order] if len(escalated) == len(starts) else None,
    )


def figures(records: Records) -> Figures:
    """Figures from raw records.

    Throughput counts from the first request sent to the last response. perf_analyzer's own
    figure is no use in request-count mode: it divides by whole seconds.

    Args:
        records: at least one request.

    Raises:
        ParseError: no request is left.
    """
    if not len(records):
        raise ParseError("no request is left after the warm-up")
    latency_ms = records.latency_ms
    p50, p95, p99 = (float(p) for p in np.percentile(latency_ms, [50, 95, 99]))
    span_s = float(records.end_ns.max() - records.start_ns.min()) / 1e9
    escalated = records.escalated
    return Figures(
        requests=len(records),
        throughput_per_s=len(records) / span_s,
        latency_ms_mean=float(latency_ms.mean()),
        latency_ms_p50=p50,
        latency_ms_p95=p95,
        latency_ms_p99=p99,
        escalation_rate=None if escalated is None else float(escalated.mean()),
    )


def parse_csv(text: str) -> dict[str, float]:
    """Read the report of `-f`, one load level.

    Args:
        text: the file; `--verbose-csv` adds columns such as `Avg latency`.

    Returns:
        Columns by name, as perf_analyzer calls them. Times are microseconds. Empty and
        non-numeric cells are left out.

    Raises:
        ParseError: there is no row, or it is not such a report.
    """
    row = next(csv.DictReader(io.StringIO(text)), None)
    if row is None or "Inferences/Second" not in row:
        raise ParseError("the CSV report of perf_analyzer has no result row")
    values: dict[str, float] = {}
    for column, cell in row.items():
        try:
            values[column] = float(cell)
        except (TypeError, ValueError):
            continue
    return values


def figures_from_csv(
    report: dict[str, float], requests: int, concurrency: int, windows: bool
) -> Figures:
    """Figures from perf_analyzer's own report, where no raw records were kept.

    Args:
        report: what `parse_csv` returned for a `--verbose-csv` report.
        requests: how many were sent (request-count mode) or asked for per window.
        concurrency: requests in flight, closed loop.
        windows: the pass was measured in windows, whose reported throughput is right. In
            request-count mode it is not (see `figures`); there throughput is
            concurrency / mean latency (Little's law).

    Raises:
        ParseError: a column is missing.
    """
    try:
        mean_ms = report["Avg latency"] / 1e3
        percentiles = [report[f"p{p} latency"] / 1e3 for p in (50, 95, 99)]
        throughput = report["Inferences/Second"] if windows else concurrency * 1e3 / mean_ms
    except KeyError as error:
        raise ParseError(f"the CSV report of perf_analyzer has no column {error}") from None
    return Figures(requests, throughput, mean_ms, *percentiles, escalation_rate=None)


# Most telling first: the server's own sentence, then what perf_analyzer says about itself.
_FAILURES = (
    re.compile(r"^Thread \[\d+\] had error: (.+)$", re.M),
    re.compile(r"^error: (.+)$", re.M),
    re.compile(r"^Error: (.+)$", re.M),
    re.compile(r"^((?:failed|Failed) .+)$", re.M),
    re.compile(r"^(.*error while loading shared libraries.*)$", re.M),
)


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


def is_unstable(output: str) -> bool:
    """Whether perf_analyzer gave up because its windows did not agree."""
    return "Failed to obtain stable measurement" in output


def delayed_share(output: str) -> float:
    """Share of an open loop's requests that perf_analyzer says it sent late, 0..1."""
    found = re.search(r"([\d.]+)% of the requests were delayed", output)
    return float(found[1]) / 100 if found else 0.0
