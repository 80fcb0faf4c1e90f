"""The order and the refusals of a rollout; the server is a fake that keeps what it was told."""

import errno
import re
import signal
from pathlib import Path

import pytest
from tritonclient.grpc.service_pb2 import ModelConfigResponse
from tritonclient.utils import InferenceServerException

import server.__main__ as command_line
from export.repository import assemble
from export.versions import add_version
from routing import manifest
from routing.versions import Versions, drop, switch
from server import rollout_command
from server.errors import ServerUsageError
from server.rollout import Access, RolloutError, rollout
from tests.unit.test_export_repository import contents, write_inputs
from tests.unit.test_export_versions import change_artifact, flip_a_bit

HANDLED = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
NOT_LOADED = (
    "load failed for model 'router': version 2 is at UNAVAILABLE state: Internal: RuntimeError: "
    "no such luck\n\nAt:\n  model.py(3): <module>\n"
)


class FakeTriton:
    """A server of a repository: loads what its files say, some polls later."""

    def __init__(self, repository, refusal=None, polls=0):
        self.repository = repository
        self.served = Versions.load(repository)
        self.refusals = refusal or {}
        self.polls = polls
        self.calls = []
        self.headers = []

    def open(self, url):
        self.url = url
        return self

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def get_model_config(self, model, headers, client_timeout):
        assert model == "adaptive_vit"
        self.headers.append(headers)
        if self.refusals.get("get_model_config"):
            raise self.refusals["get_model_config"]
        answer = ModelConfigResponse()
        steps = answer.config.ensemble_scheduling.step
        steps.add(model_name="preprocess", model_version=-1)
        steps.add(model_name="router", model_version=self.served.live)
        return answer

    def load_model(self, model, headers, client_timeout):
        self.calls.append(model)
        self.headers.append(headers)
        if model in self.refusals:
            raise self.refusals[model]
        if model == "adaptive_vit":
            self.served = Versions.load(self.repository)

    def is_model_ready(self, model, version, client_timeout):
        self.polls -= 1
        return self.polls < 0 and int(version) in self.served.served


def refusal(text, status="StatusCode.INVALID_ARGUMENT"):
    return InferenceServerException(text, status=status)


@pytest.fixture
def repository(tmp_path):
    """One version answers, a second stands beside it."""
    out = assemble(*write_inputs(tmp_path), tmp_path / "repository")
    add_version(out, change_artifact(tmp_path, "second", threshold=0.75), shadow_fraction=0.1)
    return out


def access(triton, **more):
    return Access("127.0.0.1:8001", triton, **more)


# --- loaded --------------------------------------------------------------------------------------


def test_what_the_repository_says_is_loaded_the_router_first(repository):
    triton = FakeTriton(repository)
    before = contents(repository)
    assert rollout(repository, access(triton)) == Versions(1, (1, 2), 2, 0.1)
    assert triton.calls == ["router", "adaptive_vit"]
    assert contents(repository) == before


@pytest.mark.parametrize("versions", [(2,), (2, 1)])
def test_a_switch_is_written_then_loaded_forward_and_back(repository, versions):
    triton = FakeTriton(repository, polls=3)
    for version in versions:
        assert rollout(repository, access(triton), version) == Versions(version, (1, 2))
        assert triton.served == Versions.load(repository)
    assert triton.calls == ["router", "adaptive_vit"] * len(versions)
    manifest.verify(repository)


def test_the_ensemble_goes_first_where_its_version_is_about_to_leave(repository):
    triton = FakeTriton(repository)
    switch(repository, 2)
    drop(repository, 1)
    rollout(repository, access(triton))
    assert triton.calls == ["adaptive_vit", "router"]


def test_a_server_without_the_ensemble_gets_it(repository):
    triton = FakeTriton(repository)
    missing = refusal("unknown model: 'adaptive_vit'", "StatusCode.NOT_FOUND")
    triton.refusals["get_model_config"] = missing

    def load_model(model, headers, client_timeout):
        triton.refusals.clear()
        triton.calls.append(model)

    triton.load_model = load_model
    rollout(repository, access(triton))
    assert triton.calls == ["adaptive_vit", "router"]


def test_every_restricted_call_carries_the_key(repository):
    triton = FakeTriton(repository)
    headers = {"triton-grpc-protocol-admin-key": "secret"}
    rollout(repository, access(triton, headers=headers))
    assert triton.headers and all(found == headers for found in triton.headers)


