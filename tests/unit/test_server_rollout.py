"""The order, the refusals and the failures of a rollout; the server is a fake that loads from disk.

Whatever fails, and wherever: afterwards disk and server agree, or the error says how they differ.
"""

import errno
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from tritonclient.grpc.service_pb2 import ModelConfigResponse, RepositoryIndexResponse
from tritonclient.utils import InferenceServerException

import server.__main__ as command_line
import server.access as server_access
import server.loading as server_loading
from bundle import manifest
from bundle.versions import Versions, drop, put, switch
from calibration.fit import EscalationRate
from export.repository import assemble
from export.settings import ClientParameters, ReferenceCheck, Settings
from export.versions import add_version
from routing.reference import COMPARING, OTHER, VERDICTS
from server.access import ANSWERS
from server.errors import ServerUsageError
from server.rollout import RolloutError, RolloutInterruptedError, rollout
from tests.unit.reference_files import collected, fitted
from tests.unit.test_export_repository import contents, write_inputs
from tests.unit.test_export_versions import as_an_earlier_release, change_artifact, flip_a_bit

ENSEMBLES = ("adaptive_vit", "adaptive_tensor")
TENSORS = ENSEMBLES[1]
HANDLED = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
NOT_LOADED = (
    "load failed for model 'router': version 2 is at UNAVAILABLE state: Internal: RuntimeError: "
    "no such luck\n\nAt:\n  model.py(3): <module>\n"
)


class FakeTriton:
    """A server of a repository: loads what its files say, as Triton does.

    `fault(number, name)` is called before and after each call, from 0, and may raise; `states` are
    the versions it went through, as (adaptive_vit's, adaptive_tensor's, the router's).
    """

    def __init__(self, repository, refusal=None):
        self.repository = repository
        self.served = Versions.load(repository)
        self.refusals = refusal or {}
        self.fault = lambda number, name, is_done: None
        self.number = -1
        self.calls = []
        self.headers = []
        self.states = []
        self.verdicts = {}
        self.asked = []
        self.goes_without = ()

    def open(self, url):
        self.url = url
        return self

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def _call(self, name, headers, effect):
        self.number += 1
        number = self.number
        self.headers.append(headers)
        self.fault(number, name, False)
        if name in self.refusals:
            raise self.refusals[name]
        answer = effect()
        self.fault(number, name, True)
        return answer

    def get_model_config(self, model, headers, client_timeout):
        return self._call("get_model_config", headers, lambda: self._config(model))

    def _config(self, model):
        answer = ModelConfigResponse()
        if model == "router":
            parameters = answer.config.parameters
            parameters["shadow_version"].string_value = str(self.served.shadow)
            parameters["shadow_fraction"].string_value = f"{self.served.shadow_fraction:g}"
            answer.config.input.add(name="image", dims=[3, 8, 8])
            return answer
        live = self.served.live if model == "adaptive_vit" else tensors(self.served)
        if not live:
            raise refusal(f"unknown model: '{model}'", "StatusCode.NOT_FOUND")
        steps = answer.config.ensemble_scheduling.step
        steps.add(model_name="preprocess", model_version=1)
        steps.add(model_name="router", model_version=live)
        return answer

    def get_model_repository_index(self, headers, client_timeout):
        def index():
            answer = RepositoryIndexResponse()
            answer.models.add(name="preprocess", version="1", state="READY")
            for version in (1, 2, 3):
                state = "READY" if version in self.served.served else "UNAVAILABLE"
                answer.models.add(name="router", version=str(version), state=state)
            return answer

        return self._call("get_model_repository_index", headers, index)

    def infer(self, model, inputs, model_version, request_id, client_timeout):
        """Answers as the next of the version's verdicts says, and as the last one from then on."""
        assert (model, inputs[0].shape()) == ("router", [1, 3, 8, 8])
        version = int(model_version)
        assert version in self.served.served
        self.asked.append((version, self.served.live, tensors(self.served)))
        verdicts = self.verdicts.get(version, [None])
        verdict = verdicts.pop(0) if len(verdicts) > 1 else verdicts[0]
        if isinstance(verdict, BaseException):
            raise verdict

    def load_model(self, model, headers, client_timeout):
        self.calls.append(model)
        self._call(model, headers, lambda: self._load(model))

    def _load(self, model):
        said, was = Versions.load(self.repository), self.served
        live = said.live if model == "adaptive_vit" else was.live
        named = tensors(said if model == "adaptive_tensor" else was)
        said = replace(said, live=live, tensors=None if named == live else named)
        # What it is made of comes with it; the other ensemble is gone where its version is.
        assert model == "router" or (live if model == "adaptive_vit" else named) in said.served
        assert said.named <= set(said.served) or model in self.goes_without, said
        manifest.verify(self.repository)  # as its router does
        self.served = said
        self.states.append((live, named, said.served))


