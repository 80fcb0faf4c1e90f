"""The load test's parts that need no server, and reading what Locust wrote."""

import argparse
import os
import random
import sys
import time
from types import SimpleNamespace

import gevent
import numpy as np
import pytest
from scipy.stats import kstest

from perf.figures import PerfError
from perf.locust_runs import _call, own_line, read_stats, run_locust
from perf.locust_settings import (
    Settings,
    add_options,
    arrivals,
    blocks_hub,
    image_round,
    longest_pause_share,
)
from tests.unit.image_files import write_images

# As Locust 2.47 wrote it, without the columns that are not read.
HEADER = "Type,Name,Request Count,Failure Count,Requests/s,50%,95%,99%\n"
ROWS = """grpc,failed,5,5,0.5,3,4,4
grpc,high,20,0,2.0,390,560,560
grpc,low,75,0,7.5,140,290,400
,Aggregated,100,5,10.0,150,410,560
"""


def stats_file(folder, text):
    path = folder / "run_stats.csv"
    path.write_text(text)
    return path


def test_the_csv_file_becomes_figures(tmp_path):
    assert read_stats(stats_file(tmp_path, HEADER + ROWS)) == {
        "requests": 100,
        "failures": 5,
        "throughput_per_s": pytest.approx(9.5),  # what failed is no throughput
        "latency_ms": {"p50": 150.0, "p95": 410.0, "p99": 560.0},
        "paths": {"low": 75, "high": 20},
    }


def test_a_run_without_a_request_has_no_latency(tmp_path):
    none = ",Aggregated,0,0,0.0,N/A,N/A,N/A\n"
    figures = read_stats(stats_file(tmp_path, HEADER + none))
    assert figures["requests"] == 0 and figures["throughput_per_s"] == 0
    assert figures["latency_ms"] == {"p50": None, "p95": None, "p99": None}
    assert figures["paths"] == {"low": 0, "high": 0}


@pytest.mark.parametrize("text", [None, "", HEADER, HEADER + ",Aggregated,100\n"])
def test_a_file_that_locust_did_not_finish_is_an_error(tmp_path, text):
    file = tmp_path / "absent.csv" if text is None else stats_file(tmp_path, text)
    with pytest.raises(PerfError, match="no figures of a Locust run"):
        read_stats(file)


@pytest.mark.parametrize(
    ("log", "line"),
    [
        ("[t] h/INFO/locust.main: Starting\n[t] h/ERROR/perf.locustfile: no: way\n", "no: way"),
        ("locust: error: unrecognized arguments: --rat 3\n", "unrecognized arguments: --rat 3"),
        ("Traceback (most recent call last):\n  f()\nKeyError: 'x'\n\n", "KeyError: 'x'"),
        ("", "it ended with code -9 and said nothing"),
    ],
)
def test_locusts_own_line_is_found(log, line):
    assert own_line(log, -9) == line


@pytest.mark.parametrize(
    ("slo", "requests", "failures", "p95_ms", "words"),
    [
        (Settings(slo_p95_ms=100.0), 100, 0, 100.0, None),
        (Settings(slo_p95_ms=100.0), 100, 0, 101.0, "p95 is 101 ms, 100 ms allowed"),
        (Settings(), 100, 0, 9999.0, None),
        (Settings(), 100, 1, 10.0, "1 of 100 requests failed (1.00%), 0.00% allowed"),
        (Settings(slo_failures=0.01), 100, 1, 10.0, None),
        (Settings(slo_failures=0.01), 99, 1, 10.0, "1 of 99 requests failed"),
        (
            Settings(slo_p95_ms=5.0, slo_failures=0.01),
            10,
            5,
            10.0,
            "5 of 10 requests failed (50.00%), 1.00% allowed; ",
        ),
        (Settings(slo_failures=1.0), 10, 10, 10.0, None),
        (Settings(slo_failures=1.0), 0, 0, 0.0, "not a single request"),
    ],
)
def test_the_objective_is_judged_at_its_limits(slo, requests, failures, p95_ms, words):
    missed = slo.missed(requests, failures, p95_ms)
    assert (missed is None) if words is None else (words in missed and "\n" not in missed)


def test_arrivals_are_a_poisson_process_of_the_rate():
    rate, seconds = 40.0, 200.0
    times = []
    for moment in arrivals(rate, random.Random(5)):
        if moment > seconds:
            break
        times.append(moment)
    gaps = np.diff([0.0, *times])
    assert gaps.min() > 0
    assert len(times) == pytest.approx(rate * seconds, abs=4 * (rate * seconds) ** 0.5)
    assert kstest(gaps, "expon", args=(0, 1 / rate)).pvalue > 0.01
    # Independent: a gap says nothing about the next.
    assert abs(np.corrcoef(gaps[:-1], gaps[1:])[0, 1]) < 4 / len(gaps) ** 0.5


@pytest.mark.parametrize(
    ("waits", "blocks"),
    [
        ([gevent.sleep] * 5, False),
        ([time.sleep] * 5, True),
        # One pause of the machine is no proof.
        ([time.sleep, gevent.sleep, time.sleep, time.sleep, time.sleep], False),
    ],
)
def test_a_call_blocks_where_it_waits_outside_of_gevent(waits, blocks):
    waiting = iter(waits)
    assert blocks_hub(lambda: next(waiting)(0.02)) is blocks


