"""Fit what the signals read: ridge maps and logistic weights, folded into plain arrays.

Standardisation is part of a fit, not of a signal: it is folded into the weights, so that the
router only multiplies and adds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression, Ridge, RidgeCV
from sklearn.model_selection import GroupKFold
from sklearn.preprocessing import StandardScaler

from routing import SIGNALS, RungOutputs, default_task, features

from .fidelity import Fidelity, oracle_l2
from .outputs import Outputs

FloatVector = NDArray[np.float64]
BoolVector = NDArray[np.bool_]
Coefficients = dict[str, NDArray[Any]]

FOLDS = 5
LENS_DEPTH = 3  # layers before the final one that `layer_lens` looks at
_ALPHAS = np.logspace(-1, 5, 13)
_CLASSES_FOR_ALPHA = 50  # one penalty serves all classes; a thousand would not choose it better
_ROWS_AT_ONCE = 512  # the FP64 copies of cls_layers are what fitting would need most memory for


@dataclass(frozen=True)
class FitSample:
    """What coefficients are fitted on: n images of the fit split.

    Attributes:
        low: the cheap rung's outputs.
        oracle: L2 distance between the rungs' embeddings, FP64 (n,).
        loss: fidelity loss, BOOL (n,).
        groups: the group of each image; cross-validation never divides one.
        task: what the logits mean, see `routing.TASKS`; None: no head, or `routing.default_task`.
        label_cut: for independent labels, the logit from which on a label belongs to the answer.
    """

    low: RungOutputs
    oracle: FloatVector
    loss: BoolVector
    groups: NDArray[Any]
    task: str | None = None
    label_cut: float = 0.0

    @classmethod
    def of(
        cls, outputs: Outputs, fidelity: Fidelity, rows: NDArray[np.intp], groups: NDArray[Any]
    ) -> FitSample:
        """The sample of some rows of the outputs; `groups` holds the group of every image."""
        oracle, loss = oracle_l2(outputs)[rows], fidelity.loss(outputs)[rows]
        low, cut = outputs.low.rows(rows), fidelity.label_cut
        return cls(low, oracle, loss, groups[rows], outputs.task, cut)

    def __len__(self) -> int:
        return len(self.oracle)

    def rows(self, index: NDArray[np.intp]) -> FitSample:
        """Some of the images."""
        return replace(
            self,
            low=self.low.rows(index),
            oracle=self.oracle[index],
            loss=self.loss[index],
            groups=self.groups[index],
        )

    def folds(self, seed: int) -> list[tuple[NDArray[np.intp], NDArray[np.intp]]]:
        """(train, held-out) rows, fewer than `FOLDS` where there are fewer groups."""
        count = min(FOLDS, len(np.unique(self.groups)))
        folds = GroupKFold(count, shuffle=True, random_state=seed)
        return list(folds.split(self.oracle, groups=self.groups))


def applicable(low: RungOutputs, task: str | None = None) -> list[str]:
    """Names of the signals that these outputs suffice for, and that mean something for the task."""
    if low.logits is None:
        return [name for name, signal in SIGNALS.items() if not signal.needs_logits]
    task = task or default_task(low.logits.shape[1])
    return [name for name, signal in SIGNALS.items() if signal.applies_to(task)]


def signal_values(
    name: str, low: RungOutputs, coefficients: Mapping[str, NDArray[Any]]
) -> FloatVector:
    """A signal's raw values, FP64 (N,), with bounded memory."""
    return _by_rows(low, lambda some: SIGNALS[name].compute(some, coefficients))


def fit_coefficients(sample: FitSample, seed: int) -> dict[str, Coefficients]:
    """Fit every signal that applies on images of the fit split.

    A signal that learns the fidelity loss is left out where there is nothing to learn: no loss,
    or nothing but losses, or too few of either for each fold of cross-fitting to see one.
    """
    fitted: dict[str, Coefficients] = {
        "cls_regression": _fit_regression(
            _by_rows(sample.low, features.path_features), sample.oracle
        )
    }
    names = applicable(sample.low, sample.task)
    if "label_margin" in names:
        fitted["label_margin"] = {"cut": np.array([sample.label_cut])}
    if sample.low.logits is not None and "deferral" in names and _learnable(sample, seed):
        lens, lens_rows = _fit_lens(sample, seed)
        confidence_rows = features.softmax_features(features.log_softmax(sample.low.logits))
        both = np.concatenate([confidence_rows, lens_rows], axis=1)
        fitted["layer_lens"] = {**lens, **_fit_logistic(lens_rows, sample.loss)}
        fitted["deferral"] = {**lens, **_fit_logistic(both, sample.loss)}
    known = [name for name in names if not SIGNALS[name].coefficients]
    fitted.update({name: {} for name in known})
    return {name: fitted[name] for name in SIGNALS if name in fitted}


