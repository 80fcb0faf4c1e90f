"""What each exported graph costs as Triton serves it on this machine.

images ─► batches ─► as many requests in flight as instances ─► one server with several graphs

Two servers minutes apart differ by more than many graphs do. So graphs are served together and
take turns every few batches, and each group of them holds the full model: ratios are taken within
a turn. A graph that keeps as many tokens as an image needs has a price for each image; it is asked
about more of them, and what it costs in batches is a mean over these.
"""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import onnx

from bundle import config
from bundle.graphs import Graph, GraphSet
from bundle.placing import working_folder
from report.terminal import Bar, Bars
from server import TritonServer

from .environment import gpus
from .figures import PerfError, Spread
from .harness import ONE_BY_ONE, Answer, Asker, Asks, Load, Paired, take_turns
from .images import Pool
from .systems import System
from .target import Target

TOGETHER = 8  # graphs of one server; each instance holds the weights once more
LONE = 8  # images that are asked one at a time in a turn
VARIED = 32  # where what an image costs depends on it: so many, or all that there are
SATURATED_S = 1.0  # that the full rung is asked for in a turn, about
MOST_BLOCKS = 32
_CONFIG = Path(__file__).resolve().parents[1] / "model_repository/vit_high" / "config.pbtxt"
_START_S = 300.0  # for many graphs on few cores

Price = dict[str, Any]
"""What one graph costs, as JSON types; a spread holds one value per turn.

`latency_ms`: spread of the median of lone requests of one image. `ms_per_image` and
`server_cpu_ms`: spreads by the clock and of the server's CPU time, in batches of `batch`, with as
many requests in flight as there are instances. `cost_ratio` and `cpu_cost_ratio`: spreads of those
over the full model's in the same turn. Figures of CPU time are None on a GPU, where it says
nothing. `disturbed`: whether clock and CPU time tell different stories of the ratio.

`per_image`: None where every image costs the same, else of lone requests, of each image the median
over the turns: of how many `images`; `cost_ratio`, an image's over the full model's in the same
turn, its `mean`, `std`, `p5` and `p95` over the images; `latency_ms`, its `p50` and `p95`; and
`tokens`, their `mean`, `min` and `max`, None where the graph does not tell them.
"""


@dataclass(frozen=True)
class Served:
    """How graphs are served and asked.

    Attributes:
        instances: of each graph, and requests in flight.
        threads: CPU threads of each instance.
        batch: images per request.
        turns: how often everything is measured.
    """

    instances: int = 2
    threads: int = 1
    batch: int = 8
    turns: int = 3

    @property
    def load(self) -> Load:
        """Two requests of every instance before the next graph has its turn."""
        return Load(self.instances, self.batch, block=2 * self.instances * self.batch)


def price(
    graphs: GraphSet, names: Sequence[str], pool: Pool, served: Served, bars: Bars
) -> dict[str, Price]:
    """Serve the graphs group by group, and ask those of a group in turn.

    Where clock and CPU time tell different stories of a graph, everything is measured once more,
    and the less disturbed of the two measurements is returned.

    Args:
        graphs: the exported rungs and alternatives.
        names: of the graphs; none: all of them. The full model is measured whether named or not.
        pool: the images, at least a batch of them.
        served: how they are served and asked.
        bars: show what goes on.

    Returns:
        The price of each graph; the full model's has values of every group.

    Raises:
        PerfError: an unknown graph, or too few images.
        ServerError: the server does not start.
        ClientError: it does not answer.
    """
    groups = groups_of(graphs, names)
    if len(pool) < served.batch:
        raise PerfError(
            f"{len(pool)} images do not fill a batch of {served.batch}; give more --images"
        )
    rounds = sum(2 + any(_varies(graphs, name) for name in group) for group in groups)
    with bars.stage("price the graphs as served", served.turns * rounds) as bar:
        found = _measure(graphs, groups, pool, served, bar)
        if not disturbed(found):
            return found
        again = f"clock and CPU time of {', '.join(disturbed(found))} differ: priced once more"
        bars.say(again)
        bar.begin_again(again)
        second = _measure(graphs, groups, pool, served, bar)
    return min(second, found, key=lambda prices: len(disturbed(prices)))