def test_the_share_is_of_the_longest_pause():
    def call():
        gevent.sleep(0.03)
        time.sleep(0.03)

    assert 0.4 < longest_pause_share(call) < 0.7


def options(*arguments):
    parser = argparse.ArgumentParser()
    add_options(parser)
    return parser.parse_args(arguments)


def test_the_options_are_what_the_settings_read():
    chosen = options("--images", "x", "--image-limit", "3", "--rate", "2", "--slo-p95-ms", "50")
    assert Settings.of(chosen) == Settings("x", 3, 2.0, 50.0, 0.0)
    # Each default has the type that the web page keeps.
    kinds = [type(value) for value in vars(Settings.of(options())).values()]
    assert kinds == [str, int, float, float, float]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--image-limit", "0"), "--image-limit 0"),
        (("--rate", "0"), "--rate 0"),
        (("--rate", "nan"), "--rate nan"),
        (("--slo-p95-ms", "-1"), "--slo-p95-ms -1"),
        (("--slo-failures", "5"), "--slo-failures 5"),
    ],
)
def test_an_option_that_makes_no_sense_is_named(arguments, named):
    with pytest.raises(PerfError, match=named):
        Settings.of(options(*arguments))


def test_images_are_sent_round_and_round_and_all_users_take_from_one_round(tmp_path):
    names = ("a.png", "b.png", "c.png")
    write_images(tmp_path, *names)
    files = [(tmp_path / name).read_bytes() for name in names]
    assert len(set(files)) == 3
    sent = [next(image_round(str(tmp_path), 200)) for _ in range(7)]
    assert sent == [*files, *files, files[0]]


def test_an_unreadable_image_is_left_out_and_logged(tmp_path, caplog):
    write_images(tmp_path, "b.png")
    (tmp_path / "a.jpg").write_bytes(b"no image")
    images = image_round(str(tmp_path), 200)
    assert next(images) == next(images) == (tmp_path / "b.png").read_bytes()
    assert "left out 1 of 2 images; first: a.jpg" in caplog.text


def test_no_readable_image_is_an_error(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"no image")
    with pytest.raises(PerfError, match="none of the 1 images can be read; first: a.jpg"):
        image_round(str(tmp_path), 200)


@pytest.fixture
def shapes(monkeypatch):
    """The shapes, without what importing Locust does to the process that imports it."""
    monkeypatch.setenv("LOCUST_SKIP_MONKEY_PATCH", "1")
    from perf.shapes.ramp import Ramp
    from perf.shapes.spike import Spike

    return {"ramp": Ramp, "spike": Spike}


def users_at(shape, seconds, **chosen):
    environment = SimpleNamespace(parsed_options=SimpleNamespace(**chosen))
    shape.runner = SimpleNamespace(environment=environment)
    shape.get_run_time = lambda: seconds
    tick = shape.tick()
    return None if tick is None else tick[0]


@pytest.mark.parametrize(
    ("name", "expected"),
    [("ramp", [3, 3, 5, 8, 8, 10, None]), ("spike", [2, 2, 2, 10, 2, 2, None])],
)
def test_a_shape_reaches_all_users_within_the_run_time(shapes, name, expected):
    shape = shapes[name]()
    seen = [
        users_at(shape, seconds, num_users=10, run_time=40)
        for seconds in (0, 9.9, 10, 20, 27, 39.9, 40)
    ]
    assert seen == expected


@pytest.mark.parametrize("name", ["ramp", "spike"])
def test_a_shape_without_options_is_one_user_for_a_minute(shapes, name):
    shape = shapes[name]()
    seen = [users_at(shape, seconds, num_users=None, run_time=None) for seconds in (0, 59, 60)]
    assert seen == [1, 1, None]


def child(folder):
    """A command that writes its process id and waits."""
    pid_file = folder / "pid"
    code = f"import os, time; open({str(pid_file)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    return [sys.executable, "-c", code], pid_file


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_ctrl_c_ends_locust_too(tmp_path):
    command, pid_file = child(tmp_path)

    def interrupt():
        if pid_file.exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _call(command, tmp_path / "log", 30.0, interrupt)
    assert not is_alive(int(pid_file.read_text()))


def test_a_locust_that_does_not_end_is_ended(tmp_path):
    command, pid_file = child(tmp_path)
    with pytest.raises(PerfError, match="not done within 2 s"):
        _call(command, tmp_path / "log", 2.0, None)
    assert not is_alive(int(pid_file.read_text()))


def test_an_earlier_runs_figures_are_not_taken_for_this_one(tmp_path):
    stats_file(tmp_path, HEADER + ROWS).rename(tmp_path / "grpc-closed_stats.csv")
    with pytest.raises(PerfError, match="^Locust: no such folder: /nowhere$"):
        run_locust("127.0.0.1:9", "/nowhere", tmp_path, protocol="grpc", users=1, seconds=1)
