"""Peak memory of a system: a fresh server with only its models, watched while it answers.

PSS counts a page that k processes share as 1/k in each, so that the sum over the server's processes
is what the machine gives up; RSS counts it k times. Both come from `/proc/PID/smaps_rollup`, for
which the kernel walks all of a process's pages: milliseconds, for hundreds of megabytes. So it is
read only of a process whose size in `/proc/PID/statm` has moved, and of all every second.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any

from bundle.graphs import GraphSet
from routing import WEIGHTS
from server import TritonServer

from .environment import gpus, used_mib
from .figures import PerfError, Spread
from .harness import Asker, Load
from .images import Pool
from .systems import ADAPTIVE, ENSEMBLE, HIGH, LOW, System, graphs_by_model
from .target import Target

INTERVAL_S = 0.05
REFRESH_S = 1.0  # as often the processes are listed and all of them are read
_MOVED_BYTES = 256 * 2**10
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_PROC = Path("/proc")


@dataclass(frozen=True)
class MemoryUse:
    """One system's memory, as it stands in summary.json.

    Attributes:
        peak_pss_mib: largest sum over the server's processes at one moment.
        peak_rss_mib: the same of RSS.
        gpu_mib: what the GPUs together held more than before the server started, at most: context,
            weights and arenas; None without a GPU. NVML tells a process's own share only to those
            outside of containers.
        weights_mib: size of the ONNX files that are served.
    """

    peak_pss_mib: float
    peak_rss_mib: float
    gpu_mib: float | None
    weights_mib: float


def serving(repository: Path, models: Sequence[str]) -> TritonServer:
    """A server, on free ports and not started yet, of some of a repository's models."""
    explicit = ["--model-control-mode=explicit", *(f"--load-model={name}" for name in models)]
    return TritonServer(
        repository, free_ports=True, models=models, extra_args=explicit, stop_patience_s=0
    )


class PeakMemory:
    """Watches processes between `with` and its end, 20 times a second from a thread of its own.

    Attributes:
        pss_mib: largest sum over the processes at one moment.
        rss_mib: the same of RSS.
        gpu_mib: largest value of `gpu_mib` given to it; None where that is None.
    """

    def __init__(
        self,
        processes: Callable[[], Collection[int]],
        gpu_mib: Callable[[], float | None] = lambda: None,
    ) -> None:
        """Say what to watch: ids of processes, asked for anew every second, and device memory."""
        self.pss_mib = self.rss_mib = 0.0
        self.gpu_mib: float | None = None
        self._processes = processes
        self._read_gpu_mib = gpu_mib
        self._seen: dict[int, tuple[int, int, int]] = {}  # size, PSS and RSS in bytes by process
        self._refreshed = -REFRESH_S
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._refresh()
        self._note()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join()
        if self.pss_mib == 0.0 and kind is None:
            raise PerfError(
                "no process's memory could be read; /proc/PID/smaps_rollup is needed (Linux 4.14)"
            )

    def _watch(self) -> None:
        while not self._ended.wait(INTERVAL_S):
            if time.monotonic() - self._refreshed >= REFRESH_S:
                self._refresh()
            for pid, (before, *_) in list(self._seen.items()):
                size = _size(pid)
                if size is None or abs(size - before) >= _MOVED_BYTES:
                    self._read(pid)
            self._note()
        self._refresh()  # once more at the end, whatever the clock says
        self._note()

    def _refresh(self) -> None:
        self._seen.clear()
        for pid in self._processes():
            self._read(pid)
        self._refreshed = time.monotonic()

    def _read(self, pid: int) -> None:
        size, rollup = _size(pid), read_rollup(pid)
        if size is None or rollup is None:
            self._seen.pop(pid, None)
        else:
            self._seen[pid] = (size, *rollup)

    def _note(self) -> None:
        self.pss_mib = max(self.pss_mib, sum(pss for _, pss, _ in self._seen.values()) / 2**20)
        self.rss_mib = max(self.rss_mib, sum(rss for _, _, rss in self._seen.values()) / 2**20)
        gpu_mib = self._read_gpu_mib()
        if gpu_mib is not None:
            self.gpu_mib = max(self.gpu_mib or 0.0, gpu_mib)


