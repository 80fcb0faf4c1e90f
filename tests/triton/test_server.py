"""Starting and stopping a real tritonserver, as a context manager and from the command line."""

from __future__ import annotations

import json
import os
import pty
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import urllib.request
from pathlib import Path

import psutil
import pytest
import tritonclient.grpc as triton
import tritonclient.http as triton_http

from bundle import placing
from client import GrpcClient
from server import ServerStartError, TritonServer, find_wheel
from server.ports import pick_free_ports
from server.shared_memory import SHM_DIRECTORY
from tests.servers import ECHO_CONFIG, add_model, is_alive, running, wait_for

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    return add_model(tmp_path / "repository", "echo")


def segments(pid: int) -> set[str]:
    """Shared-memory segments of servers that this process, or the command line `pid`, started."""
    return {path.name for path in SHM_DIRECTORY.glob(f"triton_{pid}_*")}


@pytest.fixture
def others() -> set[str]:
    """Segments of servers that other tests' fixtures keep running in this process."""
    return segments(os.getpid())


def test_a_server_starts_answers_and_leaves_nothing_behind(repository: Path, others: set[str]):
    lines: list[str] = []
    with TritonServer(repository, free_ports=True, on_progress=lines.append) as server:
        assert "1 of 1 models loaded" in lines
        assert server.version.count(".") == 2
        assert len(set(server.ports.all)) == 3
        with triton.InferenceServerClient(server.grpc_url) as client:
            assert client.is_model_ready("echo")
        with triton_http.InferenceServerClient(server.http_url) as client:
            assert client.is_model_ready("echo")
        with urllib.request.urlopen(server.metrics_url, timeout=10) as response:
            assert b"nv_inference_request_success" in response.read()
        tree = psutil.Process(server.pid).children(recursive=True)
        assert any("stub" in process.name() for process in tree)
        alone = psutil.Process(server.pid).memory_full_info().pss / 2**20
        assert alone < server.memory_mib() < 4096
        assert len(segments(os.getpid()) - others) == 1
        # gRPC's socket is a dual-stack one.
        assert {
            (connection.laddr.ip.removeprefix("::ffff:"), connection.laddr.port)
            for connection in psutil.Process(server.pid).net_connections(kind="tcp")
            if connection.status == psutil.CONN_LISTEN
        } == {("127.0.0.1", port) for port in server.ports.all}
        work, processes = server.log_path.parent, [psutil.Process(server.pid), *tree]
    assert not server.is_running()
    assert wait_for(lambda: not any(is_alive(process.pid) for process in processes), 5)
    assert segments(os.getpid()) <= others
    assert not work.exists()
    assert not list(repository.rglob("__pycache__"))


def test_models_do_not_see_the_launchers_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # Python models have the working directory first on sys.path.
    monkeypatch.chdir(ROOT)
    repository = add_model(tmp_path, "echo", "import server")
    with pytest.raises(ServerStartError, match="No module named 'server'"):
        TritonServer(repository, free_ports=True).start()


def test_paths_that_a_shell_would_misread_are_served_and_nothing_in_them_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    odd = tmp_path / 'it\'s "a"; $(touch ran) `touch ran` & ü\n'
    (odd / "temporary").mkdir(parents=True)
    monkeypatch.setattr(tempfile, "tempdir", str(odd / "temporary"))
    repository = add_model(odd / "repository", "echo")
    with running(repository, timeout_s=60, log=odd / "log") as server:
        with triton.InferenceServerClient(server.grpc_url) as client:
            assert client.is_model_ready("echo")
        assert server.repository == repository and "loaded 'echo'" in (odd / "log").read_text()
        for pid in server.process_ids():
            assert not Path(f"/proc/{pid}/cwd/ran").exists()
    assert not list(repository.rglob("__pycache__"))
    # What Triton knows it by is gone by now, and of no use to anybody.
    add_model(repository, "broken", "raise ValueError(args['model_repository'])")
    with pytest.raises(ServerStartError) as caught:
        TritonServer(repository, free_ports=True).start()
    assert str(caught.value) == f"model 'broken' failed to load: {repository}/broken"
    assert not list(tmp_path.rglob("ran")) and not Path("ran").exists()


