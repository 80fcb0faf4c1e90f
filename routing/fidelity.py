"""When a cheap answer is not acceptable in place of another: the fidelity loss."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .outputs import FloatArray, RungOutputs

KINDS = ("top1", "labels", "value", "cosine")
LABEL_THRESHOLD = 0.5  # from this probability on a label belongs to the answer


def cosine(low: FloatArray, other: FloatArray) -> NDArray[np.float64]:
    """Cosine between two sets of embeddings (N, D), FP64 (N,)."""
    a, b = low.astype(np.float64), other.astype(np.float64)
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.asarray((a * b).sum(axis=1) / np.maximum(lengths, np.finfo(np.float64).tiny))


def disagrees(low: RungOutputs, other: RungOutputs) -> NDArray[np.bool_] | None:
    """Whether two answers name different classes, BOOL (N,).

    None where no class is named: without a head, or with one output, which is always the largest.
    """
    if low.logits is None or other.logits is None or low.logits.shape[1] < 2:
        return None
    return np.asarray(low.logits.argmax(axis=1) != other.logits.argmax(axis=1))


def label_cut(label_threshold: float) -> float:
    """The logit from which on a label's sigmoid reaches a probability, more than 0 and below 1."""
    return math.log(label_threshold / (1 - label_threshold))


def label_sets(logits: NDArray[Any], label_threshold: float) -> NDArray[np.bool_]:
    """Which labels belong to each answer, BOOL (N, C): of at least this probability."""
    return np.asarray(logits.astype(np.float64) >= label_cut(label_threshold))


def fidelity_loss(
    chosen_by: Mapping[str, Any], low: RungOutputs, other: RungOutputs
) -> NDArray[np.bool_]:
    """Whether the cheap answers are not acceptable in place of the others.

    Args:
        chosen_by: of a calibration: `fidelity` is one of `KINDS`, and its settings stand beside it.
            `top1`: another class. `labels`: another set of labels of at least the probability
            `label_threshold`. `value`: some output differs by more than `tolerance`, or with
            `relative` by more than this share of the other's. `cosine`: the embeddings' cosine is
            not at least 1 - `tolerance`.
        low: N answers of the cheap rung.
        other: N answers to the same images.

    Returns:
        BOOL (N,); NaN is always a loss.

    Raises:
        ValueError: an unknown kind, or one that does not apply.
    """
    kind, tolerance = chosen_by["fidelity"], chosen_by.get("tolerance")
    if kind == "cosine" and tolerance is not None:
        return np.asarray(~(cosine(low.embedding, other.embedding) >= 1 - tolerance))
    loss = None
    if low.logits is not None and other.logits is not None:
        if kind == "top1":
            loss = disagrees(low, other)
            if loss is not None:  # the largest of two answers may be the same NaN
                loss = loss | _holds_nan(low.logits) | _holds_nan(other.logits)
        elif kind == "labels":
            loss = _other_labels(low.logits, other.logits, chosen_by["label_threshold"])
        elif kind == "value" and tolerance is not None:
            first, second = low.logits.astype(np.float64), other.logits.astype(np.float64)
            allowed = tolerance * np.abs(second) if chosen_by.get("relative") else tolerance
            loss = ~(np.abs(first - second) <= allowed).all(axis=1)
    if loss is None:
        raise ValueError(f"fidelity {kind!r} (tolerance {tolerance}) does not apply to this model")
    return loss


def _other_labels(low: FloatArray, other: FloatArray, label_threshold: float) -> NDArray[np.bool_]:
    differs = label_sets(low, label_threshold) != label_sets(other, label_threshold)
    return np.asarray(differs.any(axis=1) | _holds_nan(low) | _holds_nan(other))


def _holds_nan(logits: FloatArray) -> NDArray[np.bool_]:
    return np.asarray(np.isnan(logits).any(axis=1))
