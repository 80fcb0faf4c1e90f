"""Parsers against what perf_analyzer 2.50 and 2.60 really wrote (data/perf_analyzer_*).

Recorded against a small Python model of the same outputs as the router: 10 requests over five
inputs, some of which the model escalates by a fixed rule.
"""

import json
from pathlib import Path

import numpy as np
import pytest

from perf.analyzer.parse import (
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

VERSIONS = ("2.50", "2.60")


@pytest.fixture(params=VERSIONS)
def data(request):
    """Where the outputs of one version lie."""
    return Path(__file__).parent / "data" / f"perf_analyzer_{request.param}"


def as_json(export):
    """The slow way to read an export, which works where it is small."""
    return json.loads(export.decode("utf-8", errors="replace"))["experiments"][0]["requests"]


@pytest.mark.parametrize("name", ["export.json", "export_concurrency_2.json"])
def test_records_equal_a_full_reading_of_the_export(data, name):
    export = (data / name).read_bytes()
    records = parse_records(export)
    requests = sorted(as_json(export), key=lambda request: request["timestamp"])
    assert len(records) == len(requests) == 10
    assert records.start_ns.tolist() == [r["timestamp"] for r in requests]
    assert records.end_ns.tolist() == [r["response_timestamps"][-1] for r in requests]
    assert records.escalated.tolist() == [r["response_outputs"][0]["escalated"] for r in requests]
    assert 0 < records.escalated.sum() < 10


def test_the_recorded_export_is_not_valid_utf8(data):
    # Why the export is not read as JSON.
    with pytest.raises(UnicodeDecodeError):
        (data / "export.json").read_bytes().decode("utf-8")


def test_records_agree_with_perf_analyzers_own_report(data):
    export = (data / "export.json").read_bytes()
    found = figures(parse_records(export))
    report = parse_csv((data / "report.csv").read_text())
    assert found.latency_ms_mean * 1e3 == pytest.approx(report["Avg latency"], abs=1)
    # Its percentiles take the sample below, ours interpolate.
    latency_us = parse_records(export).latency_ms * 1e3
    assert np.abs(latency_us - report["p50 latency"]).min() <= 1


def test_throughput_is_of_the_time_used_not_of_whole_seconds(data):
    found = figures(parse_records((data / "export.json").read_bytes()))
    report = parse_csv((data / "report.csv").read_text())
    assert report["Inferences/Second"] < 10  # ten requests, rounded up to a second
    assert found.throughput_per_s == pytest.approx(1e3 / found.latency_ms_mean, rel=0.05)


def test_figures_on_a_case_done_by_hand():
    start = np.array([0, 10, 20, 30]) * 1_000_000
    records = Records(
        start, start + np.array([4, 6, 8, 10]) * 1_000_000, np.array([0, 0, 1, 1]) > 0
    )
    found = figures(records)
    assert found.requests == 4
    assert found.throughput_per_s == pytest.approx(4 / 0.040)
    assert (found.latency_ms_mean, found.latency_ms_p50) == (7.0, 7.0)
    assert found.escalation_rate == 0.5
    rest = figures(records.after(2))
    assert (rest.requests, rest.latency_ms_mean, rest.escalation_rate) == (2, 9.0, 1.0)
    with pytest.raises(ParseError, match="no request"):
        figures(records.after(4))


def test_requests_written_out_of_order_are_sorted_with_their_answers():
    export = (
        b'{"timestamp":20,"response_timestamps":[29],"response_outputs":[{"escalated":true}]},'
        b'{"timestamp":10,"response_timestamps":[11,12],"response_outputs":[{"escalated":false}]}'
    )
    records = parse_records(export)
    assert records.start_ns.tolist() == [10, 20]
    assert records.end_ns.tolist() == [12, 29]  # the last response ends the request
    assert records.escalated.tolist() == [False, True]


def test_data_that_looks_like_a_key_is_data():
    export = (
        rb'{"timestamp":10,"request_inputs":{"image_bytes":"\"timestamp\":99 \"escalated\":true"},'
        rb'"response_timestamps":[12],"response_outputs":[{"embedding":[1.0]}]}'
    )
    records = parse_records(export)
    assert records.start_ns.tolist() == [10]
    assert records.escalated is None


@pytest.mark.parametrize(
    "export", [b"", b"{}", b'{"timestamp":10,"response_timestamps":[]}', b'{"timestamp":10']
)
def test_an_export_without_answers_is_refused(export):
    with pytest.raises(ParseError):
        parse_records(export)


def test_the_csv_report_is_read_by_column_name(data):
    report = parse_csv((data / "report.csv").read_text())
    assert report["Concurrency"] == 1
    assert {"Server Queue", "Server Compute Infer", "p99 latency", "Avg latency"} <= report.keys()
    with_metrics = "Concurrency,Inferences/Second,Avg GPU Utilization\n1,99.9,"
    assert parse_csv(with_metrics) == {"Concurrency": 1, "Inferences/Second": 99.9}
    for text in ("", "Concurrency,Inferences/Second\n", "a,b\n1,2\n"):
        with pytest.raises(ParseError):
            parse_csv(text)


def test_figures_from_the_report_alone():
    report = {
        "Inferences/Second": 9.9,
        "Avg latency": 5000,
        "p50 latency": 4000,
        "p95 latency": 8000,
        "p99 latency": 9000,
    }
    found = figures_from_csv(report, requests=10, concurrency=2, windows=False)
    assert found.throughput_per_s == pytest.approx(2 / 0.005)
    assert (found.latency_ms_mean, found.latency_ms_p50, found.latency_ms_p99) == (5.0, 4.0, 9.0)
    assert found.escalation_rate is None
    assert figures_from_csv(report, 10, 2, windows=True).throughput_per_s == 9.9
    with pytest.raises(ParseError, match="Avg latency"):
        figures_from_csv({"Inferences/Second": 1.0}, 10, 1, windows=True)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("refused.txt", "unknown policy 'zz'; use auto, low or high"),
        (
            "absent.txt",
            "failed to get model metadata: Request for unknown model: 'nomodel' is not found",
        ),
        (
            "unstable.txt",
            "Failed to obtain stable measurement within 3 measurement windows for concurrency 1. "
            "Please try to increase the --measurement-request-count.",
        ),
    ],
)
def test_its_own_message_is_found(data, name, said):
    assert failure((data / name).read_text()) == said


@pytest.mark.parametrize(
    ("version", "said"),
    [
        ("2.50", "The --request-parameter option is currently only supported by gRPC protocol."),
        ("2.60", "it refused its options and printed its usage"),  # which is all it prints
    ],
)
def test_a_refused_option_is_told(version, said):
    data = Path(__file__).parent / "data" / f"perf_analyzer_{version}"
    assert failure((data / "usage.txt").read_text()) == said


def test_the_share_of_delayed_requests_is_read_from_what_it_prints(data):
    said = (data / "delayed.txt").read_text()
    share = delayed_share(said)
    assert 0.5 < share <= 1 and f"{100 * share:.2f}% of the requests were delayed" in said
    assert delayed_share((data / "unstable.txt").read_text()) == 0.0


def test_a_failure_of_another_kind_still_gives_a_line():
    library = "perf_analyzer: error while loading shared libraries: libb64.so.0d: cannot open"
    assert failure(f"{library}\n") == library
    assert failure("one\ntwo\n\n") == "two"
    assert failure("") == "it said nothing"


def test_an_unstable_pass_is_told_from_a_failed_one(data):
    assert is_unstable((data / "unstable.txt").read_text())
    assert not is_unstable((data / "refused.txt").read_text())
