"""`python -m server --supervise` against real faults of a real server."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
import tritonclient.grpc as triton

from client import GrpcClient, HttpClient
from perf.target import Target
from server.shared_memory import SHM_DIRECTORY
from tests.servers import is_alive, running, stubs, wait_for
from tests.triton.conftest import reference_outcome

ROOT = Path(__file__).resolve().parents[2]


class Supervised:
    """The command line, what it says on stderr, and the processes below it."""

    def __init__(self, repository: Path, *arguments: object) -> None:
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "server", "--supervise", "--free-ports", "--json"),
                *("--repository", str(repository), *map(str, arguments)),
            ],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        assert self.process.stdout is not None
        self.facts = json.loads(self.process.stdout.readline())
        self.url = self.facts["grpc_url"]

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip())

    def below(self) -> list[psutil.Process]:
        found = []
        for child in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if child.status() != psutil.STATUS_ZOMBIE:
                    found.append(child)
            except psutil.NoSuchProcess:
                continue
        return found

    def servers(self) -> list[int]:
        return [child.pid for child in self.below() if child.name() == "tritonserver"]

    def stub(self, model: str) -> int:
        """An instance of a model."""
        return stubs([child.pid for child in self.below()], model)[0]

    def segments(self) -> set[str]:
        return {path.name for path in SHM_DIRECTORY.glob(f"triton_{self.process.pid}_*")}

    def wait_for(self, text: str, timeout_s: float = 120) -> float:
        """Wait for a line with this text; returns the seconds that took."""
        began = time.monotonic()
        while time.monotonic() - began < timeout_s:
            if any(text in line for line in self.lines):
                return time.monotonic() - began
            time.sleep(0.02)
        raise AssertionError("\n".join(self.lines))

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        code = self.process.wait(timeout=90)
        self._reader.join()
        return code


@pytest.fixture
def supervised(build: Path) -> Iterator[Supervised]:
    running = Supervised(build / "model_repository")
    yield running
    running.end()


IMPATIENT_S = 1.5


@pytest.fixture
def supervised_impatiently(build: Path) -> Iterator[Supervised]:
    running = Supervised(build / "model_repository", "--canary-timeout-s", IMPATIENT_S)
    yield running
    running.end()


@pytest.mark.parametrize(
    ("model", "number", "what"),
    [
        ("router", signal.SIGKILL, "1 of 2 instances of router (version 1) ended"),
        ("preprocess", signal.SIGKILL, "1 of 2 instances of preprocess (version 1) ended"),
        pytest.param("vit_low", signal.SIGSTOP, "vit_low", marks=pytest.mark.stand_in),
        pytest.param("vit_high", signal.SIGSTOP, "vit_high", marks=pytest.mark.stand_in),
        ("", signal.SIGKILL, "tritonserver ended by itself (exit code 137)"),
    ],
)
def test_a_fault_is_healed_by_one_new_server_on_the_same_ports(
    supervised: Supervised, crops: list[bytes], model: str, number: signal.Signals, what: str
):
    with GrpcClient(supervised.url) as client:
        before = client.infer(crops[:8])
    segments, old = supervised.segments(), supervised.servers()
    os.kill(supervised.stub(model) if model else old[0], number)
    seen_s = supervised.wait_for("failure: ")
    supervised.wait_for("answering again")
    assert seen_s < 10
    failure = next(line for line in supervised.lines if "failure: " in line)
    # A process that ends between the count of processes and the image is Triton's to name.
    assert what in failure or f"Stub process '{model}_0_" in failure
    assert not any(is_alive(pid) for pid in old)
    assert len(supervised.servers()) == 1
    assert len(supervised.segments()) == len(segments)
    assert not supervised.segments() & segments
    with GrpcClient(supervised.url) as client:
        after = client.infer(crops[:8])
    assert [p.escalated for p in after] == [p.escalated for p in before]
    assert {p.escalated for p in after} == {True, False}
    np.testing.assert_allclose(
        [p.embedding for p in after], [p.embedding for p in before], rtol=1e-4, atol=1e-5
    )
    assert supervised.end() == 0
    assert supervised.segments() == set()


def test_a_repository_that_does_not_load_again_ends_it_and_leaves_nothing(
    build: Path, tmp_path: Path
):
    repository = shutil.copytree(build / "model_repository", tmp_path / "model_repository")
    log = tmp_path / "triton.log"
    supervised = Supervised(repository, "--max-restarts", 1, "--log", log)
    everyone, (server,) = supervised.below(), supervised.servers()
    (repository / "router" / "1" / "calibration.json").write_text("{}")
    os.kill(server, signal.SIGKILL)
    assert supervised.process.wait(timeout=120) == 1
    supervised.end()
    last = supervised.lines[-1]
    assert last.startswith("error: gave up after 1 restarts without 60 s of health")
    assert "model 'router' failed to load" in last
    assert sum("gave up" in line for line in supervised.lines) == 1
    assert not any(is_alive(process.pid) for process in everyone)
    assert supervised.segments() == set()
    for said in ("successfully loaded 'router'", "failed to load 'router'"):  # Of both servers.
        assert said in log.read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_it_restarts_ends_it_cleanly(supervised: Supervised, number: signal.Signals):
    os.kill(supervised.servers()[0], signal.SIGKILL)
    supervised.wait_for("restart 1 of 5 now")
    time.sleep(0.5)
    everyone = supervised.below()
    assert supervised.end(number) == 0
    assert not any(is_alive(process.pid) for process in everyone)
    assert supervised.segments() == set()
    assert not any("Traceback" in line for line in supervised.lines)


def test_reloading_and_unloading_a_model_is_no_failure(build: Path, crops: list[bytes]):
    supervised = Supervised(build / "model_repository", "--allow-reload")
    try:
        first = supervised.servers()
        with (
            triton.InferenceServerClient(supervised.url) as control,
            GrpcClient(supervised.url) as client,
        ):
            control.load_model("router")
            time.sleep(4)
            control.unload_model("vit_high")
            supervised.wait_for("vit_high is not served any more")
            time.sleep(8)  # longer than interval, patience and a second look together
            control.load_model("vit_high")
            supervised.wait_for("vit_high is served again")
            assert client.infer(crops[:1], policy="high")[0].escalated
        assert supervised.servers() == first
        assert not any("failure" in line for line in supervised.lines)
    finally:
        supervised.end()


# --- one look ----------------------------------------------------------------------------------

# A proxy is for other machines.
BEHIND_A_PROXY = {**os.environ, "http_proxy": "http://127.0.0.1:9", "no_proxy": ""}


def look(url: str, *more: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "server", "check", "--url", url, *more]
    options = {"cwd": ROOT, "env": BEHIND_A_PROXY, "capture_output": True, "text": True}
    return subprocess.run([*map(str, command)], **options)


def healthcheck(url: str) -> int:
    command = [sys.executable, ROOT / "deploy/healthcheck.py", f"http://{url}"]
    return subprocess.run(command, env=BEHIND_A_PROXY, stderr=subprocess.DEVNULL).returncode


@pytest.mark.stand_in  # with a process for each rung, six in all
@pytest.mark.parametrize("model", ["router", "vit_high"])
def test_check_and_the_containers_health_check_tell_a_server_with_a_dead_model(
    build: Path, crops: list[bytes], model: str, monkeypatch: pytest.MonkeyPatch
):
    repository = build / "model_repository"
    for name in ("http_proxy", "https_proxy", "grpc_proxy", "all_proxy"):
        for variable in (name, name.upper()):  # Nobody listens there.
            monkeypatch.setenv(variable, "http://127.0.0.1:9")
    with running(repository) as server:
        url, http = server.grpc_url, server.http_url
        for client in (
            GrpcClient(url),
            HttpClient(http),
            GrpcClient(f"0.0.0.0:{server.ports.grpc}"),
        ):
            with client:
                assert len(client.infer(crops[:1])) == 1
        with Target(url, http, server) as target:
            assert target.version == server.version
        well = look(url, "--repository", repository)
        assert (well.returncode, well.stderr) == (0, "")
        assert well.stdout.startswith("6 models ready, 6 processes alive, answered in ")
        assert healthcheck(http) == 0
        for pid in stubs(server.process_ids(), model):
            os.kill(pid, signal.SIGKILL)
        ill = look(url)
        assert ill.returncode == 1 and ill.stdout.count("\n") == 1
        assert f"instances of {model} (version 1) ended" in ill.stdout or "failed" in ill.stdout
        if model == "router":
            assert healthcheck(http) == 1
    assert look(url).returncode == 1 and healthcheck(http) == 1


# --- a pause -----------------------------------------------------------------------------------


def hold_still(pids: list[int], seconds: float) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(seconds)
    for pid in pids:
        os.kill(pid, signal.SIGCONT)


@pytest.mark.alone
def test_a_pause_of_a_whole_server_replaces_nothing_and_one_of_a_rung_alone_ends_it(
    build: Path, crops: list[bytes]
):
    """Nobody supervises here: whoever runs the server sees that it is gone, not a 200."""
    with running(build / "model_repository") as server, GrpcClient(server.grpc_url) as client:
        reference_outcome(server)  # From then on no rung is at work.
        time.sleep(4)  # Models load at different times, and look for each other again.
        before = server.process_ids()
        guard = psutil.Process(server.pid).ppid()
        with ThreadPoolExecutor() as pool:
            pause = pool.submit(hold_still, [guard, *before], 2.5)
            time.sleep(0.5)
            waited = pool.submit(client.infer, crops[:8], policy="high", timeout_s=60)
            pause.result()
            assert {answer.escalated for answer in waited.result()} == {True}
        assert len(client.infer(crops[:8])) == 8
        assert sorted(server.process_ids()) == sorted(before)
        hold_still(stubs(before, "vit_low"), 1.5)
        assert wait_for(lambda: not server.is_running(), 20)
        said = r"a model process stood still for \d+\.\d s while the server went on"
        assert re.search(said, server.log_path.read_text())


# A process of its own: a thread would wait for those of the clients.
TAKE_TURNS = """
import os, signal, sys, time
share, *pids = map(float, sys.argv[1:])
while True:
    for number, seconds in ((signal.SIGSTOP, 0.1 * (1 - share)), (signal.SIGCONT, 0.1 * share)):
        for pid in pids:
            os.kill(int(pid), number)
        time.sleep(seconds)
