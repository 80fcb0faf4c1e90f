"""`python -m server` when it is interrupted at the wrong moment; the server is a fake."""

import configparser
import errno
import io
import json
import os
import shlex
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, ClassVar

import pytest
import typer
from rich.console import Console

import server.__main__ as command_line
from bundle.versions import Versions, put, switch
from export.repository import assemble
from export.versions import add_version
from server import launcher
from server.access import Access
from server.errors import ServerStartError, ServerUsageError
from server.events import Events
from server.launcher import TritonServer
from server.probe import Finding
from server.rollout import RolloutError, RolloutInterruptedError
from tests.unit.test_export_repository import write_inputs
from tests.unit.test_export_versions import change_artifact

ROOT = Path(__file__).resolve().parents[2]
SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)


class FakeServer:
    """A server whose start is interrupted by a signal just as it returns."""

    made: ClassVar[list[Any]] = []
    interruption = signal.SIGINT

    def __init__(self, repository: object, **options: object) -> None:
        self.runs = False
        self.made.append(self)

    def start(self) -> None:
        self.runs = True
        signal.raise_signal(self.interruption)

    def stop(self) -> None:
        self.runs = False


class LostTerminal(io.StringIO):
    """What stderr is once its terminal is closed."""

    def write(self, text: str) -> int:
        raise OSError(errno.EIO, "Input/output error")


def unhandled(number: int, frame: object) -> None:
    """In place of the default, which would end pytest."""
    raise AssertionError(f"signal {number} is not handled")


