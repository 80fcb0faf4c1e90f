"""One pass of perf_analyzer: command line, warm-up, open loop, input files, failures."""

import base64
import json
import struct
from pathlib import Path

import numpy as np
import pytest

from perf.analyzer import (
    InputData,
    Load,
    PerfAnalyzerError,
    UnstableError,
    run,
    write_bytes,
    write_tensors,
)
from perf.analyzer.parse import delayed_share
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


def test_one_at_a_time_the_warm_up_is_the_head_of_the_pass_and_is_dropped(tmp_path):
    program = StandIn(tmp_path, slow=10)
    result = run(load(warmup_requests=10), program.analyzer)
    (arguments,) = program.calls()
    assert option(arguments, "--request-count") == "30"
    assert result.figures.requests == 20
    assert result.figures.latency_ms_mean == pytest.approx(0.1)  # the ten slow ones are gone
    assert result.figures.escalation_rate == 0.5
    assert result.report["Server Queue"] > 0


@pytest.mark.parametrize("changes", [{"concurrency": 3}, {"records": False}])
def test_else_the_warm_up_is_a_pass_before_so_that_items_stay_equally_covered(tmp_path, changes):
    program = StandIn(tmp_path)
    result = run(load(warmup_requests=10, **changes), program.analyzer)
    counts = [option(arguments, "--request-count") for arguments in program.calls()]
    assert counts == ["10", "20"]
    assert result.figures.requests == 20
    assert (result.records is None) == ("records" in changes)


def test_without_records_the_figures_are_those_of_the_report(tmp_path):
    result = run(load(records=False, warmup_requests=0), StandIn(tmp_path).analyzer)
    assert result.figures.latency_ms_mean == result.report["Avg latency"] / 1e3


def test_windows_replace_the_request_count(tmp_path):
    program = StandIn(tmp_path)
    run(load(count_windows=50, warmup_requests=0), program.analyzer)
    (arguments,) = program.calls()
    assert option(arguments, "--measurement-mode") == "count_windows"
    assert option(arguments, "--measurement-request-count") == "50"
    assert "--request-count" not in arguments
    assert "--profile-export-file" not in arguments


def test_parameters_are_sent_with_their_type(tmp_path):
    program = StandIn(tmp_path)
    run(load(parameters={"policy": "low", "threshold": 3, "x": True}), program.analyzer)
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
        ({"rate_per_s": 2.0, "records": False}, "raw records only"),
        ({"rate_per_s": 2.0, "count_windows": 50}, "raw records only"),
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
    result = run(load(rate_per_s=12.5, warmup_requests=0), program.analyzer)
    (arguments,) = program.calls()
    assert option(arguments, "--request-rate-range") == "12.5000"
    assert option(arguments, "--request-distribution") == "poisson"
    assert "--async" in arguments and "--concurrency-range" not in arguments
    assert option(arguments, "--request-count") == "20"
    assert (result.figures.requests, len(result.records)) == (20, 20)


def test_a_closed_loop_has_no_rate(tmp_path):
    program = StandIn(tmp_path)
    run(load(concurrency=3, warmup_requests=0), program.analyzer)
    (arguments,) = program.calls()
    assert option(arguments, "--concurrency-range") == "3"
    assert "--request-rate-range" not in arguments and "--async" not in arguments


def test_an_open_loop_is_warmed_up_by_a_closed_one_before_it(tmp_path):
    program = StandIn(tmp_path, slow=1)
    result = run(load(rate_per_s=12.5, warmup_requests=4), program.analyzer)
    before, measured = program.calls()
    assert option(before, "--request-count") == "4"  # fewer than arrive a second
    assert option(before, "--concurrency-range") == "1"
    assert "--request-rate-range" not in before
    assert option(measured, "--request-count") == "20"
    assert result.records.latency_ms[0] == pytest.approx(0.9)  # nothing is cut off its head


def test_the_warm_up_has_a_request_for_each_in_flight(tmp_path):
    program = StandIn(tmp_path)
    run(load(concurrency=8, warmup_requests=4, records=False), program.analyzer)
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


# --- failures ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind", "said"),
    [
        ("refused.txt", PerfAnalyzerError, "unknown policy 'zz'"),
        ("unstable.txt", UnstableError, "stable measurement"),
    ],
)
def test_a_failed_pass_shows_its_own_message(tmp_path, name, kind, said):
    program = StandIn(tmp_path, script=f"#!/bin/sh\ncat '{DATA / name}' >&2\nexit 99\n")
    with pytest.raises(PerfAnalyzerError, match=said) as caught:
        run(load(), program.analyzer)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)


def test_lost_requests_are_noticed(tmp_path):
    with pytest.raises(PerfAnalyzerError, match="29 requests recorded, 30 asked for"):
        run(load(), StandIn(tmp_path, lost=1).analyzer)


@pytest.mark.parametrize("size", [0, 100])
def test_an_export_that_broke_off_is_explained(tmp_path, size):
    with pytest.raises(PerfAnalyzerError, match="NaN"):
        run(load(), StandIn(tmp_path, size=size).analyzer)


def test_a_pass_that_hangs_is_ended(tmp_path):
    program = StandIn(tmp_path, script="#!/bin/sh\nexec sleep 60\n")
    with pytest.raises(PerfAnalyzerError, match=r"not done within 0\.2 s"):
        run(load(timeout_s=0.2), program.analyzer)


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