def test_a_killed_server_is_noticed_and_cleared_away(repository: Path, others: set[str]):
    server = TritonServer(repository, free_ports=True)
    server.start()
    try:
        os.kill(server.pid, signal.SIGKILL)
        with pytest.raises(ServerStartError, match=r"ended by itself \(exit code 137\)"):
            server.wait()
        assert not server.is_running()
    finally:
        server.stop()
    assert segments(os.getpid()) <= others


def test_a_failing_model_is_named_with_its_reason(repository: Path, others: set[str]):
    reason = "calibration.json does not match vit_low/1/model.onnx"
    add_model(repository, "router", f'raise ValueError("{reason}")')
    server = TritonServer(repository, free_ports=True)
    with pytest.raises(ServerStartError) as caught:
        server.start()
    assert str(caught.value) == f"model 'router' failed to load: {reason}"
    assert caught.value.not_ready == {"router": reason}
    assert reason in caught.value.log_tail
    assert not server.is_running()
    assert segments(os.getpid()) <= others


def test_a_model_that_silently_vanishes_is_named(repository: Path):
    # With a field that this Triton does not know, and leniency, the server itself reports ready.
    add_model(repository, "newer", config=ECHO_CONFIG + "field_of_tomorrow: 1\n")
    server = TritonServer(
        repository, free_ports=True, timeout_s=4, extra_args=["--exit-on-error=false"]
    )
    with pytest.raises(ServerStartError, match="model 'newer' failed.*field_of_tomorrow"):
        server.start()


def test_an_ensemble_that_fails_its_first_request_fails_the_start(tmp_path: Path):
    image = 'input [ { name: "image_bytes" data_type: TYPE_STRING dims: [ 1 ] } ]'
    lines = ECHO_CONFIG.splitlines()
    config = "\n".join([lines[0], "max_batch_size: 1", image, *lines[2:]])
    repository = add_model(tmp_path / "repository", "adaptive_vit", config=config)
    with pytest.raises(ServerStartError, match="every model is ready, but .*: not called here"):
        TritonServer(repository, free_ports=True).start()


