"""`python -m server` when it is interrupted at the wrong moment; the server is a fake."""

import errno
import io
import signal
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, ClassVar

import pytest
from rich.console import Console

import server.__main__ as command_line

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
