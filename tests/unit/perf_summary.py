"""A whole summary.json written by hand, for the tests of what shows one.

Its figures hang together: the cheap rung takes 30 ms, the full one 105 ms, one image in eight
escalates, so the cascade bound is 1 / (30/105 + 0.125) = 2.43.
"""

from perf.figures import Spread

SYSTEMS = {  # title, agreement, escalation, cost in ms
    "static-low": ("cheap rung always (112 px)", 0.875, None, 30.0),
    "static-140": ("static 140 px", 0.925, None, 43.0),
    "static-168": ("static 168 px", 0.975, None, 60.0),
    "static-high": ("full rung always (224 px)", 1.0, None, 105.0),
    "adaptive-0": ("adaptive, never escalating", 0.875, 0.0, 31.0),
    "adaptive": ("adaptive, calibrated threshold", 0.95, 0.125, 44.9),
    "adaptive-30": ("adaptive, 30 % escalated", 0.975, 0.3, 63.5),
    "adaptive-100": ("adaptive, always escalating", 1.0, 1.0, 136.5),
    "ensemble": ("adaptive from image bytes, calibrated threshold", 0.95, 0.125, 48.0),
}
PARTS = (
    *("client and network", "ensemble", "preprocess", "cheap rung", "scoring"),
    *("router, BLS hops, ensemble", "full rung", "queues"),
)
RECIPES = {f"static-{px}": f"px={px}" for px in (140, 168)}
RECIPES |= {"static-low": "px=112", "static-high": "px=224"}
STATEMENT = (
    "With confidence 90 %, at most 5 % of images drawn as the calibration images were get an "
    "answer that names another class than the full rung. Of 238 certify images that nothing was "
    "fitted on, 5 did; up to 7 would have been allowed."
)


def spread(*values):
    return Spread.of(values).to_dict()


def around(value, runs=4, share=0.02):
    """A spread of `runs` values whose median is `value`, up to `share` of it away on both sides."""
    steps = [2 * i / (runs - 1) - 1 for i in range(runs)] if runs > 1 else [0]
    return spread(*(value * (1 + share * step) for step in steps))


def answer(name):
    title, agreement, escalation, cost_ms = SYSTEMS[name]
    return {
        "title": title,
        "recipe": RECIPES.get(name),
        "agreement_with_high": agreement,
        "escalation_rate": escalation,
        "accuracy": None,
        "cost_ms": around(cost_ms),
        "cost_ratio": around(cost_ms / 105, share=0.01),
    }


def load(loop="closed", level=1, protocol="grpc", shared_memory="none"):
    return {
        "loop": loop,
        "concurrency": level if loop == "closed" else None,
        "rate_per_s": level if loop == "open" else None,
        "protocol": protocol,
        "shared_memory": shared_memory,
    }


def measured(name, under, throughput, p50, images="mixed", runs=4, unstable=None):
    """One entry of `systems`; `unstable` is the reason where the run did not stabilise."""
    rungs = {"static-low": ["vit_low"], "static-high": ["vit_high"]}.get(name)
    shares = {"vit_low": 1.0, "vit_high": 0.125 if rungs is None else 1.0}
    times = {"vit_low": 28.4, "vit_high": 101.3}
    return {
        "system": name,
        "title": SYSTEMS[name][0],
        "model": rungs[0] if rungs else "adaptive_vit" if name == "ensemble" else "router",
        "set": images,
        "load": under,
        "requests": 120,
        "stable": unstable is None,
        "unstable_reason": unstable,
        "throughput_per_s": around(throughput, runs),
        "latency_ms": {
            name: around(p50 * factor, runs)
            for name, factor in (("mean", 1.1), ("p50", 1), ("p95", 2), ("p99", 2.5))
        },
        "server_ms": {
            rung: {"images_share": shares[rung], "queue": 0.21, "input": 0.12, "output": 0.05}
            | {"infer": times[rung]}
            for rung in rungs or ("vit_low", "vit_high")
        },
        "server_cpu_ms": around(p50 * 1.05, runs),
    }


def parts(requests, *milliseconds):
    return {
        "requests": requests,
        "total_ms": round(sum(milliseconds), 6),
        "parts": [{"name": n, "ms": ms} for n, ms in zip(PARTS, milliseconds, strict=True)],
    }


def memory(pss, weights):
    sizes = {"peak_pss_mib": pss, "peak_rss_mib": pss * 1.25, "weights_mib": weights}
    return {**sizes, "gpu_mib": None}


def locust(protocol, user, shape):
    return {
        "protocol": protocol,
        "user": user,
        "shape": shape,
        "users": 4,
        "seconds": 8.0,
        "requests": 163,
        "failures": 0,
        "throughput_per_s": 20.4,
        "latency_ms": {"p50": 181.0, "p95": 342.0, "p99": 398.0},
        "paths": {"low": 141, "high": 22},
    }