"""


@contextmanager
def slowed(pids: list[int], share: float) -> Iterator[None]:
    """Let processes run for a share of each tenth of a second, as a CPU quota does."""
    command = [sys.executable, "-c", TAKE_TURNS, *map(str, (share, *pids))]
    with subprocess.Popen(command) as turns:
        try:
            yield
        finally:
            turns.kill()
            turns.wait()
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)


@pytest.mark.alone
def test_a_server_that_is_slow_is_let_work_and_loses_no_request(
    supervised_impatiently: Supervised, crops: list[bytes]
):
    supervised = supervised_impatiently
    first, end = supervised.servers(), time.monotonic() + 8
    latencies_s: list[float] = []

    def ask(number: int) -> None:
        images = 1  # more where the machine is too fast for that to be slow
        with GrpcClient(supervised.url, retry=None) as client:
            while time.monotonic() < end:
                began = time.monotonic()
                client.infer(crops[number : number + images], policy="high", timeout_s=60)
                latencies_s.append(time.monotonic() - began)
                if latencies_s[-1] < IMPATIENT_S:
                    images = min(2 * images, 8)

    family = [process.pid for process in supervised.below()]
    with slowed(family, 0.2), ThreadPoolExecutor(16) as pool:
        list(pool.map(ask, range(16)))
    assert max(latencies_s) > IMPATIENT_S and len(latencies_s) >= 16
    assert supervised.servers() == first
    assert not any("failure" in line for line in supervised.lines)


# --- a deadlock --------------------------------------------------------------------------------

IMAGE = "input [ { name: 'image' data_type: TYPE_FP32 dims: [ 3, 4, 4 ] } ]"
BYTES = "input [ { name: 'image_bytes' data_type: TYPE_STRING dims: [ 1 ] } ]"
CONFIG = """backend: "python"
max_batch_size: 4
INPUT
output [ { name: "embedding" data_type: TYPE_FP32 dims: [ 1 ] } ]
instance_group [ { kind: KIND_CPU count: 1 } ]
"""
MODEL = """
import os, time
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        while os.path.exists(HANG):
            time.sleep(0.1)
        answer = pb_utils.Tensor("embedding", np.zeros((1, 1), np.float32))
        return [pb_utils.InferenceResponse([answer]) for _ in requests]
"""


def test_a_rung_that_hangs_with_its_process_alive_is_seen_within_10_s(tmp_path: Path):
    repository, hang = tmp_path / "repository", tmp_path / "hang"
    models = {"adaptive_vit": BYTES, "preprocess": BYTES, "vit_low": IMAGE, "vit_high": IMAGE}
    for name, tensors in models.items():
        folder = repository / name / "1"
        folder.mkdir(parents=True)
        (folder.parent / "config.pbtxt").write_text(CONFIG.replace("INPUT", tensors))
        where = str(hang) if name == "vit_high" else ""
        (folder / "model.py").write_text(MODEL.replace("HANG", repr(where)))
    supervised = Supervised(repository)
    try:
        time.sleep(1)
        assert not supervised.lines or "failure" not in "".join(supervised.lines)
        hang.touch()
        seen_s = supervised.wait_for("failure: vit_high gave no answer within 5 s")
        hang.unlink()
        supervised.wait_for("answering again")
        assert seen_s < 10
        assert len(supervised.servers()) == 1
    finally:
        supervised.end()
