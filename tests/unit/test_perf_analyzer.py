"""One pass of perf_analyzer: command line, warm-up, open loop, report, failures, input files.

What perf_analyzer 2.50 and 2.60 really wrote lies in data/perf_analyzer_*, recorded against a small
Python model of the same outputs as the router.
"""

import base64
import json
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from perf.analyzer_install import PerfAnalyzerError
from perf.perf_analyzer import (
    InputData,
    Load,
    delayed_share,
    failure,
    read_report,
    run,
    write_bytes,
    write_tensors,
)
from tests.unit.perf_stand_in import DATA, StandIn

DELAYED = (
    "[WARNING] Perf Analyzer was not able to keep up with the desired request rate. "
    "{}% of the requests were delayed. "
)


def option(arguments, name):
    return arguments[arguments.index(name) + 1]


def load(**changes):
    inputs = InputData(Path("inputs.json"), items=5)
    return Load("router", "127.0.0.1:8001", inputs, **{"rounds": 4, **changes})


# --- one pass ----------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"concurrency": 3}])
def test_the_warm_up_is_a_pass_before_so_that_items_stay_equally_covered(tmp_path, changes):
    program = StandIn(tmp_path)
    figures = run(load(warmup_requests=10, **changes), program.analyzer)
    counts = [option(arguments, "--request-count") for arguments in program.calls()]
    assert counts == ["10", "20"] and figures.requests == 20


def test_parameters_are_sent_with_their_type(tmp_path):
    program = StandIn(tmp_path)
    run(
        load(parameters={"policy": "low", "threshold": 3, "x": True}, warmup_requests=0),
        program.analyzer,
    )
    (arguments,) = program.calls()
    sent = [arguments[i + 1] for i, a in enumerate(arguments) if a == "--request-parameter"]
    assert sent == ["policy:low:string", "threshold:3:int", "x:true:bool"]


def test_the_report_is_kept_where_asked(tmp_path):
    kept = tmp_path / "raw" / "router.csv"
    run(load(), StandIn(tmp_path).analyzer, csv_path=kept)
    assert kept.read_text() == (DATA / "report.csv").read_text()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"parameters": {"threshold": 0.25}}, "no float parameter"),
        ({"parameters": {"policy": "low"}, "protocol": "http"}, "gRPC only"),
        ({"protocol": "smtp"}, "smtp"),
        ({"shared_memory": "cuda"}, "cuda"),
        ({"rounds": 0}, "rounds"),
        ({"rate_per_s": 20.5}, "as many requests as arrive a second"),
        ({"rate_per_s": 0.0}, "as many requests"),
        ({"rate_per_s": -2.0}, "as many requests"),
    ],
)
def test_what_perf_analyzer_would_not_do_is_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        load(**changes)


# --- open loop ---------------------------------------------------------------------------------


def test_requests_arrive_at_a_rate_however_many_are_in_flight(tmp_path):
    program = StandIn(tmp_path)
    figures = run(load(rate_per_s=12.5, warmup_requests=0), program.analyzer)
    (arguments,) = program.calls()
    assert option(arguments, "--request-rate-range") == "12.5000"
    assert option(arguments, "--request-distribution") == "poisson"
    assert "--async" in arguments and "--concurrency-range" not in arguments
    assert option(arguments, "--request-count") == "20"
    assert (figures.requests, figures.throughput_per_s) == (20, 12.5)


def test_a_closed_loop_has_no_rate(tmp_path):
    program = StandIn(tmp_path)
    run(load(concurrency=3, warmup_requests=0), program.analyzer)
    (arguments,) = program.calls()
    assert option(arguments, "--concurrency-range") == "3"
    assert "--request-rate-range" not in arguments and "--async" not in arguments


def test_an_open_loop_is_warmed_up_by_a_closed_one_before_it(tmp_path):
    program = StandIn(tmp_path)
    run(load(rate_per_s=12.5, warmup_requests=4), program.analyzer)
    before, measured = program.calls()
    assert option(before, "--request-count") == "4"  # fewer than arrive a second
    assert option(before, "--concurrency-range") == "1"
    assert "--request-rate-range" not in before
    assert option(measured, "--request-count") == "20"


def test_the_warm_up_has_a_request_for_each_in_flight(tmp_path):
    program = StandIn(tmp_path)
    run(load(concurrency=8, warmup_requests=4), program.analyzer)
    before, _ = program.calls()
    assert option(before, "--request-count") == "8"  # it refuses fewer than are in flight


def test_a_rate_may_be_as_many_as_are_sent(tmp_path):
    assert load(rate_per_s=20.0).rate_per_s == 20.0  # four rounds of five


def test_requests_that_were_sent_late_are_told(tmp_path):
    program = StandIn(tmp_path, says=DELAYED.format(12.5))
    assert run(load(rate_per_s=12.5), program.analyzer).delayed == 0.125
    in_time = StandIn(tmp_path)
    assert run(load(rate_per_s=12.5), in_time.analyzer).delayed == 0.0


