"""The stand-in's guard against answers that come too late to be taken for what they are."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

FILE = Path(__file__).resolve().parents[2] / "server/backends/onnxruntime/stall_guard.py"


def load():
    spec = importlib.util.spec_from_file_location("stall_guard", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_process_that_moves_is_left_alone():
    ended = []
    guard = load().StallGuard(end=lambda: ended.append("ended"))
    for _ in range(10):
        time.sleep(0.02)
        guard.check()
    assert ended == []


def test_whoever_looks_first_after_a_stall_ends_the_process():
    now, ended = [100.0], []
    guard = load().StallGuard(end=lambda: ended.append(now[0]), clock=lambda: now[0])
    now[0] += 5  # as after SIGCONT: no thread has run in between
    guard.check()
    assert ended[0] == 105.0


def test_a_stopped_process_ends_when_it_goes_on_and_a_short_stop_is_nothing():
    program = (
        f"import sys, time; sys.path.insert(0, {str(FILE.parent)!r})\n"
        "from stall_guard import StallGuard\n"
        "guard = StallGuard()\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        stop_for(process, 0.3)
        time.sleep(0.5)
        assert process.poll() is None
        stop_for(process, 1.5)
        assert process.wait(10) == -signal.SIGKILL


def stop_for(process, seconds):
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(seconds)
    os.kill(process.pid, signal.SIGCONT)
