"""What graphs cost image by image, in this process: does a cost follow the tokens that are kept?

All graphs take turns on the same images, in an order drawn anew for each, on one thread, so that a
machine whose speed drifts changes all alike. CPU time stands beside the clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from .figures import MOST_APART, apart

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Costs:
    """What one graph cost in R requests of several images.

    Attributes:
        seconds: of each request by the clock, the median over the rounds, (R,).
        cpu_s: its CPU time, (R,).
        tokens: mean over the images of a request of the tokens that a block sees, (R,); of a graph
            that counts none, NaN.
    """

    seconds: Floats
    cpu_s: Floats
    tokens: Floats

    def ratio_to(self, full: Costs) -> float | None:
        """The mean cost over the full model's; None where clock and CPU time tell other stories."""
        ratio = float(self.seconds.mean() / full.seconds.mean())
        return None if apart(ratio, self.cpu_ratio_to(full)) > MOST_APART else ratio

    def cpu_ratio_to(self, full: Costs) -> float:
        """The mean CPU time over the full model's."""
        return float(self.cpu_s.mean() / full.cpu_s.mean())


@dataclass(frozen=True)
class Follows:
    """How the cost of a request goes with its tokens: a straight line by least squares.

    Attributes:
        r: Pearson's correlation.
        slope: of the cost, as a share of the full model's, over the tokens, as a share of all: 1
            where half of the tokens cost half.
        intercept: of that line.
        requests: that it was drawn through.
    """

    r: float
    slope: float
    intercept: float
    requests: int


def measure(
    files: Mapping[str, Path],
    images: NDArray[np.float32],
    batch: int,
    rounds: int,
    seed: int = 0,
    progress: Callable[[], None] = lambda: None,
) -> dict[str, Costs]:
    """Let graphs answer the same requests in turn.

    Args:
        files: ONNX graphs by name.
        images: FP32 (N, 3, H, W); every `batch` of them, in their order, are one request.
        batch: images in a request; what is left of the N is left out.
        rounds: how often each request is made.
        seed: of the order of the graphs.
        progress: called after each request to all graphs.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    sessions = {
        name: ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        for name, file in files.items()
    }
    rng, names = np.random.default_rng(seed), list(files)
    requests = [images[i : i + batch] for i in range(0, len(images) - batch + 1, batch)]
    taken = {name: np.empty((2, rounds, len(requests))) for name in files}
    tokens = {name: np.full(len(requests), np.nan) for name in files}
    for session in sessions.values():  # warm
        session.run(None, {"image": requests[0]})
    for turn in range(rounds):
        for row, request in enumerate(requests):
            for number in rng.permutation(len(names)):
                name = names[number]
                session = sessions[name]
                before = time.perf_counter(), time.process_time()
                session.run(["embedding"], {"image": request})
                after = time.perf_counter(), time.process_time()
                taken[name][:, turn, row] = np.subtract(after, before)
                if turn == 0 and "tokens" in [output.name for output in session.get_outputs()]:
                    (counts,) = session.run(["tokens"], {"image": request})
                    tokens[name][row] = counts.mean()
            progress()
    found = {}
    for name, both in taken.items():
        seconds, cpu_s = np.median(both, axis=1)
        found[name] = Costs(seconds, cpu_s, tokens[name])
    return found


def follows(costs: Costs, full: Costs, all_tokens: int) -> Follows | None:
    """Hold CPU time against tokens; None where no two requests kept other numbers of them.

    Args:
        costs: of a graph that counts tokens.
        full: of the full model, of the same requests.
        all_tokens: that an image has in the full model.
    """
    shares = costs.tokens / all_tokens
    relative = costs.cpu_s / float(np.mean(full.cpu_s))
    if len(shares) < 2 or np.ptp(shares) == 0 or np.ptp(relative) == 0:
        return None
    slope, intercept = np.polyfit(shares, relative, 1)
    r = np.corrcoef(shares, relative)[0, 1]
    return Follows(float(r), float(slope), float(intercept), len(shares))


def by_tokens(tokens: Sequence[float] | Floats) -> NDArray[np.intp]:
    """The order of images by their tokens, so that those of one request keep about as many."""
    return np.argsort(np.asarray(tokens), kind="stable")