@pytest.mark.parametrize(("said", "share"), [("0.5", 0.005), ("7", 0.07), ("100", 1.0)])
def test_the_share_of_late_requests_is_read_from_the_warning(said, share):
    output = f"Request Rate: 12.5\n{DELAYED.format(said)}\n  p95 latency: 90% of\n"
    assert delayed_share(output) == pytest.approx(share)
    assert delayed_share("95% of the requests were answered") == 0.0


# --- the report --------------------------------------------------------------------------------

VERSIONS = ("2.50", "2.60")


@pytest.fixture(params=VERSIONS)
def data(request):
    """Where the outputs of one version lie."""
    return Path(__file__).parent / "data" / f"perf_analyzer_{request.param}"


@pytest.mark.parametrize("in_flight", [1, 2])
def test_the_figures_are_those_of_the_report_but_for_its_rounded_throughput(data, in_flight):
    text = (data / "report.csv").read_text()
    found = read_report(text, load(concurrency=in_flight))
    titles, values = (line.split(",") for line in text.splitlines())
    report = dict(zip(titles, map(float, values), strict=True))
    assert report["Inferences/Second"] < 10  # ten requests, rounded up to a second
    assert found.throughput_per_s == pytest.approx(1e6 * in_flight / report["Avg latency"])
    assert found.latency_ms_mean == report["Avg latency"] / 1e3
    assert [found.latency_ms_p50, found.latency_ms_p95, found.latency_ms_p99] == [
        report[f"p{p} latency"] / 1e3 for p in (50, 95, 99)
    ]


def test_the_report_of_an_open_loop_has_another_first_column(data):
    text = (data / "report.csv").read_text().replace("Concurrency,", "Request Rate,")
    open_loop = replace(load(), rate_per_s=2.5)
    assert read_report(text, open_loop, 0.25).throughput_per_s == 2.5
    assert read_report(text, open_loop, 0.25).delayed == 0.25


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no result row"),
        ("Concurrency,Inferences/Second\n", "no result row"),
        ("a,b\n1,2\n", "no result row"),
        ("Concurrency,Inferences/Second\n1,9.9\n", "no column 'Avg latency'"),
    ],
)
def test_another_file_is_no_report(tmp_path, text, said):
    with pytest.raises(ValueError, match=said):
        read_report(text, load())
    (tmp_path / "text").write_text(text)
    script = f"#!/bin/sh\nwhile [ $1 != -f ]; do shift; done; cp '{tmp_path / 'text'}' $2\n"
    with pytest.raises(PerfAnalyzerError, match=said):
        run(load(), StandIn(tmp_path, script=script).analyzer)


# --- failures ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "said"),
    [("refused.txt", "unknown policy 'zz'"), ("unstable.txt", "stable measurement")],
)
def test_a_failed_pass_shows_its_own_message(tmp_path, name, said):
    program = StandIn(tmp_path, script=f"#!/bin/sh\ncat '{DATA / name}' >&2\nexit 99\n")
    with pytest.raises(PerfAnalyzerError, match=said) as caught:
        run(load(), program.analyzer)
    assert "\n" not in str(caught.value)


def test_a_pass_that_hangs_is_ended(tmp_path):
    program = StandIn(tmp_path, script="#!/bin/sh\nexec sleep 60\n")
    with pytest.raises(PerfAnalyzerError, match=r"not done within 0\.2 s, twice"):
        run(load(timeout_s=0.2), program.analyzer)


def test_a_pass_that_hangs_once_is_made_again(tmp_path):
    hung = tmp_path / "hung"
    script = f"#!/bin/sh\nif [ -e '{hung}' ]; then cat '{DATA / 'refused.txt'}' >&2; exit 99; fi\n"
    program = StandIn(tmp_path, script=f"{script}touch '{hung}'\nexec sleep 60\n")
    with pytest.raises(PerfAnalyzerError, match="unknown policy"):
        run(load(timeout_s=2.0), program.analyzer)


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
    written = write_tensors(tmp_path / "new" / "t.json", images)
    assert written.items == 3
    for image, (content, shape) in zip(images, elements(written.path, "image"), strict=True):
        assert shape == [3, 4, 5]
        assert (np.frombuffer(content, np.float32).reshape(shape) == image).all()


def test_bytes_round_trip_behind_their_length(tmp_path):
    images = [b"\xff\xd8\x00", b"", bytes(range(256))]
    written = write_bytes(tmp_path / "b.json", images)
    for image, (content, shape) in zip(images, elements(written.path, "image_bytes"), strict=True):
        assert shape == [1]
        assert struct.unpack("<I", content[:4]) == (len(image),)
        assert content[4:] == image


def test_input_files_need_float32_images(tmp_path):
    with pytest.raises(ValueError, match="no image"):
        write_tensors(tmp_path / "t.json", [])
    with pytest.raises(ValueError, match="float32"):
        write_tensors(tmp_path / "t.json", [np.zeros((3, 2, 2))])
