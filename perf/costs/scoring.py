"""What a score costs in the router: every signal, on outputs of a given shape, no server.

The arrays are random: the cost of a signal depends on shapes, not on values.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np

from routing import SIGNALS, Calibration, RungOutputs, RungRecord, ScoreMap

ROUNDS = 2000
_LENS_DEPTH = 3


def outputs(batch: int, layers: int, dim: int, classes: int) -> RungOutputs:
    """Random outputs of a cheap rung: L = `layers` blocks, D = `dim`, C = `classes`."""
    rng = np.random.default_rng(0)
    return RungOutputs(
        rng.normal(size=(batch, dim)).astype(np.float32),
        rng.normal(size=(batch, layers + 1, dim)).astype(np.float32),
        rng.normal(size=(batch, classes)).astype(np.float32),
    )


def artifacts(layers: int, dim: int, classes: int) -> Iterator[Calibration]:
    """One artifact for each signal, with coefficients of the right shapes."""
    rng = np.random.default_rng(0)
    lens = {
        "lens_weights": rng.normal(size=(_LENS_DEPTH, dim, classes)).astype(np.float32),
        "lens_bias": rng.normal(size=(_LENS_DEPTH, classes)).astype(np.float32),
    }
    lengths = {
        "cls_regression": 3 * layers + 1 + dim,
        "layer_lens": 3 * _LENS_DEPTH,
        "deferral": 4 + 3 * _LENS_DEPTH,
    }
    for name, signal in SIGNALS.items():
        if not signal.applies_to("classes"):
            continue
        coefficients = {key: lens[key] for key in signal.coefficients if key in lens}
        if "weights" in signal.coefficients:
            coefficients["weights"] = rng.normal(size=lengths[name])
            coefficients["bias"] = np.zeros(1)
        yield Calibration(
            backbone="random",
            rungs={rung: RungRecord(0, "", "") for rung in ("vit_low", "vit_high")},
            image_shape=(3, 1, 1),
            preprocessing_sha256="",
            embedding_dim=dim,
            layers=layers,
            classes=classes,
            signal=name,
            coefficients=coefficients,
            score_map=ScoreMap(1, tuple(np.linspace(-1, 1, 32)), tuple(np.linspace(0, 9, 32))),
            threshold=1.0,
            chosen_by={"threshold": 1.0},
        )


def measure(batch: int, layers: int, dim: int, classes: int) -> dict[str, float]:
    """Median time of one score in ms per image, by signal; the signals take turns."""
    rows = outputs(batch, layers, dim, classes)
    calibrations = list(artifacts(layers, dim, classes))
    times: dict[str, list[float]] = {calibration.signal: [] for calibration in calibrations}
    for _ in range(ROUNDS):
        for calibration in calibrations:
            start = time.perf_counter()
            calibration.score(rows)
            times[calibration.signal].append(time.perf_counter() - start)
    return {name: 1e3 * float(np.median(column)) / batch for name, column in times.items()}
