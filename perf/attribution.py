"""Where one adaptive request spends its time, for images that stay cheap and that escalate.

Sent one at a time, so that differences of Triton's counters belong to these requests. A part that
has no counter of its own is what is left of the one around it.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from statistics import mean, median
from typing import Any

import numpy as np

from routing import SIGNALS, Calibration, RungOutputs, ScoreMap, Signal

from .harness import Asker
from .server_times import Times, counted, ms
from .systems import System
from .target import Target

SCORING_ROUNDS = 200
SIGNAL_ROUNDS = 2000
_LENS_DEPTH = 3


def attribute(
    target: Target,
    asker: Asker,
    ensemble: System,
    rows: Sequence[int],
    scoring_ms: float,
    on_image: Callable[[], None],
) -> dict[str, Any]:
    """Send images and take their mean latency apart.

    Args:
        target: the server, asked by nobody else.
        asker: sends it the requests.
        ensemble: the system that takes bytes.
        rows: images that all take the same path.
        scoring_ms: of one image.
        on_image: called after each image.

    Returns:
        `requests`, `total_ms` and `parts`, a list of `name` and `ms` per request that add up to it.

    Raises:
        PerfError: the server answers, and does not count it.
        ClientError: it does not answer as it should.
    """
    before = target.times()
    latencies = []
    for row in rows:
        latencies += [answer.latency_ms for answer in asker.ask(ensemble, [row])]
        on_image()
    times = counted(target.times, before, ("router", "adaptive_vit"), len(rows))
    return parts(mean(latencies), len(rows), times, scoring_ms)


def parts(latency_ms: float, requests: int, times: Times, scoring_ms: float) -> dict[str, Any]:
    """Take the mean latency of so many requests apart, by Triton's times of them."""
    low, high, router, preprocess, ensemble = (
        times.get(model, Counter())
        for model in ("vit_low", "vit_high", "router", "preprocess", "adaptive_vit")
    )
    scored = scoring_ms * low["requests"]
    compute = ("input", "infer", "output")
    # Not the router's own time: its counter runs on after the response has left.
    inside = sum(ms(model, "queue", *compute) for model in (preprocess, low, high))
    inside += ms(router, "queue") + scored
    sums = {
        "client and network": latency_ms * requests - ms(ensemble, "total"),
        "preprocess": ms(preprocess, *compute),
        "cheap rung": ms(low, *compute),
        "scoring": scored,
        "router, BLS hops, ensemble": ms(ensemble, "total") - inside,
        "full rung": ms(high, *compute),
        "queues": sum(ms(model, "queue") for model in (low, high, router, preprocess)),
    }
    return {
        "requests": requests,
        "total_ms": latency_ms,
        "parts": [{"name": name, "ms": total / requests} for name, total in sums.items()],
    }


def together(
    kept: Mapping[str, Any] | None, escalated: Mapping[str, Any] | None, escalation_rate: float
) -> dict[str, Any] | None:
    """Both kinds of requests at the rate at which images escalate.

    Returns:
        None where one of them is missing and would be needed.
    """
    needed = []
    for side, weight in ((kept, 1 - escalation_rate), (escalated, escalation_rate)):
        if weight > 0:
            if side is None:
                return None
            needed.append((side, weight))
    names = [part["name"] for part in needed[0][0]["parts"]]
    return {
        "requests": sum(side["requests"] for side, _ in needed),
        "total_ms": sum(weight * side["total_ms"] for side, weight in needed),
        "parts": [
            {"name": name, "ms": sum(weight * side["parts"][i]["ms"] for side, weight in needed)}
            for i, name in enumerate(names)
        ],
    }


def scoring_ms(calibration: Calibration) -> float:
    """Milliseconds to score one image with the artifact, the median of many, in this process.

    The outputs are random: the cost of a signal depends on shapes, not on values.
    """
    dim, width = calibration.embedding_dim, calibration.layer_dim
    outputs = _outputs(1, calibration.layers, dim, calibration.classes, width)
    return _medians_ms({"own": calibration.score}, outputs, SCORING_ROUNDS)["own"]


def all_signals(batch: int, layers: int, dim: int, classes: int) -> dict[str, float]:
    """Median time of one score in milliseconds per image, by signal; the signals take turns.

    Coefficients are random, too, each of the shape that it has for a model of so many layers.
    """
    rng = np.random.default_rng(0)
    score_map = ScoreMap(1, tuple(np.linspace(-1, 1, 32)), tuple(np.linspace(0, 9, 32)))
    lens = {
        "lens_weights": rng.normal(size=(_LENS_DEPTH, dim, classes)),
        "lens_bias": rng.normal(size=(_LENS_DEPTH, classes)),
        "bias": np.zeros(1),
    }
    lengths = {
        "cls_regression": 3 * layers + 1 + dim,
        "layer_lens": 3 * _LENS_DEPTH,
        "deferral": 4 + 3 * _LENS_DEPTH,
    }

    def scorer(signal: Signal) -> Callable[[RungOutputs], object]:
        coefficients = {**lens, "weights": rng.normal(size=lengths.get(signal.name, 0))}
        return lambda outputs: score_map(signal.compute(outputs, coefficients))

    timed = {s.name: scorer(s) for s in SIGNALS.values() if s.applies_to("classes")}
    found = _medians_ms(timed, _outputs(batch, layers, dim, classes), SIGNAL_ROUNDS)
    return {signal: ms / batch for signal, ms in found.items()}


def _medians_ms(
    scorers: Mapping[str, Callable[[RungOutputs], object]], outputs: RungOutputs, rounds: int
) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in scorers}
    for _ in range(rounds):
        for name, score in scorers.items():
            start = time.perf_counter()
            score(outputs)
            times[name].append(time.perf_counter() - start)
    return {name: 1e3 * median(taken) for name, taken in times.items()}


def _outputs(
    batch: int, layers: int, dim: int, classes: int | None, width: int | None = None
) -> RungOutputs:
    """Random outputs of a cheap rung: L = `layers` blocks, D = `dim`, C = `classes`.

    `width` is that of its `cls_layers`; None: D.
    """
    rng = np.random.default_rng(0)
    return RungOutputs(
        rng.standard_normal((batch, dim), dtype=np.float32),
        rng.standard_normal((batch, layers + 1, width or dim), dtype=np.float32),
        None if classes is None else rng.standard_normal((batch, classes), dtype=np.float32),
    )
