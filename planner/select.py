"""Shortlist cascades on the fit split, certify all of the shortlist, choose the cheapest certified.

A cascade is a cheap graph, a full graph and a signal; a model of A cheap and B full graphs offers
A x B x 6. What a choice among them does to a certificate is the point of this module:

1. On the **fit** split every cascade gets its predicted cost: the escalation that brings the
   cross-validated risk down to what the test will allow, priced with the measured costs. The K
   cheapest (at most `MOST`, none dearer than `WITHIN` times the cheapest, and not so many that
   the images of the certify split are too few for δ / K) are the shortlist. K and who is in it
   depend on the fit split, and on how many images the certify split has.
2. On the **certify** split each of the K is tested at δ / K (Bonferroni), so that with probability
   1 - δ all K statements hold at once, and with them that of any one we then choose, whatever the
   choice looks at. Thresholds within a cascade are a fixed sequence and cost nothing more.
3. The cheapest of those certified is chosen by its escalation on the certify split.

Why a split of δ and not a fixed sequence over cascades: a sequence ends with the first failure, and
every cascade's own walk over thresholds ends in one, so nothing would be left for the second
cascade. And K - 1 further cascades cost little: going from δ to δ / 4 takes three or four of 31
allowed errors among 800 images at ε = 5 %. Where the full graph is not the reference, the risk need
not grow with the threshold; the fixed sequence stays valid, see `certify`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from calibration.certify import Goal
from calibration.coefficients import FitSample, out_of_fold
from calibration.fidelity import Fidelity
from calibration.fit import cross_validated_costs
from calibration.outputs import Outputs
from calibration.record import Fit
from calibration.scoring import learn_sign

MOST = 4
WITHIN = 1.15

Pair = tuple[str, str]


@dataclass(frozen=True)
class Candidate:
    """A cascade with what it is predicted to cost.

    Attributes:
        low: name of the cheap graph.
        high: name of the full graph.
        signal: key of `routing.SIGNALS`.
        escalation: predicted, 0..1; infinite where no escalation brings the risk down far enough.
        ms_per_image: predicted, without the router.
    """

    low: str
    high: str
    signal: str
    escalation: float
    ms_per_image: float


@dataclass(frozen=True, eq=False)
class Tested:
    """A shortlisted cascade after its test.

    Attributes:
        candidate: what was predicted.
        outputs: of its graphs for all images that have a part.
        fit: its signal, threshold and certificate.
        certified: whether the risk was proved.
        escalation: on the certify split at the certified threshold, 0..1.
        ms_per_image: with that escalation, without the router.
    """

    candidate: Candidate
    outputs: Outputs
    fit: Fit
    certified: bool
    escalation: float
    ms_per_image: float


def cascade_ms(low_ms: float, high_ms: float, escalation: float) -> float:
    """Expected cost of an image: the cheap graph for each, the full one for those that escalate."""
    return low_ms + escalation * high_ms if np.isfinite(escalation) else float("inf")


def predict(
    pairs: Mapping[Pair, Outputs],
    groups: NDArray[np.str_],
    fidelity: Fidelity,
    goal: Goal,
    certify_images: int,
    costs_ms: Mapping[str, float],
    seed: int,
    progress: Callable[[], None] = lambda: None,
) -> list[Candidate]:
    """Every cascade with its predicted cost, the cheapest first. Looks at the fit split only.

    Args:
        pairs: outputs by (cheap, full) graph, of the n fit images, cross-fitted.
        groups: of the n images.
        fidelity: when an answer is a loss.
        goal: with `choices` as many as the shortlist may have.
        certify_images: independent ones that the test will have.
        costs_ms: of an image, by graph.
        seed: of the folds.
        progress: called after each cheap graph.
    """
    found: list[Candidate] = []
    for low in dict.fromkeys(name for name, _ in pairs):
        highs = [high for name, high in pairs if name == low]
        outputs = pairs[low, highs[0]]
        sample = FitSample.of(outputs, fidelity, np.arange(len(outputs)), groups)
        raw = out_of_fold(sample, seed)
        ranking = {k: learn_sign(v, sample.oracle, sample.loss) * v for k, v in raw.items()}
        for high in highs:
            high_loss = fidelity.high_loss(pairs[low, high])
            needed = cross_validated_costs(ranking, sample.loss, high_loss, goal, certify_images)
            found += [
                Candidate(low, high, k, p, cascade_ms(costs_ms[low], costs_ms[high], p))
                for k, p in needed.items()
            ]
        progress()
    return sorted(found, key=lambda candidate: candidate.ms_per_image)


def shortlist(
    candidates: Sequence[Candidate], allowed: Callable[[Pair], bool], most: int = MOST
) -> list[Candidate]:
    """The cascades to test: each pair's best signal, the cheapest pairs.

    Args:
        candidates: from `predict`, the cheapest first.
        allowed: whether a pair may be served, for instance within a latency budget.
        most: cascades to test; fewer than `MOST` where more could not all pass.
    """
    best: dict[Pair, Candidate] = {}
    for candidate in candidates:
        if np.isfinite(candidate.ms_per_image) and allowed((candidate.low, candidate.high)):
            best.setdefault((candidate.low, candidate.high), candidate)
    ordered = list(best.values())[:most]
    return [c for c in ordered if c.ms_per_image <= WITHIN * ordered[0].ms_per_image]


def choose(tested: Sequence[Tested]) -> Tested | None:
    """The cheapest certified cascade; None where none is certified."""
    certified = [entry for entry in tested if entry.certified]
    return min(certified, key=lambda entry: entry.ms_per_image, default=None)
