"""A whole summary.json written by hand, for the tests of what shows one.

Its figures hang together: the cheap rung takes 30 ms, the full one 105 ms, one image in eight
escalates, so the cascade bound is 1 / (30/105 + 0.125) = 2.43.
"""

from statistics import median

TITLES = {
    "static-low": "cheap rung always (112 px)",
    "static-140": "static 140 px",
    "static-168": "static 168 px",
    "static-high": "full rung always (224 px)",
    "adaptive-0": "adaptive, never escalating",
    "adaptive": "adaptive, calibrated threshold",
    "adaptive-30": "adaptive, 30 % escalated",
    "adaptive-100": "adaptive, always escalating",
    "ensemble": "adaptive from image bytes, calibrated threshold",
}
RECIPES = {f"static-{px}": f"px={px}" for px in (140, 168)}
RECIPES |= {"static-low": "px=112", "static-high": "px=224"}
STATEMENT = (
    "With confidence 90 %, at most 5 % of images drawn as the calibration images were get an "
    "answer that names another class than the full rung. Of 238 certify images that nothing was "
    "fitted on, 5 did; up to 7 would have been allowed."
)


def spread(*values):
    """As `Spread.to_dict` writes it."""
    return {
        "median": median(values),
        "min": min(values),
        "max": max(values),
        "runs": len(values),
        "values": list(values),
    }


def around(value, runs=4, share=0.02):
    """A spread of `runs` values whose median is `value`, up to `share` of it away on both sides."""
    steps = [2 * i / (runs - 1) - 1 for i in range(runs)] if runs > 1 else [0]
    return spread(*(value * (1 + share * step) for step in steps))


def answer(name, agreement, escalation, cost_ms):
    return {
        "title": TITLES[name],
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
        "title": TITLES[name],
        "model": rungs[0] if rungs else "adaptive_vit" if name == "ensemble" else "router",
        "set": images,
        "load": under,
        "requests": 120,
        "stable": unstable is None,
        "unstable_reason": unstable,
        "throughput_per_s": around(throughput, runs),
        "latency_ms": {
            "mean": around(p50 * 1.1, runs),
            "p50": around(p50, runs),
            "p95": around(p50 * 2, runs),
            "p99": around(p50 * 2.5, runs),
        },
        "server_ms": {
            rung: {
                "images_share": shares[rung],
                "queue": 0.21,
                "input": 0.12,
                "infer": times[rung],
                "output": 0.05,
            }
            for rung in rungs or ("vit_low", "vit_high")
        },
        "server_cpu_ms": around(p50 * 1.05, runs),
    }


def parts(requests, **milliseconds):
    names = {
        "client": "client and network",
        "ensemble": "ensemble",
        "preprocess": "preprocess",
        "cheap": "cheap rung",
        "scoring": "scoring",
        "hops": "router, BLS hops, ensemble",
        "full": "full rung",
        "queues": "queues",
    }
    return {
        "requests": requests,
        "total_ms": round(sum(milliseconds.values()), 6),
        "parts": [{"name": names[key], "ms": value} for key, value in milliseconds.items()],
    }


def memory(pss, weights):
    return {
        "peak_pss_mib": pss,
        "peak_rss_mib": pss * 1.25,
        "gpu_mib": None,
        "weights_mib": weights,
    }


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
        "peak_memory_ratio": spread(1.04, 1.05, 1.05, 1.06),
        "speedup_c1": spread(2.31, 2.33, 2.35, 2.38),
        "bound_c1": spread(2.42, 2.43, 2.44, 2.45),
        "speedup_saturated": spread(2.21, 2.22, 2.24, 2.26),
        "bound_saturated": spread(2.36, 2.37, 2.39, 2.4),
        "answers": {
            "static-low": answer("static-low", 0.875, None, 30.0),
            "static-140": answer("static-140", 0.925, None, 43.0),
            "static-168": answer("static-168", 0.975, None, 60.0),
            "static-high": answer("static-high", 1.0, None, 105.0),
            "adaptive-0": answer("adaptive-0", 0.875, 0.0, 31.0),
            "adaptive": answer("adaptive", 0.95, 0.125, 44.9),
            "adaptive-30": answer("adaptive-30", 0.975, 0.3, 63.5),
            "adaptive-100": answer("adaptive-100", 1.0, 1.0, 136.5),
            "ensemble": answer("ensemble", 0.95, 0.125, 48.0),
        },
        "systems": systems(),
        "attribution": {
            "kept": parts(
                35,
                client=1.2,
                ensemble=0.2,
                preprocess=2.1,
                cheap=28.6,
                scoring=0.1,
                hops=1.3,
                full=0,
                queues=0,
            ),
            "escalated": parts(
                5,
                client=1.3,
                ensemble=0.2,
                preprocess=2.2,
                cheap=28.7,
                scoring=0.1,
                hops=2.0,
                full=101.9,
                queues=0.6,
            ),
            "all": parts(
                40,
                client=1.2,
                ensemble=0.2,
                preprocess=2.1,
                cheap=28.6,
                scoring=0.1,
                hops=1.4,
                full=12.7,
                queues=0.1,
            ),
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
    entries = []
    costs = {
        "static-low": 30.0,
        "static-140": 43.0,
        "static-168": 60.0,
        "static-high": 105.0,
        "adaptive-0": 31.0,
        "adaptive": 36.0,
        "adaptive-30": 41.0,
        "adaptive-100": 138.0,
        "ensemble": 39.0,
    }
    for name, cost in costs.items():
        entries.append(measured(name, load(), 1000 / cost, cost))
    for name, cost in (("static-low", 30.0), ("static-high", 105.0), ("adaptive", 45.0)):
        for level, gain in ((2, 1.8), (4, 1.9), (8, 1.92)):
            throughput = 1000 * gain / cost
            reason = (
                "latencies still grew after 3 passes"
                if (name, level)
                == (
                    "static-high",
                    8,
                )
                else None
            )
            entries.append(
                measured(
                    name, load(level=level), throughput, 1000 * level / throughput, unstable=reason
                )
            )
        for share in (0.4, 0.7, 0.9):
            rate = round(share * 1900 / cost, 1)
            entries.append(measured(name, load("open", rate), rate, cost * (1 + share**4 * 4)))
    for images, cost in (("easy", 31.5), ("hard", 137.0)):
        entries.append(measured("adaptive", load(), 1000 / cost, cost, images))
    entries.append(measured("adaptive", load(protocol="http"), 1000 / 38.0, 38.0))
    entries.append(measured("adaptive", load(shared_memory="system"), 1000 / 35.5, 35.5))
    return entries
