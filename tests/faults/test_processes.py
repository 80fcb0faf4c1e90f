"""Processes that are killed or hang while load runs, under `python -m server --supervise`."""

import pytest

from tests.faults import inject
from tests.faults.experiment import lasting, measure, reasons
from tests.faults.processes import ServerCommand
from tests.servers import is_alive, stubs

RECOVER_WITHIN_S = 30.0
# Triton gives a model process up after 1.3 s; a late answer must not be taken for another's.
PAUSES_S = (1.5, 2.0)
MODELS = ("preprocess", "router", "vit_low", "vit_high")
HIGH_TIMEOUT = ("--high-timeout-ms", "3000")


@pytest.fixture
def supervise(assembled, tmp_path):
    """Serve a repository assembled with options: `with supervise(...) as server`."""

    def start(*options):
        repository = assembled(*HIGH_TIMEOUT, *options)
        return ServerCommand(repository, tmp_path / "supervise.log", ["--supervise"])

    return start


@pytest.fixture
def supervised(supervise):
    with supervise() as running:
        yield running


@pytest.fixture
def supervised_low(supervise):
    with supervise("--on-high-failure", "low") as running:
        yield running


def strike(server, truth, record, fault, inject_it, note=""):
    """Inject a fault and check that one new server took the place of the old one in time."""
    (old,) = server.tritonservers()

    def is_replaced():
        return not is_alive(old) and len(server.tritonservers()) == 1

    found, after = measure(server, truth, fault, inject_it, until=is_replaced, note=note)
    record(found)
    assert found.wrong == 0, reasons(after, "wrong")
    assert found.recovery_s is not None, reasons(after, "failed")
    assert found.recovery_s < RECOVER_WITHIN_S
    assert len(server.tritonservers()) == 1 and not is_alive(old)
    return found


@pytest.mark.parametrize("model", MODELS)
def test_a_killed_stub_is_replaced(supervised, truth, record, model):
    victim = stubs(supervised.process_ids(), model)[:1]
    fault = f"kill -9 of a {model} stub"
    strike(supervised, truth, record, fault, lambda: inject.kill(victim))


def test_a_killed_server_is_replaced(supervised, truth, record):
    victim = supervised.tritonservers()
    strike(supervised, truth, record, "kill -9 of tritonserver", lambda: inject.kill(victim))


def test_a_hung_cheap_rung_is_replaced(supervised, truth, record):
    victim = stubs(supervised.process_ids(), "vit_low")
    strike(supervised, truth, record, "SIGSTOP of vit_low", lambda: inject.stop(victim))


def test_a_hung_full_rung_is_replaced(supervised, truth, record):
    victim = stubs(supervised.process_ids(), "vit_high")
    fault = "SIGSTOP of vit_high, on_high_failure=error"
    strike(supervised, truth, record, fault, lambda: inject.stop(victim))


def test_a_hung_full_rung_degrades_where_that_was_chosen(supervised_low, truth, record):
    victim = stubs(supervised_low.process_ids(), "vit_high")
    fault = "SIGSTOP of vit_high, on_high_failure=low"
    note = "answers low until the server is replaced, which fails some"
    found = strike(supervised_low, truth, record, fault, lambda: inject.stop(victim), note)
    assert found.degraded > 0


@pytest.mark.parametrize("pause_s", PAUSES_S)
@pytest.mark.parametrize("model", ["vit_low", "vit_high"])
def test_a_rung_that_hangs_and_goes_on_answers_nothing_wrong(
    supervised, truth, record, model, pause_s
):
    victim = stubs(supervised.process_ids(), model)
    hang = lasting(inject.stopped(victim), pause_s)
    fault = f"SIGSTOP of {model}, SIGCONT after {pause_s:g} s"
    strike(supervised, truth, record, fault, hang)
