"""Run one pass of perf_analyzer and read its figures."""

from __future__ import annotations

import mmap
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from .inputs import InputData
from .installation import Analyzer, PerfAnalyzerError, find_analyzer
from .parse import (
    Figures,
    ParseError,
    Records,
    delayed_share,
    failure,
    figures,
    figures_from_csv,
    is_unstable,
    parse_csv,
    parse_records,
)


class UnstableError(PerfAnalyzerError):
    """The windows of a pass did not agree, so that it has no figures."""


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
            in flight (open loop); `concurrency` then has no meaning. The figures need `records`.
        rounds: how often each item is sent and measured.
        warmup_requests: sent before that, and discarded; at least one for each in flight. 0
            measures the connection's first request too.
        parameters: request parameters: str, int or bool. Over gRPC only, perf_analyzer has none
            over HTTP, and no floating-point ones: a threshold has to be a whole number.
        records: keep the raw time of each request. perf_analyzer then writes every input as
            text: 3 MB and 50 ms per request of a 224 px image, after the measurement. It cannot
            write NaN, the `score` under policy=high. Off, the figures are those of its CSV
            report.
        count_windows: if set, measure in windows of at least this many requests until they
            agree, instead of `rounds`. Items are then not covered equally, and records not kept.
        shared_memory: `none` or `system`.
        timeout_s: limit for the whole pass.
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
    records: bool = True
    count_windows: int | None = None
    shared_memory: str = "none"
    timeout_s: float = 600.0

    @property
    def keeps_records(self) -> bool:
        """Whether the figures come from raw records."""
        return self.records and self.count_windows is None

    @property
    def is_one_by_one(self) -> bool:
        """Whether each request waits for the one before."""
        return self.concurrency == 1 and self.rate_per_s is None

    @property
    def measured_requests(self) -> int:
        """How many requests the figures of a pass without windows stand on."""
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
        if self.rate_per_s is not None:
            if not self.keeps_records:
                raise ValueError("an open loop has figures from raw records only")
            if not 0 < self.rate_per_s <= self.measured_requests:
                raise ValueError("perf_analyzer wants at least as many requests as arrive a second")
        if self.parameters and self.protocol == "http":
            raise ValueError("perf_analyzer sends request parameters over gRPC only")
        for name, value in self.parameters.items():
            if not isinstance(value, str | int):
                # It accepts name:0.25:float and sends nothing.
                raise ValueError(f"{name}: perf_analyzer sends no {type(value).__name__} parameter")


@dataclass(frozen=True, eq=False)
class AnalyzerResult:
    """One pass.

    Attributes:
        load: what was sent.
        figures: latency and throughput, without the warm-up. From the raw records where kept.
        records: each measured request; None if not kept.
        report: perf_analyzer's CSV row by its column names, times in microseconds. Has the
            server's times (`Server Queue`, `Server Compute Infer`, ...), and counts in a warm-up
            that was the head of the same pass (`records` at concurrency 1).
        delayed: share of an open loop's requests that were sent later than planned, because this
            machine could not keep up; 0..1.
    """

    load: Load
    figures: Figures
    records: Records | None
    report: Mapping[str, float]
    delayed: float = 0.0


def run(
    load: Load, analyzer: Analyzer | None = None, csv_path: Path | None = None
) -> AnalyzerResult:
    """Measure one pass.

    Args:
        load: what to send.
        analyzer: the program; found if not given.
        csv_path: where to keep perf_analyzer's CSV report; dropped if not given.

    Raises:
        PerfAnalyzerError: it is missing, failed (its own message) or wrote no report.
        UnstableError: with `count_windows`, where the windows did not agree.
    """
    analyzer = analyzer or find_analyzer()
    export_path = None
    with tempfile.TemporaryDirectory(prefix="perf_analyzer_") as scratch:
        report_path = csv_path or Path(scratch) / "report.csv"
        report_path.parent.mkdir(parents=True, exist_ok=True)
        if load.keeps_records:
            export_path = Path(scratch) / "export.json"
        head = _head(load)
        if load.warmup_requests > head:
            # In a closed loop: an open one has to have more requests than arrive a second.
            closed = replace(load, rate_per_s=None)
            warmup = max(load.warmup_requests, load.concurrency)  # it refuses fewer than in flight
            _call(analyzer, load, _arguments(closed, warmup, report_path))
        count = None if load.count_windows else head + load.measured_requests
        said = _call(analyzer, load, _arguments(load, count, report_path, export_path))
        try:
            report = parse_csv(report_path.read_text())
            records = None if export_path is None else _measured(load, export_path)
            values = _csv_figures(load, report) if records is None else figures(records)
        except (OSError, ParseError) as error:
            raise PerfAnalyzerError(f"perf_analyzer on {load.model}: {error}") from None
    return AnalyzerResult(load, values, records, report, delayed_share(said))


