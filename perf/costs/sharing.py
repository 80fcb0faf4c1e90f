"""Weights stored once and prepacking: what both do to the memory and the speed of a server.

ONNX Runtime maps external weights, so that two processes could hold them once; but its CPU kernels
copy them into an order of their own (prepacking), each process for itself. So there are four ways
to serve the two rungs, compared here as the stand-in backend serves them: one process each, one
thread. Memory is taken one way at a time, or they would share each other's pages; speed with all
of them open, in turn.
"""

from __future__ import annotations

import contextlib
import random
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx.external_data_helper import uses_external_data

from routing import RUNGS, RungSet

from ..figures import PerfError
from .session_process import SessionProcess

# Batch sizes, and how many requests of each a rung answers before its memory is read: at batch 8 a
# few bring the arena of activations to its size.
REQUESTS = {1: 20, 8: 4}


@dataclass(frozen=True)
class Way:
    """How both rungs are served.

    Attributes:
        shared: whether they refer to one file of weights, or each holds its own.
        prepacking: whether ONNX Runtime reorders the weights.
    """

    shared: bool
    prepacking: bool


WAYS = tuple(Way(shared, prepacking) for shared in (False, True) for prepacking in (True, False))


@dataclass(frozen=True)
class Sharing:
    """What one way costs.

    Attributes:
        way: which.
        disk_mib: size of the files it serves.
        idle_mib: PSS of both processes together before they open their sessions.
        pss_mib: the same after the requests, by batch size.
        ms_per_image: by rung and batch size, the median of the rounds, in CPU time: on one thread
            that is the time it takes, without what else the machine is doing.
    """

    way: Way
    disk_mib: float
    idle_mib: float
    pss_mib: Mapping[int, float]
    ms_per_image: Mapping[tuple[str, int], float]


def measure_sharing(onnx_dir: Path, rounds: int, progress: Callable[[], None]) -> list[Sharing]:
    """Measure all four ways to serve two rungs that share their weights.

    Args:
        onnx_dir: folder that `export rungs` wrote.
        rounds: how often each way runs each rung at each batch size.
        progress: called after each way's memory and after each round.

    Raises:
        RungSetError: the folder holds no rungs.
        PerfError: the rungs share no weights, or one does not load.
    """
    rung_set = RungSet.load(onnx_dir)
    shared = {name: rung_set.files[name] for name in RUNGS}
    stores = _stores(shared)
    with tempfile.TemporaryDirectory() as folder:
        separate = {name: Path(folder) / f"{name}.onnx" for name in RUNGS}
        copies = Path(folder) / "copies"  # onnx refuses weights that have several links
        copies.mkdir()
        for file in (*shared.values(), *stores):
            shutil.copyfile(file, copies / file.name)
        for name in RUNGS:
            onnx.save(onnx.load(copies / shared[name].name), separate[name])
        shutil.rmtree(copies)
        disk_mib = {
            True: _size_mib([*shared.values(), *stores]),
            False: _size_mib(separate.values()),
        }
        memory, opened = {}, {}
        with contextlib.ExitStack() as stack:
            for way in WAYS:
                files = shared if way.shared else separate
                with _serving(files, way.prepacking) as servers:
                    memory[way] = _memory_mib(servers, rung_set.image_shape)
                progress()
            for way in WAYS:
                files = shared if way.shared else separate
                opened[way] = stack.enter_context(_serving(files, way.prepacking))
                for server in opened[way].values():
                    server.open()
            times = _times(opened, rung_set.image_shape, rounds, progress)
    return [Sharing(way, disk_mib[way.shared], *memory[way], times[way]) for way in WAYS]


@contextlib.contextmanager
def _serving(files: Mapping[str, Path], prepacking: bool) -> Iterator[dict[str, SessionProcess]]:
    with contextlib.ExitStack() as stack:
        servers = {}
        for name, file in files.items():
            servers[name] = SessionProcess(file, prepacking)
            stack.callback(servers[name].close)
        yield servers


def _memory_mib(
    servers: Mapping[str, SessionProcess], image_shape: tuple[int, ...]
) -> tuple[float, dict[int, float]]:
    """PSS of all together: before their sessions, and after the requests by batch size."""
    idle_mib = _pss_mib(servers)
    for server in servers.values():
        server.open()
    pss_mib = {}
    for batch, count in REQUESTS.items():
        for server in servers.values():
            for _ in range(count):
                server.run((batch, *image_shape))
        pss_mib[batch] = _pss_mib(servers)
    return idle_mib, pss_mib


def _pss_mib(servers: Mapping[str, SessionProcess]) -> float:
    return sum(server.pss() for server in servers.values()) / 2**20


def _times(
    opened: Mapping[Way, Mapping[str, SessionProcess]],
    image_shape: tuple[int, ...],
    rounds: int,
    progress: Callable[[], None],
) -> dict[Way, dict[tuple[str, int], float]]:
    """Median milliseconds per image, the ways in an order drawn anew for each figure."""
    rng = random.Random(0)
    found: dict[Way, dict[tuple[str, int], list[float]]] = {way: {} for way in opened}
    for counts in range(rounds + 1):
        for name in RUNGS:
            for batch in REQUESTS:
                for way in rng.sample(WAYS, len(WAYS)):
                    seconds = opened[way][name].run((batch, *image_shape))
                    if counts:  # the first is the warm-up
                        found[way].setdefault((name, batch), []).append(1000 * seconds / batch)
        if counts:
            progress()
    return {
        way: {key: statistics.median(values) for key, values in figures.items()}
        for way, figures in found.items()
    }


def _stores(files: Mapping[str, Path]) -> set[Path]:
    """The files of weights that both rungs refer to."""
    stores: list[set[Path]] = []
    for file in files.values():
        graph = onnx.load(file, load_external_data=False).graph
        external = [tensor for tensor in graph.initializer if uses_external_data(tensor)]
        locations = {e.value for t in external for e in t.external_data if e.key == "location"}
        stores.append({file.parent / location for location in locations})
    shared = set.intersection(*stores)
    if not shared:
        raise PerfError(
            f"{' and '.join(files)} share no weights; export both in FP32 with "
            "python -m export rungs"
        )
    return shared


def _size_mib(files: Iterable[Path]) -> float:
    return sum(file.stat().st_size for file in files) / 2**20
