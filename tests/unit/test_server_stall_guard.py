"""The stand-in's guard against answers that come too late to be taken for what they are."""

import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest

FILE = Path(__file__).resolve().parents[2] / "server/backends/onnxruntime/stall_guard.py"


def load():
    spec = importlib.util.spec_from_file_location("stall_guard", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Drill:
    """A guard without its thread, whose clock and whose sibling are stand-ins."""

    def __init__(self, sibling=0):
        self.now, self.sibling, self.ended = 100.0, sibling, []
        module = load()
        idle = SimpleNamespace(start=lambda: None)
        module.threading = SimpleNamespace(Thread=lambda **how: idle, Lock=threading.Lock)
        self.guard = module.StallGuard(self.ended.append, lambda: self.now, lambda: self.sibling)

    def stall(self, seconds, sibling_ran=0.0):
        """As after SIGCONT: no thread of this process has run in between."""
        self.now += seconds
        if self.sibling is not None:  # Stopping and going on is a tick, too.
            self.sibling += round(sibling_ran * 10) + 2
        return self


def test_a_process_that_moves_is_left_alone():
    """The thread is a real one; the clock waits for it, as a busy machine would not."""
    ended, now = [], 0.0
    guard = load().StallGuard(ended.append, lambda: now)
    for _ in range(4):
        now += 0.5
        deadline = time.monotonic() + 20
        while guard._ticked != now and time.monotonic() < deadline:
            time.sleep(0.02)
        guard.begin()
        guard.check()
    assert ended == []


def test_a_sibling_that_loads_later_is_found_within_two_seconds():
    module, now, searches = load(), 1000.0, []
    module.time = SimpleNamespace(monotonic=lambda: now)
    sibling = module.Sibling(0)
    sibling._search = lambda: searches.append(now)
    for _ in range(4000):
        assert sibling.ticks() is None
        now += 0.1
    pauses_s = [(at, after - at) for at, after in pairwise(searches)]
    assert max(pause_s for at, pause_s in pauses_s if at < 1055) < 2.2
    assert 55 < max(pause_s for _, pause_s in pauses_s) < 65  # Where there is none it costs little.


@pytest.mark.parametrize("look", ["begin", "check", "_look"])
def test_whoever_looks_first_after_a_stall_of_this_process_alone_ends_the_server(look):
    drill = Drill().stall(1.5, sibling_ran=1.5)
    getattr(drill.guard, look)()
    (why,) = drill.ended
    assert why.startswith("a model process stood still for 1.5 s while the server went on")


def test_a_pause_of_the_whole_server_is_no_stall():
    drill = Drill()
    for pause_s in (1.0, 2.0, 3600.0):
        drill.stall(pause_s).guard.begin()
        drill.guard.check()
    assert drill.ended == []


def test_what_was_being_answered_in_a_pause_may_have_been_given_up():
    drill = Drill()
    drill.guard.begin()
    drill.stall(1.5).guard.check()
    (why,) = drill.ended
    assert why.startswith("a model process stood still for 1.5 s while it answered")


def test_without_a_sibling_no_pause_is_told_from_a_stall():
    drill = Drill(sibling=None).stall(1.5)
    drill.guard.begin()
    assert len(drill.ended) == 1


# A server with two model processes: each prints `ready`, then what its guard does.
PROGRAM = """
import os, subprocess, sys, time
sys.path.insert(0, FOLDER)
from stall_guard import StallGuard
if len(sys.argv) < 2:
    for _ in range(2):
        subprocess.Popen([sys.executable, __file__, "model"])
    time.sleep(60)
guard = StallGuard()
while guard._sibling_ticks is None:  # The first one that starts finds no other yet.
    time.sleep(0.05)
print(os.getpid(), flush=True)
time.sleep(60)
"""


def test_a_stopped_process_ends_its_server_when_it_goes_on_and_a_stop_of_all_is_nothing(tmp_path):
    program = tmp_path / "server.py"
    program.write_text(PROGRAM.replace("FOLDER", repr(str(FILE.parent))))
    command = [sys.executable, str(program)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as server:
        models = [int(server.stdout.readline()) for _ in range(2)]
        try:
            stop_for([models[0]], 0.1)
            stop_for([server.pid, *models], 1.6)
            time.sleep(0.5)
            assert server.poll() is None
            stop_for([models[0]], 1.6)
            assert server.wait(10) == -signal.SIGTERM
            assert "the server went on" in server.stderr.readline()
        finally:
            for pid in (server.pid, *models):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def stop_for(pids, seconds):
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(seconds)
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
