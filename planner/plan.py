"""The road from a model and images to the cheapest certified cascade.

Images play four parts, each image one: *align* teaches the graphs; *fit* teaches signals and makes
the shortlist; *certify* tests it; *test* measures, and decides nothing. Candidates answer all but
the align images, graphs to compare with the test images only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bundle.graphs import GraphSet
from calibration.align import Aligned
from calibration.certify import one_per_group
from calibration.fidelity import Fidelity
from calibration.fit import Options, fit
from calibration.outputs import Outputs
from calibration.reference import with_reference_answers
from calibration.splits import SplitError, check_grouping, group_keys
from routing import Overrides, escalation_mask

from .answers import (
    Parts,
    agreements,
    answers_of,
    divide,
    give_back,
    outputs_to_align_on,
    pair_outputs,
    pair_rung_set,
)
from .bars import Bars
from .candidates import ALIGN, FULL, Graph, find, shelf_graphs
from .checks import check_certify_images, check_images, check_recipes, choices_for, needed
from .graph_outputs import OutputsCache
from .request import Request
from .select import MOST, Candidate, Pair, Tested, cascade_ms, choose, predict, shortlist
from .shelf import align_graph, export_shelf, taught_by_export
from .subprocesses import PlanError, run, run_json

BATCH = 8  # images of a request when graphs are priced, as batches form under load
TURNS = 3


@dataclass(frozen=True, eq=False)
class Planned:
    """Everything a plan found.

    Attributes:
        request: what was asked for.
        rung_set: of the shelf.
        graphs: on the shelf, by name.
        lows: names of the cheap candidates.
        highs: names of the full candidates.
        beside: names of the graphs to compare with.
        parts: of the images.
        fidelity: when an answer is a loss.
        aligned: what each alignment is worth, by the name of the graph that is aligned, or, where
            it does not help, of the graph without it that takes its place.
        costs: of each graph, as `perf serving` measured them; once more where `disturbed`.
        agreement: share of test images without a loss if a graph alone answers, by name.
        candidates: every cascade, the cheapest predicted first.
        tested: the shortlist, tested.
        chosen: the cascade to serve; None: nothing certified is cheaper than the full model.
        pairs: outputs of each pair for `rest`.
        notes: on what was asked for, one line each.
    """

    request: Request
    rung_set: GraphSet
    graphs: Mapping[str, Graph]
    lows: Sequence[str]
    highs: Sequence[str]
    beside: Sequence[str]
    parts: Parts
    fidelity: Fidelity
    aligned: Mapping[str, Aligned]
    costs: Mapping[str, Mapping[str, Any]]
    agreement: Mapping[str, float]
    candidates: Sequence[Candidate]
    tested: Sequence[Tested]
    chosen: Tested | None
    pairs: Mapping[Pair, Outputs]
    notes: Sequence[str] = ()

    @property
    def ms(self) -> dict[str, float]:
        """Milliseconds per image of each graph, served at the largest batch measured."""
        return costs_ms(self.costs)

    @property
    def doubted(self) -> list[str]:
        """Names of the graphs whose costs cannot be believed; usually none."""
        return disturbed(self.costs)


def make_plan(request: Request, bars: Bars) -> Planned:
    """Check, export, run, price, certify, choose.

    Raises:
        PlanError: a command failed, or a request that cannot be met.
        ImagesError, SplitError, FidelityError, FitError, CertifyError: as `fit`.
    """
    check_grouping(request.group_by)
    asked = check_recipes(request, bars)
    fidelity = _fidelity(request, asked.task)
    notes = [*asked.notes, *check_images(request, asked, bars)]
    lows, highs, beside = asked.lows, asked.highs, asked.beside
    bases = [recipe - {ALIGN} for recipe in (*lows, *highs, *beside)]
    bases = [recipe for recipe in dict.fromkeys(bases) if recipe]  # the empty one is the full model
    shelf = export_shelf(request, bases, bars)
    rung_set = GraphSet.load(shelf)
    cache = OutputsCache(request.cache / "outputs", request.source, rung_set)
    # Images that cannot be read, or that are one group, are known only now.
    try:
        parts = divide(request, rung_set, cache, asked.aligns, bars)
    except SplitError as error:
        raise PlanError(f"{error}; {needed(request, asked)}") from None
    known = group_keys(parts.reference, request.group_by)
    check_certify_images(_certify_images(parts, request), known, request, asked)

    by_export = taught_by_export(rung_set)
    names: list[str] = []
    aligned: dict[str, Aligned] = {}
    for recipe in lows:
        graph = find(shelf_graphs(GraphSet.load(shelf)), recipe - {ALIGN})
        name = graph.name
        if ALIGN in recipe:
            taught = outputs_to_align_on(graph, rung_set, by_export, cache, parts, bars)
            name, aligned[name] = align_graph(
                shelf, graph, taught, fidelity, request.group_by, request.seed, bars
            )
        names.append(name)
    names = list(dict.fromkeys(names))
    if aligned and not any(found.helps for found in aligned.values()):
        parts = give_back(parts, request, rung_set)
    rung_set = GraphSet.load(shelf)
    graphs = shelf_graphs(rung_set)
    high_names = [find(graphs, recipe).name for recipe in highs]
    beside_names = [find(graphs, recipe).name for recipe in beside]

    answers = {
        name: answers_of(graphs[name], cache, parts, parts.rest, name in names, bars)
        for name in dict.fromkeys([*names, *high_names])
    }
    pairs = {
        (low, high): pair_outputs(low, high, rung_set, graphs, answers, parts, request)
        for low in names
        for high in high_names
    }
    agreement = agreements(
        [*answers, *beside_names], graphs, answers, cache, parts, fidelity, pairs, bars
    )
    costs = _costs([*answers, *beside_names], shelf, request, bars)
    ms = costs_ms(costs)

    certify_images = _certify_images(parts, request)
    most = choices_for(certify_images, request.goal, MOST)
    with bars.stage("predict on the fit split", len(names)) as advance:
        candidates = predict(
            pairs,
            parts.splits["fit"],
            parts.groups,
            fidelity,
            replace(request.goal, choices=most),
            certify_images,
            ms,
            request.seed,
            lambda: advance(1),
        )
    listed = shortlist(candidates, lambda pair: _within_budget(pair, costs, request), most)
    tested = _test(listed, pairs, rung_set, graphs, ms, fidelity, request, parts, bars)
    best = choose(tested)
    chosen = best if best is not None and best.ms_per_image < ms[FULL] else None
    return Planned(
        request, rung_set, graphs, names, high_names, beside_names, parts, fidelity, aligned,
        costs, agreement, candidates, tested, chosen, pairs, notes,
    )  # fmt: skip


def costs_ms(costs: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Milliseconds per image of each graph as `perf serving` measured it.

    Of the full model the median; of every other graph its ratio to the full model, taken turn by
    turn in one run, times that: two servers minutes apart differ by more than many graphs do. Where
    the clock was disturbed, the ratio is of CPU time, which other work on the machine disturbs
    less; it orders the cascades, and nobody is told it as a figure.
    """
    full_ms = float(costs[FULL]["ms_per_image"]["median"])
    ratio, by_cpu = "cost_ratio", [cost["cpu_cost_ratio"] for cost in costs.values()]
    if disturbed(costs) and all(spread and spread["median"] > 0 for spread in by_cpu):
        ratio = "cpu_cost_ratio"
    return {name: full_ms * float(cost[ratio]["median"]) for name, cost in costs.items()}


