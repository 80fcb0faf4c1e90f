"""What the full rung changes, on any images: the oracle, and the fidelity losses beside it."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

from routing import SIGNALS

from . import metrics
from .coefficients import applicable, signal_values
from .fidelity import APPLICABLE, COSINE_TOLERANCE, Fidelity, oracle_cosine, oracle_l2
from .outputs import Outputs

FloatVector = NDArray[np.float64]
BoolVector = NDArray[np.bool_]

QUANTILES = (5, 25, 50, 75, 95, 99)
EXTREMES = 24  # images at each end
GROUPS = 10
INTERVAL = 0.95


def analyse(outputs: Outputs, fidelity: Fidelity, seed: int = 0) -> dict[str, Any]:
    """Measure the change between the rungs over N images, and what goes with it.

    `fidelity` is the loss to name first; the others that apply are measured beside it.

    Returns:
        JSON types. `l2` and `cosine`: mean and quantiles, by percent, of the distances and the
        cosines between the rungs' embeddings. `losses`: how each fidelity loss goes with the L2
        distance, the asked one first, as `_relation` says. `spearman`: rank correlation of the L2
        distance with what is known without labels; None where either is constant. `most`, `least`:
        rows of the images with the largest L2 distance and the smallest, the extreme one first.

    Raises:
        FidelityError: the fidelity loss does not apply.
    """
    oracle, cosine = oracle_l2(outputs), oracle_cosine(outputs)
    fidelities = _fidelities(outputs, fidelity)
    order = np.argsort(oracle, kind="stable")
    ends = max(1, min(EXTREMES, len(outputs) // 2))
    bootstrap = metrics.Bootstrap(np.array(outputs.groups), seed)
    return {
        "source": outputs.title,
        "images": len(outputs),
        "fidelity": asdict(fidelity),
        "tolerance": next(
            (f.tolerance for f in fidelities if f.kind == "cosine"), COSINE_TOLERANCE
        ),
        "l2": distribution(oracle),
        "cosine": distribution(cosine),
        "losses": [_relation(kind, kind.loss(outputs), oracle, bootstrap) for kind in fidelities],
        "spearman": {
            name: metrics.value(partial(metrics.spearman, first=values, second=oracle), len(oracle))
            for name, values in _companions(outputs, cosine).items()
        },
        "most": order[::-1][:ends].tolist(),
        "least": order[:ends].tolist(),
    }


def distribution(values: FloatVector) -> dict[str, Any]:
    """The mean of (N,) values, and their quantiles by percent."""
    quantiles = np.percentile(values, QUANTILES).tolist()
    return {
        "mean": float(values.mean()),
        "quantiles": dict(zip(map(str, QUANTILES), quantiles, strict=True)),
    }


def _fidelities(outputs: Outputs, asked: Fidelity) -> list[Fidelity]:
    kinds = [kind for kind in APPLICABLE[outputs.task][0] if kind not in (asked.kind, "value")]
    # A value's tolerance is none of a cosine.
    tolerance = COSINE_TOLERANCE if asked.kind == "value" else asked.tolerance
    return [asked, *(Fidelity(kind, tolerance) for kind in kinds)]


def _relation(
    fidelity: Fidelity, loss: BoolVector, oracle: FloatVector, bootstrap: metrics.Bootstrap
) -> dict[str, Any]:
    """How one fidelity loss goes with the size of the change.

    Returns:
        `kind` of the loss; `words`, to be read after "an answer that"; `rate`, the share of images
        with a loss; `auroc`, the probability that an image with a loss has the larger L2 distance
        than one without, None where all images have a loss, or none; `auroc_interval`, 95 %,
        bootstrapped over groups; `tenths`.
    """
    auroc = partial(metrics.auroc, values=oracle, loss=loss)
    return {
        "kind": fidelity.kind,
        "words": fidelity.words(),
        "rate": float(loss.mean()),
        "auroc": metrics.value(auroc, len(loss)),
        "auroc_interval": bootstrap.interval(auroc),
        "tenths": tenths(oracle, loss),
    }


def tenths(oracle: FloatVector, loss: BoolVector) -> list[dict[str, Any]]:
    """Losses in groups of equal count along the oracle, ten where there are images enough.

    Returns:
        From the least to the most changed images: `upper`, the largest L2 distance of the group;
        its number of `images` and of `losses`; `interval` of its loss rate, 95 % (Wilson 1927).
    """
    groups = np.array_split(np.argsort(oracle, kind="stable"), min(GROUPS, len(oracle)))
    found = []
    for rows in groups:
        losses = int(loss[rows].sum())
        ends = binomtest(losses, len(rows)).proportion_ci(INTERVAL, "wilson")
        found.append(
            {
                "upper": float(oracle[rows].max()),
                "images": len(rows),
                "losses": losses,
                "interval": [float(ends.low), float(ends.high)],
            }
        )
    return found


def _companions(outputs: Outputs, cosine: FloatVector) -> dict[str, FloatVector]:
    """What is known of an image without a label: cosine, norms, signals that learn nothing."""
    low = np.linalg.norm(outputs.low.embedding.astype(np.float64), axis=1)
    high = np.linalg.norm(outputs.high.embedding.astype(np.float64), axis=1)
    values = {
        "cosine": cosine,
        "norm of the low embedding": low,
        "norm of the full embedding": high,
    }
    for name in applicable(outputs.low, outputs.task):
        if not SIGNALS[name].coefficients:
            values[name] = signal_values(name, outputs.low, {})
    return values
