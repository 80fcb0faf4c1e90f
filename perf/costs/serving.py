"""What each exported graph costs as Triton serves it on this machine.

images ─► batches ─► as many clients as instances ─► one server with several graphs ─► ms per image

Two servers minutes apart differ by more than many graphs do. So graphs are served together and
asked in turn, and each group of them holds the full rung: ratios are taken within a turn.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import tritonclient.grpc as triton
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from client.errors import server_errors
from routing import RungSet
from server import TritonServer

from ..figures import MOST_APART, PerfError, Spread, apart
from ..measure.cpu import CpuMeter
from ..measure.deployment import lay_out_graph
from ..measure.sets import Pool
from ..nvml import Nvml
from .clients import Clients, input_tensors

REFERENCE = "vit_high"
TOGETHER = 8  # graphs of one server; each instance holds the weights once more
_CONFIG = Path(__file__).resolve().parents[2] / "model_repository" / REFERENCE / "config.pbtxt"
_START_S = 300.0  # for many graphs on few cores


@dataclass(frozen=True)
class Load:
    """How graphs are served and asked.

    Attributes:
        instances: of each graph, and requests in flight.
        threads: CPU threads of each instance.
        batches: images per request, ascending.
        turns: how often everything is measured.
    """

    instances: int = 2
    threads: int = 1
    batches: tuple[int, ...] = (1, 8)
    turns: int = 5

    @classmethod
    def of(cls, instances: int, threads: int, batches: str, turns: int) -> Load:
        """From the command line, where batches are text such as `1,8`.

        Raises:
            PerfError: batches that are no numbers of images.
        """
        sizes = [size.strip() for size in batches.split(",")]
        if not all(size.isdecimal() and int(size) > 0 for size in sizes):
            raise PerfError(f"--batches {batches!r}: give numbers of images with commas, as 1,8")
        return cls(instances, threads, tuple(sorted({int(size) for size in sizes})), turns)


@dataclass
class GraphCost:
    """What one graph costs: one value per turn in each list.

    Attributes:
        latency_ms: median of lone requests of one image, milliseconds.
        ms_per_image: by batch, with as many requests in flight as there are instances.
        client_cpu_ms: by batch, CPU time of the client per image, which runs on the same machine.
        server_cpu_ms: CPU time of the server per image at the largest batch; empty on a GPU, where
            it says nothing.
        cost_ratio: `ms_per_image` at the largest batch over the full rung's in the same turn.
        cpu_cost_ratio: the same of `server_cpu_ms`.
    """

    latency_ms: list[float] = field(default_factory=list)
    ms_per_image: dict[int, list[float]] = field(default_factory=dict)
    client_cpu_ms: dict[int, list[float]] = field(default_factory=dict)
    server_cpu_ms: list[float] = field(default_factory=list)
    cost_ratio: list[float] = field(default_factory=list)
    cpu_cost_ratio: list[float] = field(default_factory=list)

    @property
    def disturbed(self) -> bool:
        """Whether clock and CPU time tell different stories of this graph's cost."""
        if not self.cpu_cost_ratio:
            return False
        return apart(median(self.cost_ratio), median(self.cpu_cost_ratio)) > MOST_APART

    def to_dict(self) -> dict[str, Any]:
        """As JSON types: spreads, those of batches under the batch as text."""

        def by_batch(values: Mapping[int, list[float]]) -> dict[str, Any]:
            return {str(batch): Spread.of(taken).to_dict() for batch, taken in values.items()}

        return {
            "latency_ms": Spread.of(self.latency_ms).to_dict(),
            "ms_per_image": by_batch(self.ms_per_image),
            "client_cpu_ms": by_batch(self.client_cpu_ms),
            "server_cpu_ms": _or_none(self.server_cpu_ms),
            "cost_ratio": Spread.of(self.cost_ratio).to_dict(),
            "cpu_cost_ratio": _or_none(self.cpu_cost_ratio),
            "disturbed": self.disturbed,
        }


def _or_none(values: Sequence[float]) -> dict[str, Any] | None:
    return Spread.of(values).to_dict() if values else None


def groups_of(rung_set: RungSet, names: Sequence[str] = ()) -> list[list[str]]:
    """Which graphs are served together, the full rung in each group.

    Args:
        rung_set: the exported rungs and alternatives.
        names: of graphs; none: all.

    Raises:
        PerfError: a name that was not exported.
    """
    known = [*rung_set.rungs, *rung_set.alternatives]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise PerfError(f"no graph {unknown[0]!r} was exported; there are {', '.join(known)}")
    others = [name for name in known if name != REFERENCE and (not names or name in names)]
    size = TOGETHER - 1
    return [[REFERENCE, *others[i : i + size]] for i in range(0, max(1, len(others)), size)]