@pytest.mark.parametrize("kind", ["wrapper", "link"])
def test_tritonserver_from_path(
    repository: Path,
    build: Path,
    server: TritonServer,
    crops: list[bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
):
    wheel = find_wheel()
    assert wheel is not None
    on_path = tmp_path / "bin" / "tritonserver"
    on_path.parent.mkdir()
    if kind == "link":
        on_path.symlink_to(wheel.binary)
    else:  # Without exec: the shell stays as the server's parent and passes no signal on.
        on_path.write_text(f'#!/bin/sh\n"{wheel.binary}" "$@"\nexit $?\n')
        on_path.chmod(0o755)
        repository = build / "model_repository"
    monkeypatch.setenv("PATH", str(on_path.parent), prepend=os.pathsep)
    with TritonServer(repository, free_ports=True) as from_path:
        assert from_path.installation is not None
        assert from_path.installation.binary == on_path
        tree = psutil.Process(from_path.pid).children(recursive=True)
        if kind == "wrapper":
            with GrpcClient(from_path.grpc_url) as client, GrpcClient(server.grpc_url) as other:
                found, expected = client.infer(crops[:16]), other.infer(crops[:16])
            assert [p.escalated for p in found] == [p.escalated for p in expected]
            assert {p.escalated for p in found} == {True, False}
            scores = [p.score for p in expected]
            assert [p.score for p in found] == pytest.approx(scores, rel=1e-4)
    assert wait_for(lambda: not any(is_alive(process.pid) for process in tree), 5)


def command(*arguments: object, **options: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "server", *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def refused(*arguments: object, **options: object) -> tuple[int, str]:
    process = command(*arguments, **options)
    out, error = process.communicate(timeout=60)
    assert out == ""
    assert error.startswith("error: ")
    assert error.count("\n") == 1, error
    return process.returncode, error


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_command_line_cleanly(repository: Path, number: signal.Signals):
    process = command("--repository", repository, "--free-ports", "--json")
    assert process.stdout is not None
    facts = json.loads(process.stdout.readline())
    tree = psutil.Process(process.pid).children(recursive=True)
    assert facts["pid"] in [child.pid for child in tree]
    with triton.InferenceServerClient(facts["grpc_url"]) as client:
        assert client.is_model_ready("echo")
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 0, error
    assert "Traceback" not in error
    assert not any(is_alive(child.pid) for child in tree)
    assert segments(process.pid) == set()


IN_TERMINAL = """
import os, signal, sys

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup, and who runs the tests under it, ignores it
for number in range(3):  # The first terminal that a session's leader opens becomes the session's.
    os.dup2(os.open(sys.argv[1], os.O_RDWR), number)
os.execv(sys.executable, [sys.executable, "-m", "server", *sys.argv[2:]])
"""


def test_a_closed_terminal_ends_the_command_line_cleanly(repository: Path):
    terminal, end = pty.openpty()
    arguments = [os.ttyname(end), "--repository", str(repository), "--free-ports"]
    process = subprocess.Popen(
        [sys.executable, "-c", IN_TERMINAL, *arguments], cwd=ROOT, start_new_session=True
    )
    said = b""
    while b"Stop with Ctrl-C" not in said:
        said += os.read(terminal, 4096)
    tree = psutil.Process(process.pid).children(recursive=True)
    work = Path(said.split(b"log      ")[1].split(b"/tritonserver.log")[0].decode())
    assert len(tree) == 3 and work.is_dir()  # guard, server, stub
    os.close(end)
    os.close(terminal)
    assert process.wait(timeout=60) == 0
    assert not any(is_alive(child.pid) for child in tree)
    assert segments(process.pid) == set()
    assert not work.exists()


PROGRAM = """
import json, sys, time
from server import TritonServer

with TritonServer(sys.argv[1], free_ports=True) as server:
    print(json.dumps({"pid": server.pid, "log": str(server.log_path)}), flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_server_does_not_outlive_a_program_that_ends_without_stopping_it(
    repository: Path, number: signal.Signals
):
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(repository)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert program.stdout is not None
    facts = json.loads(program.stdout.readline())
    tree = psutil.Process(program.pid).children(recursive=True)
    assert facts["pid"] in [child.pid for child in tree]
    assert any("stub" in child.name() for child in tree)
    program.send_signal(number)
    assert program.wait() == -number
    assert wait_for(lambda: not any(is_alive(child.pid) for child in tree))
    assert segments(program.pid) == set()
    assert not Path(facts["log"]).parent.exists()


def has_ended(lock: Path) -> bool:
    with placing.abandoned(lock) as is_dead:
        return is_dead


def test_what_killed_servers_left_goes_at_the_next_start_and_live_ones_stay(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    program = [sys.executable, "-c", PROGRAM, str(repository)]
    killed, lives = (
        subprocess.Popen(program, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    )
    works = [Path(json.loads(p.stdout.readline())["log"]).parent for p in (killed, lives)]
    assert works[0].is_dir() and segments(killed.pid)  # Another start may clear these away.
    family = psutil.Process(killed.pid).children(recursive=True)
    for process in [*family, killed]:
        process.kill()  # The guard, too, which would clear away.
    killed.communicate()
    # Its locks are held to the end of its last thread, which its processes' status does not tell.
    assert wait_for(lambda: has_ended(works[0] / placing._OWNER))
    assert works[0].is_dir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with running(repository):
        assert not works[0].exists() and not segments(killed.pid)
        assert works[1].is_dir() and segments(lives.pid)
    lives.kill()
    lives.communicate()
    assert wait_for(lambda: not works[1].exists())


def test_json_lines_from_a_start_without_any_environment(repository: Path):
    # No PATH, HOME or locale: neither bash nor python3 is found by what a user has set.
    arguments = ("--repository", repository, "--free-ports", "--log-format", "json")
    process = command(*arguments, env={})
    assert process.stdout is not None
    said = []
    while not said or said[-1]["source"] != "server":
        said.append(json.loads(process.stdout.readline()))
    assert said[-1]["message"].startswith("Triton ") and said[-1]["grpc_url"]
    with triton.InferenceServerClient(said[-1]["grpc_url"]) as client:
        assert client.is_model_ready("echo")
    process.send_signal(signal.SIGTERM)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 0 and error == ""
    said += [json.loads(line) for line in out.splitlines()]
    assert {"time", "level", "source", "message"} <= set.intersection(*map(set, said))
    assert "successfully loaded 'echo'" in [entry["message"] for entry in said]
    assert "warning" in {entry["level"] for entry in said}


def test_a_signal_while_starting_ends_it_cleanly(tmp_path: Path):
    slow = add_model(tmp_path, "slow", "import time; time.sleep(60)")
    process = command("--repository", slow, "--free-ports")
    assert wait_for(lambda: segments(process.pid))
    tree = psutil.Process(process.pid).children(recursive=True)
    assert tree
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=30)  # Without waiting for the model.
    assert process.returncode == 0, error
    assert not any(is_alive(child.pid) for child in tree)
    assert segments(process.pid) == set()


def test_a_failed_start_shows_the_log_and_names_the_model(repository: Path):
    shutil.rmtree(repository / "echo")
    add_model(repository, "router", 'raise ValueError("calibration.json is not there")')
    process = command("--repository", repository, "--free-ports")
    out, error = process.communicate(timeout=60)
    assert process.returncode == 1
    assert out == ""
    *log, last = error.strip().splitlines()
    assert last == "error: model 'router' failed to load: calibration.json is not there"
    assert any("failed to load 'router' version 1" in line for line in log)


def test_a_port_in_use_is_refused_before_anything_starts(repository: Path):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        free = pick_free_ports("127.0.0.1")
        ports = ["--http-port", free.http, "--grpc-port", port, "--metrics-port", free.metrics]
        code, error = refused("--repository", repository, *ports)
    assert code == 2
    assert f"gRPC port {port} on 127.0.0.1 cannot be used" in error
    assert "--free-ports" in error


def test_misuse_is_one_line_and_exit_code_two(repository: Path, tmp_path: Path):
    code, error = refused("--repository", tmp_path / "nowhere")
    assert code == 2 and "no model repository at" in error and "python -m export" in error
    code, error = refused("--repository", repository, "--tritonserver", "/nowhere/tritonserver")
    assert code == 2 and "/nowhere/tritonserver is not an executable file" in error
    code, error = refused("--http-port", "many")
    assert code == 2 and "--http-port" in error and "--help" in error
    code, error = refused("--repository", repository, "--free-ports", "--log", tmp_path)
    assert code == 2 and f"the log {tmp_path} cannot be written (Is a directory)" in error


def test_no_tritonserver_is_one_line_that_says_what_to_install(repository: Path, tmp_path: Path):
    (tmp_path / "pytriton").mkdir()
    (tmp_path / "pytriton" / "__init__.py").write_text("")  # Hides the one that is installed.
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "PATH": str(tmp_path)}
    code, error = refused("--repository", repository, "--free-ports", env=environment)
    assert code == 2
    assert error.startswith("error: no tritonserver found on PATH or in this Python; pip install")


def test_servers_live_side_by_side(repository: Path, others: set[str]):
    with running(repository) as first:
        threads = threading.active_count()
        with running(repository) as second:
            assert not set(first.ports.all) & set(second.ports.all)
            assert len(segments(os.getpid()) - others) == 2
        assert threading.active_count() <= threads
        assert len(segments(os.getpid()) - others) == 1
        with triton.InferenceServerClient(first.grpc_url) as client:
            assert client.is_model_ready("echo")