def tensors(versions):
    """What adaptive_tensor names."""
    return versions.live if versions.tensors is None else versions.tensors


def refusal(text, status="StatusCode.INVALID_ARGUMENT"):
    return InferenceServerException(text, status=status)


@pytest.fixture(scope="module")
def assembled(tmp_path_factory):
    """Two repositories with a version that answers and a shadow beside it, and their inputs."""
    folder = tmp_path_factory.mktemp("assembled")
    inputs = write_inputs(folder)
    second = change_artifact(folder, "second", threshold=0.75)
    for name, kind in (("careful", ClientParameters.CAREFUL), ("any", ClientParameters.ANY)):
        out = assemble(*inputs, folder / name, Settings(client_parameters=kind))
        add_version(out, second, shadow_fraction=0.1)
    return folder


@pytest.fixture
def repository(assembled, tmp_path):
    return shutil.copytree(assembled / "careful", tmp_path / "repository")


@pytest.fixture
def permissive(assembled, tmp_path):
    """Where a former version may be pinned."""
    return shutil.copytree(assembled / "any", tmp_path / "permissive")


@pytest.fixture(scope="module")
def assembled_to_refuse(tmp_path_factory):
    """A repository whose router refuses other answers than calibrated, and a candidate."""
    folder = tmp_path_factory.mktemp("refusing")
    rung_set, outputs = collected(folder)
    for rate in (0.3, 0.6):
        fitted(rung_set, outputs, EscalationRate(rate)).save(folder / f"{rate}.json")
    settings = Settings(reference_check=ReferenceCheck.REFUSE)
    out = assemble(rung_set, folder / "0.3.json", folder / "repository", settings)
    add_version(out, folder / "0.6.json", shadow_fraction=0.1)
    return out


@pytest.fixture
def refusing(assembled_to_refuse, tmp_path):
    return shutil.copytree(assembled_to_refuse, tmp_path / "refusing")


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(server_loading, "_POLL_S", 0.001)
    monkeypatch.setattr(server_access, "_POLL_S", 0.001)


BEFORE = Versions(1, (1,), 2, 0.1)


def roll(repository, triton, to=None, timeout_s=120.0, headers=()):
    access = SimpleNamespace(url="127.0.0.1:8001", headers=dict(headers), open=lambda: triton)
    return rollout(repository, access, to, timeout_s)


# --- loaded --------------------------------------------------------------------------------------


def test_a_shadow_is_loaded_by_the_version_that_answers_and_answers_nobody(repository):
    triton = FakeTriton(repository)
    triton.served = Versions(1, (1,))
    before = contents(repository)
    assert roll(repository, triton) == BEFORE == triton.served
    assert triton.calls == ["router", *ENSEMBLES]
    assert contents(repository) == before


def by_way_of_both(former, version):
    both = (1, 2)
    return [
        (former, former, both),
        (version, former, both),
        (version, version, both),
        (version, version, (version,)),
    ]


