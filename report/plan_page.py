"""`plan.html`: what a plan serves and promises, and everything it was chosen over.

One self-contained file made from plan.json. Costs are shares of the full model's, taken in one turn
with it, because minutes apart the same graph differs by more than many graphs do.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from .figures import INK, OTHERS, Axis, Rule, Series, chart
from .frontier import Look, frontier
from .page import HIGH_COLOUR, LOW_COLOUR, RED, render
from .words import milliseconds, recipe_words, setting

Content = Mapping[str, Any]
# Graphs that are cheaper in this one way are joined by a line.
_FAMILIES = ("px", "tome", "apt", "halt")
_ROLES = ("reference", "low", "high")  # the first one that a graph plays decides its looks
_LOOKS = {
    "low": Look("cheap candidate alone", LOW_COLOUR, "o", 12),
    "high": Look("full candidate alone", "#7a5230", "s", 12),
    "reference": Look("full model", INK, "s"),
    "px": Look("alternative, fewer pixels", "#777777", "8"),
    "tome": Look("alternative, merged tokens", OTHERS[0], "H"),
    "apt": Look("alternative, flat areas in larger patches", OTHERS[3], "8"),
    "halt": Look("alternative, tokens halt", OTHERS[4], "H"),
    "other": Look("alternative, other", OTHERS[7], "p", 14),
    "refused": Look("cascade, not certified", RED, "D", 12, above=True),
    "certified": Look("cascade, certified", HIGH_COLOUR, "D", 12, above=True),
    "chosen": Look("cascade, chosen", HIGH_COLOUR, "p", 18, above=True),
}


def write_plan(path: Path, content: Content, threshold: str | None) -> None:
    """Write the page of a plan.json.

    `threshold` is that of the chosen cascade, with the digits that decide; None where none is
    chosen.
    """
    marks = graph_marks(content)
    aligned = {n: g["alignment"] for n, g in content["graphs"].items() if g["alignment"]}
    render(
        path,
        "plan.html.j2",
        content=content,
        threshold=threshold,
        full=reference_name(content),
        marks=marks,
        letters=cascade_marks(content),
        named={
            name: f"{graph_words(content, name)} (no.\N{NO-BREAK SPACE}{mark})"
            for name, mark in marks.items()
        },
        graph_words={name: graph_words(content, name) for name in marks},
        is_chosen=lambda entry: is_chosen(content, entry),
        frontier=None if content["disturbed"] else _frontier(content),
        growth=_growth(content, aligned) if aligned else None,
        aligned=aligned,
        has_alternatives=any("beside" in graph["roles"] for graph in content["graphs"].values()),
        pairs=_pairs(content),
        varying=varying(content, marks),
        mean_words=mean_words,
        latency_words=latency_words(content),
    )


def graph_marks(content: Content) -> dict[str, str]:
    """Each graph's number, the cheapest first."""
    graphs = content["graphs"]
    ordered = sorted(graphs, key=lambda name: graphs[name]["cost_ratio"]["median"])
    return {name: str(number) for number, name in enumerate(ordered, 1)}


def cascade_marks(content: Content) -> dict[tuple[str, str], str]:
    """The letter of each tested (cheap, full) pair."""
    pairs = [(entry["low"], entry["high"]) for entry in content["tested"]]
    return dict(zip(pairs, ascii_uppercase, strict=False))


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
    """Whether a tested cascade is the chosen one."""
    chosen = content["chosen"]
    return chosen is not None and all(chosen[key] == entry[key] for key in ("low", "high"))


def varying(content: Content, names: Iterable[str]) -> list[str]:
    """Those of the graphs that cost more for one image than for another, each once."""
    return [name for name in dict.fromkeys(names) if content["graphs"][name]["per_image"]]


def mean_words(content: Content, entry: Mapping[str, Any]) -> str:
    """What to add to the cost of a cascade that takes more for one image; of others nothing."""
    whose = varying(content, (entry["low"], entry["high"]))
    if not whose:
        return ""
    graph = "cheap graph" if whose == [entry["low"]] else "full graph"
    what = f"the {graph} costs" if len(whose) == 1 else "its graphs cost"
    return (
        f", as a mean over images: what {what} depends on the image, and the certificate is about "
        "answers, not about cost"
    )


def latency_words(content: Content) -> str:
    """How a latency budget counts a graph that takes longer for one image; of others nothing."""
    if not varying(content, content["graphs"]):
        return ""
    return (
        f" (at the {content['goal']['latency_percentile']}th percentile over images of a graph "
        "whose cost depends on the image)"
    )


def points(content: Content) -> list[dict[str, Any]]:
    """Where every graph that answers alone, and every tested cascade, stands.

    Returns:
        For each its `mark`; its `kind`, a key of the looks; the `family` that a line joins it with;
        its `cost` over the full model's, and the `spread` of that over the turns measured; and
        `acceptable`, the share of the images that measure whose answer is no loss.
    """
    return [*_graph_points(content), *_cascade_points(content)]


