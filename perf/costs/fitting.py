"""What `calibration fit` costs with all signals, on made-up outputs of a given size.

CLS tokens walk at random from layer to layer and the full rung's are noisy copies of the last, so
that rungs disagree on a part of the images: the cost of a fit depends on sizes, hardly on values.
"""

from __future__ import annotations

import resource
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bundle.prints import no_looks
from calibration.certify import Goal
from calibration.fidelity import Fidelity
from calibration.fit import Options, fit
from calibration.outputs import Outputs
from imaging import code_sha256
from routing import RUNGS, RungOutputs, RungRecord, RungSet

NOISE = 0.3  # of the full rung's embedding, in standard deviations of the cheap one's


@dataclass(frozen=True)
class FitCost:
    """Seconds of one fit, and the process's peak resident memory before and after it in GiB."""

    seconds: float
    peak_before_gib: float
    peak_gib: float


def measure(images: int, layers: int, dim: int, classes: int) -> FitCost:
    """Fit all signals once on `images` images of L = `layers`, D = `dim`, C = `classes`."""
    outputs, rung_set = _outputs(images, layers, dim, classes)
    before = _peak_gib()
    start = time.perf_counter()
    fit(outputs, rung_set, Goal(0.05, 0.9, "ltt"), Options(Fidelity("top1")))
    return FitCost(time.perf_counter() - start, before, _peak_gib())


def _peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB


def _outputs(images: int, layers: int, dim: int, classes: int) -> tuple[Outputs, RungSet]:
    rng = np.random.default_rng(0)
    tokens = rng.standard_normal((images, layers + 1, dim), dtype=np.float32)
    for layer in range(1, layers + 1):
        tokens[:, layer] = 0.8 * tokens[:, layer - 1] + 0.6 * tokens[:, layer]
    head = rng.standard_normal((dim, classes), dtype=np.float32) / dim**0.5
    low = tokens[:, -1].copy()
    high = low + NOISE * rng.standard_normal(low.shape, dtype=np.float32)
    rung_set = RungSet(
        backbone="random",
        image_shape=(3, 1, 1),
        embedding_dim=dim,
        layers=layers,
        classes=classes,
        labels=None,
        preprocessing={},
        rungs={name: RungRecord(0, "", name) for name in RUNGS},
        files={name: Path(name) for name in RUNGS},
    )
    names = tuple(map(str, range(images)))
    outputs = Outputs(
        low=RungOutputs(low, tokens, low @ head),
        high=RungOutputs(high, None, high @ head),
        labels=np.full(images, -1),
        names=names,
        groups=names,
        hashes=tuple(f"{i:064x}"[::-1] for i in range(images)),
        looks=no_looks(images),
        rung_hashes={name: name for name in RUNGS},
        preprocessing_sha256=rung_set.preprocessing_sha256(),
        imaging_sha256=code_sha256(),
        source="",
        title="made up",
    )
    return outputs, rung_set