def disturbed(costs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Names of the graphs of which clock and CPU time tell different stories."""
    return [name for name, cost in costs.items() if cost["disturbed"]]


def _certify_images(parts: Parts, request: Request) -> int:
    """Independent images of the certify split."""
    return len(one_per_group(parts.groups, parts.splits["certify"], request.seed))


def _fidelity(request: Request, task: str | None) -> Fidelity:
    """When an answer is a loss, refused before anything is exported if it means nothing."""
    if request.fidelity is not None:
        request.fidelity.check(task)
        return request.fidelity
    return Fidelity.asked(task, None, request.tolerance, request.relative, request.label_threshold)


def _costs(
    names: Sequence[str], shelf: Any, request: Request, bars: Bars
) -> dict[str, dict[str, Any]]:
    """What `perf serving` says of each graph, the less disturbed of two where the first one is."""
    wanted = ",".join(dict.fromkeys([*names, FULL]))
    arguments = ["perf", "serving", "--onnx", shelf, "--images", request.images]
    arguments += ["--graphs", wanted, "--instances", request.instances]
    arguments += ["--threads", request.threads, "--batch", BATCH, "--turns", TURNS, "--json"]
    costs = dict(run_json(arguments, bars.say)["graphs"])
    if not disturbed(costs):
        return costs
    bars.say(f"clock and CPU time of {', '.join(disturbed(costs))} differ: priced once more")
    again = dict(run_json(arguments, bars.say)["graphs"])
    return min(again, costs, key=lambda found: len(disturbed(found)))


def _within_budget(pair: Pair, costs: Mapping[str, Any], request: Request) -> bool:
    latency = sum(float(costs[name]["latency_ms"]["median"]) for name in pair)
    return request.latency_budget_ms is None or latency <= request.latency_budget_ms


def _test(
    listed: Sequence[Candidate],
    pairs: Mapping[Pair, Outputs],
    rung_set: GraphSet,
    graphs: Mapping[str, Graph],
    ms: Mapping[str, float],
    fidelity: Fidelity,
    request: Request,
    parts: Parts,
    bars: Bars,
) -> list[Tested]:
    """Certify each cascade of the shortlist with its share of δ."""
    goal = replace(request.goal, choices=max(1, len(listed)))
    tested = []
    with bars.stage("certify the shortlist", len(listed)) as advance:
        for candidate in listed:
            low, high = candidate.low, candidate.high
            options = Options(fidelity, candidate.signal, request.group_by, request.seed)
            pair = pair_rung_set(rung_set, graphs[low], graphs[high])
            found = fit(pairs[low, high], pair, goal, options, splits=parts.splits)
            threshold = found.calibration.threshold
            scores = found.scores[parts.splits["certify"]]
            escalation = float(escalation_mask(scores, threshold, Overrides()).mean())
            cost = cascade_ms(ms[low], ms[high], escalation)
            tested.append(Tested(candidate, found, threshold is not None, escalation, cost))
            advance(1)
    return tested


def choose_rungs(planned: Planned, bars: Bars) -> None:
    """Write the chosen cascade to `request.out`: onnx/, calibration.json, outputs.json.

    Raises:
        PlanError: the export failed.
    """
    chosen, request = planned.chosen, planned.request
    assert chosen is not None
    low, high = chosen.candidate.low, chosen.candidate.high
    shelf = planned.graphs[FULL].file.parent
    arguments = ["export", "choose", "--onnx", shelf, "--low", low, "--high", high]
    for name in dict.fromkeys([*planned.beside, *planned.highs, FULL]):
        arguments += ["--beside", name]
    run([*arguments, "--out", request.out / "onnx"], bars.say)
    fitted = with_reference_answers(
        chosen.fit, planned.pairs[low, high], planned.rung_set, request.reference_images, bars.say
    )
    fitted.save(request.out / "calibration.json")
    planned.pairs[low, high].save(request.out / "outputs.json")
