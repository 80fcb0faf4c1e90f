"""The keeper and a server that loads what the repository says: any call of it may fail."""

from types import SimpleNamespace

import pytest

import server.rollout
from bundle.versions import Versions
from calibration.anytime import images_needed
from calibration.live_state import State
from tests.unit.live_site import EPSILON, Killed, Site, without_pages
from tests.unit.loading_triton import NOT_LOADED, LoadingTriton, lost, refusal

NEEDED = images_needed(EPSILON, 0.05)
CALLS = 14  # of the server in one switch, as the tests of a rollout count them


@pytest.fixture(autouse=True)
def no_pages(monkeypatch):
    without_pages(monkeypatch)
    monkeypatch.setattr(server.rollout, "_ASK_AGAIN_S", 0.01)


@pytest.fixture
def served(tmp_path):
    """A repository and its server."""
    site = Site(tmp_path)
    triton = LoadingTriton(site.repository)
    site.access = SimpleNamespace(
        url="127.0.0.1:8001", headers={}, open=lambda: triton, why_refused=lambda: None
    )
    return site, triton


def agree(site, triton):
    """What the server serves is what the repository and the state say."""
    said = Versions.load(site.repository)
    state = State.load(site.state_file, site.artifact)
    assert triton.served == said and said.fault == ""
    assert state.served.threshold == site.artifact.threshold and state.pending == 0
    return state


def failing(triton, number, kind, monkeypatch):
    """Let one call of the server fail from now on: refused, answered to nobody, or a kill -9."""
    fails_at = triton.number + 1 + number

    def fault(call, name, is_done):
        if call != fails_at or is_done != (kind == "lost"):
            return
        if kind == "killed":
            raise Killed
        raise lost() if kind == "lost" else refusal(NOT_LOADED)

    triton.fault = fault
    if kind == "killed":

        def end(change, error):
            raise error

        monkeypatch.setattr(server.rollout._Change, "settle", end)


def test_a_certificate_is_served_and_taken_back(served):
    site, triton = served
    site.traffic(NEEDED + 10)
    site.step()
    assert triton.served == Versions(2, (2,)) and triton.number + 1 == CALLS
    assert agree(site, triton).served.threshold is not None
    site.traffic(40, score=0.0, lost=True)
    site.step()
    assert triton.served == Versions(3, (3,)) and agree(site, triton).served.threshold is None


@pytest.mark.parametrize("kind", ["refused", "lost", "killed"])
@pytest.mark.parametrize("number", range(CALLS))
def test_whichever_call_fails_all_agree_after_the_next_steps(served, monkeypatch, number, kind):
    site, triton = served
    site.traffic(NEEDED + 10)
    with monkeypatch.context() as patched:
        failing(triton, number, kind, patched)
        try:
            site.step()
        except Killed:
            assert kind == "killed"
        triton.fault = lambda *_: None
    for _ in range(2):
        site.step()
    state = agree(site, triton)
    assert state.served.threshold is not None
    assert (state.images, state.audited, state.number) == (NEEDED + 10, NEEDED + 10, 1)


@pytest.mark.parametrize("number", range(CALLS))
def test_a_keeper_that_dies_while_it_takes_back_goes_on_taking_back(served, monkeypatch, number):
    site, triton = served
    site.traffic(NEEDED + 10)
    site.step()
    site.traffic(40, score=0.0, lost=True)
    with monkeypatch.context() as patched:
        failing(triton, number, "killed", patched)
        with pytest.raises(Killed):
            site.step()
        triton.fault = lambda *_: None
    site.step()
    state = agree(site, triton)
    assert state.served.threshold is None and state.number == 2
