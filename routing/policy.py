"""What a request may ask of the router, what pressure may change, and which images escalate."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

import numpy as np
from numpy.typing import NDArray

# The id of requests by which somebody watches the service: canaries, reference images. They are
# answered as any other and are no traffic: in no audit and no figure about images.
PROBE_ID = "adaptive-vit-probe"


class Policy(str, Enum):
    """Who answers: the calibrated threshold, or one rung for every image."""

    AUTO = "auto"
    LOW = "low"
    HIGH = "high"


@dataclass(frozen=True)
class Overrides:
    """A request's parameters, checked.

    Attributes:
        policy: `auto` unless the request names another.
        threshold: replaces the calibrated threshold, in oracle units; only with `auto`.
    """

    policy: Policy = Policy.AUTO
    threshold: float | None = None


@dataclass(frozen=True)
class Allowance:
    """How far a request's parameters may go.

    Attributes:
        careful_only: a request may only make routing more careful: lower the threshold or send
            `policy=high`. Otherwise it may ask for anything.
        threshold: the calibrated one, which `careful_only` compares with, in oracle units; None:
            all images escalate anyway, so that no request can be more careful.
    """

    careful_only: bool = False
    threshold: float | None = None

    def check(self, overrides: Overrides) -> None:
        """Refuse what is less careful than the artifact.

        Raises:
            ValueError: one line, fit for a client.
        """
        if not self.careful_only:
            return
        if overrides.policy is Policy.LOW:
            raise ValueError(f"policy=low is not allowed here; {_CAREFUL}")
        if overrides.threshold is None:
            return
        if self.threshold is None:
            raise ValueError("no threshold was certified, so requests may not bring one here")
        if overrides.threshold > self.threshold:
            raise ValueError(
                f"threshold {threshold_text(overrides.threshold)} is above the calibrated "
                f"{threshold_text(self.threshold)}; {_CAREFUL}"
            )


_CAREFUL = "a request may only lower the threshold or send policy=high"


def parse_overrides(
    parameters: Mapping[str, object], allowance: Allowance | None = None
) -> Overrides:
    """Check a request's parameters, as decoded from Triton's JSON; without an allowance all may be.

    Raises:
        ValueError: an unknown parameter or policy, a threshold that is no number and no text of
            one, a threshold beside a policy that ignores it, or one that is not allowed. One line,
            fit for a client.
    """
    overrides = _parsed(parameters)
    (allowance or Allowance()).check(overrides)
    return overrides


def _parsed(parameters: Mapping[str, object]) -> Overrides:
    unknown = sorted(set(parameters) - {"policy", "threshold"})
    if unknown:
        raise ValueError(f"unknown parameter {_short(unknown[0])}; known are policy and threshold")
    policy = parameters.get("policy", Policy.AUTO.value)
    try:
        chosen = Policy(policy)
    except ValueError:
        raise ValueError(f"policy {_short(policy)} is none of auto, low, high") from None
    threshold = parameters.get("threshold")
    if threshold is None:
        return Overrides(chosen)
    number = _number(threshold)
    if number is None:
        raise ValueError(
            f"threshold {_short(threshold)} is not a number; send a float in oracle units"
        )
    if math.isnan(number):
        raise ValueError("threshold is NaN; send a float in oracle units")
    if chosen is not Policy.AUTO:
        raise ValueError(f"threshold has no meaning with policy={chosen.value}; send one of them")
    return Overrides(chosen, number)


# What a client sent comes back to it and into logs, cut to a few words.
_short = reprlib.repr


def _number(value: object) -> float | None:
    """A number, also from its text: BLS callers and perf_analyzer cannot send a float."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        return None
    try:
        return float(value)
    except ValueError:
        return None


def escalation_mask(
    scores: NDArray[np.float32], calibrated_threshold: float | None, overrides: Overrides
) -> NDArray[np.bool_]:
    """Which images the full rung must answer: those whose score is not at or below the threshold.

    A score that is NaN proves nothing, so its image escalates.

    Args:
        scores: FP32 (B,), oracle units.
        calibrated_threshold: None stands for "no threshold was certified": all escalate.
        overrides: the request's parameters.

    Returns:
        BOOL (B,).
    """
    if overrides.policy is Policy.LOW:
        return np.zeros(scores.shape, dtype=np.bool_)
    if always_high(calibrated_threshold, overrides):
        return np.ones(scores.shape, dtype=np.bool_)
    threshold = calibrated_threshold if overrides.threshold is None else overrides.threshold
    # FP64: numpy would otherwise round the threshold to the scores' FP32 before comparing.
    return np.asarray(~(scores.astype(np.float64) <= np.float64(threshold)))


def always_high(calibrated_threshold: float | None, overrides: Overrides) -> bool:
    """Whether the request goes to the full rung without a look at the cheap one."""
    if overrides.policy is Policy.HIGH:
        return True
    no_threshold = calibrated_threshold is None and overrides.threshold is None
    return overrides.policy is Policy.AUTO and no_threshold


def threshold_text(threshold: float) -> str:
    """The shortest text that reads back as this very FP64 number, without `.0`.

    A threshold typed back from a text of four digits would send other images to the full rung.
    """
    text = repr(float(threshold))
    return text.removesuffix(".0")


@dataclass(frozen=True)
class Relief:
    """How far the threshold rises with the number of images that had to wait.

    Off unless the operator asked for it. An answer that it changed is marked `degraded`; the
    certificate is about the others only.

    Attributes:
        depth: images of one batch that had to wait from which on the threshold rises.
        full: images in a full batch; where all have waited the threshold is `highest`.
        highest: the limit, oracle units.
    """

    depth: int
    full: int
    highest: float

    def threshold(self, calibrated: float, waiting: int) -> float:
        """The threshold for a batch in which so many images had to wait, oracle units.

        It is the calibrated one below `depth`, and from there rises in equal steps to `highest`
        at `full`. It is never below the calibrated one.
        """
        if waiting < self.depth or self.highest <= calibrated:
            return calibrated
        steps = self.full - self.depth + 1
        share = min(1.0, (waiting - self.depth + 1) / steps)
        return calibrated + share * (self.highest - calibrated)
