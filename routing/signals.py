"""Signals: named, pure functions from the cheap rung's outputs to one raw number per image.

A signal says nothing about units or about its sign against the oracle: `scoremap` learns both.
Each is computed row by row, so an image's value does not depend on its neighbours in the batch.

To add one, write the function and register it in `SIGNALS`; calibration, the router and the tests
find it there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from .outputs import RungOutputs

Coefficients = Mapping[str, NDArray[np.float64]]


@dataclass(frozen=True)
class Signal:
    """A registered signal.

    Attributes:
        name: as written in `calibration.json`.
        summary: one line for people.
        needs_logits: whether it can only be computed for a model with a head.
        compute: (outputs of B images, fitted coefficients) -> raw values, FP64 (B,).
        coefficients: names of the fitted arrays `compute` reads; empty where nothing is fitted.
    """

    name: str
    summary: str
    needs_logits: bool
    compute: Callable[[RungOutputs, Coefficients], NDArray[np.float64]]
    coefficients: tuple[str, ...] = ()


def softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Softmax over the last axis in FP64, stable for large logits."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    exponentials = np.exp(shifted)
    return np.asarray(exponentials / exponentials.sum(axis=-1, keepdims=True), dtype=np.float64)


def cls_path(outputs: RungOutputs, coefficients: Coefficients) -> NDArray[np.float64]:
    """Mean L2 length of the CLS token's step from layer to layer.

    The proxy of the research script this project grew from: an image whose CLS token still moves
    a lot was taken to need more compute. Measured since, its sign differs by model.
    """
    if outputs.cls_layers is None:
        raise ValueError("cls_path needs cls_layers")
    steps = np.diff(outputs.cls_layers.astype(np.float64), axis=1)  # (B, L, D)
    return np.asarray(np.linalg.norm(steps, axis=2).mean(axis=1))  # (B,)


def margin(outputs: RungOutputs, coefficients: Coefficients) -> NDArray[np.float64]:
    """One minus the gap between the two largest class probabilities, in 0..1.

    Scheffer et al. 2001, "Active hidden Markov models for information extraction" (margin
    sampling). A model with a single class has no second probability: its value is 0.
    """
    if outputs.logits is None:
        raise ValueError("margin needs logits")
    probabilities = softmax(outputs.logits)  # (B, C)
    if probabilities.shape[1] < 2:
        return np.zeros(len(outputs))
    top = np.partition(probabilities, -2, axis=1)[:, -2:]  # (B, 2), ascending
    return np.asarray(1.0 - (top[:, 1] - top[:, 0]))


SIGNALS: Mapping[str, Signal] = MappingProxyType(
    {
        signal.name: signal
        for signal in (
            Signal("cls_path", "mean L2 step of the CLS token across layers", False, cls_path),
            Signal("margin", "1 - (top-1 minus top-2 probability)", True, margin),
        )
    }
)
