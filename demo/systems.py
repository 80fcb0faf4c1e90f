"""What answers images on the demo's server: the cascade, and every graph that could alone."""

from __future__ import annotations

from bundle.graphs import GraphSet
from perf.systems import ADAPTIVE, HIGH, LOW, System, systems

CORE = (LOW, HIGH, ADAPTIVE)
NEVER = "adaptive-0"  # the router told never to escalate


def served_systems(graphs: GraphSet) -> dict[str, System]:
    """Every system that the demo may ask, by the name that `perf` gives it.

    Static high is the full FP32 model, which certificates are about; where the router escalates to
    another graph, that is a system of its own, and so is what was exported beside them.
    """
    every = systems(graphs, [*graphs.beside], threshold=0.0, threshold_30=0.0)
    return {s.name: s for s in every if s.is_static or s.name in (ADAPTIVE, NEVER)}


def recipes(graphs: GraphSet) -> dict[str, str]:
    """How each system that is a graph makes itself cheap."""
    found = served_systems(graphs)
    return {name: system.recipe for name, system in found.items() if system.recipe is not None}


def resolutions_px(graphs: GraphSet) -> tuple[int, int]:
    """Of the cheap rung and of the full FP32 model."""
    return graphs.low.record.px, graphs.reference.record.px