# --- refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["router", "adaptive_vit"])
def test_a_refused_switch_is_taken_back_on_disk(repository, model):
    before = contents(repository)
    triton = FakeTriton(repository, {model: refusal(NOT_LOADED)})
    with pytest.raises(RolloutError) as caught:
        rollout(repository, access(triton), 2)
    assert contents(repository) == before
    goes_on = f"{model} was not loaded; router/1 goes on answering: "
    assert str(caught.value).startswith(goes_on) and "no such luck" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "explicit model load / unload is not allowed if polling is enabled",
            "loads no models while it serves; router/1 goes on answering; start it with "
            "--allow-reload",
        ),
        (
            "This protocol is restricted, expecting header 'triton-grpc-protocol-admin-key'",
            "wants the admin key for this; router/1 goes on answering; give --admin-key-file",
        ),
    ],
)
def test_a_server_that_may_not_be_told_says_what_is_needed(repository, text, message):
    triton = FakeTriton(repository, {"router": refusal(text)})
    with pytest.raises(RolloutError, match=re.escape(message)):
        rollout(repository, access(triton))


def test_without_an_answer_nothing_is_changed(repository):
    before = contents(repository)
    silent = refusal("failed to connect to all addresses", "StatusCode.UNAVAILABLE")
    triton = FakeTriton(repository, {"get_model_config": silent})
    with pytest.raises(ServerUsageError, match=r"no answer from a server at 127.0.0.1:8001 \(f"):
        rollout(repository, access(triton), 2)
    assert contents(repository) == before and triton.calls == []


def test_a_server_of_another_repository_is_noticed(tmp_path, repository):
    other = assemble(*write_inputs(tmp_path), tmp_path / "other")
    triton = FakeTriton(other)
    with pytest.raises(RolloutError, match="not those of this repository; give the --repository"):
        rollout(repository, access(triton, timeout_s=0.2), 2)
    assert Versions.load(repository) == Versions(1, (1, 2), 2, 0.1)


@pytest.mark.parametrize(
    ("damage", "to", "message"),
    [
        (lambda r: flip_a_bit(r / "router/2/calibration.json"), 2, "differs from its SHA-256"),
        (lambda r: flip_a_bit(r / "vit_high/1/model.onnx"), None, "differs from its SHA-256"),
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
        rollout(repository, access(triton), to)
    assert triton.calls == []


def no_space(path, *arguments, **options):
    raise OSError(errno.ENOSPC, "No space left on device", str(path))


def test_a_full_disk_is_said_before_anything_is_loaded(repository, monkeypatch):
    triton = FakeTriton(repository)
    monkeypatch.setattr(Path, "write_text", no_space)
    with pytest.raises(ServerUsageError, match="cannot be changed: .*No space left on device"):
        rollout(repository, access(triton), 2)
    assert triton.calls == []


def test_what_cannot_be_taken_back_is_said(repository, monkeypatch):
    triton = FakeTriton(repository)

    def refuse(model, headers, client_timeout):
        monkeypatch.setattr(Path, "write_text", no_space)
        raise refusal(NOT_LOADED)

    triton.load_model = refuse
    with pytest.raises(
        RolloutError, match="no such luck; and the repository still says .*--live 1"
    ):
        rollout(repository, access(triton), 2)


# --- the command ---------------------------------------------------------------------------------


@pytest.fixture
def handlers():
    """The command line installs its own."""
    before = {number: signal.getsignal(number) for number in HANDLED}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def run(monkeypatch, capsys, instead, *arguments):
    monkeypatch.setattr(rollout_command, "rollout", instead)
    code = command_line.main(["rollout", *map(str, arguments)])
    return code, *capsys.readouterr()


@pytest.mark.usefixtures("handlers")
def test_the_command_says_what_is_served(monkeypatch, capsys):
    asked = []

    def instead(repository, access, switch_to):
        asked.append((repository, access.url, access.timeout_s, switch_to))
        return Versions(1, (1, 2))

    options = ("--repository", "r", "--to", 1, "--url", "host:9", "--timeout-s", 7)
    code, out, err = run(monkeypatch, capsys, instead, *options)
    assert (code, err) == (0, "") and asked == [(Path("r"), "host:9", 7.0, 1)]
    assert out.splitlines() == [
        "router/1 answers; router/1 and router/2 can be pinned",
        "A request to `router` itself that pins no version goes to router/2",
    ]


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize(
    ("error", "expected", "said"),
    [
        (RolloutError("router was not loaded"), 1, "error: router was not loaded\n"),
        (ServerUsageError("no version 7"), 2, "error: no version 7\n"),
        (KeyboardInterrupt(), 130, "interrupted; "),
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
        (("--tls-ca", "a", "--tls-cert", "b"), "--tls-cert and --tls-key go together"),
        (("--tls-cert", "b", "--tls-key", "c"), "--tls-cert needs --tls-ca"),
        (("--tls-ca", "nowhere.crt"), "nowhere.crt: No such file or directory"),
        (("--admin-key-file", "nowhere.key"), "admin key file nowhere.key cannot be read"),
    ],
)
def test_a_bad_option_is_one_line(monkeypatch, capsys, options, message):
    code, out, err = run(monkeypatch, capsys, rollout, *options)
    assert (code, out) == (2, "") and message in err and len(err.splitlines()) == 1
