"""`python -m server check`: exit codes and lines. The servers are fakes."""

import json
import signal
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tritonclient.utils import InferenceServerException

import server.__main__ as command_line
import server.check
from calibration.running import open_session, run_session
from export.repository import assemble
from routing import PROBE_ID, Calibration, CascadeRequest, answered_score, run_cascade
from routing.policy import parse_overrides
from routing.reference import COMPARING, OTHER, VERDICTS
from server.access import Access
from server.serving import Reply, Stub
from tests.unit.reference_files import collected, fitted
from tests.unit.server_fakes import MODELS, Stand


@pytest.fixture(autouse=True)
def handlers():
    before = {number: signal.getsignal(number) for number in (1, 2, 15)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    graph_set, outputs = collected(folder)
    fitted(graph_set, outputs).save(folder / "calibration.json")
    fitted(graph_set, outputs, images=0).save(folder / "none.json")
    assemble(graph_set, folder / "none.json", folder / "without")
    return assemble(graph_set, folder / "calibration.json", folder / "repository")


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
        found["score"] = answered_score(found["score"])
        columns = {name: found[name][:, None] for name in ("escalated", "score", "degraded")}
        return SimpleNamespace(as_numpy=lambda name: {**found, **columns}[name])


def run(monkeypatch, server, repository, *more):
    monkeypatch.setattr(Access, "open", lambda access: server(access.url))
    return command_line.main(["check", "--answers", "--repository", str(repository), *more])


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


# --- one look ------------------------------------------------------------------------------------


class Shown(Stand):
    """A healthy server with a process a model, unless changed."""

    def __init__(self):
        super().__init__()
        self.processes = [Stub(number, model, "1") for number, model in enumerate(MODELS[1:])]
        self.hides = False

    def __call__(self, access, process_ids):
        return self

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def states(self):
        return None if self.hides else super().states()

    def is_ready(self, model):
        return model not in self.absent and self.counts is not None

    def is_python(self, model, version):
        return model in ("preprocess", "router")


@pytest.fixture
def shown(monkeypatch):
    stand = Shown()
    monkeypatch.setattr(server.check, "Serving", stand)
    return stand


def check(capsys, *more):
    """Exit code, line on stdout, lines on stderr."""
    code = command_line.main(["check", "--timeout-s", "0.8", *map(str, more)])
    found = capsys.readouterr()
    assert found.out.count("\n") <= 1
    return code, found.out.strip(), found.err


def test_a_healthy_server_is_0_and_one_line(shown, capsys):
    code, line, err = check(capsys)
    assert (code, err) == (0, "")
    assert line == "5 models ready, 4 processes alive, answered in 31 ms"
    code, line, _ = check(capsys, "--json")
    found = json.loads(line)
    assert (code, found["healthy"], found["models"], found["processes"]) == (0, True, 5, 4)
    assert found["latency_ms"] < 300 and found["not_looked_at"] == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"absent": {"vit_high": "UNAVAILABLE (unloaded)"}}, "not ready: vit_high (UNAVAILABLE"),
        ({"replies": {"vit_low": [Reply("boom")]}}, "vit_low failed: boom"),
        ({"replies": {"router": [None], "adaptive_vit": [None]}}, "adaptive_vit gave no answer"),
        ({"processes": [Stub(1, "router", "1")]}, "1 of 1 instances of preprocess (version 1)"),
        ({"counts": None}, "the server does not answer on gRPC"),
    ],
)
def test_what_is_not_well_is_1_and_one_line(shown, capsys, change, said):
    for name, value in change.items():
        whole = {**getattr(shown, name), **value} if name == "replies" else value
        setattr(shown, name, whole)
    if shown.counts is None:
        shown.replies = {model: [Reply("failed to connect", True)] for model in MODELS}
    code, line, err = check(capsys)
    assert (code, err) == (1, "") and line.startswith(said)
    assert json.loads(check(capsys, "--json")[1])["healthy"] is False


def test_every_model_of_the_repository_must_be_ready(shown, capsys, tmp_path):
    for model in MODELS:
        (tmp_path / model).mkdir()
    assert check(capsys, "--repository", tmp_path)[0] == 0
    (tmp_path / "vit_reference").mkdir()
    code, line, _ = check(capsys, "--repository", tmp_path)
    assert (code, line) == (1, "not ready: vit_reference")
    code, _, err = check(capsys, "--repository", tmp_path / "nowhere")
    assert code == 2 and "no model repository at" in err


def test_what_it_cannot_look_at_is_said(shown, capsys):
    shown.hides, shown.processes = True, None
    code, line, _ = check(capsys)
    assert code == 0 and line.startswith("5 models ready, answered in ")
    assert "not looked at: its processes, which are not on this machine, its index of" in line
    shown.absent = {"router": "gone"}
    assert check(capsys)[:2] == (1, "not ready: router")


def test_a_server_behind_a_tunnel_is_elsewhere(shown, capsys):
    """What listens here is the tunnel's end, with no model's process below it."""
    shown.processes = []
    code, line, err = check(capsys)
    assert (code, err) == (0, "") and line.startswith("5 models ready, answered in ")
    assert line.endswith("; not looked at: its processes, which are not on this machine")
    assert json.loads(check(capsys, "--json")[1])["processes"] is None


def test_an_interrupted_look_says_nothing(shown, capsys):
    def interrupted(model):
        raise KeyboardInterrupt

    shown.ask = interrupted
    assert check(capsys) == (130, "", "")


# --- the container's health check ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "body", "code", "said"),
    [
        (200, b"{}", 0, ""),
        (503, b'{"error":"in ensemble \'adaptive_vit\', Exceeds maximum queue size"}', 0, ""),
        (503, b'{"error":"Stub process \'router_0_0\' is not healthy."}', 1, "HTTP Error 503"),
        (None, b"", 1, "Connection refused"),
    ],
)
def test_the_containers_health_check_takes_a_full_queue_for_busy_and_not_for_dead(
    status, body, code, said
):
    asked = []

    class Triton(BaseHTTPRequestHandler):
        def do_POST(self):  # noqa: N802
            asked.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *words):
            pass

    with HTTPServer(("127.0.0.1", 0), Triton) as server:
        url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        if status is None:
            server.shutdown()
            server.server_close()
        file = Path(__file__).resolve().parents[2] / "deploy/healthcheck.py"
        done = subprocess.run([sys.executable, file, url], capture_output=True, text=True)
        server.shutdown()
    assert done.returncode == code and said in done.stderr and "Traceback" not in done.stderr
    if status is not None:
        ((path, sent),) = asked
        assert path == "/v2/models/adaptive_vit/infer" and PROBE_ID.encode() in sent
