"""Shortlist cascades on the fit split, certify all of the shortlist, choose the cheapest certified.

A cascade is a cheap graph, a full graph and a signal; a model of A cheap and B full graphs offers
A x B x 6. What a choice among them does to a certificate is the point of this module:

1. On the **fit** split the test of every cascade is played out `PLAYS` times, each time on as many
   images as the certify split has, drawn from the fit images with replacement (the bootstrap, Efron
   1979), at each share of δ that it might get. What a play costs is the cascade's cost with the
   escalation that it certifies, and the full model's where it certifies nothing cheaper: a cascade
   that is cheap but seldom passes, because its full graph alone loses about as much as the test
   allows, is told from one that does. The shortlist are those K cascades, at most `MOST`, of which
   the cheapest that passes costs least on average. K and who is in it depend on the fit split, and
   on how many images the certify split has, never on what these answer.
2. On the **certify** split each of the K is tested at δ / K (Bonferroni), so that with probability
   1 - δ all K statements hold at once, and with them that of any one we then choose, whatever the
   choice looks at. Thresholds within a cascade are a fixed sequence and cost nothing more.
3. The cheapest of those certified is chosen by its escalation on the certify split.

Why a split of δ and not a fixed sequence over cascades: a sequence ends with the first failure, and
every cascade's own walk over thresholds ends in one, so nothing would be left for the second
cascade. Where the full graph is not the reference, the risk need not grow with the threshold; the
fixed sequence stays valid, see `certify`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from calibration.certify import Goal, allowed_errors
from calibration.coefficients import FitSample, out_of_fold
from calibration.fidelity import Fidelity
from calibration.outputs import Outputs
from calibration.record import Fit
from calibration.scoring import learn_sign

MOST = 4
PLAYS = 300
_AT_ONCE = 2**20  # images of all plays that are counted together: 8 MiB an array

Pair = tuple[str, str]
FloatMatrix = NDArray[np.float64]


@dataclass(frozen=True)
class Candidate:
    """A cascade with what it is predicted to cost.

    Attributes:
        low: name of the cheap graph.
        high: name of the full graph.
        signal: key of `routing.SIGNALS`.
        escalation: predicted where it is certified, 0..1; infinite where it never is.
        ms_per_image: predicted, without the router; what the full model costs counts for the plays
            in which nothing cheaper is certified.
        chance: of being certified.
        plays: what it costs in each play, of K cascades tested, (MOST, PLAYS).
    """

    low: str
    high: str
    signal: str
    escalation: float
    ms_per_image: float
    chance: float
    plays: FloatMatrix = field(repr=False, compare=False)


@dataclass(frozen=True, eq=False)
class Offer:
    """A cascade and what n images say of it, none scored by what it taught.

    Attributes:
        low: name of the cheap graph.
        high: name of the full graph.
        signal: key of `routing.SIGNALS`.
        ranked: raw values of the signal, (n,), larger escalating first.
        loss: the fidelity loss of the cheap answers, BOOL (n,).
        high_loss: that of the escalated answers, where the full graph is not the reference.
    """

    low: str
    high: str
    signal: str
    ranked: NDArray[np.float64]
    loss: NDArray[np.bool_]
    high_loss: NDArray[np.bool_] | None


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
    full_ms: float,
    seed: int,
    progress: Callable[[], None] = lambda: None,
) -> list[Candidate]:
    """Every cascade with its predicted cost if it alone is tested, the cheapest first.

    Args:
        pairs: outputs by (cheap, full) graph, of the n fit images, cross-fitted.
        groups: of the n images.
        fidelity: when an answer is a loss.
        goal: of one test.
        certify_images: independent ones that the test will have.
        costs_ms: of an image, by graph; the mean where it depends on the image.
        full_ms: of an image where nothing cheaper is certified.
        seed: of the folds and the plays.
        progress: called after each cheap graph.
    """
    drawn = _draws(groups, certify_images, seed)
    allowed = [allowed_errors(certify_images, replace(goal, choices=k)) for k in range(1, MOST + 1)]
    found: list[Candidate] = []
    for low in dict.fromkeys(name for name, _ in pairs):
        for seen in offers(
            {pair: pairs[pair] for pair in pairs if pair[0] == low}, groups, fidelity, seed
        ):
            escalation = play(seen.ranked, seen.loss, seen.high_loss, drawn, allowed)
            certified = np.isfinite(escalation)
            plays = plays_ms(escalation, costs_ms[low], costs_ms[seen.high], full_ms)
            mean = float(escalation[0, certified[0]].mean()) if certified[0].any() else np.inf
            found.append(
                Candidate(
                    *(low, seen.high, seen.signal, mean, float(plays[0].mean())),
                    chance=float(certified[0].mean()),
                    plays=plays,
                )
            )
        progress()
    return sorted(found, key=lambda candidate: candidate.ms_per_image)


def offers(
    pairs: Mapping[Pair, Outputs], groups: NDArray[np.str_], fidelity: Fidelity, seed: int
) -> Iterator[Offer]:
    """Every cascade with its scores out of fold, all of one cheap graph in a row.

    Args:
        pairs: outputs by (cheap, full) graph, of n images.
        groups: of the n images.
        fidelity: when an answer is a loss.
        seed: of the folds.
    """
    for low in dict.fromkeys(name for name, _ in pairs):
        highs = [high for name, high in pairs if name == low]
        outputs = pairs[low, highs[0]]
        sample = FitSample.of(outputs, fidelity, np.arange(len(outputs)), groups)
        for signal, raw in out_of_fold(sample, seed).items():
            ranked = learn_sign(raw, sample.oracle, sample.loss) * raw
            for high in highs:
                yield Offer(
                    low, high, signal, ranked, sample.loss, fidelity.high_loss(pairs[low, high])
                )


def _draws(groups: NDArray[np.str_], certify_images: int, seed: int) -> NDArray[np.int64]:
    """How often each image is drawn in each play, (PLAYS, n): first a group, then its image.

    As the certify split has one image of each group, see `certify.one_per_group`.
    """
    _, inverse, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    chances = 1 / sizes[inverse]
    rng = np.random.default_rng(seed)
    return rng.multinomial(certify_images, chances / chances.sum(), PLAYS)


def play(
    ranked: NDArray[np.float64],
    loss: NDArray[np.bool_],
    high_loss: NDArray[np.bool_] | None,
    drawn: NDArray[np.int64],
    allowed: Sequence[int],
) -> FloatMatrix:
    """The test of a cascade on drawn images, as `certify` does it.

    Args:
        ranked: of n images, larger escalating first.
        loss: the fidelity loss of their cheap answers, BOOL (n,).
        high_loss: that of their escalated answers, where the full rung is not the reference.
        drawn: how often each image is drawn in each play, (P, n).
        allowed: the most errors that certify a threshold, of K tests.

    Returns:
        The escalation that is certified, infinite where none is, (K, P).
    """
    order = np.argsort(ranked, kind="stable")
    values, lost = ranked[order], loss[order]
    high_lost = None if high_loss is None else high_loss[order]
    ends = np.append(np.flatnonzero(values[1:] > values[:-1]), len(values) - 1)  # no tie is divided
    found = np.full((len(allowed), len(drawn)), np.inf)
    step = max(1, _AT_ONCE // len(values))
    for first in range(0, len(drawn), step):
        counts = drawn[first : first + step, order]
        kept = np.cumsum(counts, axis=1)
        errors = np.cumsum(counts * lost, axis=1)[:, ends]
        if high_lost is not None:
            highs = np.cumsum(counts * high_lost, axis=1)
            errors += highs[:, -1:] - highs[:, ends]
        escalation = 1 - kept[:, ends] / kept[:, -1:]
        for row, most in enumerate(allowed):
            failed = errors > most
            passed = np.where(failed.any(axis=1), failed.argmax(axis=1), len(ends))
            some = np.flatnonzero(passed)
            found[row, first + some] = escalation[some, passed[some] - 1]
    return found


def plays_ms(escalation: FloatMatrix, low_ms: float, high_ms: float, full_ms: float) -> FloatMatrix:
    """What a cascade costs in each play: the full model's cost where it certifies nothing cheaper.

    Args:
        escalation: from `play`, (K, P).
        low_ms: of an image, of the cheap graph.
        high_ms: of the full graph.
        full_ms: of the full model.
    """
    certified = np.isfinite(escalation)
    cost = low_ms + np.where(certified, escalation, 0) * high_ms
    return np.where(certified, np.minimum(cost, full_ms), full_ms)


def shortlist(
    candidates: Sequence[Candidate], allowed: Callable[[Pair], bool], most: int = MOST
) -> list[Candidate]:
    """The cascades to test: those of which the cheapest that passes costs least on average.

    Args:
        candidates: from `predict`.
        allowed: whether a pair may be served, for instance within a latency budget.
        most: cascades to test; fewer than `MOST` where more could not all pass.

    Returns:
        At most one of each pair, the one that adds most first; none where none ever passes.
    """
    offered = [c for c in candidates if c.chance > 0 and allowed((c.low, c.high))]
    pairs = [(c.low, c.high) for c in offered]
    best: tuple[float, list[Candidate]] = (np.inf, [])
    for tests in range(1, most + 1):
        costs = [c.plays[tests - 1] for c in offered]
        listed, cost = cheapest_together(pairs, [costs] * tests)
        if cost < best[0]:
            best = (cost, [offered[place] for place in listed])
    return best[1]


def cheapest_together(
    pairs: Sequence[Pair], costs: Sequence[Sequence[NDArray[np.float64]]]
) -> tuple[list[int], float]:
    """Cascades of which the cheapest costs little on average, the one that adds most first.

    Args:
        pairs: of each cascade, of which one is taken at most.
        costs: for each that is to be taken, what each cascade costs in every play as that one.

    Returns:
        Places of the cascades, and the mean cost of the cheapest of them; infinite of none.
    """
    listed: list[int] = []
    cost: NDArray[np.float64] | float = np.inf
    for each in costs:
        taken = {pairs[place] for place in listed}
        others = [place for place, pair in enumerate(pairs) if pair not in taken]
        if not others:
            break
        listed.append(min(others, key=lambda place: np.minimum(cost, each[place]).mean()))
        cost = np.minimum(cost, each[listed[-1]])
    return listed, float(np.mean(cost))


def choose(tested: Sequence[Tested]) -> Tested | None:
    """The cheapest certified cascade; None where none is certified."""
    certified = [entry for entry in tested if entry.certified]
    return min(certified, key=lambda entry: entry.ms_per_image, default=None)
