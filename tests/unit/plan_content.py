"""The content of a plan.json written by hand, for the tests of what shows one.

Its figures hang together: the full model takes 78.6 ms, and a cascade's cost is its cheap graph's
and its escalation's share of the full one's.
"""

from copy import deepcopy

from planner.result import outcome

FULL_MS = 78.6
STATEMENT = (
    "With confidence 90 %, at most 5 % of images drawn as the calibration images were get an "
    "answer that names another class than the full model, whichever of the 3 cascades that were "
    "tested is chosen (each at 96.6667 %). Of 560 certify images that nothing was fitted on, 13 "
    "did; up to 18 would have been allowed."
)
# Recipe, cost over the full model's, share acceptable alone, roles.
_GRAPHS = {
    "static_112_int8static_align": ("px=112,int8=static,align", 0.10, 0.955, ["low"]),
    "static_98_int8static_align": ("px=98,int8=static,align", 0.08, 0.93, ["low"]),
    "static_84_int8static_align": ("px=84,int8=static,align", 0.062, 0.894, ["low"]),
    "static_112": ("px=112", 0.21, 0.92, ["beside"]),
    "static_140": ("px=140", 0.36, 0.95, ["beside"]),
    "static_168": ("px=168", 0.52, 0.955, ["beside"]),
    "static_196": ("px=196", 0.77, 0.96, ["beside"]),
    "static_tome8": ("px=224,tome=8", 0.8, 0.99, ["beside"]),
    "static_tome16": ("px=224,tome=16", 0.6, 0.97, ["beside"]),
    "static_depth9": ("px=224,depth=9", 0.75, 0.81, ["beside"]),
    "static_int8static": ("px=224,int8=static", 0.5, 0.99, ["high", "beside"]),
    "vit_high": ("px=224", 1.0, 1.0, ["high", "reference"]),
}
SIGNALS = ("deferral", "layer_lens", "margin", "cls_path")


def spread(value, share=0.05):
    """As `perf serving` writes it."""
    low, high = value * (1 - share), value * (1 + share)
    return {"median": value, "min": low, "max": high, "runs": 3, "values": [low, value, high]}


def varied(mean, least, most, latency_ms=(30.0, 50.0), tokens=(150.0, 90.0, 257.0)):
    """`per_image` of a graph whose cost depends on the image, as `perf.prices` writes it."""
    return {
        "images": 32,
        "cost_ratio": {"mean": mean, "std": 0.1, "p5": least, "p95": most},
        "latency_ms": dict(zip(("p50", "p95"), latency_ms, strict=True)),
        "tokens": tokens and dict(zip(("mean", "min", "max"), tokens, strict=True)),
    }


def growth(without, *fits):
    """Acceptable shares without, and by images that double up to 768."""
    images = [768 >> step for step in reversed(range(len(fits)))]
    points = [(0, without), *zip(images, fits, strict=True)]
    return [{"images": i, "cosine": share - 0.1, "acceptable": share} for i, share in points]


def graph(name):
    recipe, ratio, acceptable, roles = _GRAPHS[name]
    shares = (acceptable - 0.08, acceptable - 0.05, acceptable - 0.03, acceptable - 0.01)
    curve = {"helps": True, "growth": growth(acceptable - 0.12, *shares)}
    return {
        "recipe": recipe,
        "roles": roles,
        "acceptable": acceptable,
        "ms_per_image": FULL_MS * ratio,
        "latency_ms": spread(FULL_MS * ratio * 1.3),
        "cost_ratio": spread(ratio) if name != "vit_high" else spread(1.0, 0.0),
        "cpu_cost_ratio": spread(ratio) if name != "vit_high" else spread(1.0, 0.0),
        "disturbed": False,
        "per_image": None,
        "budget_latency_ms": FULL_MS * ratio * 1.3,
        "alignment": curve if recipe.endswith("align") else None,
        "adapted": None,
    }


