"""Fit an alignment, without labels, and say what it is worth on images it has not learned.

Ridge regression (Hoerl and Kennard 1970) from the cheap rung's last CLS tokens to the reference's
embedding, on images of its own: on those it has seen an aligned rung answers better than on others,
so no signal is fitted, nothing certified and nothing measured on them (`fit.without_learned`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import Ridge, RidgeCV
from sklearn.model_selection import GroupKFold
from sklearn.preprocessing import StandardScaler

from bundle.alignment import Alignment, tokens
from bundle.graphs import HIGH, REFERENCE
from bundle.head import LinearHead
from bundle.prints import encode
from routing import RungOutputs

from .fidelity import Fidelity, oracle_cosine
from .outputs import Outputs
from .splits import Rows

FloatMatrix = NDArray[np.float64]
ALIGN_SHARE = 1 / 3  # of the images, unless the user says otherwise
ALPHAS = np.logspace(-1, 5, 13)
FOLDS = 5
SHARES = (0.125, 0.25, 0.5, 1.0)  # of the images to learn from, for the curve


@dataclass(frozen=True)
class Growth:
    """What an alignment from so many images is worth on others.

    Attributes:
        images: it was fitted on; 0: no alignment.
        cosine: mean, between the embedding and the reference's.
        acceptable: share of images whose answer is no fidelity loss.
    """

    images: int
    cosine: float
    acceptable: float


@dataclass(frozen=True, eq=False)
class Aligned:
    """A fitted alignment and its curve.

    Attributes:
        alignment: the map that was fitted on all of these images.
        growth: what a map from so many images is worth on others, by cross-validation; the first
            point is that of no map.
    """

    alignment: Alignment
    growth: Sequence[Growth]

    @property
    def helps(self) -> bool:
        """Whether more answers are acceptable than without it, or as many and nearer ones."""
        first, last = self.growth[0], self.growth[-1]
        return (last.acceptable, last.cosine) > (first.acceptable, first.cosine)

    def to_dict(self) -> dict[str, Any]:
        """The curve as JSON types."""
        return {"helps": self.helps, "growth": [asdict(point) for point in self.growth]}


def fit_alignment(
    outputs: Outputs,
    rows: Rows,
    groups: NDArray[Any],
    graph: tuple[str, str],
    fidelity: Fidelity,
    head: LinearHead | None,
    seed: int,
) -> Aligned:
    """Fit on the images in `rows` and measure by cross-validation among them.

    `groups` holds the group of every image, and cross-validation divides none; `graph` is the
    fingerprint and the recipe of the cheap graph; `head` makes logits of its embedding.
    """
    sample = outputs.rows(rows)
    inputs = tokens(sample.low).astype(np.float64)
    targets = sample.truth.embedding.astype(np.float64)
    scaler = StandardScaler().fit(inputs)
    alpha = float(RidgeCV(ALPHAS).fit(scaler.transform(inputs), targets).alpha_)
    weights, bias = _ridge(inputs, targets, alpha)
    growth = [_growth(0, sample, sample.low, fidelity)]
    folds = list(
        GroupKFold(FOLDS, shuffle=True, random_state=seed).split(inputs, groups=groups[rows])
    )
    for share in SHARES:
        found = np.empty_like(targets)
        for train, held_out in folds:
            some = train[np.random.default_rng(seed).permutation(len(train))]
            some = some[: max(2, round(share * len(train)))]
            fold_weights, fold_bias = _ridge(inputs[some], targets[some], alpha)
            found[held_out] = inputs[held_out] @ fold_weights + fold_bias
        images = round(share * len(sample) * (FOLDS - 1) / FOLDS)
        embedding = found.astype(np.float32)
        logits = None if head is None else head(embedding)
        growth.append(_growth(images, sample, RungOutputs(embedding, None, logits), fidelity))
    alignment = Alignment(
        weights=weights.astype(np.float32),
        bias=bias.astype(np.float32),
        graph=graph[0],
        reference=outputs.made.graphs.get(REFERENCE, outputs.made.graphs[HIGH]),
        recipe=graph[1],
        image_prints=encode(sample.hashes, sample.looks),
    )
    return Aligned(alignment, growth)


def _ridge(
    inputs: FloatMatrix, targets: FloatMatrix, alpha: float
) -> tuple[FloatMatrix, FloatMatrix]:
    """Weights (F, D) and bias (D,) on raw inputs, the standardisation folded in."""
    scaler = StandardScaler().fit(inputs)
    ridge = Ridge(alpha).fit(scaler.transform(inputs), targets)
    weights = (ridge.coef_ / scaler.scale_).T
    return weights, ridge.intercept_ - scaler.mean_ @ weights


def _growth(images: int, sample: Outputs, low: RungOutputs, fidelity: Fidelity) -> Growth:
    answered = replace(sample, low=low)
    cosine, loss = oracle_cosine(answered), fidelity.loss(answered)
    return Growth(images, float(cosine.mean()), float(1 - loss.mean()))