@pytest.mark.parametrize("versions", [(2,), (2, 1)])
def test_a_switch_goes_by_way_of_both_and_leaves_what_answers(repository, versions):
    triton = FakeTriton(repository)
    for version in versions:
        other = 3 - version
        assert roll(repository, triton, version) == Versions(version, (version,))
        assert triton.served == Versions.load(repository) == Versions(version, (version,))
        assert triton.states[-4:] == by_way_of_both(other, version)
    assert triton.calls == ["router", *ENSEMBLES, "router"] * len(versions)
    manifest.verify(repository)


def test_a_former_version_stays_where_it_may_be_pinned_unless_it_is_a_higher_one(permissive):
    triton = FakeTriton(permissive)
    assert roll(permissive, triton, 2) == triton.served == Versions(2, (1, 2))
    assert triton.calls == ["router", *ENSEMBLES]
    assert roll(permissive, triton, 1) == triton.served == Versions(1, (1,))
    assert Versions.load(permissive) == triton.served


def test_a_candidate_that_an_earlier_release_loaded_is_taken_out(permissive):
    put(permissive, Versions(1, (1, 2), 2, 0.1))
    triton = FakeTriton(permissive)
    assert roll(permissive, triton) == triton.served == BEFORE
    assert Versions.load(permissive) == BEFORE


def test_what_was_switched_while_nobody_looked_is_loaded_beside_what_answers(repository):
    triton = FakeTriton(repository)
    switch(repository, 2)
    assert roll(repository, triton) == triton.served == Versions(2, (2,))
    assert triton.states == by_way_of_both(1, 2)
    assert Versions.load(repository) == triton.served


def test_the_ensemble_goes_first_where_its_version_is_gone(repository):
    triton = FakeTriton(repository)
    switch(repository, 2)
    drop(repository, 1)
    triton.goes_without = ("adaptive_vit",)  # adaptive_tensor's is gone until that is loaded, too
    roll(repository, triton)
    assert triton.calls == [*ENSEMBLES, "router"]


def test_a_server_without_the_ensemble_gets_it(repository):
    triton = FakeTriton(repository)
    triton.served = Versions(0, (1,))
    assert roll(repository, triton) == triton.served == BEFORE
    assert triton.calls == [*ENSEMBLES, "router"]


def test_a_repository_without_an_ensemble_for_tensors_is_switched_as_it_is(repository):
    as_an_earlier_release(repository)
    triton = FakeTriton(repository)
    assert roll(repository, triton, 2) == triton.served == Versions(2, (2,), tensors=0)
    assert triton.calls == ["router", "adaptive_vit", "router"]


def test_a_server_of_a_repository_assembled_before_gets_the_ensemble_for_tensors(repository):
    triton = FakeTriton(repository)
    triton.served = replace(BEFORE, tensors=0)
    assert roll(repository, triton) == triton.served == BEFORE
    triton.served = replace(BEFORE, tensors=0)
    triton.refusals = {"adaptive_tensor": refusal(NOT_LOADED)}
    with pytest.raises(
        RolloutError, match="says router/1 answers, without adaptive_tensor; router"
    ):
        roll(repository, triton, timeout_s=0.05)


@pytest.mark.parametrize("live", [1, 2])
def test_ensembles_that_name_different_versions_are_brought_together(repository, live):
    """As a rollout that was killed halfway leaves disk and server."""
    put(repository, Versions(live, (1, 2), tensors=3 - live))
    triton = FakeTriton(repository)
    assert roll(repository, triton) == triton.served == Versions(live, (live,))
    assert Versions.load(repository) == triton.served


def test_every_restricted_call_carries_the_key(repository):
    triton = FakeTriton(repository)
    headers = {"triton-grpc-protocol-admin-key": "secret"}
    roll(repository, triton, 2, headers=headers)
    assert len(triton.headers) == CALLS and all(found == headers for found in triton.headers)


