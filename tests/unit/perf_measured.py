"""Answers and passes written by hand, for the tests of what is computed from them."""

from collections import Counter

import numpy as np

from perf.harness import Answer
from perf.loads import Passes
from perf.perf_analyzer import Level, Pass
from perf.systems import System

MODELS = {
    "static-low": "vit_low",
    "static-high": "vit_high",
    "static-6": "static_6",
    "ensemble": "adaptive_vit",
}


def make_system(name, **changes):
    """A system by its name in summary.json."""
    fields = {"takes_bytes": name == "ensemble", **changes}
    return System(name, f"title of {name}", MODELS.get(name, "router"), **fields)


def make_answer(
    latency_ms=1.0,
    escalated=False,
    names=0,
    embedding=(1.0, 0.0),
    head=True,
    cpu_ms=None,
    score=0.5,
):
    """An answer that names class `names` of four."""
    logits = np.eye(4, dtype=np.float32)[names] if head else None
    embedding = np.array(embedding, np.float32)
    return Answer(latency_ms, embedding, logits, escalated, score, cpu_ms)


def make_times(requests=1, queue=0, input=0, infer=0, output=0, rest=0, batch=1):
    """Sums in milliseconds; `rest` is spent neither in the queue nor in the backend."""
    parts = {"queue": queue, "input": input, "infer": infer, "output": output}
    parts["total"] = sum(parts.values()) + rest
    ns = {part: 1_000_000 * ms for part, ms in parts.items() if ms}
    return Counter(requests=requests, images=batch * requests, **ns)


def make_pass(throughput=1.0, p50=10.0, server=None, cpu_ms=None, delayed=0.0, requests=8):
    """One pass of perf_analyzer, whose percentiles can be told apart."""
    latency_ms = {"mean": p50 + 1, "p50": p50, "p95": p50 + 2, "p99": p50 + 3}
    server = {"router": make_times()} if server is None else server
    return Pass(requests, throughput, latency_ms, delayed, server, cpu_ms)


def make_measured(name, throughputs, concurrency=4, **changes):
    """A level of the system and one pass per throughput."""
    system = make_system(name)
    server = {system.model: make_times()}
    level = Level(system, concurrency=concurrency, **changes)
    return Passes(level, [make_pass(value, server=server) for value in throughputs])