def _head(load: Load) -> int:
    """How many requests of the measured pass are its warm-up; the rest of it is a pass before.

    Items are sent in turn, so one request at a time the warm-up can be cut off the same pass and
    each item is still measured equally often. With several in flight a cut by time would not fall
    between rounds.
    """
    return load.warmup_requests if load.keeps_records and load.is_one_by_one else 0


def _csv_figures(load: Load, report: Mapping[str, float]) -> Figures:
    windows = load.count_windows is not None
    requests = load.count_windows or load.measured_requests
    return figures_from_csv(report, requests, load.concurrency, windows)


def _measured(load: Load, export: Path) -> Records:
    size = export.stat().st_size
    with export.open("rb") as file:
        file.seek(max(0, size - 1))
        complete = file.read() == b"}"
        if not complete:
            raise ParseError(
                "it broke off writing the raw records, as it does where an output holds NaN; "
                "measure with records=False"
            )
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            records = parse_records(data)
    if load.shared_memory != "none":
        # perf_analyzer exports its own unset buffer there, not the output.
        records = replace(records, escalated=None)
    expected = _head(load) + load.measured_requests
    if len(records) != expected:
        raise ParseError(f"{len(records)} requests recorded, {expected} asked for")
    return records.after(_head(load))


def _arguments(
    load: Load, count: int | None, report: Path, export: Path | None = None
) -> list[str]:
    """The command line for `count` requests, or for windows where that is None."""
    arguments = ["-m", load.model, "-u", load.url, "-i", load.protocol]
    arguments += ["--input-data", str(load.inputs.path)]
    if load.rate_per_s is None:
        arguments += ["--concurrency-range", str(load.concurrency)]
    else:
        # Asynchronous: its default is a few threads that each wait for their answer, which no more
        # lets requests arrive than a closed loop does.
        arguments += ["--request-rate-range", f"{load.rate_per_s:.4f}"]
        arguments += ["--request-distribution", "poisson", "--async"]
    if count is not None:
        arguments += ["--request-count", str(count)]
    else:
        arguments += ["--measurement-mode", "count_windows"]
        arguments += ["--measurement-request-count", str(load.count_windows)]
    if load.shared_memory != "none":
        arguments += ["--shared-memory", load.shared_memory]
    for name, value in load.parameters.items():
        kind = {bool: "bool", int: "int"}.get(type(value), "string")
        text = str(value).lower() if kind == "bool" else str(value)
        arguments += ["--request-parameter", f"{name}:{text}:{kind}"]
    arguments += ["-f", str(report), "--verbose-csv"]
    if export is not None:
        arguments += ["--profile-export-file", str(export)]
    return arguments


def _call(analyzer: Analyzer, load: Load, arguments: list[str]) -> str:
    """Run it and return what it printed."""
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
    except subprocess.TimeoutExpired:
        raise PerfAnalyzerError(
            f"perf_analyzer on {load.model}: not done within {load.timeout_s:g} s"
        ) from None
    except OSError as error:
        raise PerfAnalyzerError(f"perf_analyzer does not start: {error.strerror}") from None
    if ran.returncode != 0:
        kind = UnstableError if is_unstable(ran.stdout) else PerfAnalyzerError
        raise kind(f"perf_analyzer on {load.model} at {load.url}: {failure(ran.stdout)}")
    return ran.stdout
