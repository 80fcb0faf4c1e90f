"""One fault under load: before, injection, recovery, after."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from tests.faults.asking import Question, Request
from tests.faults.load import Load, usual_workers
from tests.faults.results import Row, row
from tests.faults.truth import Truth
from tests.servers import wait_for

BEFORE_S, AFTER_S = 2.0, 2.0


def measure(
    server,
    truth: Truth,
    fault: str,
    inject: Callable[[], object],
    *,
    until: Callable[[], bool] = lambda: True,
    workers: Sequence[Sequence[Question]] | None = None,
    recover_within_s: float = 30.0,
    note: str = "",
) -> tuple[Row, list[Request]]:
    """Inject a fault while load runs, and wait until the service has recovered, or has not.

    Args:
        server: what the load is for.
        truth: the images and their answers.
        fault: its name in the table.
        inject: does it; a fault that lasts is over when this returns.
        until: what has to be so before recovery is looked for, such as a replaced server.
        workers: of the load; the usual four if not given.
        recover_within_s: how long to wait for `until`, and then for recovery.
        note: for the table.

    Returns:
        The row of the table, and the requests that ended after the injection.
    """
    with Load(server, truth, workers or usual_workers(truth)) as load:
        time.sleep(BEFORE_S)
        since = time.monotonic()
        inject()
        is_over = wait_for(until, recover_within_s)
        is_whole = load.wait_for_recovery(time.monotonic(), recover_within_s) is not None
        time.sleep(AFTER_S)
        recovered_s = load.recovered_s(since) if is_over and is_whole else None
    before = [request for request in load.requests if request.ended < since]
    bad = [request.detail for request in before if request.outcome != "ok"]
    assert before and not bad, bad[:3]
    after = [request for request in load.requests if request.ended >= since]
    return row(fault, after, recovered_s, note), after


def lasting(fault: AbstractContextManager, seconds: float) -> Callable[[], None]:
    """A fault that is there for some seconds."""

    def inject() -> None:
        with fault:
            time.sleep(seconds)

    return inject


def reasons(requests: Sequence[Request], outcome: str) -> list[str]:
    """What those requests were told, each sentence once."""
    return sorted({request.detail for request in requests if request.outcome == outcome})
