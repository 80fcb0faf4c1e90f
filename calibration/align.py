"""Fit an alignment, without labels, and say what it is worth on images it has not learned.

Ridge regression (Hoerl and Kennard 1970) from the cheap rung's last CLS tokens to what its
embedding lacks of the reference's. It shrinks towards the rung's own answer, so that few images
change little, and no alignment at all is one of the strengths among which cross-validation chooses.
What an aligned rung is worth is said by embeddings that are cross-fitted: each by a map that did
not learn its image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
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
ALPHAS = np.logspace(0, 7, 15)
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
    own = sample.low.embedding.astype(np.float64)
    lacking = sample.truth.embedding - own
    folds = GroupKFold(FOLDS, shuffle=True, random_state=seed)
    divided = list(folds.split(inputs, groups=groups[rows]))
    growth = [_growth(0, sample, sample.low, fidelity)]
    for share in SHARES:
        learned = []
        for train, held_out in divided:
            some = train[np.random.default_rng(seed).permutation(len(train))]
            some = some[: max(2, round(share * len(train)))]
            ridges = _Ridges(inputs[some], lacking[some])
            learned.append((ridges, ridges.coordinates(inputs[held_out]), held_out))
        alpha = _best(learned, lacking)
        found = own.copy()
        for ridges, coordinates, held_out in learned:
            found[held_out] += ridges.predict(coordinates, alpha)
        images = round(share * len(sample) * (FOLDS - 1) / FOLDS)
        embedding = found.astype(np.float32)
        logits = None if head is None else head(embedding)
        growth.append(_growth(images, sample, RungOutputs(embedding, None, logits), fidelity))
    weights, bias = _Ridges(inputs, lacking).map(alpha)
    weights[: own.shape[1]] += np.eye(own.shape[1])  # `tokens` begin with the embedding
    alignment = Alignment(
        weights=weights.astype(np.float32),
        bias=bias.astype(np.float32),
        graph=graph[0],
        reference=outputs.made.graphs.get(REFERENCE, outputs.made.graphs[HIGH]),
        recipe=graph[1],
        image_prints=encode(sample.hashes, sample.looks),
        image_hashes=np.array(sample.hashes),
        cross_fitted=embedding,
        layer_dim=_other_width(sample.low),
    )
    return Aligned(alignment, growth)


def fit_map(
    inputs: FloatMatrix, lacking: FloatMatrix, groups: NDArray[Any], seed: int
) -> tuple[FloatMatrix, FloatMatrix]:
    """What embeddings lack as a map of tokens, its strength chosen by cross-validation.

    Args:
        inputs: `bundle.alignment.tokens` of n images, (n, F).
        lacking: the full model's embedding minus the rung's own, (n, D).
        groups: of the n images; cross-validation divides none.
        seed: of the folds.

    Returns:
        Weights (F, D) and a bias (D,); zeros where no map is better than any.
    """
    folds = GroupKFold(FOLDS, shuffle=True, random_state=seed).split(inputs, groups=groups)
    learned = []
    for train, held_out in folds:
        ridges = _Ridges(inputs[train], lacking[train])
        learned.append((ridges, ridges.coordinates(inputs[held_out]), held_out))
    return _Ridges(inputs, lacking).map(_best(learned, lacking))


def _other_width(low: RungOutputs) -> int | None:
    """Width of the CLS tokens where it is another than the embedding's."""
    assert low.cls_layers is not None
    width = low.cls_layers.shape[2]
    return None if width == low.embedding.shape[1] else width


class _Ridges:
    """Ridge regressions of every strength on n images, from one singular value decomposition."""

    def __init__(self, inputs: FloatMatrix, targets: FloatMatrix) -> None:
        self._scaler = StandardScaler().fit(inputs)
        self._mean = targets.mean(axis=0)
        left, self._values, self._right = np.linalg.svd(
            self._scaler.transform(inputs), full_matrices=False
        )
        self._seen = left.T @ (targets - self._mean)  # (R, D)

    def coordinates(self, inputs: FloatMatrix) -> FloatMatrix:
        """Where m images lie in the space of those that were learned, (m, R)."""
        return np.asarray(self._scaler.transform(inputs) @ self._right.T)

    def predict(self, coordinates: FloatMatrix, alpha: float) -> FloatMatrix:
        """What embeddings lack, (m, D); nothing where the strength is infinite."""
        if np.isinf(alpha):
            return np.zeros((len(coordinates), len(self._mean)))
        return np.asarray(coordinates @ self._shrunk(alpha) + self._mean)

    def map(self, alpha: float) -> tuple[FloatMatrix, FloatMatrix]:
        """Weights (F, D) and bias (D,) on raw inputs."""
        if np.isinf(alpha):
            return np.zeros((self._right.shape[1], len(self._mean))), np.zeros_like(self._mean)
        weights = self._right.T @ self._shrunk(alpha) / self._scaler.scale_[:, np.newaxis]
        return weights, self._mean - self._scaler.mean_ @ weights

    def _shrunk(self, alpha: float) -> FloatMatrix:
        shares = self._values / (self._values**2 + alpha)
        return np.asarray(shares[:, np.newaxis] * self._seen)


def _best(learned: Sequence[tuple[_Ridges, FloatMatrix, Rows]], lacking: FloatMatrix) -> float:
    """The strength with the least squared error on images not learned; infinite: no alignment."""
    errors = {np.inf: float((lacking**2).sum())}
    for alpha in ALPHAS.tolist():
        errors[alpha] = sum(
            float(((ridges.predict(coordinates, alpha) - lacking[rows]) ** 2).sum())
            for ridges, coordinates, rows in learned
        )
    return min(errors, key=lambda alpha: errors[alpha])


def _growth(images: int, sample: Outputs, low: RungOutputs, fidelity: Fidelity) -> Growth:
    answered = replace(sample, low=low)
    cosine, loss = oracle_cosine(answered), fidelity.loss(answered)
    return Growth(images, float(cosine.mean()), float(1 - loss.mean()))
