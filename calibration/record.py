"""`calibration.fit.npz`, beside `calibration.json`: what every signal said of every image."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .chunks import NpzError, load_npz, save_npz
from .outputs import Outputs, OutputsError
from .splits import Rows


def record_path(artifact: Path) -> Path:
    """Where the record of an artifact lies."""
    return artifact.with_suffix(".fit.npz")


@dataclass(frozen=True)
class FitRecord:
    """A fit, image by image.

    Attributes:
        splits: rows of each split.
        values: what each signal that applies says of each image, FP64 (N,), in the signal's own
            units, larger meaning more need to escalate; out-of-fold on the fit split.
        scores: FP32 (N,) of the chosen signal, in oracle units, as the router computes them.
        loss: the fidelity loss of the cheap answers, BOOL (N,).
        high_loss: the fidelity loss of the full rung's answers; None: the full rung is the
            reference.
        fingerprint: `Outputs.fingerprint` of the outputs.
        artifact_sha256: the hash of the calibration.json that the fit wrote.
    """

    splits: dict[str, Rows]
    values: dict[str, NDArray[np.float64]]
    scores: NDArray[np.float32]
    loss: NDArray[np.bool_]
    fingerprint: str
    artifact_sha256: str
    high_loss: NDArray[np.bool_] | None = None

    def save(self, path: Path) -> None:
        """Write the `.npz`."""
        arrays = {
            "scores": self.scores,
            "loss": self.loss,
            "fingerprint": np.array(self.fingerprint),
            "artifact_sha256": np.array(self.artifact_sha256),
            **{f"split_{name}": rows for name, rows in self.splits.items()},
            **{f"signal_{name}": values for name, values in self.values.items()},
        }
        if self.high_loss is not None:
            arrays["high_loss"] = self.high_loss
        save_npz(path, arrays)

    @classmethod
    def load(cls, path: Path, outputs: Outputs, artifact: Path) -> FitRecord:
        """Read the record that belongs to these outputs and this artifact.

        Raises:
            OutputsError: missing, unreadable, or of another fit.
        """
        try:
            arrays = load_npz(path)
            record = cls(
                splits=_named(arrays, "split_"),
                values=_named(arrays, "signal_"),
                scores=arrays["scores"],
                loss=arrays["loss"],
                high_loss=arrays.get("high_loss"),
                fingerprint=str(arrays["fingerprint"]),
                artifact_sha256=str(arrays["artifact_sha256"]),
            )
        except FileNotFoundError:
            raise OutputsError(f"no {path}; run python -m calibration fit first") from None
        except (NpzError, KeyError) as error:
            raise OutputsError(f"{path} is not readable ({error}); fit again") from None
        artifact_sha256 = hashlib.sha256(artifact.read_bytes()).hexdigest()
        if (record.fingerprint, record.artifact_sha256) != (outputs.fingerprint(), artifact_sha256):
            raise OutputsError(f"{path} is of another fit than {artifact}; fit again")
        return record


def _named(arrays: Mapping[str, NDArray[Any]], prefix: str) -> dict[str, NDArray[Any]]:
    return {
        name.removeprefix(prefix): array
        for name, array in arrays.items()
        if name.startswith(prefix)
    }
