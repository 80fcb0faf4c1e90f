"""CPU time of other processes in less than a clock tick, and processes kept on the same cores."""

import os
import subprocess
import sys
import time

import psutil
import pytest

from perf import cpu
from perf.cpu import CpuMeter, on_same_cores

# Works for as many milliseconds of its own CPU time as each line says, then answers.
WORKER = """
import sys, time
print(flush=True)
for line in sys.stdin:
    end = time.process_time() + float(line) / 1e3
    while time.process_time() < end: pass
    print(flush=True)
"""


class Worker:
    def __init__(self):
        self._process = subprocess.Popen(
            [sys.executable, "-c", WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._process.stdout.readline()
        self.pid = self._process.pid

    def work(self, milliseconds):
        self._process.stdin.write(f"{milliseconds}\n")
        self._process.stdin.flush()
        self._process.stdout.readline()

    def end(self):
        self._process.stdin.close()
        self._process.wait()


@pytest.fixture
def worker():
    worker = Worker()
    yield worker
    worker.end()


def test_the_cpu_time_of_one_request_is_told_in_less_than_a_tick(worker):
    meter = CpuMeter([worker.pid], idle_s=0.01)
    before = meter.read_s()
    worker.work(3)
    assert 0.003 <= meter.used_s(before, 0.0) < 0.009  # a tick has 10 ms
    before = meter.read_s()
    time.sleep(0.02)  # waiting is not working
    assert meter.used_s(before, 0.0) < 0.001


def test_the_processes_of_a_tree_are_summed(worker):
    meter = CpuMeter([worker.pid, os.getpid()], idle_s=0.01)
    before = meter.read_s()
    worker.work(3)
    end = time.process_time() + 0.004
    while time.process_time() < end:
        pass
    assert 0.007 <= meter.used_s(before, 0.0) < 0.03


def test_what_idling_takes_is_not_a_requests(worker):
    meter = CpuMeter([worker.pid], idle_s=0.01)
    meter.idle_share = 0.1
    before = meter.read_s()
    worker.work(10)
    assert 0.0079 <= meter.used_s(before, 0.02) < 0.0095  # ten, less two of idling
    assert meter.used_s(meter.read_s(), 1.0) == 0.0  # never below nothing


def test_where_the_kernel_refuses_its_clock_the_ticks_are_read(worker, monkeypatch):
    class Refusing:
        perf_counter, sleep = time.perf_counter, time.sleep

        @staticmethod
        def clock_gettime(clock):
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(cpu, "time", Refusing)
    meter = CpuMeter([worker.pid], idle_s=0.01)
    before = meter.read_s()
    worker.work(60)
    assert 0.049 <= meter.read_s() - before < 0.2  # six ticks of 10 ms, less one


def test_the_server_has_its_cores_and_the_client_the_others(worker):
    cores = os.sched_getaffinity(0)
    with on_same_cores([worker.pid], 1) as count:
        assert count == 1
        if len(cores) > 1:
            served = os.sched_getaffinity(worker.pid)
            assert len(served) == 1 and os.sched_getaffinity(0) == cores - served
    assert os.sched_getaffinity(0) == os.sched_getaffinity(worker.pid) == cores


def test_nothing_is_moved_where_every_core_is_needed(worker):
    cores = os.sched_getaffinity(0)
    with on_same_cores([worker.pid], len(cores)) as count:
        assert count == len(cores)
        assert os.sched_getaffinity(0) == os.sched_getaffinity(worker.pid) == cores


def test_processes_come_back_to_their_cores_after_an_error(worker):
    cores = os.sched_getaffinity(0)
    with pytest.raises(psutil.Error), on_same_cores([worker.pid], 1):
        raise psutil.Error
    assert os.sched_getaffinity(0) == os.sched_getaffinity(worker.pid) == cores