# --- refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["router", *ENSEMBLES])
def test_a_refused_switch_is_taken_back(repository, model):
    before = contents(repository)
    triton = FakeTriton(repository, {model: refusal(NOT_LOADED)})
    with pytest.raises(RolloutError) as caught:
        roll(repository, triton, 2, timeout_s=0.05)
    message = str(caught.value)
    assert contents(repository) == before
    assert message.startswith(f"{model} was not loaded: ") and "no such luck" in message
    assert "\n" not in message
    if model == "router":  # nothing was loaded, and nothing has to be
        assert message.endswith("; router/1 goes on answering")
        assert triton.served == BEFORE and triton.calls == ["router"]


@pytest.mark.parametrize(
    ("served", "said"),
    [
        (Versions(1, (1,)), "says router/1 answers; to"),
        (Versions(0, ()), "says nothing answers; to"),
    ],
)
def test_a_refused_load_of_what_the_disk_says_tells_how_the_server_differs(
    repository, served, said
):
    """Its next start would load what has been refused now."""
    first = "router" if served.live else "adaptive_vit"
    triton = FakeTriton(repository, {first: refusal(NOT_LOADED)})
    triton.served = served
    with pytest.raises(RolloutError) as caught:
        roll(repository, triton, timeout_s=0.05)
    message = str(caught.value)
    assert message.startswith(f"{first} was not loaded: ") and "\n" not in message
    assert "the repository says router/1 answers; router/2 shadows 10% of the images" in message
    assert f"but the server at 127.0.0.1:8001 {said} make them agree, run python -m" in message
    assert triton.served == served and Versions.load(repository) == BEFORE


def test_a_load_that_outlives_the_time_for_it_may_still_be_done(repository):
    """The server goes on with what it had for now, and with what it is loading later."""
    triton = FakeTriton(repository)

    def late(number, name, is_done):
        if name == "router" and not is_done:
            raise refusal("Deadline Exceeded", "StatusCode.DEADLINE_EXCEEDED")

    triton.fault = late
    with pytest.raises(RolloutError) as caught:
        roll(repository, triton, 2, timeout_s=0.05)
    message = str(caught.value)
    assert "; router/1 goes on answering" in message and "\n" not in message
    assert "; the server may still be loading what it was told to; look again with" in message
    assert "the way back failed: " in message


def test_a_switch_that_is_refused_halfway_goes_back_in_the_server_too(repository):
    triton = FakeTriton(repository)

    def refuse_once(number, name, is_done):
        if triton.calls == ["router", "adaptive_vit"] and name == "adaptive_vit":
            raise refusal(NOT_LOADED)

    triton.fault = refuse_once
    with pytest.raises(RolloutError, match="adaptive_vit was not loaded: .*; router/1 goes on ans"):
        roll(repository, triton, 2)
    assert triton.served == Versions.load(repository) == BEFORE
    assert triton.states[0] == (1, 1, (1, 2)) and triton.states[-1] == (1, 1, (1,))


@pytest.mark.parametrize(
    ("text", "status", "message"),
    [
        (
            "explicit model load / unload is not allowed if polling is enabled",
            "StatusCode.UNAVAILABLE",
            "loads no models while it serves; start it with --allow-reload, or restart it to serve "
            "what the repository says; router/1 goes on answering",
        ),
        (
            "This protocol is restricted, expecting header 'triton-grpc-protocol-admin-key'",
            "StatusCode.UNAVAILABLE",
            "wants the admin key for this; give --admin-key-file; router/1 goes on answering",
        ),
    ],
)
def test_a_server_that_may_not_be_told_says_what_is_needed(repository, text, status, message):
    triton = FakeTriton(repository, {"router": refusal(text, status)})
    with pytest.raises(RolloutError, match=re.escape(message)):
        roll(repository, triton, 2)
    assert triton.served == Versions.load(repository) == BEFORE