def steps(groups: Sequence[Sequence[str]], load: Load) -> int:
    """How often `measure_serving` calls `on_step`."""
    return load.turns * (1 + len(load.batches)) * sum(map(len, groups))


def measure_serving(
    rung_set: RungSet,
    groups: Sequence[Sequence[str]],
    pool: Pool,
    load: Load,
    on_step: Callable[[], None],
) -> dict[str, GraphCost]:
    """Serve the graphs group by group and ask them in turn.

    Args:
        rung_set: the exported rungs and alternatives.
        groups: of their names, see `groups_of`.
        pool: the images, at least as many as the largest batch.
        load: how they are served and asked.
        on_step: called after each measurement of a graph.

    Returns:
        By graph; the full rung's has values of every group.

    Raises:
        PerfError: too few images.
        ServerError: the server does not start.
        ClientError: it does not answer.
    """
    if len(pool) < load.batches[-1]:
        raise PerfError(
            f"{len(pool)} images do not fill a batch of {load.batches[-1]}; give more --images"
        )
    costs = {name: GraphCost() for group in groups for name in group}
    rng = np.random.default_rng(0)
    for group in groups:
        with _asking(rung_set, group, pool, load) as clients:
            for name in group:
                for batch in load.batches:
                    clients.warm_up(name, batch)
            for _ in range(load.turns):
                _take_turn(clients, {name: costs[name] for name in group}, load, rng, on_step)
    return costs


def _take_turn(
    clients: Clients,
    costs: Mapping[str, GraphCost],
    load: Load,
    rng: np.random.Generator,
    on_step: Callable[[], None],
) -> None:
    """Measure each graph once, in an order drawn anew, and note its costs."""
    names = list(costs)
    for index in rng.permutation(len(names)):
        costs[names[index]].latency_ms.append(clients.latency_ms(names[index]))
        on_step()
    for batch in load.batches:
        for index in rng.permutation(len(names)):
            wall_ms, cpu_ms, server_ms = clients.saturate(names[index], batch)
            costs[names[index]].ms_per_image.setdefault(batch, []).append(wall_ms)
            costs[names[index]].client_cpu_ms.setdefault(batch, []).append(cpu_ms)
            if batch == load.batches[-1] and server_ms is not None:
                costs[names[index]].server_cpu_ms.append(server_ms)
            on_step()
    last = {name: cost.ms_per_image[load.batches[-1]][-1] for name, cost in costs.items()}
    for name, cost in costs.items():
        cost.cost_ratio.append(last[name] / last[REFERENCE])
    full_ms = costs[REFERENCE].server_cpu_ms
    for cost in costs.values():
        if full_ms and full_ms[-1] > 0:
            cost.cpu_cost_ratio.append(cost.server_cpu_ms[-1] / full_ms[-1])


@contextlib.contextmanager
def _asking(rung_set: RungSet, names: Sequence[str], pool: Pool, load: Load) -> Iterator[Clients]:
    """Clients of a server with these graphs."""
    with contextlib.ExitStack() as stack:
        repository = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="perf-serving-")))
        lay_out(rung_set, names, load, repository)
        server = stack.enter_context(TritonServer(repository, free_ports=True, timeout_s=_START_S))
        client = stack.enter_context(triton.InferenceServerClient(server.grpc_url))
        threads = stack.enter_context(ThreadPoolExecutor(load.instances))
        stack.enter_context(server_errors(server.grpc_url))
        outputs = _outputs(names, rung_set.classes is not None)
        inputs = {batch: input_tensors(pool, batch) for batch in {1, *load.batches}}
        with Nvml() as nvml:
            meter = None if nvml.handles else CpuMeter(server.process_ids())
        yield Clients(client, threads, load.instances, inputs, outputs, meter)


def _outputs(names: Sequence[str], has_head: bool) -> dict[str, list[str]]:
    """What the router asks for: the CLS tokens of a cheap rung's layers, not of the full one's."""
    head = ["logits"] if has_head else []
    cheap = ["embedding", "cls_layers", *head]
    return {name: ["embedding", *head] if name == REFERENCE else cheap for name in names}


def lay_out(rung_set: RungSet, names: Sequence[str], load: Load, repository: Path) -> None:
    """Write a model repository of these graphs, configured as the full rung is.

    Args:
        rung_set: the exported rungs and alternatives.
        names: of the graphs.
        load: instances and threads.
        repository: an empty folder.
    """
    files = {**rung_set.files, **rung_set.alternative_files}
    records = {**rung_set.rungs, **rung_set.alternatives}
    config = text_format.Parse(_CONFIG.read_text(), ModelConfig())
    config.instance_group[0].count = load.instances
    config.parameters["intra_op_thread_count"].string_value = str(load.threads)
    for name in names:
        lay_out_graph(files[name], records[name], repository / name / "1")
        (repository / name / "config.pbtxt").write_text(text_format.MessageToString(config))
