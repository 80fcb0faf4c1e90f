"""What a way of dividing images is worth: the certified speed-up over many divisions of them.

All graphs answer all images once. Each division then makes a plan of its own, from alignment to
test, by those answers; an aligned graph's are made here, by the product that it would compute. This
and `simulation` are what the shares of `calibration.splits` and the number of cascades that
`select` tests were chosen by.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import Ridge, RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from bundle.alignment import tokens
from bundle.head import LinearHead
from calibration.align import fit_alignment
from calibration.certify import Goal, candidate_thresholds, certify
from calibration.coefficients import FitSample, fit_coefficients, out_of_fold, signal_values
from calibration.fidelity import Fidelity
from calibration.outputs import Outputs, with_embedding
from calibration.scoring import learn_sign
from calibration.splits import FIT_SHARE, Rows
from report.terminal import Bars

from .plan import costs_ms, lay_ground
from .request import PlanError, Request
from .select import MOST, Candidate, Pair, cascade_ms, predict, shortlist
from .workshop import Workshop

Aligns = Callable[["Study", Outputs, Rows, int], Outputs]


@dataclass(frozen=True)
class Design:
    """A way of dividing images and of using the parts.

    Attributes:
        name: in words.
        shares: of the images that align, fit and certify; where none align apart, the fit images
            do, cross-fitted. What is left over would be a test split.
        align: what makes an aligned graph's answers of a plain one's; None: nothing is aligned.
        most: cascades that are tested, each at its share of δ.
    """

    name: str
    shares: tuple[float, float, float]
    align: Aligns | None
    most: int = MOST


@dataclass(frozen=True, eq=False)
class Study:
    """What the graphs answer for N images, and what they cost.

    Attributes:
        pairs: outputs of every cheap graph, not aligned, with every full one.
        groups: of the images; none is divided.
        ms: of an image, by graph.
        full: name of the full model.
        fidelity: when an answer is a loss.
        head: embeddings to logits; None: the model has none.
    """

    pairs: Mapping[Pair, Outputs]
    groups: NDArray[np.str_]
    ms: Mapping[str, float]
    full: str
    fidelity: Fidelity
    head: LinearHead | None

    def speedups(
        self, design: Design, goals: Sequence[Goal], seed: int, images: int | None = None
    ) -> list[float]:
        """The certified speed-ups over the full model of one plan for each goal, of one division.

        Args:
            design: how the images are divided, and used.
            goals: what is to be certified.
            seed: of the division.
            images: how many of the N are used; None: all.

        Returns:
            One for each goal; 1 where nothing is certified.
        """
        align, fit, certified = self._divide(design, seed, images)
        pairs = self.pairs
        if design.align is not None:
            pairs = self.aligned(design.align, align if len(align) else fit, seed)
        return [self._speedup(pairs, fit, certified, goal, design.most, seed) for goal in goals]

    def aligned(self, align: Aligns, rows: Rows, seed: int) -> dict[Pair, Outputs]:
        """The outputs with every cheap graph aligned by these rows."""
        found = dict(self.pairs)
        for low in {low for low, _ in found}:
            highs = [high for name, high in found if name == low]
            answers = align(self, found[low, highs[0]], rows, seed).low
            found |= {(low, high): replace(found[low, high], low=answers) for high in highs}
        return found

    def _speedup(
        self,
        pairs: Mapping[Pair, Outputs],
        fit: Rows,
        certified: Rows,
        goal: Goal,
        most: int,
        seed: int,
    ) -> float:
        full_ms = self.ms[self.full]
        candidates = predict(
            {pair: outputs.rows(fit) for pair, outputs in pairs.items()},
            self.groups[fit],
            self.fidelity,
            goal,
            len(certified),
            self.ms,
            full_ms,
            seed,
        )
        listed = shortlist(candidates, lambda pair: True, most)
        goal = replace(goal, choices=max(1, len(listed)))
        costs = [self._certified_ms(c, pairs, fit, certified, goal, seed) for c in listed]
        return full_ms / min([full_ms, *costs])

    def _divide(self, design: Design, seed: int, images: int | None) -> list[Rows]:
        names, inverse = np.unique(self.groups, return_inverse=True)
        rank = np.random.default_rng(seed).permutation(len(names))[inverse]
        ends = np.round(np.cumsum((0.0, *design.shares)) * min(images or len(names), len(names)))
        return [
            np.flatnonzero((start <= rank) & (rank < end))
            for start, end in zip(ends[:-1], ends[1:], strict=True)
        ]

    def _certified_ms(
        self,
        candidate: Candidate,
        pairs: Mapping[Pair, Outputs],
        fit: Rows,
        certified: Rows,
        goal: Goal,
        seed: int,
    ) -> float:
        outputs, signal = pairs[candidate.low, candidate.high], candidate.signal
        sample = FitSample.of(outputs, self.fidelity, fit, self.groups)
        unseen = out_of_fold(sample, seed)[signal]
        sign = learn_sign(unseen, sample.oracle, sample.loss)
        coefficients = fit_coefficients(sample, seed)[signal]
        tested = outputs.rows(certified)
        scores = sign * signal_values(signal, tested.low, coefficients)
        thresholds = candidate_thresholds(sign * unseen)
        lost, high_lost = self.fidelity.loss(tested), self.fidelity.high_loss(tested)
        verdict = certify(scores, lost, thresholds, goal, high_lost)
        if verdict.threshold is None:
            return float("inf")
        escalation = float((scores > verdict.threshold).mean())
        return cascade_ms(self.ms[candidate.low], self.ms[candidate.high], escalation)


def study(request: Request, workshop: Workshop, bars: Bars) -> Study:
    """Let every graph answer every image, and price the graphs.

    Raises:
        PlanError: a model whose head no alignment reaches.
        What `plan.make_plan` raises.
    """
    ground = lay_ground(request, workshop, bars)
    graphs, parts = ground.graphs, ground.parts
    head = LinearHead.read(graphs.reference.file)
    if head is None and ground.asked.task is not None:
        raise PlanError("designs that align cannot be studied: this head reads more than CLS")
    full, highs = graphs.reference.name, ground.names(ground.asked.highs)
    lows = ground.names(ground.asked.lows)
    pairs: dict[Pair, Outputs] = {}
    for low in lows:
        pairs |= parts.outputs(low, highs, graphs, None, bars)
    names = list(dict.fromkeys([*lows, *highs, full]))
    prices = workshop.price(graphs, names, request, parts.rows("fit"), bars)
    return Study(pairs, parts.groups, costs_ms(prices, full), full, ground.fidelity, head)


def to_the_mean(study: Study, outputs: Outputs, rows: Rows, seed: int) -> Outputs:
    """Ridge on the embedding itself, which shrinks towards the mean of those learned from."""
    sample = outputs.rows(rows)
    alphas = np.logspace(-1, 5, 13)
    inputs = tokens(sample.low).astype(np.float64)
    scaled = StandardScaler().fit_transform(inputs)
    alpha = RidgeCV(alphas).fit(scaled, sample.truth.embedding).alpha_
    ridge = make_pipeline(StandardScaler(), Ridge(alpha)).fit(inputs, sample.truth.embedding)
    embedding = ridge.predict(tokens(outputs.low).astype(np.float64)).astype(np.float32)
    return replace(outputs, low=with_embedding(outputs.low, _all(outputs), embedding, study.head))


def to_no_alignment(study: Study, outputs: Outputs, rows: Rows, seed: int) -> Outputs:
    """The alignment that is served, cross-fitted for the images that it learned; or none."""
    found = fit_alignment(outputs, rows, study.groups, ("", ""), study.fidelity, study.head, seed)
    if not found.helps:
        return outputs
    alignment, everywhere = found.alignment, _all(outputs)
    low = with_embedding(outputs.low, everywhere, alignment.embedding(outputs.low), study.head)
    return replace(outputs, low=with_embedding(low, rows, alignment.cross_fitted, study.head))


def _all(outputs: Outputs) -> Rows:
    return np.arange(len(outputs))


def designs(shares: Sequence[float] = (0.25, 0.5)) -> list[Design]:
    """Those that were weighed, and the fit split's share of others besides today's."""
    rest = 1 - FIT_SHARE
    return [
        Design("shrunk to the mean; 42/23/23 % and a test split", (0.42, 0.23, 0.23), to_the_mean),
        Design("no alignment; 40/40 % and a test split", (0.0, 0.4, 0.4), None),
        Design("residual; 42/23/23 % and a test split", (0.42, 0.23, 0.23), to_no_alignment),
        Design("residual, cross-fitted", (0.0, FIT_SHARE, rest), to_no_alignment),
        Design("the same, one cascade tested", (0.0, FIT_SHARE, rest), to_no_alignment, 1),
        *(
            Design(f"the same, {share:.0%} fit", (0.0, share, 1 - share), to_no_alignment)
            for share in shares
        ),
    ]
