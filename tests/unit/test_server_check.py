"""`python -m server check` without a server: exit codes and lines. The server is a fake."""

import json
import signal
from types import SimpleNamespace

import numpy as np
import pytest
from tritonclient.utils import InferenceServerException

import server.__main__ as command_line
from calibration.running import open_session, run_session
from export.repository import assemble
from routing import PROBE_ID, Calibration, CascadeRequest, run_cascade
from routing.policy import parse_overrides
from routing.reference import COMPARING, OTHER, VERDICTS
from server import check as module
from tests.unit.reference_files import collected, fitted


@pytest.fixture(autouse=True)
def handlers():
    before = {number: signal.getsignal(number) for number in (1, 2, 15)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    rung_set, outputs = collected(folder)
    fitted(rung_set, outputs).save(folder / "calibration.json")
    fitted(rung_set, outputs, images=0).save(folder / "none.json")
    assemble(rung_set, folder / "none.json", folder / "without")
    return assemble(rung_set, folder / "calibration.json", folder / "repository")


class FakeTriton:
    """The router of a repository, by ONNX Runtime."""

    def __init__(self, repository, change=lambda answer: answer, error=None):
        files = {name: repository / name / "1/model.onnx" for name in ("vit_low", "vit_high")}
        self.sessions = {name: open_session(file) for name, file in files.items()}
        self.calibration = Calibration.load(repository / "router/1/calibration.json")
        self.change, self.error = change, error
        self.asked = []

    def __call__(self, url):
        self.url = url
        return self

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    close = __exit__

    def get_server_metadata(self, headers, client_timeout):
        return SimpleNamespace(version="2.51.0")

    def infer(self, model, inputs, model_version, parameters, request_id, client_timeout):
        if self.error:
            raise self.error
        assert (model, model_version, request_id) == ("router", "1", PROBE_ID)
        image = np.frombuffer(inputs[0]._raw_content, np.float32).reshape(inputs[0].shape())
        self.asked.append((len(image), parameters))
        (answer,) = run_cascade(
            [CascadeRequest(image, parse_overrides(parameters or {}))],
            self.calibration,
            lambda rows: run_session(self.sessions["vit_low"], rows, layers=True),
            lambda rows: run_session(self.sessions["vit_high"], rows, layers=False),
        )
        found = self.change({name: getattr(answer, name) for name in vars(answer)})
        columns = {name: found[name][:, None] for name in ("escalated", "score", "degraded")}
        return SimpleNamespace(as_numpy=lambda name: {**found, **columns}[name])


def run(monkeypatch, server, repository, *more):
    monkeypatch.setattr(module.Channel, "open", lambda channel, url: server(url))
    return command_line.main(["check", "--repository", str(repository), *more])


def test_a_server_that_answers_alike_is_0(monkeypatch, repository, capsys):
    server = FakeTriton(repository)
    assert run(monkeypatch, server, repository, "--url", "10.0.0.7:8001") == 0
    printed = capsys.readouterr().out
    assert "this server answers as the calibration did" in printed and "vit_high" in printed
    assert "serving on tritonserver 2.51.0, a processor that is not known" in printed
    assert server.url == "10.0.0.7:8001"
    # As a client that says nothing is answered, and by the full rung: careful servers allow both.
    assert server.asked == [(8, None), (8, {"policy": "high"})] * 4


def test_a_server_that_answers_otherwise_is_1(monkeypatch, repository, capsys):
    def other(answer):
        return {**answer, "logits": -answer["logits"]}

    assert run(monkeypatch, FakeTriton(repository, other), repository, "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert found["outcome"] == "other" and found["lost"] > found["allowed"]
    assert found["runtimes"]["serving"]["processor"]  # the default address is this machine
    assert found["runtimes"]["calibrated"]["name"].startswith("onnxruntime ")


SAID = f"{VERDICTS[OTHER]}: of 32 reference images 9 have another answer"


@pytest.mark.parametrize("more", [(), ("--json",)])
def test_a_router_that_refuses_for_that_is_1_and_says_what_it_found(
    monkeypatch, repository, capsys, more
):
    refused = FakeTriton(repository, error=InferenceServerException(SAID, "StatusCode.UNAVAILABLE"))
    assert run(monkeypatch, refused, repository, *more) == 1
    found = capsys.readouterr()
    assert found.err == "" and found.out.count("\n") == 1
    if more:
        assert json.loads(found.out) == {"version": 1, "outcome": "other", "refused": SAID}
    else:
        assert found.out.startswith(f"router/1 refuses every request: {SAID}; to calibrate here, ")
        assert "--reference-check warn" in found.out


@pytest.mark.parametrize(
    ("place", "server", "words"),
    [
        ("nowhere", {}, "assemble with python -m export repository"),
        ("without", {}, "no reference answers in this artifact"),
        (
            "repository",
            {"error": InferenceServerException("failed to connect", "StatusCode.UNAVAILABLE")},
            "no answer from router/1 at 127.0.0.1:8001 (failed to connect)",
        ),
        (
            "repository",
            {"error": InferenceServerException(COMPARING, "StatusCode.UNAVAILABLE")},
            "error: router/1 at 127.0.0.1:8001: the router is still comparing its answers",
        ),
        (
            "repository",
            {"change": lambda a: {**a, "degraded": np.ones_like(a["degraded"])}},
            "answers are marked degraded",
        ),
    ],
)
def test_what_cannot_be_compared_is_one_line_and_2(
    monkeypatch, repository, capsys, place, server, words
):
    fake = FakeTriton(repository, **server)
    assert run(monkeypatch, fake, repository.parent / place) == 2
    found = capsys.readouterr()
    assert words in found.err and found.err.count("\n") == 1 and found.out == ""


def test_an_interrupted_check_is_no_verdict(monkeypatch, repository):
    assert run(monkeypatch, FakeTriton(repository, error=KeyboardInterrupt()), repository) == 130
