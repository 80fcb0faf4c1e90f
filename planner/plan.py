"""The road from a model and images to the cheapest certified cascade.

Images play two parts, each image one: *fit* teaches the ranges of int8, alignments and signals, and
makes the shortlist by cross-fitted answers; *certify* tests it, and only the graphs of the
shortlist answer these images. A *test* split, where images abound, measures and decides nothing.
Where cheap graphs are to be adapted, images are set aside for that before (`adapting`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from bundle.adapted import Adapted
from bundle.graphs import GraphSet
from bundle.recipe import Recipe
from calibration.align import Aligned
from calibration.answers import AnswerCache
from calibration.certify import Goal
from calibration.fidelity import Fidelity
from calibration.fit import Options, fit
from calibration.outputs import Made, Outputs, refer
from calibration.reference import with_reference_answers
from calibration.splits import SplitError, check_grouping
from export.errors import ExportError
from report.terminal import Bars
from routing import Overrides, escalation_mask

from . import checks
from .adapting import Adapting, Trained, bodies, twins, wanted
from .graphs import aligned_graph, exported
from .parts import Parts
from .request import LATENCY_PERCENTILE, PlanError, Request
from .select import MOST, Candidate, Pair, Tested, cascade_ms, choose, predict, shortlist
from .workshop import Prices, Workshop

if TYPE_CHECKING:  # torch takes seconds to import
    from export.backbones import Backbone


@dataclass(frozen=True, eq=False)
class Planned:
    """Everything a plan found.

    Attributes:
        request: what was asked for.
        graphs: all that were exported and aligned, perhaps for earlier plans, too.
        lows: names of the cheap candidates.
        highs: names of the full candidates.
        beside: names of the graphs to compare with.
        parts: of the images, and the cache of what graphs answer for them.
        fidelity: when an answer is a loss.
        aligned: what each alignment is worth, by the name of the graph that is aligned, or, where
            it does not help, of the graph without it that takes its place.
        prices: of each graph, on fit images, measured once more where they were disturbed.
        agreement: share of the images that measure without a loss if a graph alone answers, by
            name.
        candidates: every cascade, the cheapest predicted first.
        tested: the shortlist, tested.
        chosen: the cascade to serve; None: nothing certified is cheaper than the full model.
        notes: on what was asked for, one line each.
        states: the adapted states that graphs hold, by their keys.
        trained: what was trained for this plan, or for an earlier one like it.
    """

    request: Request
    graphs: GraphSet
    lows: Sequence[str]
    highs: Sequence[str]
    beside: Sequence[str]
    parts: Parts
    fidelity: Fidelity
    aligned: Mapping[str, Aligned]
    prices: Prices
    agreement: Mapping[str, float]
    candidates: Sequence[Candidate]
    tested: Sequence[Tested]
    chosen: Tested | None
    notes: Sequence[str] = ()
    states: Mapping[str, Adapted] = field(default_factory=dict)
    trained: Sequence[Trained] = ()

    @property
    def full(self) -> str:
        """The name of the full model in FP32, which certificates are about."""
        return self.graphs.reference.name

    @property
    def ms(self) -> dict[str, float]:
        """Milliseconds per image of each graph, the mean where it depends on the image."""
        return costs_ms(self.prices, self.full)

    @property
    def doubted(self) -> list[str]:
        """Names of the graphs whose prices cannot be believed; usually none."""
        return disturbed(self.prices)


@dataclass(frozen=True, eq=False)
class Ground:
    """What every plan stands on: checked recipes, exported graphs, and images that have a part.

    Attributes:
        asked: the recipes.
        fidelity: when an answer is a loss.
        notes: on what was asked for, one line each.
        graphs: every recipe's, not aligned.
        parts: of the images, which the full model has answered.
        backbone: the model, which knows the adapted states that recipes name.
    """

    asked: checks.Asked
    fidelity: Fidelity
    notes: Sequence[str]
    graphs: GraphSet
    parts: Parts
    backbone: Backbone

    def names(self, recipes: Iterable[Recipe]) -> list[str]:
        """The graphs of some recipes, without their alignments."""
        px = self.asked.full.px or 0
        return list(dict.fromkeys(replace(recipe, align=False).slug(px) for recipe in recipes))


def lay_ground(request: Request, workshop: Workshop, bars: Bars) -> Ground:
    """Check, export the full model, let it answer, divide the images, export the other graphs.

    Raises:
        PlanError: a request that cannot be met.
        ExportError: a graph cannot be made.
        ImagesError, SplitError, FidelityError: as `fit`.
        OSError: a folder cannot be made.
    """
    check_grouping(request.group_by)
    if request.out.exists() and not request.out.is_dir():
        raise PlanError(f"--out {request.out} is a file; give a folder")
    for folder in (request.cache, request.answers):
        folder.mkdir(parents=True, exist_ok=True)
    bars.say(f"load {request.model}")
    backbone = workshop.load(request)
    asked = checks.check_recipes(request, backbone, bars)
    backbone = replace(backbone, adapted=asked.states)
    fidelity = request.fidelity(asked.task)
    notes = [*asked.notes, *checks.check_images(request, asked, bars)]
    graphs = exported(request, asked.full, (), backbone, workshop, bars)
    cache = AnswerCache(request.answers, request.source, graphs)
    parts = _divide(request, asked, cache, graphs.fitted_on, bars)
    rows = parts.rows("fit")
    graphs = exported(request, asked.full, asked.exported, backbone, workshop, bars, rows)
    return Ground(asked, fidelity, notes, graphs, parts, backbone)


def make_plan(request: Request, workshop: Workshop, bars: Bars) -> Planned:
    """Lay the ground, align, price, predict, perhaps adapt and predict anew, certify, choose.

    Raises:
        PlanError, ExportError, ImagesError, SplitError, FidelityError, OSError: as `lay_ground`.
        FitError, CertifyError: as `fit`.
        PerfError, ServerError, ClientError: the graphs cannot be priced.
    """
    ground = lay_ground(request, workshop, bars)
    asked, fidelity, parts = ground.asked, ground.fidelity, ground.parts
    road = _Road(ground, request, workshop, bars)
    road.answer(asked.lows)
    trained: list[Trained] = []
    if request.adapt_minutes is None:
        road.shortlist()
    else:
        trained = _adapt(road)
    graphs, prices, ms = road.graphs, road.prices, costs_ms(road.prices, road.full)
    agreement = parts.agreements(list(prices), graphs, fidelity, bars)
    goal = replace(request.goal, choices=max(1, len(road.listed)))  # each its share of δ
    tested = [_test(one, graphs, ms, goal, fidelity, parts, bars) for one in road.listed]
    best = choose(tested)
    chosen = best if best is not None and best.ms_per_image < ms[road.full] else None
    return Planned(
        request, graphs, road.lows, road.highs, road.beside, parts, fidelity, road.aligned, prices,
        agreement, road.candidates, tested, chosen,
        [*road.notes, *(found.line for found in trained)], road.backbone.adapted, trained,
    )  # fmt: skip


class _Road:
    """What a plan has found so far, from the ground to the shortlist.

    Attributes:
        backbone: the model, which knows all adapted states.
        graphs: all that were exported and aligned.
        pairs: outputs for the fit images, by (cheap, full) graph.
        aligned, prices, candidates: as of `Planned`.
        listed: the shortlist.
        notes: as of `Planned`, without those of trainings.
        full, highs, beside: names of graphs.
    """

    def __init__(self, ground: Ground, request: Request, workshop: Workshop, bars: Bars) -> None:
        self.ground, self.request, self.workshop, self.bars = ground, request, workshop, bars
        self.backbone, self.graphs = ground.backbone, ground.graphs
        self.full = ground.graphs.reference.name
        self.highs, self.beside = (
            ground.names(ground.asked.highs),
            ground.names(ground.asked.beside),
        )
        self.pairs: dict[Pair, Outputs] = {}
        self.aligned: dict[str, Aligned] = {}
        self.prices: Prices = {}
        self.candidates: list[Candidate] = []
        self.listed: list[Candidate] = []
        self.notes = list(ground.notes)

    @property
    def lows(self) -> list[str]:
        """Names of the cheap graphs."""
        return list(dict.fromkeys(low for low, _ in self.pairs))

    def answer(self, recipes: Iterable[Recipe]) -> None:
        """Let cheap graphs answer the fit images, aligned where that is asked for and helps."""
        ground, bars = self.ground, self.bars
        for recipe in recipes:
            (name,) = ground.names([recipe])
            if recipe.align:
                outputs = ground.parts.outputs(name, [self.full], self.graphs, "fit", bars)
                self.graphs, name, self.aligned[name] = aligned_graph(
                    *(self.graphs, name, outputs[name, self.full], ground.fidelity),
                    *(self.request, self.workshop, bars),
                )
            self.pairs |= ground.parts.outputs(name, self.highs, self.graphs, "fit", bars)

    def adopt(self, trained: Sequence[Trained]) -> bool:
        """Export the adapted twins of the candidates, and let them answer.

        A twin that does not export as it should is left out with its like, with a note.

        Returns:
            Whether there are new candidates.
        """
        asked, backbone = self.ground.asked, self.backbone
        states = {found.state.key: found.state for found in trained if found.state is not None}
        recipes = twins(asked.lows, trained)
        if not recipes:
            return False
        backbone = replace(backbone, adapted={**backbone.adapted, **states})
        try:
            self.graphs = exported(
                *(self.request, asked.full, replace(asked, lows=recipes).exported, backbone),
                *(self.workshop, self.bars, self.ground.parts.rows("fit")),
            )
        except ExportError as error:
            self.notes.append(f"adapted graphs are left out: {error}")
            return False
        self.backbone = backbone
        self.answer(recipes)
        return True

    def allows(self, pair: Pair) -> bool:
        """Whether a lone image through both graphs stays within the latency budget."""
        latency = sum(budget_latency_ms(self.prices[name]) for name in pair)
        budget = self.request.latency_budget_ms
        return budget is None or latency <= budget

    def shortlist(self) -> None:
        """Price all graphs in one run, predict every cascade, list those that are worth a test."""
        request, parts = self.request, self.ground.parts
        names = list(dict.fromkeys([*self.lows, *self.highs, *self.beside, self.full]))
        rows = parts.rows("fit")
        self.prices = self.workshop.price(self.graphs, names, request, rows, self.bars)
        ms = costs_ms(self.prices, self.full)
        with self.bars.stage("predict on the fit split", len(self.lows)) as bar:
            self.candidates = predict(
                self.pairs,
                parts.groups[parts.splits["fit"]],
                self.ground.fidelity,
                request.goal,
                parts.certify_images,
                ms,
                ms[self.full],
                request.seed,
                bar.advance,
            )
        most = checks.choices_for(parts.certify_images, request.goal, MOST)
        self.listed = shortlist(self.candidates, self.allows, most)


def _adapt(road: _Road) -> list[Trained]:
    """Train what the shortlist asks for, and make it anew with what came of that."""
    ground, asked, fidelity = road.ground, road.ground.asked, road.ground.fidelity
    adapting = Adapting(
        *(road.request, ground.backbone, asked.full, road.graphs, ground.parts, fidelity),
        (asked.lows, asked.highs),
    )
    recipes = adapting.remembered()
    if recipes is None:
        road.shortlist()
        offered = bodies(asked.lows, asked.full)
        recipes = wanted(offered, road.listed, road.pairs, road.graphs, fidelity, road.allows)
        adapting.remember(recipes)
    trained = adapting.train(recipes, road.workshop, road.bars)
    if road.adopt(trained) or not road.prices:
        road.shortlist()
    return trained


def costs_ms(prices: Prices, full: str) -> dict[str, float]:
    """Milliseconds per image of each graph, served as it was priced; a mean over the images.

    Of the full model the median; of every other graph its ratio to the full model, taken turn by
    turn in one run, times that: two servers minutes apart differ by more than many graphs do. Where
    the clock was disturbed, the ratio is of CPU time, which other work on the machine disturbs
    less; it orders the cascades, and is told as no figure.
    """
    full_ms = float(prices[full]["ms_per_image"]["median"])
    ratio, by_cpu = "cost_ratio", [price["cpu_cost_ratio"] for price in prices.values()]
    if disturbed(prices) and all(spread and spread["median"] > 0 for spread in by_cpu):
        ratio = "cpu_cost_ratio"
    return {name: full_ms * float(price[ratio]["median"]) for name, price in prices.items()}


def budget_latency_ms(price: Mapping[str, Any]) -> float:
    """What a lone image takes of a latency budget in a graph.

    The median; where it depends on the image, the `LATENCY_PERCENTILE`-th percentile over images.
    """
    if price["per_image"] is None:
        return float(price["latency_ms"]["median"])
    return float(price["per_image"]["latency_ms"][f"p{LATENCY_PERCENTILE}"])


def disturbed(prices: Prices) -> list[str]:
    """Names of the graphs of which clock and CPU time tell different stories."""
    return [name for name, price in prices.items() if price["disturbed"]]


def choose_rungs(planned: Planned, workshop: Workshop, bars: Bars) -> None:
    """Write the chosen cascade to `request.out`: onnx/, calibration.json and outputs.json.

    Raises:
        OSError: a file cannot be written.
    """
    chosen, request = planned.chosen, planned.request
    assert chosen is not None
    graphs = planned.graphs.cast(chosen.candidate.low, chosen.candidate.high)
    fitted = with_reference_answers(
        chosen.fit, chosen.outputs, graphs, request.reference_images, bars.say
    )
    folder = request.out / "onnx"
    served = workshop.share(graphs.place(folder, [*planned.beside, *planned.highs]), folder)
    calibration = replace(fitted.calibration, rungs=served.rungs, reference=served.reference_record)
    replace(fitted, calibration=calibration).save(request.out / "calibration.json")
    # The files are others, what they answer is the same.
    parts, made = planned.parts, Made.by(served)
    refer(request.out / "outputs.json", parts.cache, graphs, parts.rows(), made)


def _divide(
    request: Request, asked: checks.Asked, cache: AnswerCache, head: str, bars: Bars
) -> Parts:
    """The parts; images that cannot be read, or that are one group, are known only now."""
    try:
        parts = Parts.divide(request, cache, head, asked.learned, bars)
        checks.check_count(len(parts.places))
    except SplitError as error:
        raise PlanError(f"{error}; {checks.needed(request, asked)}") from None
    checks.check_certify_images(parts.certify_images, parts.groups.tolist(), request, asked)
    return parts


def _test(
    candidate: Candidate,
    graphs: GraphSet,
    ms: Mapping[str, float],
    goal: Goal,
    fidelity: Fidelity,
    parts: Parts,
    bars: Bars,
) -> Tested:
    """Certify a cascade of the shortlist."""
    low, high = candidate.low, candidate.high
    outputs = parts.outputs(low, [high], graphs, None, bars)[low, high]
    assert len(outputs) == len(parts.places)  # `usable` and `Parts.divide` leave out the same
    request = parts.request
    options = Options(fidelity, candidate.signal, request.group_by, request.seed)
    found = fit(outputs, graphs.cast(low, high), goal, options, splits=parts.splits)
    threshold = found.calibration.threshold
    scores = found.scores[parts.splits["certify"]]
    escalation = float(escalation_mask(scores, threshold, Overrides()).mean())
    cost = cascade_ms(ms[low], ms[high], escalation)
    return Tested(candidate, outputs, found, threshold is not None, escalation, cost)
