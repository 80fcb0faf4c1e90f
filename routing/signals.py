"""Signals: named, pure functions from the cheap rung's outputs to one raw number per image.

A signal says nothing about units or about its sign against the oracle: `scoremap` learns both.
Some read fitted coefficients, which `calibration` fits and the artifact carries.

To add one, write the function and register it in `SIGNALS`; calibration, the router and the tests
find it there. If it reads coefficients, `calibration/coefficients.py` must know how to fit them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import features
from .outputs import RungOutputs

Coefficients = Mapping[str, NDArray[Any]]
Values = NDArray[np.float64]


@dataclass(frozen=True)
class Signal:
    """A registered signal.

    Attributes:
        name: as written in `calibration.json`.
        summary: one line for people.
        needs_logits: whether it can only be computed for a model with a head.
        compute: (outputs of B images, fitted coefficients) -> raw values, FP64 (B,).
        coefficients: names of the fitted arrays `compute` reads; empty where nothing is fitted.
        task: the one of `outputs.TASKS` that it means something for; None: for each, and for a
            model without a head.
    """

    name: str
    summary: str
    needs_logits: bool
    compute: Callable[[RungOutputs, Coefficients], Values]
    coefficients: tuple[str, ...] = ()
    task: str | None = None

    def applies_to(self, task: str | None) -> bool:
        """Whether it means something for a model of this task."""
        return self.task is None or self.task == task


def cls_path(outputs: RungOutputs, coefficients: Coefficients) -> Values:
    """Mean L2 length of the CLS token's step from layer to layer.

    The proxy of the research script this project grew from: an image whose CLS token still moves
    a lot was taken to need more compute. Measured since, its sign differs by model.
    """
    if outputs.cls_layers is None:
        raise ValueError("cls_path needs cls_layers")
    steps = np.diff(outputs.cls_layers.astype(np.float64), axis=1)  # (B, L, D)
    return np.asarray(np.linalg.norm(steps, axis=2).mean(axis=1))  # (B,)


def cls_regression(outputs: RungOutputs, coefficients: Coefficients) -> Values:
    """Ridge regression of the oracle on steps, cosines, norms and the final CLS token.

    Coefficients: `weights` (3L + 1 + D,), `bias` (1,); see `features.path_features`.
    """
    return _linear(features.path_features(outputs), coefficients)


def entropy(outputs: RungOutputs, coefficients: Coefficients) -> Values:
    """Entropy of the class probabilities, in nats.

    As an escalation signal in BranchyNet, Teerapittayanon et al. 2016.
    """
    return features.entropy(_logarithms(outputs, "entropy"))


def margin(outputs: RungOutputs, coefficients: Coefficients) -> Values:
    """One minus the gap between the two largest class probabilities, in 0..1.

    Scheffer et al. 2001, "Active hidden Markov models for information extraction" (margin
    sampling). A model with a single class has no second probability: its value is 1.
    """
    first, second = features.top_two(_logarithms(outputs, "margin"))
    return np.asarray(1.0 - (np.exp(first) - np.exp(second)))


def label_margin(outputs: RungOutputs, coefficients: Coefficients) -> Values:
    """How near the label that is nearest to its threshold comes to it, in logits, at most 0.

    Margin sampling for independent labels, as "binary minimum" in Brinker 2006, "On active learning
    in multi-label classification": the set of labels changes if any one of them crosses.
    Coefficients: `cut` (1,), the logit of the threshold.
    """
    if outputs.logits is None:
        raise ValueError("label_margin needs logits")
    distances = np.abs(outputs.logits.astype(np.float64) - coefficients["cut"][0])  # (B, C)
    return np.asarray(-distances.min(axis=1))


def layer_lens(outputs: RungOutputs, coefficients: Coefficients) -> Values:
    """How the predicted class settles over the last layers, weighed by logistic regression.

    Each of the last layers' CLS tokens is taken to class space by a fitted ridge map
    (nostalgebraist 2020, "the logit lens"; Belrose et al. 2023, "the tuned lens"). Coefficients:
    `lens_weights` (K, D, C), `lens_bias` (K, C), and `weights` (3K,), `bias` (1,) over
    `features.lens_features`. The value is a log-odds.
    """
    logarithms = _logarithms(outputs, "layer_lens")
    return _linear(_lens(outputs, logarithms, coefficients), coefficients)


def deferral(outputs: RungOutputs, coefficients: Coefficients) -> Values:
    """Logistic regression on softmax features and `layer_lens` features; a log-odds.

    A learned deferral rule, as in Jitkrittum et al. 2023, "When does confidence-based cascade
    deferral suffice?". Coefficients as `layer_lens`, with `weights` over both sets of features.
    """
    logarithms = _logarithms(outputs, "deferral")
    rows = [features.softmax_features(logarithms), _lens(outputs, logarithms, coefficients)]
    return _linear(np.concatenate(rows, axis=1), coefficients)


def _logarithms(outputs: RungOutputs, signal: str) -> Values:
    if outputs.logits is None:
        raise ValueError(f"{signal} needs logits")
    return features.log_softmax(outputs.logits)


def _lens(outputs: RungOutputs, logarithms: Values, coefficients: Coefficients) -> Values:
    weights, bias = coefficients["lens_weights"], coefficients["lens_bias"]
    return features.lens_features(outputs, logarithms, weights, bias)


def _linear(rows: Values, coefficients: Coefficients) -> Values:
    # Row by row rather than one matrix product, whose last bits depend on the size of the batch.
    return np.asarray((rows * coefficients["weights"]).sum(axis=1) + coefficients["bias"][0])


_LENS = ("lens_weights", "lens_bias")
_LINEAR = ("weights", "bias")

# Simplest first: of two that are worth the same, calibration takes the earlier.
SIGNALS: Mapping[str, Signal] = MappingProxyType(
    {
        signal.name: signal
        for signal in (
            Signal("margin", "1 - (top-1 minus top-2 probability)", True, margin, task="classes"),
            Signal("entropy", "entropy of the class probabilities", True, entropy, task="classes"),
            Signal(
                "label_margin",
                "how near a label comes to its threshold",
                True,
                label_margin,
                ("cut",),
                "labels",
            ),
            Signal("cls_path", "mean L2 step of the CLS token across layers", False, cls_path),
            Signal(
                "cls_regression",
                "ridge on the CLS token's path -> oracle",
                False,
                cls_regression,
                _LINEAR,
            ),
            Signal(
                "layer_lens",
                "how the class settles over the last layers",
                True,
                layer_lens,
                (*_LENS, *_LINEAR),
                "classes",
            ),
            Signal(
                "deferral",
                "logistic regression on softmax features and layer_lens",
                True,
                deferral,
                (*_LENS, *_LINEAR),
                "classes",
            ),
        )
    }
)
