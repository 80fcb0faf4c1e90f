"""A fit: its artifact, and beside that `calibration.fit.npz`, what signals said of every image."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from routing import Calibration, ReferenceAnswers, answers_path

from .chunks import NpzError, load_npz, save_npz
from .outputs import Outputs, OutputsError
from .splits import Rows

_ARRAYS = ("scores", "loss", "high_loss")


@dataclass(frozen=True)
class Fit:
    """The artifact, and what every signal said of every image.

    Attributes:
        splits: rows of each split.
        values: what each signal that applies says of each image, FP64 (N,), in the signal's own
            units, larger meaning more need to escalate; out-of-fold on the fit split.
        scores: FP32 (N,) of the chosen signal, in oracle units, as the router computes them;
            cross-fitted on the fit split.
        loss: the fidelity loss of the cheap answers, BOOL (N,).
        high_loss: the fidelity loss of the full rung's answers, BOOL (N,); None: the full rung is
            the reference.
        independent: one row of each group among the rows that nothing was fitted on; none of a
            fit that was read.
        answers: the reference answers that the artifact names, if it does; likewise.
        artifact_sha256: of the file that the artifact was read from; empty where it was not.
    """

    calibration: Calibration
    splits: Mapping[str, Rows]
    values: Mapping[str, NDArray[np.float64]]
    scores: NDArray[np.float32]
    loss: NDArray[np.bool_]
    high_loss: NDArray[np.bool_] | None = None
    independent: Rows = field(default_factory=lambda: np.zeros(0, np.intp))
    answers: ReferenceAnswers | None = None
    artifact_sha256: str = ""

    def save(self, path: Path) -> None:
        """Write the artifact, and beside it what `load` reads and the reference answers."""
        self.calibration.save(path)
        answers = answers_path(path)
        answers.unlink(missing_ok=True)  # of an earlier fit
        if self.answers is not None:
            answers.write_bytes(self.answers.to_bytes())
        arrays = {name: getattr(self, name) for name in _ARRAYS if getattr(self, name) is not None}
        arrays["fingerprint"] = np.array(self.calibration.data["fingerprint"])
        arrays["artifact_sha256"] = np.array(_sha256(path))
        arrays |= {f"split_{name}": rows for name, rows in self.splits.items()}
        arrays |= {f"signal_{name}": values for name, values in self.values.items()}
        save_npz(_beside(path), arrays)

    @classmethod
    def load(cls, path: Path, outputs: Outputs) -> Fit:
        """Read an artifact and what was found when it was fitted on these outputs.

        Raises:
            CalibrationError: the artifact cannot be read.
            OutputsError: the rest is missing, unreadable, or of another fit.
        """
        calibration, beside = Calibration.load(path), _beside(path)
        try:
            arrays = load_npz(beside)
            of = str(arrays["fingerprint"]), str(arrays["artifact_sha256"])
            splits, values = _named(arrays, "split_"), _named(arrays, "signal_")
            scores, loss = arrays["scores"], arrays["loss"]
        except FileNotFoundError:
            raise OutputsError(f"no {beside}; run python -m calibration fit first") from None
        except (NpzError, KeyError) as error:
            raise OutputsError(f"{beside} is not readable ({error}); fit again") from None
        sha256 = _sha256(path)
        if of != (outputs.fingerprint(), sha256):
            raise OutputsError(f"{beside} is of another fit than {path}; fit again")
        high_loss = arrays.get("high_loss")
        return cls(calibration, splits, values, scores, loss, high_loss, artifact_sha256=sha256)


def measured_split(splits: Collection[str]) -> str:
    """The split that figures and galleries are of: `test`, or `fit`, cross-fitted."""
    return "test" if "test" in splits else "fit"


def _beside(artifact: Path) -> Path:
    return artifact.with_suffix(".fit.npz")


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _named(arrays: Mapping[str, NDArray[Any]], prefix: str) -> dict[str, NDArray[Any]]:
    return {
        name.removeprefix(prefix): array
        for name, array in arrays.items()
        if name.startswith(prefix)
    }
