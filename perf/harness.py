"""Systems in turn on the same images: the one way in which this project measures what they cost.

Passes of seconds drift by more than a router costs. Here the systems take turns, image by image or
block by block, in an order drawn anew each time, so that what a shared machine does to one it does
to all. The CPU time of the server's processes stands beside the clock, and figures that cannot be
true are measured once more (`believed`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from statistics import mean, median
from typing import Any, Protocol

import numpy as np
import tritonclient.grpc as triton
from numpy.typing import NDArray

from client.errors import server_errors
from routing import RungOutputs, fidelity_loss, score_of_answer

from . import figures
from .cpu import CpuMeter
from .figures import Spread
from .images import Pool
from .systems import ADAPTIVE, ENSEMBLE, ESCALATION, HIGH, LOW, System
from .target import Target

# Asked right after one another, in either order: their ratio is what the second one adds.
PAIRS = {"adaptive-0": LOW, ENSEMBLE: ADAPTIVE}
TIMEOUT_S = 120.0  # of a request


@dataclass(frozen=True)
class Load:
    """How a system is asked about images.

    Attributes:
        in_flight: requests that are always unanswered.
        batch: images in a request.
        block: images a system is asked about before the next system has its turn; None: a whole
            share.
    """

    in_flight: int = 1
    batch: int = 1
    block: int | None = 1


ONE_BY_ONE = Load()


@dataclass(frozen=True, eq=False)
class Answer:
    """What a system said of one image.

    Attributes:
        latency_ms: from sending the request to its answer, in milliseconds per image; of several
            requests the time of all of them per image.
        embedding: FP32 (D,).
        logits: FP32 (C,), or None.
        escalated: whether the full rung answered; False for a static system.
        score: oracle units; NaN for a static system.
        cpu_ms: CPU time of the server's processes meanwhile, per image; None where it is not
            measured.
        tokens: that the graph kept of the image, of those of each block the mean; None: not asked.
    """

    latency_ms: float
    embedding: NDArray[np.float32]
    logits: NDArray[np.float32] | None
    escalated: bool
    score: float
    cpu_ms: float | None = None
    tokens: float | None = None

    @property
    def top1(self) -> int:
        """The class of the largest logit, where there are logits."""
        assert self.logits is not None
        return int(self.logits.argmax())


class Asks(Protocol):
    """Asks a system about images, as an `Asker` does."""

    def ask(self, system: System, rows: Sequence[int], load: Load = ...) -> list[Answer]:
        """One answer for each of the rows."""


class Asker:
    """Sends the images of a pool over gRPC.

    Args:
        target: the server.
        pool: the images.
        has_head: whether the model has logits.
        meter: of the server's processes; None: no CPU time.
    """

    def __init__(
        self, target: Target, pool: Pool, has_head: bool, meter: CpuMeter | None = None
    ) -> None:
        self._target = target
        self._pool = pool
        self._meter = meter
        self._answer = ("embedding", "logits") if has_head else ("embedding",)

    def ask(self, system: System, rows: Sequence[int], load: Load = ONE_BY_ONE) -> list[Answer]:
        """Ask about these images, nobody else asking meanwhile.

        The clock runs from the first request to the last answer; the requests are made before.

        Args:
            system: who is asked.
            rows: of the pool.
            load: its block says nothing here.

        Raises:
            ClientError: the server did not answer as it should.
        """
        parts = [rows[start : start + load.batch] for start in range(0, len(rows), load.batch)]
        tensors = [self._input(system, part) for part in parts]
        before_s = 0.0 if self._meter is None else self._meter.read_s()
        start = time.perf_counter()
        if load.in_flight == 1:
            found = [self._infer(system, tensor) for tensor in tensors]
        else:
            with ThreadPoolExecutor(load.in_flight) as threads:
                found = list(threads.map(partial(self._infer, system), tensors))
        seconds = time.perf_counter() - start
        changes: dict[str, Any] = {}
        if self._meter is not None:
            changes["cpu_ms"] = 1e3 * self._meter.used_s(before_s, seconds) / len(rows)
        if len(parts) > 1:  # Requests in flight together share the time.
            changes["latency_ms"] = 1e3 * seconds / len(rows)
        return [replace(answer, **changes) for answer in chain.from_iterable(found)]

    def _infer(self, system: System, tensor: triton.InferInput) -> list[Answer]:
        """Send one request and take its answer apart."""
        decision = () if system.is_static else ("escalated", "score")
        names = system.outputs or (*self._answer, *decision)
        parameters = {
            name: float(value) if name == "threshold" else value
            for name, value in system.parameters.items()
        }
        outputs = [triton.InferRequestedOutput(name) for name in names]
        with server_errors(self._target.grpc_url):
            start = time.perf_counter()
            result = self._target.client.infer(
                system.model,
                [tensor],
                outputs=outputs,
                parameters=parameters,
                client_timeout=TIMEOUT_S,
            )
            latency_ms = 1e3 * (time.perf_counter() - start)
        values = {name: result.as_numpy(name) for name in names}
        embeddings, logits = values["embedding"], values.get("logits")
        escalated, score = values.get("escalated"), values.get("score")
        tokens = values.get("tokens")  # (B, 1) or, of each block, (B, L)
        return [
            Answer(
                latency_ms / len(embeddings),
                embedding,
                None if logits is None else logits[i],
                False if escalated is None else bool(escalated[i].item()),
                np.nan if score is None else float(score_of_answer(score[i]).item()),
                tokens=None if tokens is None else float(tokens[i].mean()),
            )
            for i, embedding in enumerate(embeddings)
        ]

    def _input(self, system: System, rows: Sequence[int]) -> triton.InferInput:
        if system.takes_bytes:
            data = np.array([[self._pool.encoded[row]] for row in rows], dtype=np.object_)
            tensor = triton.InferInput("image_bytes", [len(rows), 1], "BYTES")
        else:
            data = np.stack([self._pool.tensors[row] for row in rows])  # (B, 3, H, W)
            tensor = triton.InferInput("image", list(data.shape), "FP32")
        tensor.set_data_from_numpy(data)
        return tensor


@dataclass(frozen=True, eq=False)
class Paired:
    """What was measured.

    Attributes:
        shares: for each share of the images, measured once or more often, the answers of each
            system in the order of the share's images.
    """

    shares: Sequence[dict[str, list[Answer]]]

    def answers(self, system: str) -> list[Answer]:
        """What a system answered, in the order of the shares."""
        return [answer for share in self.shares for answer in share[system]]

    def cost(self, system: str) -> Spread:
        """Mean latency in milliseconds, one value per share."""
        return Spread.of([mean(a.latency_ms for a in share[system]) for share in self.shares])

    def cpu_cost(self, system: str) -> Spread | None:
        """Mean CPU time of the server in milliseconds; None where it was not measured."""
        taken = [[a.cpu_ms for a in share[system]] for share in self.shares]
        if any(cpu_ms is None for share in taken for cpu_ms in share):
            return None
        return Spread.of([mean(ms for ms in share if ms is not None) for share in taken])

    def cost_ratio(self, system: str, to: str = HIGH) -> Spread:
        """Mean latency / that of another system on the same share."""
        both = zip(self.cost(system).values, self.cost(to).values, strict=True)
        return Spread.of([cost / other for cost, other in both])

    def cpu_cost_ratio(self, system: str, to: str = HIGH) -> Spread | None:
        """The same of CPU time; None where that was not measured, or took none."""
        costs, others = self.cpu_cost(system), self.cpu_cost(to)
        if costs is None or others is None or min(costs.min, others.min) <= 0:
            return None
        both = zip(costs.values, others.values, strict=True)
        return Spread.of([cost / other for cost, other in both])

    def disturbed(self, system: str, to: str, cpu_counts: bool) -> bool:
        """Whether clock and CPU time, where it counts, tell different stories of a cost ratio."""
        if not cpu_counts or self.cpu_cost(system) is None:
            return False
        by_cpu = self.cpu_cost_ratio(system, to)
        if by_cpu is None:  # some images took none, less what idling takes
            return True
        return figures.apart(self.cost_ratio(system, to).median, by_cpu.median) > figures.MOST_APART

    def escalation_rate(self, system: str) -> float:
        """Share of all images that the full rung answered, 0..1."""
        return mean(answer.escalated for answer in self.answers(system))

    def agreement(self, system: str, disagrees: Callable[[Answer, Answer], bool]) -> float:
        """Share of all images answered as static high answers them, 0..1."""
        both = zip(self.answers(system), self.answers(HIGH), strict=True)
        return mean(not disagrees(mine, full) for mine, full in both)

    def router_overhead(self) -> Spread:
        """Of each share the median over its images of adaptive-0 / static low, side by side."""
        ratios = [
            median(
                never.latency_ms / low.latency_ms
                for never, low in zip(share["adaptive-0"], share[LOW], strict=True)
            )
            for share in self.shares
        ]
        return Spread.of(ratios)

    def speedup(self) -> Spread:
        """Of the calibrated cascade, one value per share."""
        return self.cost_ratio(HIGH, to=ADAPTIVE)

    def cpu_speedup(self) -> Spread | None:
        """The same by CPU time; None where that was not measured, or took none."""
        return self.cpu_cost_ratio(HIGH, to=ADAPTIVE)

    def doubts(self, cpu_counts: bool) -> list[str]:
        """Why the figures cannot be believed, see `figures.doubts`.

        Args:
            cpu_counts: whether CPU time grows as the time by the clock does: no GPU, and requests
                of one thread, or saturated cores.
        """
        over_low = self.cost_ratio(ADAPTIVE, to=LOW).median
        if "adaptive-0" in self.shares[0]:
            over_low = min(over_low, self.router_overhead().median)
        cpu = self.cpu_speedup() if cpu_counts else None
        speedup = self.speedup().median
        # People divide the two medians that they are shown, which is another figure.
        efficiency = max(self.efficiency().median, speedup / self.bound().median)
        found = figures.doubts(speedup, efficiency, over_low, None if cpu is None else cpu.median)
        if cpu_counts and cpu is None and self.cpu_cost(ADAPTIVE) is not None:
            found.append(
                "some images took no CPU time, less what the server was seen to take while idle"
            )
        return found

    def bound(self) -> Spread:
        """The cascade bound at each share's own escalation rate."""
        low, high, escalated = (
            self.cost(system).values
            for system in (LOW, HIGH, ESCALATION if ESCALATION in self.shares[0] else HIGH)
        )
        bounds = []
        for share, *costs in zip(self.shares, low, high, escalated, strict=True):
            rate = mean(a.escalated for a in share[ADAPTIVE])
            # Where nothing is certified no image is scored, and the cheap rung costs it nothing.
            scored = mean(not np.isnan(a.score) for a in share[ADAPTIVE])
            bounds.append(figures.cascade_bound(costs[0] * scored, costs[1], rate, costs[2]))
        return Spread.of(bounds)

    def efficiency(self) -> Spread:
        """The cascade efficiency, one value per share."""
        both = zip(self.speedup().values, self.bound().values, strict=True)
        return Spread.of([speedup / bound for speedup, bound in both])


