"""Peak memory of real processes: what is counted, and how seldom it is looked at."""

import os
import subprocess
import sys
import time

import psutil
import pytest

from perf import memory
from perf.figures import PerfError
from perf.memory import PeakMemory, read_rollup

# Does on command: hold so many MiB, let go of them, end.
HOLDER = """
import sys
held = b""
for line in sys.stdin:
    held = b"" if line == "0\\n" else b"x" * (int(line) << 20)
    print("done", flush=True)
"""
# Two processes that share 32 MiB: a page written before a fork, and only read after it.
SHARERS = """
import os, sys
held = b"x" * (32 << 20)
child = os.fork()
if child:
    print(child, flush=True)
sys.stdin.read(1)
"""


class Holder:
    """A process that holds as much memory as it is told to."""

    def __init__(self, script=HOLDER):
        self.process = subprocess.Popen(
            [sys.executable, "-S", "-c", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self.process.pid

    def hold(self, mib):
        self.process.stdin.write(f"{mib}\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "done\n"

    def end(self):
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


@pytest.fixture
def holder():
    process = Holder()
    process.hold(0)
    yield process
    if process.process.poll() is None:
        process.end()


def test_the_rollup_is_what_psutil_adds_up(holder):
    pss, rss = read_rollup(holder.pid)
    assert rss == pytest.approx(psutil.Process(holder.pid).memory_info().rss, rel=0.05)
    assert pss == pytest.approx(psutil.Process(holder.pid).memory_full_info().pss, rel=0.1)
    assert 0 < pss <= rss


def test_a_peak_between_two_listings_is_seen_and_stays(holder, monkeypatch):
    monkeypatch.setattr(memory, "REFRESH_S", 60)
    with PeakMemory(lambda: [holder.pid]) as peak:
        before_mib = peak.pss_mib
        holder.hold(48)
        time.sleep(0.5)
        holder.hold(0)
        time.sleep(0.2)
    assert before_mib + 47 < peak.pss_mib < before_mib + 60
    assert peak.rss_mib >= peak.pss_mib
    assert peak.gpu_mib is None


def test_peaks_at_different_moments_do_not_add_up(holder):
    other = Holder()
    with PeakMemory(lambda: [holder.pid, other.pid]) as peak:
        before_mib = peak.pss_mib
        for process in (holder, other):
            process.hold(40)
            time.sleep(0.3)
            process.hold(0)
            time.sleep(0.3)
    other.end()
    assert before_mib + 39 < peak.pss_mib < before_mib + 60


def test_shared_pages_count_once_in_pss_and_twice_in_rss():
    first = Holder(SHARERS)
    second = int(first.process.stdout.readline())
    with PeakMemory(lambda: [first.pid, second]) as peak:
        pass
    first.end()
    assert peak.pss_mib > 32
    assert peak.rss_mib > peak.pss_mib + 30


def test_a_process_that_starts_later_is_found_and_one_that_ends_is_no_error(holder, monkeypatch):
    monkeypatch.setattr(memory, "REFRESH_S", 0.1)
    alive = [holder.pid]
    with PeakMemory(lambda: alive) as peak:
        before_mib = peak.pss_mib
        other = Holder()
        alive = [holder.pid, other.pid]
        other.hold(40)
        time.sleep(0.5)
        other.end()  # It stays in the list for a while, as in a server's.
        time.sleep(0.3)
    assert peak.pss_mib > before_mib + 39


def test_a_process_that_does_not_move_is_read_once_a_second(holder, monkeypatch):
    reads = []

    def counted(pid):
        reads.append(pid)
        return read_rollup(pid)

    monkeypatch.setattr(memory, "read_rollup", counted)
    with PeakMemory(lambda: [holder.pid]):
        time.sleep(0.8)
    assert len(reads) == 2  # at the beginning and at the end


def test_what_cannot_be_read_is_said():
    with pytest.raises(PerfError, match="smaps_rollup is needed"), PeakMemory(lambda: []):
        pass
    with pytest.raises(KeyError, match="its own"), PeakMemory(lambda: []):
        raise KeyError("its own")


def test_the_largest_device_memory_is_kept():
    readings = iter([100.0, 700.0])
    with PeakMemory(lambda: [os.getpid()], lambda: next(readings, 300.0)) as peak:
        time.sleep(0.2)
    assert peak.gpu_mib == 700.0
