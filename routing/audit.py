"""What live traffic says: of the certificate, by a sequential test, and of a candidate artifact.

A random share of all images asked about without parameters is looked at, off the request path: each
has a loss if the answer that the certified threshold decides on is not acceptable in place of the
reference's. Where the full rung is the reference, an image that is to escalate has none. Each such
image is an independent draw of the risk, the share of *all* images that have a loss.

The test may be read after every image: it is a mixture likelihood ratio against "risk at most
epsilon", a non-negative supermartingale under that hypothesis, so that by Ville's inequality it
ever reaches 1/alpha with probability at most alpha (Robbins 1970; Ramdas et al. 2023,
"Game-theoretic statistics and safe anytime-valid inference"). It is mixed over the moment at which
the images change, too: else a long time of sound ones would hide that they are no longer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .calibration import Calibration
from .outputs import RungOutputs
from .policy import Overrides, escalation_mask

SHADOW_OUTCOMES = ("both_low", "both_high", "only_live_high", "only_candidate_high")

# Risks above epsilon that the mixture looks for: a grid, because a sum of likelihood ratios needs
# no special functions. Denser towards epsilon, where the ones are that would really occur.
_ALTERNATIVES = 64
_BLOCK = 16  # images between two moments at which a change is looked for
_RECENT = 8  # blocks that keep each of their moments; twice as many back every other is kept, ...


@dataclass
class RiskTest:
    """Whether the realised risk contradicts a certificate.

    Attributes:
        epsilon: the certified risk, 0 < epsilon < 1.
        alpha: probability of an alarm, ever, while the risk is at most epsilon.
        images: looked at so far.
        losses: among them.
        moments: at which the images may have changed: the images and the losses up to then. Not
            all are kept: what is left out of a sum only makes it smaller.
    """

    epsilon: float
    alpha: float = 0.01
    images: int = 0
    losses: int = 0
    moments: list[tuple[int, int]] = field(default_factory=lambda: [(0, 0)])

    def __post_init__(self) -> None:
        if not 0 < self.epsilon < 1:
            raise ValueError(f"epsilon {self.epsilon} is not between 0 and 1")

    @classmethod
    def of(cls, certificate: Mapping[str, Any]) -> RiskTest:
        """The test of a certificate of `calibration.certify` that certifies a threshold.

        `ltt` bounds the risk by epsilon. `crc` bounds its average over calibrations, of which many
        exceed epsilon: with k errors allowed among n certify images the risk is stochastically at
        most Beta(k + 1, n - k), so its quantile at 1 - alpha/2 is tested, at alpha/2. `live`
        bounds the risk by epsilon too, and says what of alpha each of its thresholds may use.
        """
        if certificate.get("method") != "crc":
            return cls(certificate["epsilon"], certificate.get("alarm", cls.alpha))
        half = cls.alpha / 2
        return cls(_beta_quantile(certificate["allowed"], certificate["n"], half), half)

    def observe(self, lost: bool) -> None:
        """Count one image: whether it has a loss."""
        self.images += 1
        self.losses += lost
        if self.images % _BLOCK == 0:
            self.moments = [*filter(self._is_kept, self.moments), (self.images, self.losses)]

    def _is_kept(self, moment: tuple[int, int]) -> bool:
        age = (self.images - moment[0]) // _BLOCK
        return moment[0] // _BLOCK % (1 << (age // _RECENT).bit_length()) == 0

    @property
    def log_evidence(self) -> float:
        """Natural logarithm of the evidence against "risk at most epsilon"; 0 at the start."""
        steps = np.arange(1, _ALTERNATIVES + 1) / (_ALTERNATIVES + 1)
        risks = self.epsilon + (1 - self.epsilon) * steps**2
        before = np.array(self.moments, np.float64).T[:, :, np.newaxis]
        images, losses = self.images - before[0], self.losses - before[1]
        ratios = losses * np.log(risks / self.epsilon)
        ratios += (images - losses) * np.log((1 - risks) / (1 - self.epsilon))
        # A half for no change, and the other for one at moment 1, 2, ...: all weights make 1.
        moments = before[0] // _BLOCK
        weights = np.where(moments == 0, 1.0, 1 / np.maximum(moments * (moments + 1), 1)) / 2
        later = 0.5 / (self.images // _BLOCK + 1)  # of moments to come, whose evidence is 1
        terms = np.append(ratios + np.log(weights / _ALTERNATIVES), math.log(later))
        return float(np.logaddexp.reduce(terms))

    @property
    def is_contradicted(self) -> bool:
        """Whether the evidence has reached 1/alpha."""
        return self.log_evidence >= -math.log(self.alpha)


def compare_decisions(
    candidate: Calibration, low: RungOutputs, live: NDArray[np.bool_]
) -> dict[str, int]:
    """Count how a candidate artifact decides beside the live one, about n images.

    Both belong to the same rungs, so what the cheap rung said of an image serves both and a shadow
    costs no further call. `live`, BOOL (n,), is what the live artifact wants to escalate.

    Returns:
        Images by outcome, one entry for each of `SHADOW_OUTCOMES`.
    """
    wanted = escalation_mask(candidate.score(low), candidate.threshold, Overrides())
    found = (~live & ~wanted, live & wanted, live & ~wanted, ~live & wanted)
    return {name: int(mask.sum()) for name, mask in zip(SHADOW_OUTCOMES, found, strict=True)}


def _beta_quantile(k: int, n: int, above: float) -> float:
    """The p that Beta(k + 1, n - k) exceeds with this probability, which is P(Bin(n, p) <= k)."""
    ways = [math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) for i in range(k + 1)]
    low, high = 0.0, 1.0
    for _ in range(50):  # bisection, to the last bits
        p = (low + high) / 2
        hit, miss = math.log(p), math.log1p(-p)
        at_most = math.fsum(math.exp(w + i * hit + (n - i) * miss) for i, w in enumerate(ways))
        low, high = (p, high) if at_most > above else (low, p)
    return high