def take_turns(
    asker: Asks,
    systems: Sequence[System],
    shares: Sequence[Sequence[int]],
    load: Load,
    on_turn: Callable[[], None] = lambda: None,
    warm_up: int = 0,
    on_share: Callable[[], None] = lambda: None,
) -> Paired:
    """Ask every system about every image.

    Every system is asked about a block of images before the first one is asked about the next.

    Args:
        asker: sends the requests.
        systems: their names tell them apart.
        shares: images, a value of each figure for each share of them.
        load: how they are asked.
        on_turn: called each time that a system has been asked about a block.
        warm_up: images of the first share that each system is asked about before, for nothing.
        on_share: called after each share.
    """
    rng = np.random.default_rng(0)
    by_name = {system.name: system for system in systems}
    if warm_up:
        for system in systems:  # what a size of batch costs when it is met first
            asker.ask(system, shares[0][:warm_up], load)
    measured = []
    for share in shares:
        answers: dict[str, list[Answer]] = {name: [] for name in by_name}
        size = load.block or len(share)
        for start in range(0, len(share), size):
            for name in _order(list(by_name), rng):
                answers[name] += asker.ask(by_name[name], share[start : start + size], load)
                on_turn()
        measured.append(answers)
        on_share()
    return Paired(measured)


def cut(rows: Sequence[int], count: int) -> list[list[int]]:
    """Cut rows into so many shares of neighbours."""
    return [share.tolist() for share in np.array_split(np.asarray(rows), count)]


