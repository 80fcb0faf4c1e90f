"""Locust against the real server: the load is concurrent, named by path and judged."""

import csv
import itertools
import math
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from client import GrpcClient
from perf.figures import PerfError
from perf.locust_runs import run_locust

ROOT = Path(__file__).resolve().parents[2]
LOCUSTFILE = ROOT / "perf/locustfile.py"
IMAGES = 24  # few enough for every run to send each, with both paths among them


@pytest.fixture(scope="module")
def folder(crops, tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for index, data in enumerate(crops[:IMAGES]):
        (folder / f"{index:02d}.jpg").write_bytes(data)
    return folder


def command(server, folder, *arguments, files=LOCUSTFILE):
    return [
        *(sys.executable, "-m", "locust", "-f", str(files), "--headless", "--only-summary"),
        *("--host", server.grpc_url, "--images", str(folder), "--run-time", "1s"),
        *map(str, arguments),
    ]


def locust(*arguments, **files):
    """Exit code and log of a run, which has to end by itself."""
    ran = subprocess.run(
        command(*arguments, **files),
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=40,
    )
    return ran.returncode, ran.stderr


def error_lines(log):
    return re.findall(r"/ERROR/[^:]*: (.*)", log)


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.alone
@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_four_users_have_four_requests_in_flight(server, folder, tmp_path, protocol):
    url = server.grpc_url if protocol == "grpc" else server.http_url
    entry = run_locust(url, str(folder), tmp_path, protocol=protocol, users=4, seconds=3)
    assert entry["failures"] == 0
    assert entry["requests"] > IMAGES
    assert entry["paths"]["low"] > 0 and entry["paths"]["high"] > 0
    assert sum(entry["paths"].values()) == entry["requests"]
    total = rows(tmp_path / f"{protocol}-closed_stats.csv")[-1]
    busy_s = entry["requests"] * float(total["Average Response Time"]) / 1e3
    wall_s = entry["requests"] / entry["throughput_per_s"]
    assert 2.0 < wall_s < 4.0
    # One request at a time gives 1, four users at best 4.
    assert busy_s > 1.5 * wall_s
    assert (tmp_path / f"{protocol}-closed.html").stat().st_size > 0


def test_every_image_is_sent_equally_often(server, crops, folder, tmp_path):
    with GrpcClient(server.grpc_url) as client:
        high = sum(answer.escalated for answer in client.infer(crops[:IMAGES]))
    entry = run_locust(server.grpc_url, str(folder), tmp_path, protocol="grpc", users=2, seconds=2)
    rounds = entry["requests"] / IMAGES
    assert math.floor(rounds) * high <= entry["paths"]["high"] <= math.ceil(rounds) * high


def test_without_gevent_the_run_ends_at_once_and_says_why(server, folder, tmp_path):
    blocked = tmp_path / "blocked.py"
    blocked.write_text(
        "import grpc.experimental.gevent\n"
        "grpc.experimental.gevent.init_gevent = lambda: None\n"
        "from perf.locustfile import *\n"
    )
    code, log = locust(server, folder, "--users", 4, "--spawn-rate", 4, files=blocked)
    assert code == 2
    (line,) = error_lines(log)
    assert line.startswith("a grpc request stops all other users while it waits")


@pytest.mark.alone
@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_open_users_send_at_their_rate(server, folder, tmp_path, protocol):
    url = server.grpc_url if protocol == "grpc" else server.http_url
    entry = run_locust(
        url, str(folder), tmp_path, protocol=protocol, user="open", users=2, rate=8.0, seconds=4
    )
    planned = 2 * 8.0 * 4
    assert abs(entry["requests"] - planned) < 4 * planned**0.5
    assert entry["failures"] == 0 and sum(entry["paths"].values()) == entry["requests"]


def wrapper(folder, lines):
    """A locustfile that is ours after `lines`."""
    path = folder / "wrapper.py"
    path.write_text(f"import perf.locustfile as users\nfrom perf.locustfile import *\n{lines}\n")
    return path


@pytest.mark.parametrize(("share", "code"), [("0.0", 1), ("1.0", 0)])
def test_what_an_open_user_cannot_send_is_a_failure(server, folder, tmp_path, share, code):
    files = wrapper(tmp_path, "users.MAX_OUTSTANDING = 0")
    prefix = tmp_path / "run"
    ended, log = locust(
        *(server, folder, "--rate", 20, "--slo-failures", share, "--csv", prefix, "GrpcOpenUser"),
        files=files,
    )
    assert ended == code, log
    kinds = {row["Name"]: row for row in rows(tmp_path / "run_stats.csv")}
    assert set(kinds) == {"not sent", "Aggregated"}
    assert kinds["not sent"]["Failure Count"] == kinds["Aggregated"]["Request Count"] != "0"
    (failure,) = rows(tmp_path / "run_failures.csv")
    assert "0 requests of this user had no answer yet" in failure["Error"]


@pytest.mark.parametrize("user", ["GrpcUser", "HttpUser", "GrpcOpenUser"])
def test_refused_requests_are_failures_with_the_servers_words(server, folder, tmp_path, user):
    # After the image of the first user's check, nothing but garbage.
    files = wrapper(
        tmp_path,
        "import functools, itertools\nfrom perf.locust_settings import image_round\n"
        "@functools.cache\ndef spoilt(*spec):\n"
        "    return itertools.chain([next(image_round(*spec))], itertools.repeat(b'no image'))\n"
        "users.image_round = spoilt",
    )
    url = server.http_url if user == "HttpUser" else server.grpc_url
    prefix = tmp_path / "run"
    code, log = locust(
        *(server, folder, "--host", url, "--rate", 20, "--csv", prefix, user), files=files
    )
    assert code == 1
    (line,) = error_lines(log)
    assert line.startswith("SLO missed: ") and "requests failed (100.00%)" in line
    assert [row["Name"] for row in rows(tmp_path / "run_stats.csv")] == ["failed", "Aggregated"]
    (failure,) = rows(tmp_path / "run_failures.csv")
    assert failure["Error"].startswith("InvalidRequestError(")


@pytest.mark.parametrize(("limit_ms", "code"), [(0.5, 1), (60_000, 0)])
def test_the_exit_code_tells_whether_the_objective_was_met(server, folder, limit_ms, code):
    ended, log = locust(server, folder, "--slo-p95-ms", limit_ms)
    assert ended == code, log
    lines = error_lines(log)
    assert len(lines) == code and all("ms, 0.5 ms allowed" in line for line in lines)


def test_a_run_without_a_request_fails(server, folder):
    code, log = locust(server, folder, "--rate", 0.001, "GrpcOpenUser")
    assert code == 1
    assert error_lines(log) == ["not a single request was sent; allow more time, or more users"]


@pytest.mark.alone
def test_a_ramp_starts_more_users_step_by_step(server, folder, tmp_path):
    entry = run_locust(
        server.grpc_url, str(folder), tmp_path, protocol="grpc", shape="ramp", users=4, seconds=5
    )
    assert entry["shape"] == "ramp" and entry["failures"] == 0 and entry["requests"] > 0
    history = rows(tmp_path / "grpc-closed-ramp_stats_history.csv")
    counts = [int(row["User Count"]) for row in history if row["Name"] == "Aggregated"]
    steps = [count for count, _ in itertools.groupby(counts) if count]
    assert steps == [1, 2, 3, 4]


def test_a_master_judges_what_its_workers_sent(server, folder):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    worker = subprocess.Popen(
        [
            *(sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--worker"),
            *("--master-port", str(port)),
        ],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        code, log = locust(
            *(server, folder, "--master", "--master-bind-host", "127.0.0.1"),
            *("--master-bind-port", port, "--expect-workers", 1, "--slo-p95-ms", 0.5),
        )
        assert code == 1
        assert [line for line in error_lines(log) if "0.5 ms allowed" in line], log
        assert worker.wait(timeout=10) == 0
    finally:
        worker.kill()
        worker.wait()


def test_an_address_without_a_server_is_one_line(folder, tmp_path):
    with pytest.raises(PerfError, match="^Locust: no server answers at 127.0.0.1:9; start one"):
        run_locust("127.0.0.1:9", str(folder), tmp_path, protocol="grpc", users=3, seconds=3)
