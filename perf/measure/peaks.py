"""Peak memory of each system on a server that serves nothing else, all under the same load."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bundle.graphs import GraphSet
from routing import WEIGHTS
from server import TritonServer

from ..harness import Asker, Load
from .memory import MemoryUse, measure_memory
from .sets import Pool
from .systems import ADAPTIVE, ENSEMBLE, HIGH, LOW, System
from .target import Target

# What a cascade needs the server to load. `adaptive` takes image tensors, as the static ones do.
CASCADES = {
    ADAPTIVE: ("vit_low", "vit_high", "router"),
    ENSEMBLE: ("vit_low", "vit_high", "router", "preprocess", "adaptive_vit"),
}
MEASURED = (LOW, HIGH, *CASCADES)


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


def peak_memory(system: System, repository: Path, rung_set: GraphSet, load: PeakLoad) -> MemoryUse:
    """Serve one system, send the load, and watch.

    Args:
        system: one of `MEASURED`.
        repository: the assembled repository with its alternatives.
        rung_set: the rungs in it.
        load: what to send.

    Raises:
        ServerError: the server did not start.
        ClientError: it did not answer.
    """
    models = CASCADES.get(system.name, (system.model,))

    def exercise(server: TritonServer) -> None:
        with Target(server.grpc_url, None, server) as target:
            asker = Asker(target, load.pool, rung_set.classes is not None)
            asker.ask(system, load.rows, Load(in_flight=load.concurrency))

    return measure_memory(repository, models, exercise, _weights(rung_set, models))


def _weights(rung_set: GraphSet, models: Sequence[str]) -> list[Path]:
    """The files that hold these models' weights, one that several share once."""
    records = {**rung_set.rungs, **rung_set.alternatives}
    files = {**rung_set.files, **rung_set.alternative_files}
    graphs = [model for model in models if model in files]
    shared = {files[m].with_name(WEIGHTS) for m in graphs if records[m].weights_sha256 is not None}
    return [*(files[model] for model in graphs), *sorted(shared)]