@pytest.fixture(autouse=True)
def signals(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(command_line, "TritonServer", FakeServer)
    monkeypatch.setattr(command_line, "progress", Console(file=io.StringIO()))
    monkeypatch.setattr(FakeServer, "made", [])
    before = {number: signal.signal(number, unhandled) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_just_as_the_server_has_started_stops_it(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(FakeServer, "interruption", number)
    assert command_line.main([]) == 0
    (server,) = FakeServer.made
    assert not server.runs


@pytest.mark.parametrize("number", SIGNALS)
def test_a_lost_terminal_does_not_keep_the_server_running(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
):
    class LosesTerminal(FakeServer):
        interruption = number

        def start(self) -> None:
            command_line.progress.file = LostTerminal()
            super().start()

    terminal = Console(file=io.StringIO(), force_terminal=True)
    monkeypatch.setattr(command_line, "progress", terminal)
    monkeypatch.setattr(command_line, "TritonServer", LosesTerminal)
    with suppress(OSError):  # Nobody is left to be told.
        command_line.main([])
    (server,) = FakeServer.made
    assert not server.runs


def test_nohup_is_respected():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    command_line.main(["--help"])
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_a_candidate_above_the_version_that_answers_keeps_from_starting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    repository = assemble(*write_inputs(tmp_path), tmp_path / "repository")
    add_version(repository, change_artifact(tmp_path, "second", threshold=0.75))
    put(repository, Versions(1, (1, 2)))  # as an earlier release left it
    arguments = ["--repository", str(repository)]
    assert command_line.main(arguments) == 2
    said = capsys.readouterr().err
    assert FakeServer.made == [] and said.count("\n") == 1
    assert "router/2 is loaded above router/1" in said
    remedy = f"run python -m export versions --repository {repository} --live 1, and start again"
    assert remedy in said
    switch(repository, 1)  # what that command does
    assert command_line.main(arguments) == 0
    assert len(FakeServer.made) == 1
    put(repository, Versions(2, (1, 2)))  # a former version that may be pinned
    assert command_line.main(arguments) == 0


class LetGo:
    """A connection that somebody lets go of just as the signal comes."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGTERM)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_that_comes_while_a_destructor_runs_ends_it_too(monkeypatch: pytest.MonkeyPatch):
    """Python drops what the handler raises there."""

    class Lasting(FakeServer):
        access = None

        def start(self) -> None:
            self.runs = True

        def process_ids(self) -> list[int]:
            return []

        def why_it_ended(self) -> str:
            return ""

    looks: list[str] = []

    def look(*_: object) -> Finding:
        looks.append("looked")
        assert len(looks) == 1
        LetGo()
        return Finding()

    monkeypatch.setattr(command_line, "TritonServer", Lasting)
    monkeypatch.setattr(command_line, "Serving", lambda *_: nullcontext())
    monkeypatch.setattr(command_line, "look", look)
    monkeypatch.setattr(command_line.events, "serves", lambda *_: None)
    assert command_line.main(["--supervise"]) == 0
    assert looks == ["looked"] and not FakeServer.made[0].runs


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_that_comes_just_before_it_waits_ends_it_too(monkeypatch: pytest.MonkeyPatch):
    class Lasting(FakeServer):
        def start(self) -> None:
            self.runs = True

        def is_running(self) -> bool:
            return self.runs

        def wait(self) -> None:
            raise AssertionError("a server that runs is waited for without end")

    def report(*_: object) -> None:
        LetGo()

    monkeypatch.setattr(command_line, "TritonServer", Lasting)
    monkeypatch.setattr(command_line.events, "serves", report)
    assert command_line.main([]) == 0
    assert not FakeServer.made[0].runs


# --- python -m server rollout ------------------------------------------------------------------


def instead(asked: list[object], error: BaseException | None = None) -> Any:
    """Takes the place of the rollout."""

    def rollout(repository: Path, access: Access, switch_to: int, timeout_s: float) -> Versions:
        asked.append((repository, access.url, timeout_s, switch_to))
        if error is not None:
            raise error
        return Versions(2, (1, 2))

    return rollout


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (None, 0, "router/2 answers; router/1 can be pinned too\n"),
        (RolloutError("router was not loaded"), 1, "error: router was not loaded\n"),
        (ServerUsageError("no version 7"), 2, "error: no version 7\n"),
        (KeyboardInterrupt(), 130, "interrupted before anything was changed\n"),
        (RolloutInterruptedError("interrupted; router/1"), 130, "interrupted; router/1\n"),
    ],
)
def test_a_rollouts_exit_code_tells_whose_move_it_is(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException | None,
    code: int,
    said: str,
):
    asked: list[object] = []
    monkeypatch.setattr(command_line, "rollout", instead(asked, error))
    options = "--repository r --to 1 --url host:9 --timeout-s 7"
    assert command_line.main(["rollout", *options.split()]) == code
    out, err = capsys.readouterr()
    assert (out + err, bool(err)) == (said, error is not None)
    assert asked == [(Path("r"), "host:9", 7.0, 1)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--tls-ca a --tls-cert b", "a client cert without a key; give both"),
        ("--tls-cert b --tls-key c", "cannot read b for TLS: No such file"),
        ("--tls-ca nowhere.crt", "cannot read nowhere.crt for TLS: No such file"),
        ("--admin-key-file nowhere.key", "admin key file nowhere.key cannot be read"),
    ],
)
@pytest.mark.parametrize("verb", ["rollout", "check"])
def test_a_bad_option_is_one_line(
    capsys: pytest.CaptureFixture[str], verb: str, options: str, message: str
):
    assert command_line.main([verb, *options.split()]) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize(
    ("host", "name", "grpc_host"),
    [
        ("127.0.0.1", None, "127.0.0.1"),
        ("0.0.0.0", None, "10.0.0.7"),
        ("0.0.0.0", "vit.example", "vit.example"),  # which its certificate holds
        ("0.0.0.0", "check.example", "10.0.0.7"),  # of *.example
        ("::", None, "[fd00::7]"),
        ("10.0.0.1", "vit.example", "10.0.0.1"),
    ],
)
def test_addresses_are_told_as_others_can_call_them(
    as_json: bool,
    host: str,
    name: str | None,
    grpc_host: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    server = TritonServer(tmp_path, host=host)
    server._access = Access("", name=name)
    monkeypatch.setattr(TritonServer, "pid", 7)
    way_out = {"AF_INET": "10.0.0.7", "AF_INET6": "fd00::7"}
    monkeypatch.setattr(socket.socket, "connect", lambda *_: None)
    monkeypatch.setattr(socket.socket, "getsockname", lambda way: (way_out[way.family.name], 1))
    command_line.events.serves(server, as_json)
    shown = capsys.readouterr().out
    http_host = {"0.0.0.0": "10.0.0.7", "::": "[fd00::7]"}.get(host, host)
    if as_json:
        facts = json.loads(shown)
        assert facts["grpc_url"] == f"{grpc_host}:8001"
        assert facts["http_url"] == f"{http_host}:8000"
        assert facts["metrics_url"] == f"http://{http_host}:8002/metrics"
    else:
        lines = [f"  HTTP     {http_host}:8000", f"  gRPC     {grpc_host}:8001"]
        assert set(lines) < set(shown.splitlines())
    here = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, host)
    assert server.access.url == f"{here}:8001"  # of our own calls


# --- its events --------------------------------------------------------------------------------


def test_every_line_on_the_standard_output_is_json_where_that_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    class Failing(FakeServer):
        options: ClassVar[dict[str, object]] = {}

        def __init__(self, repository: object, **options: object) -> None:
            super().__init__(repository)
            self.options.update(options)

        def start(self) -> None:
            raise ServerStartError("model 'x' failed to\nload: y", log_tail="E1121 of Triton's")

    monkeypatch.setattr(command_line, "TritonServer", Failing)
    arguments = ["--host", "0.0.0.0", "--log-format", "json"]
    assert command_line.main(arguments) == 1
    said = capsys.readouterr()
    entries = [json.loads(line) for line in said.out.splitlines()]
    assert [(entry["level"], entry["source"]) for entry in entries] == [
        ("warning", "server"),
        ("error", "server"),
    ]
    assert entries[-1]["message"] == "model 'x' failed to load: y"
    assert said.err == "error: model 'x' failed to load: y\n"  # The log has been told.
    assert (str(Failing.options["log"]), Failing.options["log_as_json"]) == ("-", True)
    assert command_line.main([*arguments, "--log", "triton.log"]) == 1
    assert str(Failing.options["log"]) == "triton.log"
    assert command_line.main([]) == 1  # The next command line is for people again.
    assert "E1121 of Triton's\nerror: " in capsys.readouterr().err
    assert (Failing.options["log"], Failing.options["log_as_json"]) == (None, False)


def test_who_does_not_read_the_standard_output_holds_up_no_event(monkeypatch: pytest.MonkeyPatch):
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with suppress(BlockingIOError):
        while True:
            os.write(writing, b"x" * 2**12)
    os.set_blocking(writing, True)
    # The reader is closed first: what still waits for it then ends.
    with open(writing, "w") as stdout, open(reading, "rb", buffering=0) as reader:
        monkeypatch.setattr(sys, "stdout", stdout)
        events = Events(as_json=True)
        for _ in range(3):
            saying = threading.Thread(target=events.say, args=("lost",), daemon=True)
            saying.start()
            saying.join(20)
            assert not saying.is_alive()
        while b"lost" not in reader.read(2**16):  # The one that waited.
            pass
        deadline = time.monotonic() + 20
        while events._writer.is_alive() and time.monotonic() < deadline:
            time.sleep(0.01)
        events.say("again")
        assert json.loads(reader.read(2**16))["message"] == "again"


def test_one_line_of_json_has_the_standard_output_to_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert command_line.main(["--repository", str(tmp_path), "--json", "--log", "-"]) == 2
    assert "give --log FILE, or --log-format json" in capsys.readouterr().err


def test_a_disk_that_is_full_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    class Full(FakeServer):
        def start(self) -> None:
            raise OSError(errno.ENOSPC, "No space left on device", "/dev/shm/x")

    monkeypatch.setattr(command_line, "TritonServer", Full)
    assert command_line.main([]) == 2
    assert capsys.readouterr().err == "error: /dev/shm/x: No space left on device\n"


def test_the_documented_unit_starts_a_command_that_there_is(tmp_path: Path):
    text = (ROOT / "docs/operations.md").read_text()
    unit = configparser.ConfigParser(interpolation=None)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read_string("[Unit]" + text.split("\n[Unit]")[1].split("```")[0])
    python, *words = shlex.split(unit["Service"]["ExecStart"])
    folder = Path(unit["Service"]["WorkingDirectory"])
    assert Path(python) == folder / ".venv/bin/python" and words[:2] == ["-m", "server"]
    with typer.main.get_command(command_line.app).make_context("server", words[2:]) as context:
        assert context.params["supervise"] and context.params["log_format"] == "json"
    # Longer than the launcher waits for Triton to finish its requests and then to be killed.
    assert int(unit["Service"]["TimeoutStopSec"]) > 1.5 * launcher._STOP_TIMEOUT_S + 10
    assert unit["Service"]["KillMode"] == "mixed"  # The launcher ends the server.
