"""The rows in which clients try again: as often as they do by default, and until it is back."""

import itertools
import threading
import time

import numpy as np
import pytest

from client import ClientError, GrpcClient, HttpClient
from client.retry import DEFAULT_RETRY, Retry
from tests.faults import inject
from tests.faults.asking import Question, Request
from tests.faults.experiment import reasons
from tests.faults.load import PAUSE_S, recovery_s
from tests.faults.processes import ServerCommand
from tests.faults.results import row
from tests.servers import wait_for

PATIENT = Retry(attempts=1000, max_backoff_s=0.5)
TIMEOUT_S = 60.0
BEFORE_S, AFTER_S = 2.0, 3.0
NAMES = ("embedding", "logits", "escalated", "score", "degraded")


def ask_on_and_on(client, truth, first, stop, requests):
    """One worker: an image at a time, until told to stop."""
    for index in itertools.cycle(range(first, len(truth.files), 4)):
        if stop.is_set():
            return
        asked = Question("grpc", "router", (index,), b"")
        started, degraded = time.monotonic(), 0
        try:
            (found,) = client.infer_tensor(truth.images[[index]], timeout_s=TIMEOUT_S)
        except ClientError as error:
            outcome, detail = "failed", str(error)
            time.sleep(PAUSE_S)
        else:
            answer = {name: np.atleast_2d(getattr(found, name)) for name in NAMES}
            detail = truth.wrong([index], answer) or ""
            outcome, degraded = "wrong" if detail else "ok", int(found.degraded)
        requests.append(Request(asked, started, time.monotonic(), outcome, degraded, detail))


@pytest.mark.parametrize(
    ("retry", "called"),
    [
        (DEFAULT_RETRY, "clients as they are by default, 3 attempts"),
        (PATIENT, "clients with 1,000 attempts"),
    ],
    ids=["default", "patient"],
)
def test_a_killed_server_costs_clients_that_try_again_no_wrong_answer(
    assembled, truth, record, tmp_path, retry, called
):
    stop, requests = threading.Event(), []
    with ServerCommand(assembled(), tmp_path / "server.log", ["--supervise"]) as server:
        clients = [GrpcClient(server.grpc_url, retry=retry) for _ in range(2)]
        clients += [HttpClient(server.http_url, retry=retry) for _ in range(2)]
        workers = [
            threading.Thread(target=ask_on_and_on, args=(client, truth, first, stop, requests))
            for first, client in enumerate(clients)
        ]
        for worker in workers:
            worker.start()
        time.sleep(BEFORE_S)
        since = time.monotonic()
        inject.kill(server.tritonservers())

        def is_whole():
            quick = [r for r in [*requests] if r.started > since and r.outcome == "ok"]
            return len(quick) > 10

        assert wait_for(is_whole, 60)
        time.sleep(AFTER_S)
        stop.set()
        for worker in workers:
            worker.join()
    after = [request for request in requests if request.ended >= since]
    recovered_s = recovery_s(requests, since, time.monotonic())
    note = "recovery: the first request that did not wait" if retry is PATIENT else ""
    found = row(f"kill -9 of tritonserver, {called}", after, recovered_s, note)
    record(found)
    assert found.wrong == 0, reasons(requests, "wrong")
    assert recovered_s is not None, reasons(requests, "failed")
    if retry is PATIENT:  # a pause to them, no lost answer
        assert {request.outcome for request in requests} == {"ok"}, reasons(requests, "failed")
