"""The certificate: the largest threshold whose risk is proved, and the statement that goes with it.

The loss of an image is 1 if it is kept low and its cheap answer is not acceptable. It can only grow
with the threshold, and escalating everything makes it 0, so thresholds are tried from the
conservative end (most escalation first) until one fails:

- `ltt`: fixed-sequence testing with the exact binomial p-value (Angelopoulos et al. 2021, "Learn
  then Test"). With probability `confidence` over calibrations the risk is at most `max_risk`.
- `crc`: conformal risk control (Angelopoulos et al. 2022) for a monotone loss bounded by 1. The
  risk is at most `max_risk` on average over calibrations.

A full rung that is not the reference can lose escalated images too. The risk then need not grow
with the threshold: `ltt` stays valid, because each threshold's p-value is its own and the order was
fixed beforehand; `crc` does not, and is refused.

Both assume that the certify images are independent draws of what will be served, and that neither
the candidate thresholds nor the score have seen them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom

from .fidelity import Fidelity
from .metrics import needed_escalation
from .splits import Rows

FloatVector = NDArray[np.float64]

METHODS = ("ltt", "crc")
MORE = (1, 2, 4, 10)
RISKS = tuple(step / 1000 for step in range(1, 500))
MAX_CANDIDATES = 1000  # steps of 0.1 % escalation; every further one costs time and gains nothing


class CertifyError(ValueError):
    """The goal cannot be meant. One line that names the flag."""


@dataclass(frozen=True)
class Goal:
    """What the certificate shall promise.

    Attributes:
        max_risk: ε, the largest acceptable share of images that are kept low and lost.
        confidence: 1 - δ, of `ltt`; `crc` promises an average and has none.
        method: one of `METHODS`.
        choices: cascades among which one will be chosen after all have been tested. Each is tested
            at δ / choices, so that all hold together with probability 1 - δ (Bonferroni).
    """

    max_risk: float
    confidence: float
    method: str
    choices: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.max_risk < 1:
            raise CertifyError(
                f"--max-risk {self.max_risk} is a share of images: more than 0 and less than 1"
            )
        if not 0.5 <= self.confidence < 1:
            raise CertifyError(
                f"--confidence {self.confidence} is a probability: at least 0.5 and less than 1"
            )
        if self.method not in METHODS:
            raise CertifyError(f"--method {self.method!r} is none of {', '.join(METHODS)}")
        if self.choices < 1:
            raise CertifyError(f"{self.choices} choices are none; test at least one cascade")
        if self.method == "crc" and self.choices > 1:
            raise CertifyError("--method crc promises an average, which a choice would void; ltt")

    @property
    def delta(self) -> float:
        """δ of one test."""
        return float((1 - _as_typed(self.confidence)) / self.choices)


class Step(NamedTuple):
    """A tried threshold, in oracle units, and the certify images it kept low and lost."""

    threshold: float
    errors: int


@dataclass(frozen=True)
class Verdict:
    """The outcome of a certification.

    Attributes:
        threshold: the largest certified one, in oracle units; None: none is.
        n: images in the test.
        errors: images among them that are kept low and lost at `threshold`, or at the first
            threshold tried where that is None.
        allowed: the most errors that certify a threshold; -1: n is too small for any.
        path: everything tried, in order; the last one failed unless it is `threshold`.
    """

    threshold: float | None
    n: int
    errors: int
    allowed: int
    path: tuple[Step, ...]


def binomial_p_value(errors: int, n: int, epsilon: float) -> float:
    """P(Bin(n, ε) ≤ errors): how likely so few errors are where the risk is at least ε."""
    return float(binom.cdf(errors, n, epsilon))


@cache
def allowed_errors(n: int, goal: Goal) -> int:
    """The most errors among n images that still certify a threshold; -1 where none do.

    `ltt`: the largest k with P(Bin(n, ε) ≤ k) ≤ 1 - confidence. `crc`: the largest k with
    (k + 1) / (n + 1) ≤ ε.
    """
    if goal.method == "crc":
        return math.floor(_as_typed(goal.max_risk) * (n + 1)) - 1
    delta = goal.delta
    k = int(binom.ppf(delta, n, goal.max_risk))  # the smallest k with P ≥ δ, up to rounding
    while k >= 0 and binomial_p_value(k, n, goal.max_risk) > delta:
        k -= 1
    return k


def images_needed(goal: Goal) -> int:
    """The fewest images that can certify a threshold: just enough if none of them is lost."""
    if goal.method == "crc":
        return math.ceil(1 / _as_typed(goal.max_risk)) - 1
    return math.ceil(math.log(goal.delta) / math.log1p(-goal.max_risk))


def _as_typed(number: float) -> Fraction:
    """The decimal the user typed: 0.05 in binary is more than 1/20 and would cost an error."""
    return Fraction(str(float(number)))


def candidate_thresholds(scores: NDArray[np.floating[Any]]) -> FloatVector:
    """Thresholds worth trying, FP64, ascending: most escalation first.

    Midway between neighbouring scores, so that the last bit of a score decides nothing, and one
    above the largest. None escalates every one of `scores`: always-high needs no test. The scores,
    (M,), in oracle units, are of images that are NOT certified on.
    """
    distinct = np.unique(scores.astype(np.float64))
    spacing = max(float(np.ptp(distinct)), 1e-6) / len(distinct)
    edges = np.append((distinct[:-1] + distinct[1:]) / 2, distinct[-1] + spacing)
    if len(edges) <= MAX_CANDIDATES:
        return edges
    return np.asarray(edges[np.linspace(0, len(edges) - 1, MAX_CANDIDATES).round().astype(int)])


def one_per_group(groups: NDArray[Any], rows: Rows, seed: int) -> Rows:
    """Draw one image of each group, because images of one group are not independent.

    The certificate is then about an image drawn in the same way: a group, then one of its images.
    `groups` holds the group of each of N images; returned is one row of each group among `rows`,
    ascending.
    """
    shuffled = np.random.default_rng(seed).permutation(rows)
    _, first = np.unique(np.asarray(groups)[shuffled], return_index=True)
    return np.sort(shuffled[first])


def certify(
    scores: NDArray[np.floating[Any]],
    loss: NDArray[np.bool_],
    candidates: FloatVector,
    goal: Goal,
    high_loss: NDArray[np.bool_] | None = None,
) -> Verdict:
    """Find the largest threshold that is proved to meet the goal.

    Valid if the n images are independent draws of what will be served, and if score, fidelity loss
    and candidates were fixed without looking at them; see `one_per_group`.

    Args:
        scores: (n,), oracle units.
        loss: the fidelity loss, BOOL (n,).
        candidates: ascending, from `candidate_thresholds`.
        goal: what to prove.
        high_loss: the fidelity loss of escalated answers, BOOL (n,), where the full rung is not
            the reference.

    Raises:
        CertifyError: `crc`, where escalated images can be lost.
    """
    errors = _kept(scores, loss, candidates)
    if high_loss is not None:
        if goal.method == "crc":
            raise CertifyError(
                "--method crc needs a risk that only grows with the threshold; this full rung is "
                "not the reference, so use ltt"
            )
        errors = errors + high_loss.sum() - _kept(scores, high_loss, candidates)
    allowed = allowed_errors(len(scores), goal)
    # Both tests pass exactly up to `allowed` errors; the first threshold that fails ends the walk.
    failed = np.flatnonzero(errors > allowed)
    passed = int(failed[0]) if len(failed) else len(errors)
    tried = slice(0, passed + 1)
    path = tuple(map(Step, candidates[tried].tolist(), errors[tried].tolist()))
    kept = path[max(passed - 1, 0)]
    threshold = kept.threshold if passed else None
    return Verdict(threshold, len(scores), kept.errors, allowed, path)


def _kept(
    scores: NDArray[np.floating[Any]], which: NDArray[np.bool_], candidates: FloatVector
) -> NDArray[np.intp]:
    """How many of some images each threshold keeps low: those with a score at or below it."""
    return np.searchsorted(np.sort(scores[which].astype(np.float64)), candidates, side="right")


def statement(
    verdict: Verdict,
    goal: Goal,
    fidelity: Fidelity,
    grouped: bool = False,
    reference: str = "full rung",
) -> str:
    """What was proved, or that nothing was and why, in plain words.

    `grouped` says whether the images stand for groups of several, see `one_per_group`; `reference`
    is what answers are held against.
    """
    risk, confidence = _percent(goal.max_risk), f"with confidence {_percent(goal.confidence)}"
    crc = goal.method == "crc"
    if verdict.threshold is None:
        strength = "on average over calibrations" if crc else confidence
        reason = _why_not(verdict, goal, fidelity, reference)
        return (
            f"No threshold is certified for a risk of at most {risk} {strength}: {reason}. Every "
            "image therefore goes to the full rung."
        )
    drawn = "drawn as the calibration images were"
    if grouped:
        drawn += " (first a group, then one of its images)"
    promise = (
        f"at most {risk} of images {drawn}, requested without "
        f"parameters and not marked degraded, get an answer that {fidelity.words(reference)}"
    )
    if goal.choices > 1:
        promise += (
            f", whichever of the {goal.choices} cascades that were tested is chosen (each at "
            f"{_percent(1 - goal.delta)})"
        )
    if crc:
        promise = f"On average over repeated calibrations, {promise}; no confidence is attached"
    else:
        promise = f"W{confidence[1:]}, {promise}"
    return (
        f"{promise}. Of {verdict.n} certify images that nothing was fitted on, {verdict.errors} "
        f"did; up to {verdict.allowed} would have been allowed."
    )


def _why_not(verdict: Verdict, goal: Goal, fidelity: Fidelity, reference: str) -> str:
    if verdict.allowed < 0:
        return f"that {too_few(goal, verdict.n)}"
    return (
        f"even at the most careful threshold {verdict.errors} of {verdict.n} certify images get an "
        f"answer that {fidelity.words(reference)}, and up to {verdict.allowed} would have been "
        "allowed"
    )


def too_few(goal: Goal, n: int) -> str:
    """How many images a goal takes and how many there are, to be read after "that"."""
    return (
        f"takes {images_needed(goal)} independent certify images even if none of them is lost, and "
        f"there are {n}"
    )


def outlook(
    ranked: FloatVector,
    loss: NDArray[np.bool_],
    high_loss: NDArray[np.bool_] | None,
    goal: Goal,
    n: int,
) -> dict[str, Any]:
    """What more certify images would buy, and what these could prove, by the risk seen so far.

    Args:
        ranked: of the chosen signal on images that it has not learned, larger escalating first.
        loss: the fidelity loss of their cheap answers, BOOL.
        high_loss: that of their escalated answers, where the full rung is not the reference.
        goal: what is to be proved.
        n: certify images that there are.

    Returns:
        `images`: for `MORE` times as many certify images, their number `n` and the `escalation`
        at which as few images are lost as the test would allow, None where it allows none;
        `least_risk`: the least risk of which these n could certify a threshold that keeps an image
        low, in steps of 0.1 %; None where it would be 50 % or more.
    """

    def escalation(goal: Goal, n: int) -> float | None:
        allowed = allowed_errors(n, goal)
        if allowed < 0:
            return None
        needed = needed_escalation(ranked, loss, allowed / n, high_loss)
        return needed if needed < 1 else None

    few, many = 0, len(RISKS)  # the first risk that will do, by bisection
    while few < many:
        middle = (few + many) // 2
        there = escalation(replace(goal, max_risk=RISKS[middle]), n) is not None
        few, many = (few, middle) if there else (middle + 1, many)
    return {
        "images": [{"n": m, "escalation": escalation(goal, m)} for m in (k * n for k in MORE)],
        "least_risk": RISKS[few] if few < len(RISKS) else None,
    }


def goal_words(goal: Goal) -> str:
    """What is to be proved, in plain words."""
    crc = goal.method == "crc"
    strength = "on average" if crc else f"with confidence {_percent(goal.confidence)}"
    return f"a risk of at most {_percent(goal.max_risk)} {strength}"


def _percent(share: float) -> str:
    return f"{100 * share:g} %"


def certificate(
    verdict: Verdict,
    goal: Goal,
    fidelity: Fidelity,
    signal: str,
    grouped: bool = False,
    reference: str = "full rung",
) -> dict[str, Any]:
    """The artifact's record of a certification, as JSON types; arguments as `statement`."""
    return {
        "certified": verdict.threshold is not None,
        "method": goal.method,
        "epsilon": goal.max_risk,
        "confidence": None if goal.method == "crc" else goal.confidence,
        **fidelity.to_dict(),
        "signal": signal,
        "split": "certify",
        "n": verdict.n,
        "errors": verdict.errors,
        "allowed": verdict.allowed,
        "choices": goal.choices,
        "reference": reference,
        "statement": statement(verdict, goal, fidelity, grouped, reference),
    }
