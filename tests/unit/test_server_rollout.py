"""The order, the refusals and the failures of a rollout; the server is a stand-in.

Whatever fails, and wherever: afterwards disk and server agree, or the error says how they differ.
"""

import shutil
from dataclasses import replace

import pytest
from tritonclient.grpc.service_pb2 import ModelConfigResponse

from bundle import manifest
from bundle.versions import Versions, drop, put, switch
from export.repository import assemble
from server.errors import ServerUsageError
from tests.unit.loading_triton import (
    AFTER,
    BEFORE,
    BY_WAY_OF_BOTH,
    ENSEMBLES,
    NOT_LOADED,
    OUTAGE,
    TENSORS,
    LoadingTriton,
    assembled_twice,
    failure,
    lost,
    refusal,
    roll,
    without_pauses,
)
from tests.unit.test_export_repository import contents, write_inputs
from tests.unit.test_export_versions import as_an_earlier_release, flip_a_bit


@pytest.fixture(scope="module")
def assembled(tmp_path_factory):
    return assembled_twice(tmp_path_factory.mktemp("assembled"))


@pytest.fixture
def repository(assembled, tmp_path):
    return shutil.copytree(assembled / "careful", tmp_path / "repository")


@pytest.fixture
def permissive(assembled, tmp_path):
    """Where a former version may be pinned."""
    return shutil.copytree(assembled / "any", tmp_path / "permissive")


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    without_pauses(monkeypatch)


# --- loaded --------------------------------------------------------------------------------------

ROUTER_FIRST, ROUTER_LAST = ["router", *ENSEMBLES], [*ENSEMBLES, "router"]
SPLIT = {live: Versions(live, (1, 2), tensors=3 - live) for live in (1, 2)}


@pytest.mark.parametrize(
    ("change", "served", "to", "after", "calls"),
    [
        (None, Versions(1, (1,)), None, BEFORE, ROUTER_FIRST),
        (None, BEFORE, 2, AFTER, BY_WAY_OF_BOTH),
        (lambda r: switch(r, 2), AFTER, 1, Versions(1, (1,)), BY_WAY_OF_BOTH),
        # What was switched while nobody looked, and a version that is gone since.
        (lambda r: switch(r, 2), BEFORE, None, AFTER, BY_WAY_OF_BOTH),
        (lambda r: switch(r, 2) and drop(r, 1), BEFORE, None, AFTER, ROUTER_LAST),
        # A server without the ensembles, or of a release that had none for tensors.
        (None, Versions(0, (1,)), None, BEFORE, ROUTER_LAST),
        (None, replace(BEFORE, tensors=0), None, BEFORE, ROUTER_FIRST),
        (
            as_an_earlier_release,
            replace(BEFORE, tensors=0),
            2,
            Versions(2, (2,), tensors=0),
            ["router", "adaptive_vit", "router"],
        ),
        # As a rollout that was killed halfway leaves disk and server.
        (lambda r: put(r, SPLIT[1]), SPLIT[1], None, Versions(1, (1,)), BY_WAY_OF_BOTH),
        (lambda r: put(r, SPLIT[2]), SPLIT[2], None, AFTER, BY_WAY_OF_BOTH),
    ],
)
def test_disk_and_server_say_the_same_afterwards(repository, change, served, to, after, calls):
    if change:
        change(repository)
    before = contents(repository)
    triton = LoadingTriton(repository)
    triton.served = served
    if calls == ROUTER_LAST:  # The tensors' version is gone until adaptive_tensor is loaded, too.
        triton.goes_without = ("adaptive_vit",)
    assert roll(repository, triton, to) == triton.served == Versions.load(repository) == after
    manifest.verify(repository)
    assert triton.calls == calls
    if served.live != after.live and calls == BY_WAY_OF_BOTH and served not in SPLIT.values():
        former, version, both = served.live, after.live, (1, 2)
        assert triton.states == [
            (former, former, both),
            (version, former, both),
            (version, version, both),
            (version, version, (version,)),
        ]
    if to is None and change is None:
        assert contents(repository) == before


def test_a_former_version_stays_where_it_may_be_pinned_unless_it_is_a_higher_one(permissive):
    triton = LoadingTriton(permissive)
    assert roll(permissive, triton, 2) == triton.served == Versions(2, (1, 2))
    assert triton.calls == ROUTER_FIRST
    assert roll(permissive, triton, 1) == triton.served == Versions(1, (1,))
    put(permissive, Versions(1, (1, 2), 2, 0.1))  # As an earlier release loaded a candidate.
    triton = LoadingTriton(permissive)
    assert roll(permissive, triton) == triton.served == Versions.load(permissive) == BEFORE


def test_every_restricted_call_carries_the_key(repository):
    triton = LoadingTriton(repository)
    headers = {"triton-grpc-protocol-admin-key": "secret"}
    roll(repository, triton, 2, headers=headers)
    assert len(triton.headers) > 10 and all(found == headers for found in triton.headers)