def cascade(low, high="vit_high", escalation=0.04, risk=0.025, certified=True, signal="deferral"):
    """A tested cascade; what was predicted and certified is near what is measured."""

    def cost(rate):
        ms = FULL_MS * (_GRAPHS[low][1] + rate * _GRAPHS[high][1])
        return {"escalation_rate": rate, "ms_per_image": ms, "speedup": FULL_MS / ms}

    certificate = {
        "certified": certified,
        "n": 560,
        "errors": 13 if certified else 31,
        "allowed": 18,
        "choices": 3,
        "statement": STATEMENT,
    }
    return {
        "low": low,
        "high": high,
        "low_recipe": _GRAPHS[low][0],
        "high_recipe": _GRAPHS[high][0],
        "signal": signal,
        "threshold": 0.7134 if certified else None,
        "certified": certified,
        "certificate": certificate,
        "chance": 0.9,
        "outlook": {
            "images": [
                {"n": 560 * times, "escalation": escalation / times} for times in (1, 2, 4, 10)
            ],
            "least_risk": 0.012,
        },
        "predicted": cost(escalation - 0.01),
        "certify": cost(min(1.0, escalation + 0.005)),
        "measured": cost(escalation) | {"risk": risk, "acceptable": 1 - risk},
    }


def candidates():
    """Every pair with every signal, the cheapest first; `cls_path` never brings the risk down."""
    found = []
    for low, dear in zip(("112", "98", "84"), (0.03, 0.08, 0.17), strict=True):
        name = f"static_{low}_int8static_align"
        for high in ("vit_high", "static_int8static"):
            for step, signal in enumerate(SIGNALS[:3]):
                rate = dear + 0.02 * step
                ms = FULL_MS * (_GRAPHS[name][1] + rate * _GRAPHS[high][1])
                found.append((name, high, signal, rate, ms, 0.9))
    found.sort(key=lambda candidate: candidate[-2])
    keys = ("low", "high", "signal", "escalation", "ms_per_image", "chance")
    never = [
        (f"static_{low}_int8static_align", high, "cls_path", None, FULL_MS, 0.0)
        for low in ("112", "98", "84")
        for high in ("vit_high", "static_int8static")
    ]
    return [dict(zip(keys, candidate, strict=True)) for candidate in [*found, *never]]


def plan_content(**changes):
    """A plan that chose 112 px in int8, aligned, before the int8 full model."""
    chosen = cascade("static_112_int8static_align", "static_int8static", 0.046, 0.0275)
    tested = [
        cascade("static_112_int8static_align", escalation=0.04),
        chosen,
        cascade("static_98_int8static_align", "static_int8static", 1.0, 0.01, certified=False),
    ]
    content = {
        "schema_version": 3,
        "backbone": "dinov2-small",
        "reference": "px=224",
        "goal": {
            "max_risk": 0.05,
            "confidence": 0.9,
            "method": "ltt",
            "fidelity": "top1",
            "tolerance": None,
            "loss": "names another class than the full model",
            "latency_budget_ms": None,
            "latency_percentile": 95,
            "certify_images_needed": 45,
            "procedure": "The shortlist was made on the fit split; each cascade was tested.",
        },
        "images": {"source": "crops", "fit": 576, "certify": 560, "test": 288},
        "adaptation": None,
        "measured_on": "test",
        "served": {"instances": 2, "threads": 1, "batch": 8},
        "disturbed": False,
        "doubts": [],
        "graphs": {name: graph(name) for name in _GRAPHS},
        "candidates": candidates(),
        "tested": tested,
        "chosen": chosen,
        "best_alternative": {
            "name": "static_int8static",
            "recipe": "px=224,int8=static",
            "agreement": 0.99,
            "cost_ratio_to_plan": 0.5 / 0.123,
        },
        "notes": [],
    }
    content = deepcopy(content | changes)
    return content | {"outcome": outcome(content)}
