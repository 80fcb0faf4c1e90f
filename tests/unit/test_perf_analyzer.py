"""One pass of perf_analyzer: command line, warm-up, open loop, report, failures, input files.

What perf_analyzer 2.50 and 2.60 really wrote lies in data/perf_analyzer_*, recorded against a small
Python model of the same outputs as the router.
"""

import base64
import json
import struct
from pathlib import Path

import numpy as np
import pytest

from perf.analyzer_install import PerfAnalyzerError
from perf.perf_analyzer import (
    InputData,
    Level,
    delayed_share,
    failure,
    read_report,
    run,
    write_inputs,
)
from tests.unit.perf_measured import make_system
from tests.unit.perf_stand_in import DATA, StandIn

DELAYED = (
    "[WARNING] Perf Analyzer was not able to keep up with the desired request rate. "
    "{}% of the requests were delayed. "
)


def option(arguments, name):
    return arguments[arguments.index(name) + 1]


@pytest.fixture
def measure(tmp_path):
    """Runs the stand-in on four rounds of five items."""

    def measure(program, parameters=None, timeout_s=120.0, **load):
        level = Level(make_system("adaptive", parameters=parameters or {}), **load)
        inputs, report = InputData(Path("inputs.json"), items=5), tmp_path / "raw" / "router.csv"
        return run(level, "127.0.0.1:8001", inputs, 4, program.analyzer, report, timeout_s)

    return measure


# --- one pass ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("in_flight", "warm_up"), [(1, "4"), (3, "4"), (8, "8")])
def test_the_warm_up_is_a_pass_before_so_that_items_stay_equally_covered(
    tmp_path, measure, in_flight, warm_up
):
    program = StandIn(tmp_path)
    assert measure(program, concurrency=in_flight).requests == 20
    calls = program.calls()  # it refuses fewer requests than are in flight
    assert [option(arguments, "--request-count") for arguments in calls] == [warm_up, "20"]
    for arguments in calls:
        assert option(arguments, "--concurrency-range") == str(in_flight)
        assert "--request-rate-range" not in arguments and "--async" not in arguments


def test_what_is_sent_is_on_the_command_line(tmp_path, measure):
    program = StandIn(tmp_path)
    parameters = {"policy": "low", "threshold": 3}
    measure(program, parameters, concurrency=1, protocol="http", shared_memory="system")
    arguments = program.calls()[-1]
    sent = [arguments[i + 1] for i, a in enumerate(arguments) if a == "--request-parameter"]
    assert sent == ["policy:low:string", "threshold:3:int"]
    options = ("-m", "-u", "-i", "--shared-memory", "--input-data")
    assert [option(arguments, name) for name in options] == [
        *("router", "127.0.0.1:8001", "http", "system", "inputs.json")
    ]


def test_the_report_is_kept_where_asked(tmp_path, measure):
    measure(StandIn(tmp_path), concurrency=1)
    assert (tmp_path / "raw/router.csv").read_text() == (DATA / "report.csv").read_text()


# --- open loop ---------------------------------------------------------------------------------


def test_requests_arrive_at_a_rate_however_many_are_in_flight(tmp_path, measure):
    program = StandIn(tmp_path)
    found = measure(program, rate_per_s=12.5)
    before, arguments = program.calls()
    assert option(arguments, "--request-rate-range") == "12.5000"
    assert option(arguments, "--request-distribution") == "poisson"
    assert "--async" in arguments and "--concurrency-range" not in arguments
    assert option(arguments, "--request-count") == "20"
    assert (found.requests, found.throughput_per_s) == (20, 12.5)
    # The warm-up is a closed loop: its requests are fewer than arrive a second.
    assert option(before, "--request-count") == "4"
    assert option(before, "--concurrency-range") == "1" and "--request-rate-range" not in before


def test_requests_that_were_sent_late_are_told(tmp_path, measure):
    program = StandIn(tmp_path, says=DELAYED.format(12.5))
    assert measure(program, rate_per_s=12.5).delayed == 0.125
    assert measure(StandIn(tmp_path), rate_per_s=12.5).delayed == 0.0


@pytest.mark.parametrize(("said", "share"), [("0.5", 0.005), ("7", 0.07), ("100", 1.0)])
def test_the_share_of_late_requests_is_read_from_the_warning(said, share):
    output = f"Request Rate: 12.5\n{DELAYED.format(said)}\n  p95 latency: 90% of\n"
    assert delayed_share(output) == pytest.approx(share)
    assert delayed_share("95% of the requests were answered") == 0.0


# --- the report --------------------------------------------------------------------------------


@pytest.fixture(params=("2.50", "2.60"))
def data(request):
    """Where the outputs of one version lie."""
    return Path(__file__).parent / "data" / f"perf_analyzer_{request.param}"