def test_without_an_answer_nothing_is_changed(repository):
    before = contents(repository)
    silent = refusal("failed to connect to all addresses", "StatusCode.UNAVAILABLE")
    triton = FakeTriton(repository, {"get_model_config": silent})
    with pytest.raises(ServerUsageError, match=r"no answer from a server at 127.0.0.1:8001 \(f"):
        roll(repository, triton, 2)
    assert contents(repository) == before and triton.calls == []


def test_a_server_whose_router_knows_no_shadow_is_a_server_of_another_repository(repository):
    triton = FakeTriton(repository)
    triton.served = Versions(1, (1,))
    triton._load = lambda model: None
    config = triton._config
    triton._config = lambda model: ModelConfigResponse() if model == "router" else config(model)
    with pytest.raises(RolloutError, match="not those of this repository; give the --repository"):
        roll(repository, triton, 2, timeout_s=0.1)
    assert Versions.load(repository) == BEFORE


def test_a_server_of_another_repository_is_noticed(assembled, repository, tmp_path):
    other = assemble(*write_inputs(tmp_path), tmp_path / "other")
    triton = FakeTriton(other)
    with pytest.raises(RolloutError, match="not those of this repository; give the --repository"):
        roll(repository, triton, 2, timeout_s=0.1)
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
    triton = FakeTriton(repository)
    damage(repository)
    with pytest.raises(ServerUsageError, match=message):
        roll(repository, triton, to)
    assert triton.calls == []


# --- failures at every step ----------------------------------------------------------------------

# Of a switch: two questions, three models, four questions, the router, four questions.
CALLS, LOADS, LAST_LOAD = 14, (2, 3, 4, 9), 9
STEPS = range(2, CALLS)
RENAMES = 10  # on disk: the manifest, three configs and the manifest, and so again


def lost():
    return refusal("Deadline Exceeded", "StatusCode.DEADLINE_EXCEEDED")


def test_a_switch_is_so_many_steps(repository, monkeypatch):
    triton = FakeTriton(repository)
    renames = []
    rename = Path.replace

    def count(path, target):
        renames.append(path)
        return rename(path, target)

    monkeypatch.setattr(Path, "replace", count)
    roll(repository, triton, 2)
    assert (triton.number + 1, len(renames)) == (CALLS, RENAMES)


def check_outcome(repository, triton, error):
    """Disk and server agree, or the error says what each says; returns what the disk says."""
    manifest.verify(repository)
    on_disk, message = Versions.load(repository), str(error)
    assert on_disk in (BEFORE, Versions(2, (2,))) and "\n" not in message
    if triton.served != on_disk:
        assert f"the repository says {on_disk.sentence}" in message
        assert "to make them agree, run python -m server rollout --repository" in message
    return on_disk


