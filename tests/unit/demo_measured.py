"""What the demo measured of four crops, made by hand."""

from pathlib import Path

from bundle import graphs as roles
from bundle.graphs import Graph, GraphSet
from demo import run
from imaging import Preprocessing
from perf.cascade import Measured
from perf.harness import Paired
from routing import RungRecord
from tests.unit.fakes import make_calibration
from tests.unit.perf_measured import make_answer

FULL = RungRecord(224, "px=224", "f" * 64)
CHEAP = RungRecord(112, "px=112,int8=static,align", "c" * 64)
INT8 = RungRecord(224, "px=224,int8=static", "8" * 64)
MERGED = RungRecord(224, "px=224,tome=8", "m" * 64)
CERTIFICATE = {
    **{"epsilon": 0.05, "confidence": 0.9, "method": "ltt", "n": 480, "errors": 15, "allowed": 17},
    **{"certified": True, "signal": "margin", "statement": "With confidence 90 %, ..."},
}
LABELS = ("ant", "bee", "cat", "dog")
TRUTH = [0, 1, 2, 2]
ESCALATED = [False, False, True, False]
# The int8 rung, and so the router, takes the third crop for another class than the full model does.
CLASSES = {
    **{"static-low": [0, 1, 0, 3], "static-high": [0, 1, 2, 3], "adaptive": [0, 1, 1, 3]},
    **{"static-escalation": [0, 1, 1, 3], "static-tome8": [0, 1, 2, 0], "adaptive-0": [0, 1, 0, 3]},
}
ALONE = {"static-low": 25.0, "static-high": 100.0, "adaptive": 55.0, "adaptive-0": 27.5}
RATES = {  # images per second in each of three turns
    **{"static-low": [80, 88, 40], "static-high": [10, 11, 5], "adaptive": [60, 88, 20]},
    **{"static-escalation": [20, 22, 10], "static-tome8": [15, 16, 8]},
}
MACHINE = {"triton_version": "2.51.0", "device": "<one> & only", "python": "3", "onnxruntime": "1"}


def graph_set(high, *beside):
    records = {"px112_int8static_align": CHEAP, "high": high, **dict(beside)}
    return GraphSet(
        backbone="tiny",
        image_shape=(3, 224, 224),
        embedding_dim=4,
        layers=2,
        classes=4,
        labels=LABELS,
        preprocessing=Preprocessing(
            *(224, 224, 224, "bicubic"), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)
        ).to_dict(),
        graphs={name: Graph(name, record, Path(name)) for name, record in records.items()},
        roles={
            roles.LOW: "px112_int8static_align",
            roles.HIGH: "high",
            roles.REFERENCE: "high" if high is FULL else "full",
        },
    )


TWO_RESOLUTIONS = graph_set(FULL)
PLANNED = graph_set(INT8, ("tome8", MERGED), ("full", FULL))


def turn(costs, classes=CLASSES, escalated=ESCALATED, scores=(0, 1, 2, 3), rows=range(4)):
    """The answers of each system to the crops."""
    return {
        system: [
            make_answer(
                ms,
                escalated=system == "adaptive" and escalated[row],
                names=classes[system][row],
                cpu_ms=0.9 * ms,
                score=scores[row],
            )
            for row in rows
        ]
        for system, ms in costs.items()
    }


def alone(costs=ALONE, doubts=(), **how):
    return Measured(Paired([turn(costs, **how)]), doubts)


def saturated(classes=CLASSES, doubts=(), cpu_counts=True):
    """Three turns at these images per second."""
    turns = [
        turn({name: 1000 / rates[number] for name, rates in RATES.items()}, classes, rows=rows)
        for number, rows in enumerate(([0, 1], [2], [3]))
    ]
    return Measured(Paired(turns), doubts, "saturated", 16, cpu_counts, 1)


def summary_of(*measured, graphs=TWO_RESOLUTIONS, certificate=CERTIFICATE):
    calibration = make_calibration(certificate=certificate, chosen_by={"fidelity": "top1"})
    every = run.asked(graphs, 0.5)
    return {
        **run.summarise(graphs, calibration, every, measured, TRUTH),
        "environment": MACHINE,
    }


def plan_summary(classes=CLASSES, doubts=(), cpu_counts=True):
    one = alone({**ALONE, "static-escalation": 50.0})
    return summary_of(one, saturated(classes, doubts, cpu_counts), graphs=PLANNED)