def disturbed(prices: Mapping[str, Price]) -> list[str]:
    """Names of the graphs of which clock and CPU time tell different stories."""
    return [name for name, entry in prices.items() if entry["disturbed"]]


def groups_of(graphs: GraphSet, names: Sequence[str]) -> list[list[str]]:
    """Which graphs are served together, the full model first in each group.

    Raises:
        PerfError: an unknown graph.
    """
    full = graphs.reference.name
    known = [full, *(name for name in graphs.graphs if name != full)]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise PerfError(f"no graph {unknown[0]!r} was exported; there are {', '.join(known)}")
    others = [name for name in known[1:] if not names or name in names]
    size = TOGETHER - 1
    return [[full, *others[i : i + size]] for i in range(0, max(1, len(others)), size)]


def _measure(
    graphs: GraphSet, groups: Sequence[Sequence[str]], pool: Pool, served: Served, bar: Bar
) -> dict[str, Price]:
    alone: list[dict[str, list[Answer]]] = []  # of each turn of each group, answers by graph
    saturated: list[dict[str, list[Answer]]] = []
    full, head = graphs.reference.name, () if graphs.classes is None else ("logits",)
    # Neighbours in a folder may be alike.
    order = np.random.default_rng(0).permutation(len(pool)).tolist()
    few, more = list(islice(cycle(order), LONE)), order[LONE:VARIED]
    tokens: dict[str, list[float] | None] = {}
    for group in groups:
        # Each is asked what the router asks it: the full model not for the tokens of its layers.
        systems = [
            System(name, name, name, outputs=("embedding", *layers, *head))
            for name in group
            for layers in [() if name == full else ("cls_layers",)]
        ]
        varying = [system for system in systems if _varies(graphs, system.name)]
        with _serving(graphs, group, pool, served) as asker:
            block = _warm_up(asker, systems, order, served, VARIED if varying else 1)
            for system in varying:
                tokens[system.name] = _tokens(asker, graphs.graphs[system.name], order[:VARIED])
            turns = [few] * served.turns
            lone = take_turns(asker, systems, turns, ONE_BY_ONE, on_share=bar.advance).shares
            if varying:
                both = [system for system in systems if system.name == full or system in varying]
                turns = [more] * served.turns
                others = take_turns(asker, both, turns, ONE_BY_ONE, on_share=bar.advance).shares
                for turn, rest in zip(lone, others, strict=True):
                    for name, answers in rest.items():
                        turn[name] += answers
            alone += lone
            turns = [block] * served.turns
            saturated += take_turns(asker, systems, turns, served.load, on_share=bar.advance).shares
    found = {}
    for name in dict.fromkeys(name for group in groups for name in group):
        found[name] = _price(name, full, alone, saturated, served.batch)
        if _varies(graphs, name):
            own = [turn for turn in alone if name in turn]
            found[name]["per_image"] = _per_image(name, full, own, few + more, tokens[name])
    return found


def _varies(graphs: GraphSet, name: str) -> bool:
    return graphs.graphs[name].recipe.varies


def _tokens(asker: Asks, graph: Graph, rows: Sequence[int]) -> list[float] | None:
    """How many tokens a graph keeps of each image; None: it does not tell."""
    outputs = onnx.load(graph.file, load_external_data=False).graph.output
    if "tokens" not in {output.name for output in outputs}:
        return None
    system = System(graph.name, graph.name, graph.name, outputs=("embedding", "tokens"))
    answers = asker.ask(system, rows, ONE_BY_ONE)
    return [answer.tokens for answer in answers if answer.tokens is not None]