def believed(
    measure: Callable[[], Paired], cpu_counts: bool, again: Callable[[str], None]
) -> tuple[Paired, list[str]]:
    """Measure, and once more where the figures cannot be true.

    Args:
        measure: measures everything.
        cpu_counts: see `Paired.doubts`.
        again: called with words for a bar before everything is measured once more.

    Returns:
        The first measurement where it has no doubts, else the second, and its doubts.
    """
    paired = measure()
    if paired.doubts(cpu_counts):
        again("disturbed, once more")
        paired = measure()
    return paired, paired.doubts(cpu_counts)


def _order(names: list[str], rng: np.random.Generator) -> list[str]:
    """A random order in which the pairs stand side by side, either one first."""
    seconds = {name for name, first in PAIRS.items() if name in names and first in names}
    firsts = {PAIRS[name]: name for name in seconds}
    order: list[str] = []
    for index in rng.permutation(len(names)):
        name = names[index]
        if name in seconds:
            continue
        pair = [name, firsts[name]] if name in firsts else [name]
        order += pair if rng.random() < 0.5 else pair[::-1]
    return order


def is_a_loss(chosen_by: Mapping[str, Any]) -> Callable[[Answer, Answer], bool]:
    """Whether an answer is not acceptable in place of another, by the loss of a calibration."""

    def lost(*answers: Answer) -> bool:
        mine, full = (
            RungOutputs(a.embedding[None], None, None if a.logits is None else a.logits[None])
            for a in answers
        )
        return bool(fidelity_loss(chosen_by, mine, full)[0])

    return lost