def sample_summary():
    """A new copy each time, for a test to change."""
    return {
        "schema_version": 1,
        "command": "python -m perf run --images sample --suite quick",
        "suite": "quick",
        "started": "2026-11-21T17:40:00Z",
        "seconds": 171.2,
        "complete": True,
        "notes": ["CPU time of the server could not be read for 1 run."],
        "environment": {
            "device": "2 cores of Made-up CPU 3000",
            "cpu": "Made-up CPU 3000 @ 2.10GHz",
            "cores": 2,
            "memory_gib": 7.8,
            "gpus": [],
            "os": "Linux 6.1",
            "python": "3.11.2",
            "onnxruntime": "1.20.1",
            "triton_version": "2.51.0",
            "perf_analyzer": "2.50.0",
            "locust": "2.32.0",
        },
        "model": {
            "backbone": "dinov2-small",
            "image_shape": [3, 224, 224],
            "low": "px=112",
            "high": "px=224",
            "embedding_dim": 384,
            "classes": 21,
        },
        "certificate": {
            "certified": True,
            "epsilon": 0.05,
            "confidence": 0.9,
            "n": 800,
            "method": "ltt",
            "statement": STATEMENT,
        },
        "images": {
            "source": "sample crops, seed 21",
            "pool": 200,
            "sets": {
                "easy": {"images": 24, "escalation_rate": 0.0},
                "hard": {"images": 24, "escalation_rate": 1.0},
                "mixed": {"images": 40, "escalation_rate": 0.125},
            },
        },
        "fidelity": "names the same class",
        "router_overhead_c1": spread(1.03, 1.031, 1.035, 1.04),
        "cascade_efficiency_c1": spread(0.952, 0.958, 0.962, 0.97),
        "cascade_efficiency_saturated": spread(0.93, 0.934, 0.94, 0.951),
        "ensemble_over_router": spread(1.06, 1.07, 1.071, 1.08),
        "standin_over_ort_b1": spread(1.012, 1.015, 1.02, 1.024),
        "standin_over_ort_b8": spread(1.004, 1.006, 1.01, 1.011),
        "peak_memory_ratio": spread(1.04, 1.05, 1.05, 1.06),
        "speedup_c1": spread(2.31, 2.33, 2.35, 2.38),
        "bound_c1": spread(2.42, 2.43, 2.44, 2.45),
        "speedup_saturated": spread(2.21, 2.22, 2.24, 2.26),
        "bound_saturated": spread(2.36, 2.37, 2.39, 2.4),
        "answers": {name: answer(name) for name in SYSTEMS},
        "systems": systems(),
        "attribution": {
            "kept": parts(35, 1.2, 0.2, 2.1, 28.6, 0.1, 1.3, 0, 0),
            "escalated": parts(5, 1.3, 0.2, 2.2, 28.7, 0.1, 2.0, 101.9, 0.6),
            "all": parts(40, 1.2, 0.2, 2.1, 28.6, 0.1, 1.4, 12.7, 0.1),
        },
        "memory": {
            "static-low": memory(312.0, 84.2),
            "static-high": memory(348.0, 84.4),
            "adaptive": memory(693.0, 168.6),
        },
        "locust": [
            locust("grpc", "closed", None),
            locust("http", "closed", None),
            locust("grpc", "open", "spike"),
        ],
    }


def systems():
    costs = (30.0, 43.0, 60.0, 105.0, 31.0, 36.0, 41.0, 138.0, 39.0)
    entries = [
        measured(name, load(), 1000 / cost, cost) for name, cost in zip(SYSTEMS, costs, strict=True)
    ]
    for name, cost in (("static-low", 30.0), ("static-high", 105.0), ("adaptive", 45.0)):
        for level, gain in ((2, 1.8), (4, 1.9), (8, 1.92)):
            throughput = 1000 * gain / cost
            is_last = (name, level) == ("static-high", 8)
            reason = "latencies still grew after 3 passes" if is_last else None
            p50 = 1000 * level / throughput
            entries.append(measured(name, load(level=level), throughput, p50, unstable=reason))
        for share in (0.4, 0.7, 0.9):
            rate = round(share * 1900 / cost, 1)
            entries.append(measured(name, load("open", rate), rate, cost * (1 + share**4 * 4)))
    for images, cost in (("easy", 31.5), ("hard", 137.0)):
        entries.append(measured("adaptive", load(), 1000 / cost, cost, images))
    entries.append(measured("adaptive", load(protocol="http"), 1000 / 38.0, 38.0))
    entries.append(measured("adaptive", load(shared_memory="system"), 1000 / 35.5, 35.5))
    return entries