def _price(
    name: str,
    full: str,
    alone: Sequence[dict[str, list[Answer]]],
    saturated: Sequence[dict[str, list[Answer]]],
    batch: int,
) -> Price:
    latencies = [median(a.latency_ms for a in turn[name]) for turn in alone if name in turn]
    paired = Paired([turn for turn in saturated if name in turn])
    cpu, cpu_ratio = paired.cpu_cost(name), paired.cpu_cost_ratio(name, to=full)
    return {
        "batch": batch,
        "latency_ms": Spread.of(latencies).to_dict(),
        "ms_per_image": paired.cost(name).to_dict(),
        "server_cpu_ms": None if cpu is None else cpu.to_dict(),
        "cost_ratio": paired.cost_ratio(name, to=full).to_dict(),
        "cpu_cost_ratio": None if cpu_ratio is None else cpu_ratio.to_dict(),
        "disturbed": paired.disturbed(name, full, cpu_counts=True),
        "per_image": None,
    }


def _per_image(
    name: str,
    full: str,
    turns: Sequence[dict[str, list[Answer]]],
    rows: Sequence[int],
    tokens: Sequence[float] | None,
) -> dict[str, Any]:
    """What a lone image costs, over the images; see `Price`.

    Args:
        name: of the graph.
        full: name of the full model's.
        turns: answers by graph, of both as many as there are rows.
        rows: of the pool, an image perhaps more than once.
        tokens: of each image.
    """
    by_image = defaultdict(list)
    for turn in turns:
        for row, mine, whole in zip(rows, turn[name], turn[full], strict=True):
            by_image[row].append((mine.latency_ms, mine.latency_ms / whole.latency_ms))
    latencies, ratios = np.array([np.median(both, axis=0) for both in by_image.values()]).T
    p5, p95 = np.percentile(ratios, (5, 95))
    middle, most = np.percentile(latencies, (50, 95))
    ratio = {"mean": ratios.mean(), "std": ratios.std(), "p5": p5, "p95": p95}
    return {
        "images": len(by_image),
        "cost_ratio": {key: float(value) for key, value in ratio.items()},
        "latency_ms": {"p50": float(middle), "p95": float(most)},
        "tokens": tokens and {"mean": mean(tokens), "min": min(tokens), "max": max(tokens)},
    }


def _warm_up(
    asker: Asks, systems: Sequence[System], order: Sequence[int], served: Served, images: int
) -> list[int]:
    """Send every instance a few requests of either size; rows of the pool that make a turn.

    They are whole blocks, for about `SATURATED_S` of the full rung, and of at least so many images
    where the pool has them.

    Args:
        asker: sends the requests.
        systems: the full model's first.
        order: every row of the pool once.
        served: how they are asked.
        images: of a turn, at the least.
    """
    size = served.load.block or 1
    block = list(islice(cycle(order), size))
    for system in systems:
        asker.ask(system, block[:1], ONE_BY_ONE)
        asker.ask(system, block, served.load)
    seconds = 1e-3 * sum(a.latency_ms for a in asker.ask(systems[0], block, served.load))
    least = math.ceil(min(images, len(order)) / size)
    count = min(max(least, math.ceil(SATURATED_S / seconds)), MOST_BLOCKS)
    return list(islice(cycle(order), count * size))


@contextlib.contextmanager
def _serving(graphs: GraphSet, names: Sequence[str], pool: Pool, served: Served) -> Iterator[Asks]:
    """Ask a server that has these graphs and nothing else."""
    with working_folder("prices") as folder:
        repository = folder / "model_repository"
        lay_out(graphs, names, served, repository)
        server = TritonServer(repository, free_ports=True, timeout_s=_START_S, stop_patience_s=0)
        with server, Target(server.grpc_url, None, server) as target, gpus() as handles:
            meter = None if handles else target.meter()
            yield Asker(target, pool, graphs.classes is not None, meter)


def lay_out(graphs: GraphSet, names: Sequence[str], served: Served, repository: Path) -> None:
    """Write a model repository of these graphs, configured as the full rung is."""
    found = config.read(_CONFIG)
    found.instance_group[0].count = served.instances
    config.set_parameter(found, "intra_op_thread_count", str(served.threads))
    for name in names:
        version = repository / name / "1"
        version.mkdir(parents=True)
        graphs.graphs[name].place(version, "model")
        (repository / name / "config.pbtxt").write_text(config.text(found))