def out_of_fold(
    sample: FitSample, seed: int, progress: Callable[[], None] = lambda: None
) -> dict[str, FloatVector]:
    """Every signal's raw values on images that its coefficients were not fitted on, FP64 (n,).

    A signal that some fold cannot fit is left out. `progress` is called after each of at most
    `FOLDS` folds.
    """
    folds = sample.folds(seed)
    values: dict[str, FloatVector] = {}
    for number, (train, held_out) in enumerate(folds):
        fitted = fit_coefficients(sample.rows(train), seed)
        low = sample.low.rows(held_out)
        if number == 0:
            values = {name: np.empty(len(sample)) for name in fitted}
        for name in list(values):
            if name in fitted:
                values[name][held_out] = signal_values(name, low, fitted[name])
            else:
                del values[name]
        progress()
    return values


def _learnable(sample: FitSample, seed: int) -> bool:
    return all(0 < sample.loss[train].sum() < len(train) for train, _ in sample.folds(seed))


def _by_rows(
    low: RungOutputs, compute: Callable[[RungOutputs], NDArray[np.float64]]
) -> NDArray[np.float64]:
    starts = range(0, len(low), _ROWS_AT_ONCE)
    return np.concatenate([compute(low.rows(slice(i, i + _ROWS_AT_ONCE))) for i in starts])


def _fit_regression(rows: NDArray[np.float64], target: FloatVector) -> Coefficients:
    """Ridge regression, its penalty chosen by leave-one-out (Hoerl and Kennard 1970)."""
    scaler = StandardScaler().fit(rows)
    ridge = RidgeCV(_ALPHAS).fit(scaler.transform(rows), target)
    return _folded(scaler, ridge.coef_, ridge.intercept_)


def _fit_logistic(rows: NDArray[np.float64], loss: BoolVector) -> Coefficients:
    scaler = StandardScaler().fit(rows)
    # newton-cholesky: made for many rows of few features, and it needs no tuning of steps.
    model = LogisticRegression(solver="newton-cholesky").fit(scaler.transform(rows), loss)
    return _folded(scaler, model.coef_[0], model.intercept_[0])


def _folded(scaler: StandardScaler, weights: FloatVector, bias: float) -> Coefficients:
    weights = weights / scaler.scale_
    return {"weights": weights, "bias": np.array([bias - scaler.mean_ @ weights])}


def _fit_lens(sample: FitSample, seed: int) -> tuple[Coefficients, NDArray[np.float64]]:
    """The lens, and the features it gives to rows that it was not fitted on.

    A lens predicts the classes of its own rows too well; weights fitted on such features would
    trust it too much. So every row's features come from a lens fitted without it.
    """
    low = sample.low
    assert low.cls_layers is not None and low.logits is not None
    last = low.cls_layers.shape[1] - 1
    layers = range(last - min(LENS_DEPTH, last), last)
    tokens = [low.cls_layers[:, layer] for layer in layers]  # K of (n, D)
    logits = low.logits
    scalers = [StandardScaler().fit(token) for token in tokens]
    inputs = [scaler.transform(token) for scaler, token in zip(scalers, tokens, strict=True)]
    some = np.random.default_rng(seed).permutation(logits.shape[1])[:_CLASSES_FOR_ALPHA]
    alphas = [RidgeCV(_ALPHAS).fit(rows, logits[:, some]).alpha_ for rows in inputs]

    def fit(train: NDArray[np.intp] | slice) -> Coefficients:
        weights, biases = [], []
        for scaler, rows, alpha in zip(scalers, inputs, alphas, strict=True):
            ridge = Ridge(alpha).fit(rows[train], logits[train])
            weights.append((ridge.coef_.reshape(logits.shape[1], -1) / scaler.scale_).T)  # (D, C)
            biases.append(ridge.intercept_ - scaler.mean_ @ weights[-1])
        return {
            "lens_weights": np.stack(weights).astype(np.float32),
            "lens_bias": np.stack(biases).astype(np.float32),
        }

    logarithms = features.log_softmax(logits)
    cross_fitted = np.empty((len(sample), 3 * len(inputs)))
    for train, held_out in sample.folds(seed):
        lens = fit(train)
        cross_fitted[held_out] = features.lens_features(
            low.rows(held_out), logarithms[held_out], lens["lens_weights"], lens["lens_bias"]
        )
    return fit(slice(None)), cross_fitted
