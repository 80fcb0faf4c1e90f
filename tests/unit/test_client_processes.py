"""Clients across forks and in many threads: everybody's own answers, few descriptors."""

import json
import subprocess
import sys

import pytest

from client.forks import SETTLE_S
from tests.unit.client_program import MOST_DESCRIPTORS, WORKERS
from tests.unit.client_servers import HALVES, HALVES_TO_THE_END, SLOW

both = pytest.mark.parametrize("kind", ["grpc", "http"])


@pytest.fixture(scope="module")
def urls():
    command = [sys.executable, "-m", "tests.unit.client_servers"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as running:
        yield dict(zip(("grpc", "http"), running.stdout.readline().split(), strict=True))
        running.stdin.close()
        running.wait(30)


def run(scenario, kind, urls):
    command = [sys.executable, "-m", "tests.unit.client_program", scenario, kind, urls[kind]]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


def assert_own_answers(found, children, answers):
    """Everybody's own answers, over connections of their own; the parent kept its own."""
    assert len(found["children"]) == children
    for wrong, count, _ in found["children"]:
        assert (wrong, count) == ([], answers)
    before, after = found["before"], found["after"]
    assert before[0] == after[0] == []
    assert set(after[2]) <= set(before[2])
    assert all(ports and not set(ports) & set(before[2]) for _, _, ports in found["children"])


# --- forks -------------------------------------------------------------------------------------


@both
def test_forked_children_and_their_threads_get_their_own_answers(urls, kind):
    """As a web server has them that makes a client, uses it, and then forks its workers."""
    assert_own_answers(run("fork", kind, urls), 3 * WORKERS, 52)


@pytest.mark.parametrize(
    ("kind", "method"),
    [("grpc", "fork"), ("http", "fork"), ("grpc", "spawn"), ("http", "forkserver")],
)
def test_a_pool_of_processes_gets_its_own_answers(urls, kind, method):
    assert_own_answers(run(f"pool-{method}", kind, urls), 2 * WORKERS, 52)


def test_a_fork_waits_for_a_grpc_request_in_flight(urls):
    found = run("in-flight", "grpc", urls)
    assert 0.3 < found["waited_s"] < 5
    assert found["child"][0] == found["after"][0] == []


@pytest.mark.parametrize("scenario", ["opening", "closing"])
def test_a_fork_waits_for_a_grpc_channel_that_just_opens_or_closes(urls, scenario):
    found = run(scenario, "grpc", urls)
    assert found["waited"] and found["child"][0] == []


def test_a_fork_gives_a_channel_that_was_just_closed_a_moment(urls):
    found = run("closed", "grpc", urls)
    assert found["child"][0] == []
    assert SETTLE_S * 0.9 < found["at_once_s"] and found["later_s"] < found["at_once_s"]


def test_where_it_cannot_wait_for_it_the_child_says_so(urls):
    found = run("in-flight-too-long", "grpc", urls)
    assert found["waited_s"] < 0.7
    assert found["child"].startswith(
        "gRPC cannot be used in this process, which was forked while a gRPC request was in flight"
    )
    assert found["after"][0] == []


def test_http_needs_no_wait(urls):
    found = run("in-flight-too-long", "http", urls)
    assert found["child"][0] == found["after"][0] == []


@pytest.mark.parametrize("doing", ["waiting", "reading", "reading-to-the-end"])
def test_a_fork_in_the_middle_of_an_http_answer_leaves_the_child_nothing_of_it(urls, doing):
    found = run(doing, "http", urls)
    number = {"waiting": SLOW, "reading": HALVES, "reading-to-the-end": HALVES_TO_THE_END}[doing]
    assert found["asked"] == [number]
    inherited, (wrong, _, _) = found["child"]
    assert (inherited, wrong) == (0, [])


@both
def test_children_of_c_code_that_calls_no_hooks_get_their_own_answers(urls, kind):
    assert_own_answers(run("fork-in-c", kind, urls), WORKERS, 52)


def test_one_client_that_fails_after_a_fork_does_not_keep_the_others_from_forgetting(urls):
    assert run("failing", "http", urls) == [True, True]


def test_an_event_loop_that_forks_waits_for_its_requests_and_its_children_ask_too(urls):
    found = run("asyncio-fork", "grpc", urls)
    assert found["ours"] == [*range(19), SLOW]
    (wrong, count, _), inherited = found["children"]
    assert (wrong, count, inherited, found["then"]) == ([], 41, 7, 8)
    assert 0.3 < found["waited_s"] < 5


# --- descriptors -------------------------------------------------------------------------------


def assert_few(found, most):
    assert found["wrong"] == []
    assert found["before"] < found["most"] <= found["before"] + most < MOST_DESCRIPTORS
    assert found["after"] <= found["before"]


@both
def test_threads_that_come_and_go_leave_no_descriptors(urls, kind):
    assert_few(run("threads", kind, urls), 16)


@both
def test_two_hundred_threads_at_once_share_a_bounded_number(urls, kind):
    assert_few(run("threads-at-once", kind, urls), 16 if kind == "grpc" else 72)


def test_event_loops_and_their_clients_leave_none(urls):
    assert_few(run("event-loops", "grpc", urls), 24)