def _graph_points(content: Content) -> Iterator[dict[str, Any]]:
    full = _parts(content["graphs"][reference_name(content)]["recipe"])
    for name, mark in graph_marks(content).items():
        graph = content["graphs"][name]
        ways = [part.partition("=")[0] for part in _parts(graph["recipe"]) - full]
        family = ways[0] if len(ways) == 1 and ways[0] in _FAMILIES else None
        cost = graph["cost_ratio"]
        yield {
            "mark": mark,
            "kind": next((role for role in _ROLES if role in graph["roles"]), family or "other"),
            "family": family,
            "cost": cost["median"],
            "spread": (cost["min"], cost["max"]),
            "acceptable": graph["acceptable"],
        }


def _cascade_points(content: Content) -> Iterator[dict[str, Any]]:
    marks = cascade_marks(content)
    for entry in content["tested"]:
        low, high = (content["graphs"][entry[key]]["cost_ratio"] for key in ("low", "high"))
        rate = entry["measured"]["escalation_rate"]
        middle, least, most = (low[key] + rate * high[key] for key in ("median", "min", "max"))
        kind = "certified" if entry["certified"] else "refused"
        yield {
            "mark": marks[entry["low"], entry["high"]],
            "kind": "chosen" if is_chosen(content, entry) else kind,
            "family": None,
            "cost": middle,
            "spread": (least, most),
            "acceptable": entry["measured"]["acceptable"],
        }


def _parts(recipe: str) -> set[str]:
    return set(recipe.split(",")) - {"fp32"}


def _frontier(content: Content) -> str:
    """Cost and agreement of every graph alone and of every tested cascade."""
    shown, limit = points(content), 1 - content["goal"]["max_risk"]
    full = [point for point in shown if point["kind"] == "reference"]
    families = {name: [p for p in shown if p["family"] == name] for name in _FAMILIES}
    ends = [end for point in shown for end in point["spread"]]
    label = "cost of an image, of the full model's (logarithmic)"
    return frontier(
        shown,
        _LOOKS,
        [("", _LOOKS[name].colour, own + full) for name, own in families.items() if own],
        Axis(label, percent=True, log=True, limits=(0.8 * min(ends), 1.2 * max(ends))),
        f"acceptable answers, of the {content['measured_on']} images",
        Rule(limit, f"risk limit ε = {setting(1 - limit)}", across=True, colour=RED),
        [point for point in shown if point["kind"] == "chosen"],
        "beaten by the chosen cascade",
        size=(8.8, 4.8),
    )


def _growth(content: Content, aligned: Mapping[str, Mapping[str, Any]]) -> str:
    """What each alignment is worth by the images it was fitted on, from none on; red if nothing."""
    series = []
    for number, (name, found) in enumerate(aligned.items()):
        colour = OTHERS[number % len(OTHERS)] if found["helps"] else RED
        images = [float(point["images"]) for point in found["growth"]]
        shares = [point["acceptable"] for point in found["growth"]]
        words = graph_words(content, name) + ("" if found["helps"] else ": does not help")
        series.append(Series(words, images, shares, colour, "o", "-" if found["helps"] else "--"))
    return chart(
        series,
        Axis("images to learn from; at 0 the graph is not aligned", limits=(0, None)),
        Axis("acceptable if it answers alone", percent=True),
        size=(6.6, 3.4),
    )


def _pairs(content: Content) -> Sequence[Mapping[str, Any]]:
    """Each pair of graphs with its best signal, the cheapest predicted first, and its outcome."""
    best: dict[tuple[str, str], Mapping[str, Any]] = {}
    for candidate in content["candidates"]:
        best.setdefault((candidate["low"], candidate["high"]), candidate)
    tested = {(entry["low"], entry["high"]): entry for entry in content["tested"]}
    return [
        {
            **candidate,
            "outcome": _outcome(content, candidate, tested.get(pair)),
            "chosen": pair in tested and is_chosen(content, tested[pair]),
        }
        for pair, candidate in best.items()
    ]


def _outcome(
    content: Content, candidate: Mapping[str, Any], tested: Mapping[str, Any] | None
) -> str:
    if tested is not None:
        return "certified" if tested["certified"] else "tested, not certified"
    if candidate["escalation"] is None:
        return "not tested: it would never be certified"
    graphs, budget = content["graphs"], content["goal"]["latency_budget_ms"]
    latency = sum(graphs[candidate[key]]["budget_latency_ms"] for key in ("low", "high"))
    if budget is not None and latency > budget:
        return f"not tested: {milliseconds(latency)} is over the latency budget"
    return "not tested: others are predicted to be cheaper, or surer of a certificate"