def read_rollup(pid: int) -> tuple[int, int] | None:
    """PSS and RSS of a process in bytes; None if it is gone or another user's."""
    try:
        lines = (_PROC / str(pid) / "smaps_rollup").read_text().splitlines()
    except OSError:
        return None
    kib = {line.split(":")[0]: int(line.split()[1]) for line in lines[1:]}
    return (kib["Pss"] * 2**10, kib["Rss"] * 2**10) if kib else None  # Empty while it ends.


def _size(pid: int) -> int | None:
    """Resident bytes, as the kernel keeps count of them without looking."""
    try:
        return int((_PROC / str(pid) / "statm").read_text().split()[1]) * _PAGE_BYTES
    except (OSError, IndexError):
        return None


# What a cascade needs the server to load. `adaptive` takes image tensors, as the static ones do.
CASCADES = {
    ADAPTIVE: ("vit_low", "vit_high", "router"),
    ENSEMBLE: ("vit_low", "vit_high", "router", "preprocess", "adaptive_vit"),
}
MEASURED = (LOW, HIGH, *CASCADES)


def peak_memory(
    system: System,
    repository: Path,
    graphs: GraphSet,
    pool: Pool,
    rows: Sequence[int],
    in_flight: int,
) -> MemoryUse:
    """Serve one system, send the load, and watch.

    What loading takes for a moment does not count, what it leaves behind does.

    Args:
        system: one of `MEASURED`.
        repository: the assembled repository with its alternatives.
        graphs: the rungs in it.
        pool: the images.
        rows: those that are sent, once each.
        in_flight: requests that are always unanswered, so that batches form.

    Raises:
        ServerError: the server did not start.
        ClientError: it did not answer.
        PerfError: its memory cannot be read.
    """
    models = CASCADES.get(system.name, (system.model,))
    served = [graph for name, graph in graphs_by_model(graphs).items() if name in models]
    # Weights that several graphs share are there once.
    shared = {g.file.with_name(WEIGHTS) for g in served if g.record.weights_sha256 is not None}
    weights = sum(file.stat().st_size for file in (*(g.file for g in served), *shared))
    with gpus() as handles:
        before_mib = used_mib(handles)
        with (
            serving(repository, models) as server,
            PeakMemory(server.process_ids, partial(used_mib, handles)) as peak,
            Target(server.grpc_url, None, server) as target,
        ):
            asker = Asker(target, pool, graphs.classes is not None)
            asker.ask(system, rows, Load(in_flight))
    gpu_mib = None if before_mib is None or peak.gpu_mib is None else peak.gpu_mib - before_mib
    return MemoryUse(peak.pss_mib, peak.rss_mib, gpu_mib, weights / 2**20)


def memory_figures(peaks: Mapping[str, Sequence[MemoryUse]]) -> dict[str, Any]:
    """Peak memory of each system, the medians of its runs, and adaptive's over the static ones'.

    Args:
        peaks: for each system one entry per run; the runs of one turn belong together.
    """
    memory: dict[str, dict[str, float | None]] = {}
    for name, uses in peaks.items():
        entries = [asdict(use) for use in uses]
        memory[name] = {
            field: None if entries[0][field] is None else median(e[field] for e in entries)
            for field in entries[0]
        }
    turns = zip(*(peaks[name] for name in (ADAPTIVE, LOW, HIGH)), strict=True)
    ratios = [a.peak_pss_mib / (low.peak_pss_mib + high.peak_pss_mib) for a, low, high in turns]
    return {"memory": memory, "peak_memory_ratio": Spread.of(ratios).to_dict()}
