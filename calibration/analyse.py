"""What the full rung changes, on any images: the oracle, and the fidelity losses beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
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


@dataclass(frozen=True)
class Distribution:
    """Of one quantity over the images.

    Attributes:
        mean: of all.
        quantiles: by percent.
    """

    mean: float
    quantiles: Mapping[int, float]

    @classmethod
    def of(cls, values: FloatVector) -> Distribution:
        """Of (N,) values."""
        quantiles = np.percentile(values, QUANTILES).tolist()
        return cls(float(values.mean()), dict(zip(QUANTILES, quantiles, strict=True)))


@dataclass(frozen=True)
class Tenth:
    """A tenth of the images, neighbours in the size of their change.

    Attributes:
        upper: its largest L2.
        images: how many.
        losses: of them.
        interval: of the loss rate, 95 % (Wilson 1927).
    """

    upper: float
    images: int
    losses: int
    interval: tuple[float, float]

    @property
    def rate(self) -> float:
        """Share of its images with a loss."""
        return self.losses / self.images


@dataclass(frozen=True)
class LossRelation:
    """How one fidelity loss goes with the size of the change.

    Attributes:
        kind: of the fidelity.
        words: what a loss is, to be read after "an answer that".
        rate: share of images with a loss.
        auroc: probability that an image with a loss has the larger L2 than one without; None
            where all images have a loss, or none.
        auroc_interval: of it, 95 % bootstrap over groups.
        tenths: from the least to the most changed.
    """

    kind: str
    words: str
    rate: float
    auroc: float | None
    auroc_interval: list[float] | None
    tenths: tuple[Tenth, ...]


@dataclass(frozen=True)
class Analysis:
    """The representation delta between the rungs.

    Attributes:
        source: of the images, in words.
        images: N.
        fidelity: the loss that was asked for.
        tolerance: of the cosine loss.
        l2: of the distances between the rungs' embeddings.
        cosine: of the cosines between them.
        losses: the asked one first, then the other that applies without being asked for: `cosine`,
            and of classes `top1`, of labels `labels`.
        spearman: rank correlation of the L2 with what is known without labels; None where it, or
            the L2, is constant.
        most: rows of the images with the largest L2, largest first.
        least: rows of those with the smallest, smallest first.
    """

    source: str
    images: int
    fidelity: Fidelity
    tolerance: float
    l2: Distribution
    cosine: Distribution
    losses: tuple[LossRelation, ...]
    spearman: Mapping[str, float | None]
    most: tuple[int, ...]
    least: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON types."""
        content = asdict(self)
        for name in ("l2", "cosine"):
            quantiles = content[name]["quantiles"]
            content[name]["quantiles"] = {str(percent): v for percent, v in quantiles.items()}
        return content

    def rows(self) -> list[tuple[str, str]]:
        """What a printed table shows: names and values."""
        rows = [("images", f"{self.images:,}")]
        for name, distribution in (("L2", self.l2), ("cosine", self.cosine)):
            rows.append((f"{name}: mean", f"{distribution.mean:.4g}"))
            rows += [(f"{name}: {p} %", f"{v:.4g}") for p, v in distribution.quantiles.items()]
        for loss in self.losses:
            rows.append((f"{loss.kind}: share with a loss", f"{loss.rate:.3f}"))
            rows.append((f"{loss.kind}: AUROC of the L2", _number(loss.auroc)))
        rows += [(f"Spearman of the L2: {name}", _number(v)) for name, v in self.spearman.items()]
        return rows


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def analyse(outputs: Outputs, fidelity: Fidelity, seed: int = 0) -> Analysis:
    """Measure the change between the rungs, and what goes with it.

    Args:
        outputs: of N images, at least one.
        fidelity: the loss to name first; the others that apply are measured beside it.
        seed: of the bootstrap.

    Raises:
        FidelityError: the fidelity loss does not apply.
    """
    oracle, cosine = oracle_l2(outputs), oracle_cosine(outputs)
    fidelities = _fidelities(outputs, fidelity)
    order = np.argsort(oracle, kind="stable")
    ends = max(1, min(EXTREMES, len(outputs) // 2))
    bootstrap = metrics.Bootstrap(np.array(outputs.groups), seed)
    return Analysis(
        source=outputs.title,
        images=len(outputs),
        fidelity=fidelity,
        tolerance=next((f.tolerance for f in fidelities if f.kind == "cosine"), COSINE_TOLERANCE),
        l2=Distribution.of(oracle),
        cosine=Distribution.of(cosine),
        losses=tuple(_relation(kind, kind.loss(outputs), oracle, bootstrap) for kind in fidelities),
        spearman={
            name: metrics.value(partial(metrics.spearman, first=values, second=oracle), len(oracle))
            for name, values in _companions(outputs, cosine).items()
        },
        most=tuple(order[::-1][:ends].tolist()),
        least=tuple(order[:ends].tolist()),
    )


def _fidelities(outputs: Outputs, asked: Fidelity) -> list[Fidelity]:
    kinds = [kind for kind in APPLICABLE[outputs.task][0] if kind not in (asked.kind, "value")]
    # A value's tolerance is none of a cosine.
    tolerance = COSINE_TOLERANCE if asked.kind == "value" else asked.tolerance
    return [asked, *(Fidelity(kind, tolerance) for kind in kinds)]


def _relation(
    fidelity: Fidelity, loss: BoolVector, oracle: FloatVector, bootstrap: metrics.Bootstrap
) -> LossRelation:
    auroc = partial(metrics.auroc, values=oracle, loss=loss)
    return LossRelation(
        kind=fidelity.kind,
        words=fidelity.words(),
        rate=float(loss.mean()),
        auroc=metrics.value(auroc, len(loss)),
        auroc_interval=bootstrap.interval(auroc),
        tenths=tuple(tenths(oracle, loss)),
    )


def tenths(oracle: FloatVector, loss: BoolVector) -> Sequence[Tenth]:
    """Loss counts in groups of equal count along the oracle, ten where there are images enough."""
    groups = np.array_split(np.argsort(oracle, kind="stable"), min(GROUPS, len(oracle)))
    found = []
    for rows in groups:
        losses = int(loss[rows].sum())
        interval = binomtest(losses, len(rows)).proportion_ci(INTERVAL, "wilson")
        ends = (float(interval.low), float(interval.high))
        found.append(Tenth(float(oracle[rows].max()), len(rows), losses, ends))
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
