"""A certificate from a stream of audited images, which holds at every moment, look as one may.

For a threshold fixed beforehand, an audited image is lost if it would be kept low and its cheap
answer is not acceptable. Against "the risk is more than ε" one bets on each image: a bet of b takes
the wealth W to W (1 + b (ε - lost)), with 0 < b < 1 / (1 - ε). Under that hypothesis no bet gains
on average, nor does a mixture of bets, whatever came before, so that the wealth ever reaches 1/δ
with probability at most δ (Ville 1939; Waudby-Smith and Ramdas 2024, "Estimating means of bounded
random variables by betting"). With losses of 0 and 1 it depends on two counts only.

Thresholds stand in a fixed sequence from careful to bold, and one is certified if its wealth and
that of all before it has reached 1/δ: then the first that ought not to be is certified with
probability at most δ, and with it any after it (fixed-sequence testing, as in Angelopoulos et al.
2021, "Learn then Test"). What has reached it stays certified; that traffic has changed since is
another test's to find, `routing.RiskTest`.

What must hold: whether an image is audited depends on nothing that is known of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.special import betaln, xlogy

FloatVector = NDArray[np.float64]
IntVector = NDArray[np.int64]

# Of the largest bet that cannot ruin. Small ones are best where the risk is little below ε.
BETS = np.linspace(0.02, 0.98, 25)
LEVEL = 0.95  # of a confidence sequence that is shown and decides nothing


@dataclass
class AnytimeTest:
    """The wealth of every threshold.

    Attributes:
        epsilon: ε, the largest risk that is promised.
        delta: of this test, the probability that a threshold is ever certified wrongly.
        thresholds: FP64 (T,), ascending, fixed before the first image.
        images: audited so far.
        kept: of them, those that each threshold keeps low, (T,).
        lost: of those, the losses, (T,).
        certified: how many thresholds are, from the first on.
    """

    epsilon: float
    delta: float
    thresholds: FloatVector
    images: int = 0
    kept: IntVector = field(default_factory=lambda: np.zeros(0, np.int64))
    lost: IntVector = field(default_factory=lambda: np.zeros(0, np.int64))
    certified: int = 0

    def __post_init__(self) -> None:
        """Begin with nothing counted where nothing is given."""
        if not len(self.kept):
            self.kept = np.zeros(len(self.thresholds), np.int64)
            self.lost = np.zeros(len(self.thresholds), np.int64)

    def observe(self, score: float | None, lost: bool) -> None:
        """Count one audited image, and certify what this certifies.

        Args:
            score: in the thresholds' units; None: it always escalates.
            lost: whether its cheap answer is a loss.
        """
        self.images += 1
        if score is not None:
            first = int(np.searchsorted(self.thresholds, score))
            self.kept[first:] += 1
            self.lost[first:] += lost
        if self.certified < len(self.thresholds):
            self._certify()

    def _certify(self) -> None:
        needed = -math.log(self.delta)
        reached = log_wealth(self.images, self.lost[self.certified :], self.epsilon) >= needed
        self.certified += int(len(reached) if reached.all() else reached.argmin())

    @property
    def threshold(self) -> float | None:
        """The boldest that is certified; None: none is."""
        return float(self.thresholds[self.certified - 1]) if self.certified else None

    def escalation(self) -> FloatVector:
        """The share of the audited images that each threshold escalates, (T,)."""
        return np.asarray(1 - self.kept / max(self.images, 1))

    def counts(self, threshold: float | None) -> tuple[int, int]:
        """Of the audited images those that a threshold keeps low, and those of them lost."""
        if threshold is None:
            return 0, 0
        at = int(np.searchsorted(self.thresholds, threshold, side="right")) - 1
        return (int(self.kept[at]), int(self.lost[at])) if at >= 0 else (0, 0)


def log_wealth(images: int, lost: IntVector, epsilon: float) -> FloatVector:
    """The logarithm of the wealth after so many images with so many losses, FP64 (T,)."""
    bets = BETS[:, np.newaxis] / (1 - epsilon)
    terms = lost * np.log1p(-bets * (1 - epsilon)) + (images - lost) * np.log1p(bets * epsilon)
    return np.asarray(np.logaddexp.reduce(terms, axis=0) - math.log(len(BETS)))


def images_needed(epsilon: float, delta: float) -> int:
    """The fewest audited images that can certify a threshold: just enough if none is lost."""
    images, none = 1, np.zeros(1, np.int64)
    while log_wealth(images, none, epsilon)[0] < -math.log(delta):
        images *= 2
    fewest = images // 2
    while images - fewest > 1:  # it grows with every image
        middle = (fewest + images) // 2
        enough = log_wealth(middle, none, epsilon)[0] >= -math.log(delta)
        fewest, images = (fewest, middle) if enough else (middle, images)
    return images


def share_of_delta(number: int) -> float:
    """What the test of this number, from 1 on, may use of δ: a half, a quarter, and so on."""
    return 0.5**number


def confidence_sequence(lost: int, images: int, level: float = LEVEL) -> tuple[float, float]:
    """An interval of the risk that, with its like of all other moments, covers it at this level.

    The risks p at which the likelihood of the counts is not too small beside its mean over all p,
    a Beta(1, 1) mixture (Robbins 1970; Howard et al. 2021, "Time-uniform, nonparametric,
    nonasymptotic confidence sequences").
    """
    if images == 0:
        return 0.0, 1.0
    least = betaln(1 + lost, 1 + images - lost) + math.log(1 - level)

    def inside(p: float) -> bool:
        return bool(xlogy(lost, p) + xlogy(images - lost, 1 - p) > least)

    centre = lost / images
    ends = []
    for end in (0.0, 1.0):
        near, far = centre, end
        if inside(far):
            near = far
        for _ in range(60):  # bisection, to the last bits
            middle = (near + far) / 2
            near, far = (middle, far) if inside(middle) else (near, middle)
        ends.append(near)
    return ends[0], ends[1]
