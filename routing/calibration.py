"""`calibration.json`: everything the router needs to decide, and what was measured about it.

Human-readable and schema-versioned. The artifact names the SHA-256 of both ONNX files it was made
with; `check_rungs` refuses any others.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .manifest import sha256_file
from .outputs import TASKS, RungOutputs, default_task
from .scoremap import ScoreMap
from .signals import SIGNALS

SCHEMA_VERSION = 1
RUNGS = ("vit_low", "vit_high")
# The full model where `vit_high` is a cheaper graph; deployed only where an audit asks it.
REFERENCE_MODEL = "vit_reference"
FULL_RUNG = "full rung"  # what losses are about where a certificate names nothing else
WEIGHTS = "weights.bin"  # beside the graphs that share what is in it
LIVE = "live"  # the method of a certificate from live traffic
# What makes a score and a loss what they are: in `Calibration`, and in its `chosen_by`.
_SCORING = (
    *("rungs", "preprocessing_sha256", "imaging_sha256", "signal", "coefficients", "score_map"),
    "task",
)
_LOSS = ("fidelity", "tolerance", "relative", "label_threshold")
READABLE_LENGTH = 32  # longer arrays are stored as base64 of their little-endian bytes


class CalibrationError(ValueError):
    """The artifact is unreadable, invalid or does not fit the ONNX files. One line."""


def answer_depends_on_batch(recipe: str) -> str | None:
    """Why nothing can be certified about a graph of this recipe, in words; None where it can.

    Dynamic int8 takes the range of every activation from the whole batch that it sits in.
    """
    if "int8" not in recipe.split(","):
        return None
    return "with dynamic int8 an image's answer depends on the others in its batch"


@dataclass(frozen=True)
class RungRecord:
    """One graph as it was exported or calibrated.

    Attributes:
        px: the resolution it looks at.
        recipe: how it makes itself cheap, such as `px=112,int8=static,align`.
        sha256: of its ONNX file.
        weights_sha256: of the file `WEIGHTS` beside it, which holds weights it shares with other
            graphs; None: the graph is self-contained.
        layers: transformer blocks that run; None in files of earlier releases: all.
        size_bytes: of its ONNX file, to tell a file that was cut short; None: not recorded.
        weights_size_bytes: of the file `WEIGHTS`, likewise.
    """

    px: int
    recipe: str
    sha256: str
    weights_sha256: str | None = None
    layers: int | None = None
    size_bytes: int | None = field(default=None, compare=False)
    weights_size_bytes: int | None = field(default=None, compare=False)

    @property
    def fingerprint(self) -> str:
        """What tells this graph from every other: its own SHA-256, or one over both files'."""
        if self.weights_sha256 is None:
            return self.sha256
        return hashlib.sha256((self.sha256 + self.weights_sha256).encode()).hexdigest()

    def fault(self, file: Path, differs: str) -> str | None:
        """Which of an ONNX file and the weights beside it is not the recorded one, and why.

        Returns:
            Words that begin with the name of the file that is missing or cut short, or is another,
            of which they say what `differs` does; None: both are the recorded ones.
        """
        fault = _fault(file, self.sha256, self.size_bytes, differs)
        if fault is None and self.weights_sha256 is not None:
            weights = file.with_name(WEIGHTS)
            fault = _fault(weights, self.weights_sha256, self.weights_size_bytes, differs)
            if fault is not None:
                fault += f" (the weights that {file.name} reads)"
        return fault


def _fault(file: Path, sha256: str, size_bytes: int | None, differs: str) -> str | None:
    if not file.is_file():
        return f"{file.name} is missing"
    if sha256_file(file) == sha256:
        return None
    size = file.stat().st_size
    if size_bytes is not None and size < size_bytes:
        return f"{file.name} was cut short: it has {size:,} of {size_bytes:,} bytes"
    return f"{file.name} {differs}"