@pytest.mark.parametrize("first", ["Concurrency", "Request Rate"])  # closed and open loop
def test_the_latencies_are_those_of_the_report(data, first):
    text = (data / "report.csv").read_text()
    titles, values = (line.split(",") for line in text.splitlines())
    report = dict(zip(titles, map(float, values), strict=True))
    found = read_report(text.replace("Concurrency,", f"{first},"))
    assert found == {
        "mean": report["Avg latency"] / 1e3,
        **{p: report[f"{p} latency"] / 1e3 for p in ("p50", "p95", "p99")},
    }


def test_the_throughput_of_a_closed_loop_is_not_the_rounded_one_of_the_report(tmp_path, measure):
    found = measure(StandIn(tmp_path), concurrency=2)
    assert found.throughput_per_s == pytest.approx(2e3 / found.latency_ms["mean"])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Concurrency,Inferences/Second\n",
        "a,b\n1,2\n",
        "Concurrency,Inferences/Second\n1,9.9\n",
    ],
)
def test_another_file_is_no_report(tmp_path, measure, text):
    (tmp_path / "text").write_text(text)
    script = f"#!/bin/sh\nwhile [ $1 != -f ]; do shift; done; cp '{tmp_path / 'text'}' $2\n"
    with pytest.raises(PerfAnalyzerError, match="no row of latencies"):
        measure(StandIn(tmp_path, script=script), concurrency=1)


# --- failures ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "said"),
    [("refused.txt", "unknown policy 'zz'"), ("unstable.txt", "stable measurement")],
)
def test_a_failed_pass_shows_its_own_message(tmp_path, measure, name, said):
    program = StandIn(tmp_path, script=f"#!/bin/sh\ncat '{DATA / name}' >&2\nexit 99\n")
    with pytest.raises(PerfAnalyzerError, match=said) as caught:
        measure(program, concurrency=1)
    assert "\n" not in str(caught.value)


def test_a_pass_that_hangs_is_ended(tmp_path, measure):
    program = StandIn(tmp_path, script="#!/bin/sh\nexec sleep 60\n")
    with pytest.raises(PerfAnalyzerError, match=r"not done within 0\.2 s, twice"):
        measure(program, timeout_s=0.2, concurrency=1)


def test_a_pass_that_hangs_once_is_made_again(tmp_path, measure):
    hung = tmp_path / "hung"
    script = f"#!/bin/sh\nif [ -e '{hung}' ]; then cat '{DATA / 'refused.txt'}' >&2; exit 99; fi\n"
    program = StandIn(tmp_path, script=f"{script}touch '{hung}'\nexec sleep 60\n")
    with pytest.raises(PerfAnalyzerError, match="unknown policy"):
        measure(program, timeout_s=2.0, concurrency=1)


NO_STATISTICS = "failed to find the requested model version"


@pytest.mark.parametrize(
    ("again", "said"), [("unknown policy", "unknown policy"), (NO_STATISTICS, NO_STATISTICS)]
)
def test_a_pass_that_saw_no_statistics_is_made_again_once(tmp_path, measure, again, said):
    seen = tmp_path / "seen"
    script = f"#!/bin/sh\necho call >> '{seen}'\nif [ $(wc -l < '{seen}') = 1 ]; then "
    script += f"echo '{NO_STATISTICS}' >&2; else echo '{again}' >&2; fi\nexit 99\n"
    with pytest.raises(PerfAnalyzerError, match=said):
        measure(StandIn(tmp_path, script=script), concurrency=1)
    assert seen.read_text().split() == ["call", "call"]


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


# --- input files -------------------------------------------------------------------------------


def elements(path, name):
    """Every element must be a step of the one stream: a list would start streams of its own."""
    steps = json.loads(path.read_text())["data"]
    assert all(isinstance(step, dict) for step in steps)
    return [(base64.b64decode(s[name]["content"]["b64"]), s[name]["shape"]) for s in steps]


def test_tensors_round_trip(tmp_path):
    images = [np.random.default_rng(i).normal(size=(3, 4, 5)).astype(np.float32) for i in range(3)]
    written = write_inputs(tmp_path / "t.json", images)
    assert written.items == 3
    for image, (content, shape) in zip(images, elements(written.path, "image"), strict=True):
        assert shape == [3, 4, 5]
        assert (np.frombuffer(content, np.float32).reshape(shape) == image).all()


def test_bytes_round_trip_behind_their_length(tmp_path):
    images = [b"\xff\xd8\x00", b"", bytes(range(256))]
    written = write_inputs(tmp_path / "b.json", images)
    for image, (content, shape) in zip(images, elements(written.path, "image_bytes"), strict=True):
        assert shape == [1]
        assert struct.unpack("<I", content[:4]) == (len(image),)
        assert content[4:] == image
