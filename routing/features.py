"""What signals are made of: numbers read off the cheap rung's outputs, row by row."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .outputs import RungOutputs

Features = NDArray[np.float64]

# Added to norms before dividing: a CLS token of length zero has no direction.
_EPSILON = 1e-12


def log_softmax(logits: NDArray[Any]) -> Features:
    """Logarithms of the class probabilities over the last axis in FP64, stable for large logits."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def entropy(logarithms: Features) -> Features:
    """Entropy over the last axis in nats (Shannon 1948), from `log_softmax`."""
    return np.asarray(-(np.exp(logarithms) * logarithms).sum(axis=-1))


def top_two(values: Features) -> tuple[Features, Features]:
    """The largest and the second largest along the last axis; a lone value is both."""
    if values.shape[-1] < 2:
        return values[..., 0], values[..., 0]
    top = np.partition(values, -2, axis=-1)
    return top[..., -1], top[..., -2]


def path_features(outputs: RungOutputs) -> Features:
    """The CLS token's path through the layers.

    Returns:
        FP64 (B, 3L + 1 + D): L step lengths, L cosines between successive layers, L + 1 norms,
        and the final normalised CLS token.
    """
    if outputs.cls_layers is None:
        raise ValueError("cls_regression needs cls_layers")
    layers = outputs.cls_layers.astype(np.float64)  # (B, L + 1, D)
    steps = np.linalg.norm(np.diff(layers, axis=1), axis=2)  # (B, L)
    norms = np.linalg.norm(layers, axis=2)  # (B, L + 1)
    dots = (layers[:, 1:] * layers[:, :-1]).sum(axis=2)  # (B, L)
    cosines = dots / (norms[:, 1:] * norms[:, :-1] + _EPSILON)
    return np.concatenate([steps, cosines, norms, outputs.embedding.astype(np.float64)], axis=1)


def softmax_features(logarithms: Features) -> Features:
    """Confidence of the final prediction, from `log_softmax` of the logits, (B, C).

    Returns:
        FP64 (B, 4): top-1 probability, top-1 minus top-2 probability, entropy in nats, and the
        logarithm of the odds of top-1 against top-2.
    """
    first, second = top_two(logarithms)
    gap = np.exp(first) - np.exp(second)
    return np.stack([np.exp(first), gap, entropy(logarithms), first - second], axis=1)


def lens_features(
    outputs: RungOutputs,
    logarithms: Features,
    lens_weights: NDArray[Any],
    lens_bias: NDArray[Any],
) -> Features:
    """The prediction as it forms over the last K layers, through a linear map per layer.

    Args:
        outputs: of the cheap rung.
        logarithms: `log_softmax` of its logits, (B, C).
        lens_weights: (K, D, C), the map of each of the last K layers before the final one.
        lens_bias: (K, C).

    Returns:
        FP64 (B, 3K): for each layer whether its class is another than the final one (0 or 1), then
        for each the KL divergence of its probabilities from the final ones in nats, then for each
        its margin.
    """
    if outputs.cls_layers is None:
        raise ValueError("layer_lens needs cls_layers and logits")
    depth = len(lens_weights)
    tokens = outputs.cls_layers[:, -depth - 1 : -1].swapaxes(0, 1)  # (K, B, D), not the final layer
    # FP64: the last bits of a product depend on batch size and memory alignment. Those of an FP32
    # product would be seen in the score.
    logits = tokens.astype(np.float64) @ lens_weights + lens_bias[:, np.newaxis]
    formed = log_softmax(logits)  # (K, B, C)
    switches = formed.argmax(axis=2) != logarithms.argmax(axis=1)  # (K, B)
    divergence = (np.exp(logarithms) * (logarithms - formed)).sum(axis=2)  # (K, B)
    first, second = top_two(formed)
    margins = np.exp(first) - np.exp(second)
    return np.asarray(np.concatenate([switches, divergence, margins]).T, dtype=np.float64)