@dataclass(frozen=True, eq=False)
class Calibration:
    """The calibration artifact.

    Attributes:
        backbone: name of the model.
        rungs: `vit_low` and `vit_high`.
        image_shape: (3, H, W) of the `image` tensor that both rungs take.
        preprocessing_sha256: of how images become that tensor, `GraphSet.preprocessing_sha256`.
        embedding_dim: D.
        layers: L, the number of transformer blocks of the cheap rung.
        classes: C, or None for a model without a head.
        signal: name, a key of `signals.SIGNALS`.
        coefficients: the signal's fitted arrays, FP32 or FP64.
        score_map: raw signal to oracle units.
        threshold: images with a score above it escalate; oracle units. None: all escalate.
        chosen_by: how the threshold was chosen, e.g. `{"escalation_rate": 0.1}`.
        certificate: what was tested about the risk, `certified` telling whether it was proved;
            None: nothing was tested.
        metrics: measured on images that were not used to choose anything.
        data: number, source and fingerprint of the images, and the splits.
        reference_scores: FP32, ascending: scores of images that fitted nothing, for comparison
            with the scores of later images.
        reference: the full model in FP32, which losses are about; None: `vit_high` is it.
        task: what the logits mean, see `outputs.TASKS`; None: no head, or `default_task`.
        reference_answers: `sha256` and number of `images` of the file of reference answers beside
            the artifact (`reference.ReferenceAnswers`); None: there is none.
        imaging_sha256: of the code that made the tensors, `imaging.code_sha256`; empty in files of
            earlier releases.
    """

    backbone: str
    rungs: Mapping[str, RungRecord]
    image_shape: tuple[int, int, int]
    preprocessing_sha256: str
    embedding_dim: int
    layers: int
    classes: int | None
    signal: str
    score_map: ScoreMap
    threshold: float | None
    chosen_by: Mapping[str, Any]
    coefficients: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    certificate: Mapping[str, Any] | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    reference_scores: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))
    reference: RungRecord | None = None
    task: str | None = None
    reference_answers: Mapping[str, Any] | None = None
    imaging_sha256: str = ""

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            CalibrationError: naming the field.
        """
        if set(self.rungs) != set(RUNGS):
            raise CalibrationError(f"rungs must be {' and '.join(RUNGS)}, not {sorted(self.rungs)}")
        if self.signal not in SIGNALS:
            raise CalibrationError(
                f"signal {self.signal!r} is unknown; known: {', '.join(SIGNALS)}"
            )
        if self.task is None:
            object.__setattr__(self, "task", default_task(self.classes))
        elif self.task not in TASKS:
            raise CalibrationError(f"task {self.task!r} is none of {', '.join(TASKS)}")
        signal = SIGNALS[self.signal]
        if signal.needs_logits and self.classes is None:
            raise CalibrationError(f"signal {self.signal!r} needs logits and the model has no head")
        if self.chosen_by.get("fidelity") == "top1" and self.task != "classes":
            raise CalibrationError(
                "fidelity top1 compares classes, and this model names none; calibrate again with "
                "--fidelity labels, value or cosine"
            )
        if not signal.applies_to(self.task):
            raise CalibrationError(
                f"signal {self.signal!r} means nothing for a model that answers {self.task}; "
                "calibrate again"
            )
        if set(self.coefficients) != set(signal.coefficients):
            raise CalibrationError(
                f"signal {self.signal!r} takes coefficients {sorted(signal.coefficients)}, "
                f"not {sorted(self.coefficients)}"
            )
        if self.threshold is not None and not math.isfinite(self.threshold):
            raise CalibrationError("threshold must be finite, or null for always-high")
        certified = self.certificate is not None and self.certificate.get("certified")
        if certified:
            self._check_certificate()
        self._try_score()

    def _check_certificate(self) -> None:
        """Refuse a certificate that cannot be true, as earlier releases gave some."""
        if self.threshold is None:
            raise CalibrationError("the certificate is for a threshold, and there is none")
        for name, rung in self.rungs.items():
            if (reason := answer_depends_on_batch(rung.recipe)) is not None:
                raise CalibrationError(
                    f"the certificate cannot hold: {name} is {rung.recipe}, and {reason}; export "
                    "it with int8=static and calibrate again"
                )

    def _try_score(self) -> None:
        """Score one blank image: coefficients of another shape fail here, not in production."""
        blank = RungOutputs(
            np.zeros((1, self.embedding_dim), np.float32),
            np.zeros((1, self.layers + 1, self.embedding_dim), np.float32),
            None if self.classes is None else np.zeros((1, self.classes), np.float32),
        )
        try:
            finite = np.isfinite(self.score(blank)).all()
        except (ValueError, IndexError) as error:
            raise CalibrationError(
                f"the coefficients of {self.signal!r} do not fit the model: {error}"
            ) from None
        if not finite:
            raise CalibrationError(f"the coefficients of {self.signal!r} are not finite")

    def __eq__(self, other: object) -> bool:
        """Whether both would be saved as the same file."""
        return isinstance(other, Calibration) and self.to_dict() == other.to_dict()

    def score(self, outputs: RungOutputs) -> NDArray[np.float32]:
        """Scores of B images in oracle units, FP32 (B,), from the cheap rung's outputs."""
        return self.score_map(SIGNALS[self.signal].compute(outputs, self._fp64))

    @cached_property
    def _fp64(self) -> Mapping[str, NDArray[np.float64]]:
        """The coefficients as every signal computes with them, converted once."""
        return {name: array.astype(np.float64) for name, array in self.coefficients.items()}

    @property
    def is_about_full_rung(self) -> bool:
        """Whether losses are about `vit_high`'s answers, not about those of another model."""
        # Artifacts of earlier releases name the other model in words only.
        named = (self.certificate or {}).get("reference", FULL_RUNG)
        return self.reference is None and named == FULL_RUNG

    @property
    def is_live(self) -> bool:
        """Whether live traffic certifies its threshold, see `journal` and `calibration live`."""
        return self.chosen_by.get("method") == LIVE

    @property
    def scoring_sha256(self) -> str:
        """SHA-256 of what makes an image's score and loss what they are, whatever the threshold."""
        content = {name: self.to_dict()[name] for name in _SCORING}
        content["loss"] = {name: self.chosen_by.get(name) for name in _LOSS}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def check_rungs(self, files: Mapping[str, Path]) -> None:
        """Compare ONNX files, by the names of their models, with their hashes at calibration.

        Raises:
            CalibrationError: a file, or the weights beside it, is missing or not the one that was
                calibrated; naming that file.
        """
        records = dict(self.rungs)
        if self.reference is not None and REFERENCE_MODEL in files:
            records[REFERENCE_MODEL] = self.reference
        for name, record in records.items():
            if not files[name].is_file():
                raise CalibrationError(
                    f"{name}: no ONNX file at {files[name]}; run python -m export repository"
                )
            differs = "is not the file that was calibrated (SHA-256 differs)"
            fault = record.fault(files[name], differs)
            if fault is not None:
                raise CalibrationError(
                    f"{name}: {fault}; restore the calibrated file, or collect and fit with this "
                    "one"
                )

    def save(self, path: Path) -> None:
        """Write the artifact, whole or not at all; equal artifacts give equal bytes."""
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_name(f".{path.name}")
        try:
            fresh.write_text(json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n")
            fresh.replace(path)
        finally:
            fresh.unlink(missing_ok=True)

    def to_dict(self) -> dict[str, Any]:
        """The artifact as JSON types, `schema_version` first."""
        content: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            **{name: getattr(self, name) for name in self.__dataclass_fields__},
        }
        content["rungs"] = {name: asdict(self.rungs[name]) for name in RUNGS}
        content["reference"] = None if self.reference is None else asdict(self.reference)
        content["image_shape"] = list(self.image_shape)
        content["score_map"] = asdict(self.score_map)
        content["coefficients"] = {k: _encode(v) for k, v in self.coefficients.items()}
        content["reference_scores"] = _encode(self.reference_scores)
        return content

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """Read an artifact.

        Raises:
            CalibrationError: missing, not JSON, another schema version, or an invalid field.
        """
        try:
            content = json.loads(path.read_text())
        except OSError as error:
            raise CalibrationError(
                f"{path}: {error.strerror}; run python -m calibration fit first"
            ) from None
        except ValueError as error:
            raise CalibrationError(f"{path} is not JSON: {error}") from None
        try:
            return cls.from_dict(content)
        except CalibrationError as error:
            raise CalibrationError(f"{path}: {error}") from None
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CalibrationError(
                f"{path}: invalid field: {type(error).__name__} {error}"
            ) from None

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Calibration:
        """Build an artifact from what `to_dict` gave."""
        fields = dict(content)
        version = fields.pop("schema_version", None)
        if version != SCHEMA_VERSION:
            raise CalibrationError(
                f"schema version {version}, this code reads {SCHEMA_VERSION}; calibrate again"
            )
        score_map = fields["score_map"]
        fields["score_map"] = ScoreMap(
            score_map["sign"], tuple(score_map["knots"]), tuple(score_map["values"])
        )
        fields["rungs"] = {name: RungRecord(**rung) for name, rung in fields["rungs"].items()}
        if fields.get("reference") is not None:  # artifacts of earlier releases have no such field
            fields["reference"] = RungRecord(**fields["reference"])
        channels, height, width = fields["image_shape"]
        fields["image_shape"] = (channels, height, width)
        fields["coefficients"] = {k: _decode(v) for k, v in fields["coefficients"].items()}
        fields["reference_scores"] = _decode(fields["reference_scores"])
        return cls(**fields)


def _encode(array: NDArray[Any]) -> dict[str, Any]:
    """An array as JSON types, bit for bit; a short one for people to read."""
    little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    content: dict[str, Any] = {"dtype": array.dtype.name, "shape": list(array.shape)}
    if array.size <= READABLE_LENGTH:
        return {**content, "values": array.ravel().tolist()}
    return {**content, "base64": base64.b64encode(little.tobytes()).decode()}


def _decode(content: Mapping[str, Any]) -> NDArray[Any]:
    """The array that `_encode` was given; ValueError or KeyError where it cannot be."""
    if content["dtype"] not in ("float32", "float64"):
        raise ValueError(f"an array of {content['dtype']}, not of float32 or float64")
    dtype = np.dtype(content["dtype"])
    if "values" in content:
        flat = np.array(content["values"], dtype=dtype)
    else:
        data = base64.b64decode(content["base64"], validate=True)
        flat = np.frombuffer(data, dtype=dtype.newbyteorder("<")).astype(dtype)
    return flat.reshape(content["shape"])
