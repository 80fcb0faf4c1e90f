"""When a cheap answer is not acceptable in place of another: the fidelity loss."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .outputs import FloatArray, RungOutputs

KINDS = ("top1", "cosine")


def cosine(low: FloatArray, other: FloatArray) -> NDArray[np.float64]:
    """Cosine between two sets of embeddings.

    Args:
        low: (N, D).
        other: (N, D).

    Returns:
        FP64 (N,).
    """
    a, b = low.astype(np.float64), other.astype(np.float64)
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.asarray((a * b).sum(axis=1) / np.maximum(lengths, np.finfo(np.float64).tiny))


def disagrees(low: RungOutputs, other: RungOutputs) -> NDArray[np.bool_] | None:
    """Whether two answers name different classes, BOOL (N,); None without a head."""
    if low.logits is None or other.logits is None:
        return None
    return np.asarray(low.logits.argmax(axis=1) != other.logits.argmax(axis=1))


def fidelity_loss(
    kind: str, tolerance: float | None, low: RungOutputs, other: RungOutputs
) -> NDArray[np.bool_]:
    """Whether the cheap answers are not acceptable in place of the others.

    Args:
        kind: `top1`: another class; `cosine`: a cosine that is not at least 1 - tolerance.
        tolerance: of `cosine`.
        low: N answers of the cheap rung.
        other: N answers to the same images.

    Returns:
        BOOL (N,).

    Raises:
        ValueError: an unknown kind, or one that does not apply.
    """
    if kind == "cosine" and tolerance is not None:
        return np.asarray(~(cosine(low.embedding, other.embedding) >= 1 - tolerance))
    loss = disagrees(low, other) if kind == "top1" else None
    if loss is None:
        raise ValueError(f"fidelity {kind!r} (tolerance {tolerance}) does not apply to this model")
    return loss