@pytest.mark.parametrize("is_done", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("number", STEPS)
def test_an_answer_that_is_lost_at_any_step_leaves_both_agreeing(repository, number, is_done):
    triton = FakeTriton(repository)

    def lose_one(this, name, done):
        if (this, done) == (number, is_done):
            raise lost()

    triton.fault = lose_one
    try:
        error = None
        assert roll(repository, triton, 2) == Versions(2, (2,))
    except RolloutError as failure:
        error = failure
        assert "did not answer while it was to load" in str(error)
        assert ": Deadline Exceeded; router/1 goes on answering" in str(error)
    assert check_outcome(repository, triton, error) == triton.served
    assert triton.served == (Versions(2, (2,)) if error is None else BEFORE)
    # A question is asked again, and the last step may have been taken.
    assert (error is None) == (number not in LOADS or (number, is_done) == (LAST_LOAD, True))


@pytest.mark.parametrize("is_done", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("number", STEPS)
def test_a_server_that_is_gone_at_any_step_is_said_to_be(repository, number, is_done):
    triton = FakeTriton(repository)

    def be_gone(this, name, done):
        if this > number or (this, done) == (number, is_done):
            raise refusal("failed to connect to all addresses", "StatusCode.UNAVAILABLE")

    triton.fault = be_gone
    with pytest.raises(RolloutError) as caught:
        roll(repository, triton, 2, timeout_s=0.05)
    # It starts again with what the disk says.
    assert check_outcome(repository, triton, caught.value) == BEFORE
    said = "at 127.0.0.1:8001 does not say what it serves (failed to connect to all addresses)"
    assert said in str(caught.value) and "to make them agree, run" in str(caught.value)


@pytest.mark.parametrize("is_done", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("number", STEPS)
def test_ctrl_c_at_any_step_leaves_both_agreeing(repository, number, is_done):
    triton = FakeTriton(repository)

    def interrupt(this, name, done):
        if (this, done) == (number, is_done):
            raise KeyboardInterrupt

    triton.fault = interrupt
    with pytest.raises(RolloutInterruptedError) as caught:
        roll(repository, triton, 2)
    on_disk = check_outcome(repository, triton, caught.value)
    assert on_disk == triton.served
    says = "router/2 answers, as the repository says"
    says = says if on_disk.live == 2 else "router/1 goes on answering"
    assert str(caught.value) == f"interrupted; {says}"
    assert (on_disk.live == 2) == (number > LAST_LOAD or (number, is_done) == (LAST_LOAD, True))


@pytest.mark.parametrize("number", STEPS)
def test_a_second_ctrl_c_says_that_nobody_was_asked(repository, number):
    triton = FakeTriton(repository)

    def interrupt(this, name, done):
        if this >= number:
            raise KeyboardInterrupt

    triton.fault = interrupt
    with pytest.raises(RolloutInterruptedError, match="was not asked what it serves") as caught:
        roll(repository, triton, 2)
    assert check_outcome(repository, triton, caught.value) == BEFORE
    assert "to make them agree, run" in str(caught.value)


@pytest.mark.parametrize("kind", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("number", range(RENAMES))
def test_a_change_of_the_disk_that_ends_early_is_taken_back(repository, monkeypatch, number, kind):
    triton = FakeTriton(repository)
    rename, renames = Path.replace, []

    def fail_once(path, target):
        renames.append(path)
        if len(renames) == number + 1:
            raise kind(errno.EIO, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "replace", fail_once)
    halfway = RolloutError if number >= RENAMES // 2 else ServerUsageError
    expected = RolloutInterruptedError if kind is KeyboardInterrupt else halfway
    with pytest.raises(expected) as caught:
        roll(repository, triton, 2)
    assert check_outcome(repository, triton, caught.value) == BEFORE == triton.served


def no_space(path, *arguments, **options):
    raise OSError(errno.ENOSPC, "No space left on device", str(path))


def test_a_full_disk_is_said_before_anything_is_loaded(repository, monkeypatch):
    triton = FakeTriton(repository)
    before = contents(repository)
    monkeypatch.setattr(Path, "write_text", no_space)
    with pytest.raises(ServerUsageError, match="cannot be changed: .*No space left on device"):
        roll(repository, triton, 2)
    assert triton.calls == [] and contents(repository) == before


@pytest.mark.parametrize("model", ["router", *ENSEMBLES])
def test_what_cannot_be_taken_back_is_said(repository, monkeypatch, model):
    triton = FakeTriton(repository)

    def refuse(number, name, is_done):
        if name == model:
            monkeypatch.setattr(Path, "write_text", no_space)
            raise refusal(NOT_LOADED)

    triton.fault = refuse
    with pytest.raises(RolloutError) as caught:
        roll(repository, triton, 2, timeout_s=0.05)
    message = str(caught.value)
    assert "no such luck" in message and "cannot be changed back: " in message
    assert "the repository says router/2 answers; router/1 can be pinned too; but" in message
    says = "router/2 answers, and router/1 tensors" if model == TENSORS else "router/1 answers"
    assert f"the server at 127.0.0.1:8001 says {says}; router/" in message
    assert message.endswith("--url 127.0.0.1:8001 --to 1")


# --- where the router refuses other answers than calibrated ------------------------------------

OUTAGE = "StatusCode.UNAVAILABLE"
STILL = refusal(COMPARING, OUTAGE)
FOREIGN = refusal(f"{VERDICTS[OTHER]}: of 32 reference images 20 have another answer", OUTAGE)


def test_the_ensemble_names_a_version_that_every_instance_has_found_to_answer_alike(refusing):
    triton = FakeTriton(refusing)
    # Two instances take turns, and one knows before the other.
    triton.verdicts[2] = [STILL, STILL, None, STILL, None, STILL, None]
    assert roll(refusing, triton, 2) == triton.served == Versions(2, (2,))
    first = triton.asked[: 6 + ANSWERS]
    assert first == [(2, 1, 1)] * len(first) and triton.asked[len(first)] == (2, 2, 1)
    # What Triton has loaded since may be another process, which compares anew.
    assert len(triton.asked) == len(first) + 3 * ANSWERS
    assert triton.calls == ["router", *ENSEMBLES, "router"]


def test_a_version_that_refuses_is_never_named_by_the_ensemble(refusing):
    triton = FakeTriton(refusing)
    triton.verdicts[2] = [STILL, FOREIGN]
    with pytest.raises(RolloutError) as caught:
        roll(refusing, triton, 2)
    message = str(caught.value)
    assert message.startswith("router/2 refuses every request: this server computes other")
    assert "of 32 reference images 20 have" in message and "--reference-check warn" in message
    assert triton.served == Versions.load(refusing) == BEFORE
    assert {state[:2] for state in triton.states} == {(1, 1)}


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_version_that_refuses_once_it_is_loaded_anew_is_taken_back(refusing, step):
    triton = FakeTriton(refusing)
    triton.verdicts[2] = [*[None] * (step * ANSWERS), FOREIGN]
    match = "router/2 refuses every request: .*; router/1 goes on answering"
    with pytest.raises(RolloutError, match=match):
        roll(refusing, triton, 2)
    assert (2, 1, (1, 2)) in triton.states
    assert triton.served == Versions.load(refusing) == BEFORE


def test_comparing_that_takes_too_long_is_a_failed_step(refusing):
    triton = FakeTriton(refusing)
    triton.verdicts[2] = [STILL]
    with pytest.raises(RolloutError) as caught:
        roll(refusing, triton, 2, timeout_s=0.05)
    assert str(caught.value) == (
        "router/2 is still comparing its answers with the calibration's after 0.05 s; give "
        "it longer with --timeout-s; router/1 goes on answering"
    )
    assert triton.served == Versions.load(refusing) == BEFORE


@pytest.mark.parametrize("verdict", [FOREIGN, STILL])
def test_a_version_that_refuses_does_not_go_on_answering(refusing, verdict):
    triton = FakeTriton(refusing)
    triton.verdicts[1] = [verdict]
    with pytest.raises(RolloutError) as caught:
        roll(refusing, triton, timeout_s=0.05)
    assert "goes on" not in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value).endswith(f"the repository and the server say {BEFORE.sentence}")
    triton.verdicts[2] = [verdict]
    with pytest.raises(RolloutError, match="; the way back failed: router/1 "):
        roll(refusing, triton, 2, timeout_s=0.05)
    assert triton.served == Versions.load(refusing) == BEFORE


@pytest.mark.parametrize(
    "error",
    [
        refusal("vit_high failed: no answer within 10000 ms", OUTAGE),
        refusal("Exceeds maximum queue size", OUTAGE),
        lost(),
        refusal("model output is not finite", "StatusCode.INTERNAL"),
    ],
)
def test_what_a_request_fails_with_otherwise_does_not_keep_from_rolling_back(refusing, error):
    triton = FakeTriton(refusing)
    triton.verdicts = {1: [error], 2: [error]}
    for version in (2, 1):
        assert roll(refusing, triton, version) == triton.served
        assert triton.served == Versions(version, (version,))


@pytest.mark.parametrize("number", range(4 * ANSWERS))
def test_ctrl_c_while_it_is_waited_for_leaves_both_agreeing(refusing, number):
    triton = FakeTriton(refusing)
    triton.verdicts[2] = [*[None] * number, KeyboardInterrupt(), None]
    with pytest.raises(RolloutInterruptedError) as caught:
        roll(refusing, triton, 2)
    assert check_outcome(refusing, triton, caught.value) == triton.served
    assert (triton.served.live == 2) == (number >= 3 * ANSWERS)


@pytest.mark.parametrize("verdict", [None, FOREIGN])
def test_after_an_answer_that_is_lost_what_was_loaded_has_to_compare_too(refusing, verdict):
    triton = FakeTriton(refusing)

    def lose_the_last(number, name, is_done):
        if is_done and name == "router" and triton.calls.count("router") == 2:
            triton.verdicts[2] = [verdict]
            triton.fault = lambda *call: None
            raise lost()

    triton.fault = lose_the_last
    if verdict is None:
        assert roll(refusing, triton, 2) == triton.served == Versions(2, (2,))
        return
    with pytest.raises(RolloutError, match="did not answer while it was to load router"):
        roll(refusing, triton, 2)
    assert triton.served == Versions.load(refusing) == BEFORE


# --- the command ---------------------------------------------------------------------------------


@pytest.fixture
def handlers():
    """The command line installs its own."""
    before = {number: signal.getsignal(number) for number in HANDLED}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def run(monkeypatch, capsys, instead, *arguments):
    monkeypatch.setattr(command_line, "rollout", instead)
    code = command_line.main(["rollout", *map(str, arguments)])
    return code, *capsys.readouterr()


@pytest.mark.usefixtures("handlers")
def test_the_command_says_what_is_served(monkeypatch, capsys):
    asked = []

    def instead(repository, access, switch_to, timeout_s):
        asked.append((repository, access.url, timeout_s, switch_to))
        return Versions(2, (1, 2))

    options = ("--repository", "r", "--to", 1, "--url", "host:9", "--timeout-s", 7)
    code, out, err = run(monkeypatch, capsys, instead, *options)
    assert (code, err) == (0, "") and asked == [(Path("r"), "host:9", 7.0, 1)]
    assert out == "router/2 answers; router/1 can be pinned too\n"


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize(
    ("error", "expected", "said"),
    [
        (RolloutError("router was not loaded"), 1, "error: router was not loaded\n"),
        (ServerUsageError("no version 7"), 2, "error: no version 7\n"),
        (KeyboardInterrupt(), 130, "interrupted before anything was changed\n"),
        (RolloutInterruptedError("interrupted; router/1"), 130, "interrupted; router/1\n"),
    ],
)
def test_the_exit_code_tells_whose_move_it_is(monkeypatch, capsys, error, expected, said):
    def instead(*arguments, **options):
        raise error

    code, out, err = run(monkeypatch, capsys, instead)
    assert (code, out) == (expected, "")
    assert err.startswith(said) and len(err.splitlines()) == 1


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--tls-ca", "a", "--tls-cert", "b"), "a client cert without a key; give both"),
        (("--tls-cert", "b", "--tls-key", "c"), "cannot read b for TLS: No such file"),
        (("--tls-ca", "nowhere.crt"), "cannot read nowhere.crt for TLS: No such file"),
        (("--admin-key-file", "nowhere.key"), "admin key file nowhere.key cannot be read"),
    ],
)
def test_a_bad_option_is_one_line(monkeypatch, capsys, options, message):
    code, out, err = run(monkeypatch, capsys, rollout, *options)
    assert (code, out) == (2, "") and message in err and len(err.splitlines()) == 1
