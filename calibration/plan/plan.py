"""The road from a model and images to the cheapest certified cascade.

Images play four parts, each image one: *align* teaches the graphs; *fit* teaches signals and makes
the shortlist; *certify* tests it; *test* measures, and decides nothing. Candidates answer all but
the align images, graphs to compare with the test images only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from routing import Overrides, RungSet, escalation_mask

from ..align import Aligned
from ..certify import one_per_group
from ..fidelity import Fidelity
from ..fit import Options, fit
from ..outputs import Outputs
from ..reference import with_reference_answers
from ..splits import check_grouping
from .answers import (
    Parts,
    agreements,
    answers_of,
    divide,
    outputs_to_align_on,
    pair_outputs,
    pair_rung_set,
)
from .bars import Bars
from .candidates import ALIGN, FULL, Graph, default_candidates, find, recipes, shelf_graphs
from .graph_outputs import OutputsCache
from .request import Request
from .select import MOST, Candidate, Pair, Tested, cascade_ms, choose, predict, shortlist
from .shelf import align_graph, export_shelf
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
        aligned: what each alignment is worth, by the aligned graph's name.
        costs: of each graph, as `perf serving` measured them.
        agreement: share of test images without a loss if a graph alone answers, by name.
        candidates: every cascade, the cheapest predicted first.
        tested: the shortlist, tested.
        chosen: the cascade to serve; None: nothing certified is cheaper than the full model.
        pairs: outputs of each pair for `rest`.
    """

    request: Request
    rung_set: RungSet
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

    @property
    def ms(self) -> dict[str, float]:
        """Milliseconds per image of each graph, served at the largest batch measured."""
        return costs_ms(self.costs)


def make_plan(request: Request, bars: Bars) -> Planned:
    """Export, run, price, certify, choose.

    Raises:
        PlanError: a command failed, or a request that cannot be met.
        ImagesError, SplitError, FidelityError, FitError, CertifyError: as `fit`.
    """
    cheap = request.candidates or _default_candidates(request, bars)
    lows, highs, beside = (recipes(text) for text in (cheap, request.highs, request.beside))
    if not lows or not highs:
        raise PlanError("a cascade needs a cheap and a full graph; give --candidates and --highs")
    if any(_is_full(recipe - {ALIGN}, request) for recipe in lows):
        raise PlanError("--candidates names the full model itself; a cheap graph must be cheaper")
    check_grouping(request.group_by)
    bases = [recipe - {ALIGN} for recipe in (*lows, *highs, *beside)]
    bases = [recipe for recipe in dict.fromkeys(bases) if not _is_full(recipe, request)]
    shelf = export_shelf(request, bases, bars)
    rung_set = RungSet.load(shelf)
    cache = OutputsCache(request.cache / "outputs", request.source, rung_set)
    fidelity = request.fidelity or _default_fidelity(rung_set, request.tolerance)
    parts = divide(request, rung_set, cache, any(ALIGN in recipe for recipe in lows), bars)

    names, aligned = [], {}
    for recipe in lows:
        graph = find(shelf_graphs(RungSet.load(shelf)), recipe - {ALIGN})
        name = graph.name
        if ALIGN in recipe:
            taught = outputs_to_align_on(graph, rung_set, cache, parts, bars)
            name, aligned[name] = align_graph(shelf, graph, taught, fidelity, request.seed, bars)
        names.append(name)
    rung_set = RungSet.load(shelf)
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

    certify_images = len(one_per_group(parts.groups, parts.splits["certify"], request.seed))
    with bars.stage("predict on the fit split", len(names)) as advance:
        candidates = predict(
            pairs,
            parts.splits["fit"],
            parts.groups,
            fidelity,
            replace(request.goal, choices=MOST),
            certify_images,
            ms,
            request.seed,
            lambda: advance(1),
        )
    listed = shortlist(candidates, lambda pair: _within_budget(pair, costs, request))
    tested = _test(listed, pairs, rung_set, graphs, ms, fidelity, request, parts, bars)
    best = choose(tested)
    chosen = best if best is not None and best.ms_per_image < ms[FULL] else None
    return Planned(
        request, rung_set, graphs, names, high_names, beside_names, parts, fidelity, aligned,
        costs, agreement, candidates, tested, chosen, pairs,
    )  # fmt: skip


def costs_ms(costs: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Milliseconds per image of each graph at the largest batch that `perf serving` measured.

    Of the full model the median; of every other graph its ratio to the full model, taken turn by
    turn in one run, times that: two servers minutes apart differ by more than many graphs do.
    """
    by_batch = costs[FULL]["ms_per_image"]
    full_ms = float(by_batch[max(by_batch, key=int)]["median"])
    return {name: full_ms * float(cost["cost_ratio"]["median"]) for name, cost in costs.items()}


def _default_candidates(request: Request, bars: Bars) -> str:
    model = run_json(["export", "describe", "--model", request.model], bars.say)
    return default_candidates(model["patch_size"], request.px or model["high_px"])


def _default_fidelity(rung_set: RungSet, tolerance: float) -> Fidelity:
    return Fidelity("cosine", tolerance) if rung_set.classes is None else Fidelity("top1")


def _is_full(recipe: frozenset[str], request: Request) -> bool:
    return recipe <= {f"px={request.px}"}


def _costs(
    names: Sequence[str], shelf: Any, request: Request, bars: Bars
) -> dict[str, dict[str, Any]]:
    wanted = ",".join(dict.fromkeys([*names, FULL]))
    arguments = ["perf", "serving", "--onnx", shelf, "--images", request.images]
    arguments += ["--graphs", wanted, "--instances", request.instances]
    arguments += ["--threads", request.threads, "--batches", BATCH, "--turns", TURNS, "--json"]
    return dict(run_json(arguments, bars.say)["graphs"])


def _within_budget(pair: Pair, costs: Mapping[str, Any], request: Request) -> bool:
    latency = sum(float(costs[name]["latency_ms"]["median"]) for name in pair)
    return request.latency_budget_ms is None or latency <= request.latency_budget_ms


def _test(
    listed: Sequence[Candidate],
    pairs: Mapping[Pair, Outputs],
    rung_set: RungSet,
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
            pair = pair_rung_set(rung_set, graphs[low], graphs[high], graphs[FULL])
            found = fit(pairs[low, high], pair, goal, options)
            threshold = found.calibration.threshold
            scores = found.scores[parts.splits["certify"]]
            escalation = float(escalation_mask(scores, threshold, Overrides()).mean())
            cost = cascade_ms(ms[low], ms[high], escalation)
            tested.append(Tested(candidate, found, threshold is not None, escalation, cost))
            advance(1)
    return tested


def choose_rungs(planned: Planned, bars: Bars) -> None:
    """Write the chosen cascade to `request.out`: onnx/, calibration.json, outputs.npz.

    Raises:
        PlanError: the export failed.
    """
    chosen, request = planned.chosen, planned.request
    assert chosen is not None
    low, high = chosen.candidate.low, chosen.candidate.high
    shelf = planned.graphs[FULL].file.parent
    arguments = ["export", "choose", "--onnx", shelf, "--low", low, "--high", high]
    for name in dict.fromkeys([*planned.beside, *planned.highs, FULL]):
        arguments += ["--keep", name]
    run([*arguments, "--out", request.out / "onnx"], bars.say)
    fitted = with_reference_answers(
        chosen.fit, planned.pairs[low, high], planned.rung_set, request.reference_images, bars.say
    )
    fitted.save(request.out / "calibration.json")
    planned.pairs[low, high].save(request.out / "outputs.npz")
