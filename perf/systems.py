"""The systems that are measured: the cascade, its parts, and what a user would run instead.

Tensors are sent to `router` itself, so that its costs and the ensemble's over it are told apart.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bundle.graphs import Graph, GraphSet
from report.words import recipe_words

LOW, HIGH, ADAPTIVE, ENSEMBLE = "static-low", "static-high", "adaptive", "ensemble"
ESCALATION = "static-escalation"  # what escalated images go to, where it is not static high
NEVER, ALWAYS = 10**9, -(10**9)  # thresholds beyond any distance between embeddings


@dataclass(frozen=True)
class System:
    """One way to answer an image.

    Attributes:
        name: as in summary.json; of an alternative its model's, `static-112-int8static`.
        title: in words.
        model: the model that is asked.
        parameters: of each request. A threshold is text, because perf_analyzer sends no
            floating-point parameter.
        takes_bytes: whether it takes encoded images instead of the image tensor.
        outputs: what it is asked for; of none the embedding, the logits where there is a head, and
            of a router its decision.
        recipe: of a static system's graph.
    """

    name: str
    title: str
    model: str
    parameters: Mapping[str, str | int] = field(default_factory=dict)
    takes_bytes: bool = False
    outputs: tuple[str, ...] = ()
    recipe: str | None = None

    @property
    def is_static(self) -> bool:
        """Whether one rung answers every image."""
        return self.model not in ("router", "adaptive_vit")


def systems(
    graph_set: GraphSet, served: Collection[str], threshold: float | None, threshold_30: float
) -> list[System]:
    """What can be measured on a server, the cheap rung first.

    Args:
        graph_set: the exported rungs, and the alternatives exported beside them.
        served: names of the models that the server has.
        threshold: the calibrated one; None: every image escalates.
        threshold_30: the one above which 30 % of the mixed set's scores lie.
    """
    reference = graph_set.reference
    low, high = (graph_set.rungs[name].recipe for name in ("vit_low", "vit_high"))

    def static(name: str, title: str, model: str, recipe: str) -> System:
        return System(name, title.format(recipe_words(recipe)), model, recipe=recipe)

    found = [static(LOW, "cheap rung always ({})", "vit_low", low)]
    found += [
        static(_name(model), "static {}", model, graph.record.recipe)
        for model, graph in graph_set.beside.items()
        if model in served and model != reference.name
    ]
    if graph_set.reference_record is not None and reference.name in served:
        full = reference.record.recipe
        found.append(static(ESCALATION, "escalation rung always ({})", "vit_high", high))
        found.append(static(HIGH, "full model always ({})", reference.name, full))
    else:
        found.append(static(HIGH, "full rung always ({})", "vit_high", high))
    calibrated = "calibrated threshold" if threshold is not None else "nothing certified"
    found += [
        System("adaptive-0", "adaptive, never escalating", "router", {"threshold": NEVER}),
        System(ADAPTIVE, f"adaptive, {calibrated}", "router"),
        System(
            "adaptive-30", "adaptive, 30 % escalated", "router", {"threshold": repr(threshold_30)}
        ),
        System("adaptive-100", "adaptive, always escalating", "router", {"threshold": ALWAYS}),
    ]
    if "adaptive_vit" in served:
        title = f"adaptive from image bytes, {calibrated}"
        found.append(System(ENSEMBLE, title, "adaptive_vit", takes_bytes=True))
    return found


def model_section(graphs: GraphSet) -> dict[str, Any]:
    """What is served; `reference` where the full rung is not the full model."""
    reference = graphs.reference_record
    return {
        **({} if reference is None else {"reference": reference.recipe}),
        "backbone": graphs.backbone,
        "image_shape": list(graphs.image_shape),
        "low": graphs.low.record.recipe,
        "high": graphs.high.record.recipe,
        "embedding_dim": graphs.embedding_dim,
        "classes": graphs.classes,
    }


def graphs_by_model(graphs: GraphSet) -> dict[str, Graph]:
    """Every exported graph by the name of the model that serves it beside the others."""
    return {"vit_low": graphs.low, "vit_high": graphs.high, **graphs.beside}


def _name(graph: str) -> str:
    """The name of the system that a graph is alone: `static-112-int8static` of `px112_...`."""
    return "static-" + graph.removeprefix("px").replace("_", "-")


def threshold_for(scores: NDArray[np.float32], share: float) -> float:
    """The threshold above which this share of the scores lies, midway between two of them."""
    ordered = np.sort(scores.astype(np.float64))[::-1]
    count = round(share * len(ordered))
    if count == 0:
        return float(ordered[0])
    if count >= len(ordered):
        return float(np.nextafter(ordered[-1], -np.inf))
    return float((ordered[count - 1] + ordered[count]) / 2)
