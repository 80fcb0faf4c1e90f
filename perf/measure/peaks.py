"""Peak memory of each system on a server that serves nothing else, all under the same load."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from routing import RungSet
from server import TritonServer

from .asking import Asker
from .memory import MemoryUse, measure_memory
from .sets import Pool
from .systems import ADAPTIVE, ENSEMBLE, HIGH, LOW, System
from .target import Target

# What each system needs the server to load. `adaptive` takes image tensors, as the static ones do.
MODELS = {
    LOW: ("vit_low",),
    HIGH: ("vit_high",),
    ADAPTIVE: ("vit_low", "vit_high", "router"),
    ENSEMBLE: ("vit_low", "vit_high", "router", "preprocess", "adaptive_vit"),
}


@dataclass(frozen=True)
class PeakLoad:
    """What every system is sent while its memory is watched.

    Attributes:
        pool: the images.
        rows: those that are sent, once each.
        concurrency: requests in flight, so that batches form.
    """

    pool: Pool
    rows: Sequence[int]
    concurrency: int


def peak_memory(system: System, repository: Path, rung_set: RungSet, load: PeakLoad) -> MemoryUse:
    """Serve one system, send the load, and watch.

    Args:
        system: a key of `MODELS`.
        repository: the assembled repository.
        rung_set: the rungs in it.
        load: what to send.

    Raises:
        ServerError: the server did not start.
        ClientError: it did not answer.
    """
    models = MODELS[system.name]

    def exercise(server: TritonServer) -> None:
        with (
            Target(server.grpc_url, None, server) as target,
            ThreadPoolExecutor(load.concurrency) as threads,
        ):
            asker = Asker(target, load.pool, rung_set.classes is not None)
            for _ in threads.map(lambda row: asker.ask(system, row), load.rows):
                pass

    weights = [rung_set.files[model] for model in models if model in rung_set.files]
    return measure_memory(repository, models, exercise, weights)
