"""The sentences of a plan's page, computed from its numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from report.words import count_of, percent, setting
from routing import threshold_text

from ..fidelity import Fidelity
from .plan_points import (
    Content,
    Point,
    cascade_marks,
    graph_marks,
    graph_words,
    reference_name,
)


def milliseconds(value: float) -> str:
    """A duration with three figures, e.g. `6.25 ms`, its space non-breaking."""
    places = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:.{places}f}\N{NO-BREAK SPACE}ms"


def times(factor: float) -> str:
    """A ratio of two costs, e.g. `7.5 times`."""
    return f"{factor:.{2 if factor < 2 else 1}f} times"


def named(content: Content, name: str) -> str:
    """A graph with its number in the figure."""
    return f"{graph_words(content, name)} (no.\N{NO-BREAK SPACE}{graph_marks(content)[name]})"


def loss(content: Content) -> str:
    """When an answer is a loss, to be read after "an answer that"."""
    return Fidelity.from_dict(content["goal"]).words("full model")


def served(content: Content) -> str:
    """Which graph answers which image."""
    chosen = content["chosen"]
    if chosen is None:
        full = graph_words(content, reference_name(content))
        return f"Every image runs through {full}, as without a plan."
    return (
        f"Every image runs through {named(content, chosen['low'])}. Where the signal "
        f"{chosen['signal']} predicts a change above {threshold_text(chosen['threshold'])}, the "
        f"answer of {named(content, chosen['high'])} replaces the cheap one."
    )


def why_nothing(content: Content) -> str:
    """Why no cascade was chosen."""
    goal, tested = content["goal"], content["tested"]
    limit = f"a risk of at most {setting(goal['max_risk'])}"
    certified = [entry for entry in tested if entry["certified"]]
    if certified and content["disturbed"]:
        return (
            f"Cascades were certified ({len(certified)}), but by CPU time none of them costs less "
            "than the full model."
        )
    if certified:
        best = min(certified, key=lambda entry: entry["certify"]["ms_per_image"])
        mark = cascade_marks(content)[best["low"], best["high"]]
        full = content["graphs"][reference_name(content)]["ms_per_image"]
        return (
            f"Cascade {mark} is the cheapest that was certified, and costs "
            f"{milliseconds(best['certify']['ms_per_image'])} per image where the full model costs "
            f"{milliseconds(full)}. That is a result, not a failure."
        )
    if tested:
        return (
            f"Not one of the cascades that were tested ({len(tested)}) could be certified for "
            f"{limit}. That is a result, not a failure: without proof the full model answers."
        )
    if any(candidate["escalation"] is not None for candidate in content["candidates"]):
        budget = milliseconds(goal["latency_budget_ms"])
        return (
            f"Every cascade that could meet {limit} takes longer than the latency budget of "
            f"{budget} for an image that runs through both graphs, so none was tested."
        )
    return (
        f"On the fit split no share of escalated images brought any cascade down to {limit}, so "
        "none was tested."
    )


def saved(content: Content) -> str:
    """What the chosen cascade costs and how its answers fare, on the test split."""
    chosen, full = content["chosen"], content["graphs"][reference_name(content)]
    test = chosen["test"]
    if content["disturbed"]:
        return (
            f"On {count_of(content['images']['test'], 'test image')}, which decided nothing, "
            f"{percent(test['escalation_rate'])} escalate; {percent(test['acceptable'])} of the "
            "answers are acceptable."
        )
    return (
        f"On {count_of(content['images']['test'], 'test image')}, which decided nothing, "
        f"{percent(test['escalation_rate'])} escalate and an image costs "
        f"{milliseconds(test['ms_per_image'])}, {times(test['speedup'])} less than with the full "
        f"model ({milliseconds(full['ms_per_image'])}); {percent(test['acceptable'])} of the "
        f"answers are acceptable."
    )


def alternative(content: Content) -> str:
    """How the chosen cascade compares with the best single graph that agrees as often."""
    best = content["best_alternative"]
    ratio = best["cost_ratio_to_plan"]
    agrees = f"({percent(best['agreement'])} acceptable)"
    if content["disturbed"]:
        return (
            "The graph alone that agrees at least as often and takes the least CPU time is "
            f"{named(content, best['name'])} {agrees}."
        )
    if best["name"] == reference_name(content):
        return (
            "No cheaper graph alone agrees with the full model as often as the cascade; the full "
            f"model itself costs {times(ratio)} as much."
        )
    return (
        f"The cheapest graph alone that agrees at least as often is "
        f"{named(content, best['name'])} {agrees}: it costs {times(ratio)} as much as the cascade."
    )


def warnings(content: Content) -> list[str]:
    """What contradicts the plan, or puts its figures in doubt; usually nothing."""
    chosen, best = content["chosen"], content["best_alternative"]
    found = [f"{doubt[0].upper()}{doubt[1:]}." for doubt in content["doubts"]]
    if chosen is None:
        return found
    epsilon, risk = content["goal"]["max_risk"], chosen["test"]["risk"]
    if risk > epsilon:
        found.append(
            f"On the test images the risk is {percent(risk)}, ABOVE the limit of "
            f"{setting(epsilon)}: they do not bear the certificate out. It is about one image of "
            "each group; look whether a few groups make the difference."
        )
    if content["disturbed"]:
        return found
    if best["cost_ratio_to_plan"] < 1:
        found.append(
            f"{named(content, best['name'])} alone costs less than the cascade and agrees at "
            "least as often on the test images, though nothing is certified of it: the cascade "
            "is not worth its router here."
        )
    if chosen["test"]["speedup"] <= 1:
        found.append("With the escalation of the test images the cascade saves nothing.")
    return found


def frontier(content: Content, points: Sequence[Point]) -> str:
    """What the chosen cascade beats."""
    graphs = [point for point in points if not point.is_cascade]
    beside = [graph for graph in content["graphs"].values() if "beside" in graph["roles"]]
    none = "" if beside else " No alternative was given to compare with beside the candidates."
    chosen = next((point for point in points if point.kind == "chosen"), None)
    if chosen is None:
        return f"Nothing is chosen; the further up and left, the better.{none}"
    beaten = [g for g in graphs if g.cost >= chosen.cost and g.acceptable <= chosen.acceptable]
    less = [g for g in graphs if g.cost < chosen.cost and g.acceptable < chosen.acceptable]
    more = [g for g in graphs if g.cost > chosen.cost and g.acceptable > chosen.acceptable]
    better = len(graphs) - len(beaten) - len(less) - len(more)
    unbeaten = f" {better} cost no more and agree at least as often." if better else ""
    return (
        f"Of {count_of(len(graphs), 'graph')} alone, {len(beaten)} cost at least as much as the "
        f"chosen cascade and agree no more often, {len(less)} cost less and agree less often, "
        f"{len(more)} agree more often and cost more.{unbeaten}{none}"
    )


def grown(content: Content, name: str, alignment: Mapping[str, Any]) -> str:
    """What an alignment is worth, and whether more images would make it worth more."""
    without, *_, before, last = alignment["growth"]
    gained = 100 * (last["acceptable"] - before["acceptable"])
    return (
        f"{graph_words(content, name)}: {percent(without['acceptable'])} acceptable without, "
        f"{percent(last['acceptable'])} with the alignment from "
        f"{count_of(last['images'], 'image')}; going from {before['images']:,} to "
        f"{last['images']:,} images brought {gained:+.1f} points."
    )


def not_helping(content: Content, name: str) -> str:
    """The loud line of an alignment that does not help."""
    return (
        f"{graph_words(content, name)}: the alignment does not help on images it has not learned, "
        "so this graph takes its place as it is; with more images to learn from it may help."
    )


def given_back(content: Content) -> str:
    """What became of the images of alignments of which none helps; empty where one does."""
    found = [graph["alignment"] for graph in content["graphs"].values() if graph["alignment"]]
    if not found or any(alignment["helps"] for alignment in found):
        return ""
    return (
        "No alignment is part of anything that was tested, so the images that they were tried on "
        "went to the fit split, and the other splits have their full share of the rest."
    )


def enough(content: Content) -> str:
    """How many images the certify split had to have for any cascade to pass."""
    goal = content["goal"]
    needed = goal.get("certify_images_needed")  # plans of earlier releases do not say
    if needed is None:
        return ""
    return (
        f"A risk of at most {setting(goal['max_risk'])} with confidence "
        f"{setting(goal['confidence'])} takes {needed:,} independent certify images even if none "
        "of them is lost; several cascades tested at once take more."
    )


def left_out(content: Content) -> str:
    """What the costs are, and what they are not."""
    instances, threads = content["served"]["instances"], content["served"]["threads"]
    return (
        f"Costs are of the graphs alone, each served by Triton with "
        f"{count_of(instances, 'instance')} of {count_of(threads, 'thread')}, "
        f"{count_of(batch(content), 'image')} to a request. The router, which computes the score "
        "and passes images on, takes time as well; it is in none of these figures, and is measured "
        "once the chosen cascade is served."
    )


def batch(content: Content) -> int:
    """Images of a request, where costs were measured."""
    by_batch = content["graphs"][reference_name(content)]["ms_per_image_by_batch"]
    return max(map(int, by_batch))
