"""What answers images on the demo's server: the cascade, and every graph that could alone.

Systems have names of their own. `low` is the cheap rung and `adaptive` the router. `high` is the
full FP32 model, which certificates are about. Other graphs go by the name of their model:
`vit_high` where the router escalates to another graph than that, and what was exported beside them.
"""

from __future__ import annotations

from collections.abc import Mapping

from bundle.graphs import GraphSet
from perf import systems as measured
from perf.systems import System, graphs_by_model

LOW, HIGH, ADAPTIVE = "low", "high", "adaptive"
RUNG = "vit_high"  # what the router escalates to
CORE = (LOW, HIGH, ADAPTIVE)
NEVER = System("adaptive-0", "never escalating", "router", {"threshold": measured.NEVER})
# As `perf` calls them, which derives the figures.
_MEASURED = {
    LOW: measured.LOW,
    HIGH: measured.HIGH,
    ADAPTIVE: measured.ADAPTIVE,
    RUNG: measured.ESCALATION,
}


def name_of(system: str) -> str:
    """A system's name in a `perf.harness.Paired`."""
    return _MEASURED.get(system, system)


def asked(system: str, served: Mapping[str, str]) -> System:
    """A system for `perf` to ask.

    Args:
        system: one of ours.
        served: what `served_systems` returned.
    """
    return System(name_of(system), system, served[system])


def served_systems(rung_set: GraphSet) -> dict[str, str]:
    """The model to ask for each system, those of `CORE` first."""
    reference = RUNG if rung_set.reference_record is None else rung_set.reference.name
    beside = [RUNG, *rung_set.beside]
    own = {name: name for name in beside if name != reference}
    return {LOW: "vit_low", HIGH: reference, ADAPTIVE: "router", **own}


def recipes(rung_set: GraphSet) -> dict[str, str]:
    """How each system that is a graph makes itself cheap."""
    graphs = graphs_by_model(rung_set)
    return {
        system: graphs[model].record.recipe
        for system, model in served_systems(rung_set).items()
        if system != ADAPTIVE
    }


def resolutions_px(rung_set: GraphSet) -> tuple[int, int]:
    """Of the cheap rung and of the full FP32 model."""
    full = rung_set.reference.record
    return rung_set.rungs["vit_low"].px, full.px
