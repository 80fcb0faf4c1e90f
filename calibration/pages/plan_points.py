"""Where a plan's graphs and cascades stand: what an image costs, how often the answer will do.

Both axes come from plan.json as they are. Costs are shares of the full model's, taken in one turn
with it, because minutes apart the same graph differs by more than many graphs do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any

from report.words import recipe_words

Content = Mapping[str, Any]
FAMILIES = ("px", "tome")  # of graphs that are cheaper in this one way
_ROLES = ("reference", "low", "high")  # the first one that a graph plays decides its looks


@dataclass(frozen=True)
class Point:
    """A graph that answers alone, or a cascade.

    Attributes:
        mark: in the figure and in the tables: a number of a graph, a letter of a cascade.
        kind: `reference`, `low`, `high`, one of `FAMILIES` or `other` of a graph; `chosen`,
            `certified` or `refused` of a cascade.
        family: that a line joins it with; None: it stands alone.
        cost: of an image, over the full model's.
        spread: smallest and largest cost over the turns measured.
        acceptable: share of the test images whose answer is no loss.
    """

    mark: str
    kind: str
    family: str | None
    cost: float
    spread: tuple[float, float]
    acceptable: float

    @property
    def is_cascade(self) -> bool:
        """Whether it is two graphs."""
        return self.kind in ("chosen", "certified", "refused")


def graph_marks(content: Content) -> dict[str, str]:
    """Each graph's number, the cheapest first."""
    graphs = content["graphs"]
    ordered = sorted(graphs, key=lambda name: graphs[name]["cost_ratio"]["median"])
    return {name: str(number) for number, name in enumerate(ordered, 1)}


def cascade_marks(content: Content) -> dict[tuple[str, str], str]:
    """The letter of each tested (cheap, full) pair."""
    pairs = [(entry["low"], entry["high"]) for entry in content["tested"]]
    return dict(zip(pairs, ascii_uppercase, strict=False))


def points(content: Content) -> list[Point]:
    """Every graph from the cheapest on, then every tested cascade."""
    return [*_graphs(content), *_cascades(content)]


def reference_name(content: Content) -> str:
    """The full model, which answers are held against."""
    graphs = content["graphs"]
    return next(str(name) for name in graphs if "reference" in graphs[name]["roles"])


def graph_words(content: Content, name: str) -> str:
    """A graph by its recipe."""
    words = recipe_words(content["graphs"][name]["recipe"])
    if name != reference_name(content):
        return words
    return "full model" if words == "fp32" else f"{words}, full model"


def is_chosen(content: Content, entry: Mapping[str, Any]) -> bool:
    """Whether a cascade is the chosen one."""
    chosen = content["chosen"]
    return chosen is not None and all(chosen[key] == entry[key] for key in ("low", "high"))


def _graphs(content: Content) -> Iterator[Point]:
    full = _parts(content["graphs"][reference_name(content)]["recipe"])
    for name, mark in graph_marks(content).items():
        graph = content["graphs"][name]
        ways = [part.partition("=")[0] for part in _parts(graph["recipe"]) - full]
        family = ways[0] if len(ways) == 1 and ways[0] in FAMILIES else None
        kind = next((role for role in _ROLES if role in graph["roles"]), family or "other")
        cost = graph["cost_ratio"]
        spread = (cost["min"], cost["max"])
        yield Point(mark, kind, family, cost["median"], spread, graph["acceptable"])


def _cascades(content: Content) -> Iterator[Point]:
    marks = cascade_marks(content)
    for entry in content["tested"]:
        low, high = (content["graphs"][entry[key]]["cost_ratio"] for key in ("low", "high"))
        rate = entry["test"]["escalation_rate"]
        middle, least, most = (low[key] + rate * high[key] for key in ("median", "min", "max"))
        kind = "certified" if entry["certified"] else "refused"
        kind = "chosen" if is_chosen(content, entry) else kind
        mark = marks[entry["low"], entry["high"]]
        yield Point(mark, kind, None, middle, (least, most), entry["test"]["acceptable"])


def _parts(recipe: str) -> set[str]:
    return set(recipe.split(",")) - {"fp32"}