# --- refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["router", *ENSEMBLES])
def test_a_refused_switch_is_taken_back(repository, model):
    before = contents(repository)
    triton = LoadingTriton(repository, {model: refusal(NOT_LOADED)})
    message = failure(repository, triton, 2, timeout_s=0.05)
    assert contents(repository) == before
    assert message.startswith(f"{model} was not loaded: ") and "no such luck" in message
    if model == "router":  # nothing was loaded, and nothing has to be
        assert message.endswith("; router/1 goes on answering")
        assert triton.served == BEFORE and triton.calls == ["router"]


@pytest.mark.parametrize(
    ("served", "first", "said"),
    [
        (Versions(1, (1,)), "router", "router/1 answers; to"),
        (Versions(0, ()), "adaptive_vit", "nothing answers; to"),
        (replace(BEFORE, tensors=0), TENSORS, "router/1 answers, without adaptive_tensor; router"),
    ],
)
def test_a_refused_load_of_what_the_disk_says_tells_how_the_server_differs(
    repository, served, first, said
):
    """Its next start would load what has been refused now."""
    triton = LoadingTriton(repository, {first: refusal(NOT_LOADED)})
    triton.served = served
    message = failure(repository, triton, timeout_s=0.05)
    assert message.startswith(f"{first} was not loaded: ")
    assert "the repository says router/1 answers; router/2 shadows 10% of the images" in message
    assert f"but the server at 127.0.0.1:8001 says {said}" in message
    assert "to make them agree, run python -m" in message
    assert triton.served == served and Versions.load(repository) == BEFORE


def test_a_load_that_outlives_the_time_for_it_may_still_be_done(repository):
    """The server goes on with what it had for now, and with what it is loading later."""
    triton = LoadingTriton(repository)

    def late(number, name, is_done):
        if name == "router" and not is_done:
            raise lost()

    triton.fault = late
    message = failure(repository, triton, 2, timeout_s=0.05)
    assert "; router/1 goes on answering" in message and "the way back failed: " in message
    assert "; the server may still be loading what it was told to; look again with" in message


def test_a_switch_that_is_refused_halfway_goes_back_in_the_server_too(repository):
    triton = LoadingTriton(repository)

    def refuse_once(number, name, is_done):
        if triton.calls == ["router", "adaptive_vit"] and name == "adaptive_vit":
            raise refusal(NOT_LOADED)

    triton.fault = refuse_once
    message = failure(repository, triton, 2)
    assert message.startswith("adaptive_vit was not loaded: ")
    assert message.endswith("; router/1 goes on answering")
    assert triton.served == Versions.load(repository) == BEFORE
    assert triton.states[0] == (1, 1, (1, 2)) and triton.states[-1] == (1, 1, (1,))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "explicit model load / unload is not allowed if polling is enabled",
            "loads no models while it serves; start it with --allow-reload, or restart it to serve "
            "what the repository says; router/1 goes on answering",
        ),
        (
            "This protocol is restricted, expecting header 'triton-grpc-protocol-admin-key'",
            "wants the admin key for this; give --admin-key-file; router/1 goes on answering",
        ),
    ],
)
def test_a_server_that_may_not_be_told_says_what_is_needed(repository, text, message):
    triton = LoadingTriton(repository, {"router": refusal(text, OUTAGE)})
    assert message in failure(repository, triton, 2)
    assert triton.served == Versions.load(repository) == BEFORE


def test_without_an_answer_nothing_is_changed(repository):
    before = contents(repository)
    silent = refusal("failed to connect to all addresses", "StatusCode.UNAVAILABLE")
    triton = LoadingTriton(repository, {"get_model_config": silent})
    message = failure(repository, triton, 2, kind=ServerUsageError)
    assert "no answer from a server at 127.0.0.1:8001 (failed to connect" in message
    assert contents(repository) == before and triton.calls == []


@pytest.mark.parametrize("is_old", [False, True])
def test_a_server_of_another_repository_is_noticed(repository, tmp_path, is_old):
    triton = LoadingTriton(assemble(*write_inputs(tmp_path), tmp_path / "other"))
    if is_old:  # Its router knows no shadow.
        triton._load = lambda model: None
        config = triton._config
        triton._config = lambda model: ModelConfigResponse() if model == "router" else config(model)
    message = failure(repository, triton, 2, timeout_s=0.1)
    assert "not those of this repository; give the --repository" in message
    assert Versions.load(repository) == BEFORE


@pytest.mark.parametrize(
    ("damage", "to", "message"),
    [
        (lambda r: flip_a_bit(r / "router/2/calibration.json"), 2, "differs from its SHA-256"),
        (lambda r: flip_a_bit(r / "vit_high/1/model.onnx"), None, "differs from its SHA-256"),
        (lambda r: (r / "vit_low/2").mkdir(), None, "vit_low/2 is not listed"),
        (lambda r: (r / "MANIFEST.json").unlink(), None, "missing or unreadable"),
        (lambda r: None, 3, "the router has no version 3"),
    ],
)
def test_what_is_wrong_with_the_repository_is_said_before_anything_is_loaded(
    repository, damage, to, message
):
    triton = LoadingTriton(repository)
    damage(repository)
    assert message in failure(repository, triton, to, kind=ServerUsageError)
    assert triton.calls == []
