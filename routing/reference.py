"""Reference answers: what the calibration's runtime answered for some of its images.

A certificate is about the answers of one runtime. The same int8 graph gives others with another
release of ONNX Runtime or on another processor: one rounding flips an 8-bit level, and what follows
carries it on. That usually changes no decision, and whether it does is measured here: the reference
images are answered anew where they are served, and answers and decisions held against those of the
calibration.

The images are tensors after the preprocessing, so that nothing but the graphs is compared. A tensor
holds at most 256 values a channel, one for each level of grey, so it is stored as the levels'
numbers and a table of their values, which gives it back bit for bit.
"""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from .calibration import Calibration
from .cascade import CascadeAnswer
from .fidelity import fidelity_loss
from .outputs import FloatArray, RungOutputs
from .policy import Overrides, Policy, escalation_mask

BATCH = 8
_PLAUSIBLE = 0.99  # Of a hundred servers that keep what is certified one may be told otherwise.
SAME, WITHIN_SLACK, OTHER = OUTCOMES = ("same", "within_slack", "other")
VERDICTS = {
    SAME: "this server answers as the calibration did",
    WITHIN_SLACK: "this server computes other answers than the calibration did, of which no more "
    "are lost than its certificate leaves room for",
    OTHER: "this server computes other answers than the calibration did; calibrate here",
}
NONE_STORED = "no reference answers in this artifact"
# What a router that refuses other answers says until it knows.
COMPARING = "the router is still comparing its answers with the calibration's; try again soon"

Cascade = Callable[[FloatArray, Overrides], CascadeAnswer]


class AnswersError(ValueError):
    """Reference answers are missing, unreadable or another artifact's. One line."""


def answers_path(artifact: Path) -> Path:
    """Where the reference answers of an artifact lie: beside it."""
    return artifact.with_suffix(".answers.npz")


def reference_words(named: Mapping[str, Any] | None) -> str:
    """What an artifact names, for people."""
    return NONE_STORED if named is None else f"reference answers for {named['images']} images"


@dataclass(frozen=True)
class ReferenceAnswers:
    """N images of the calibration and what was answered for them there.

    Attributes:
        pixels: (N, 3, H, W), numbers of levels.
        levels: FP32 (3, K), the value of each level in each channel.
        low: of the cheap rung, without `cls_layers`.
        high: of the full rung.
        truth: of the reference that losses are about; None: the full rung is it.
        scores: FP32 (N,), oracle units.
    """

    pixels: NDArray[Any]
    levels: FloatArray
    low: RungOutputs
    high: RungOutputs
    truth: RungOutputs | None
    scores: FloatArray

    @classmethod
    def of(
        cls,
        image: FloatArray,
        low: RungOutputs,
        high: RungOutputs,
        truth: RungOutputs | None,
        scores: FloatArray,
    ) -> ReferenceAnswers:
        """Of N image tensors, FP32 (N, 3, H, W), and the answers to them."""
        pixels, levels = _indexed(image)
        without_layers = RungOutputs(low.embedding, None, low.logits)
        return cls(pixels, levels, without_layers, high, truth, scores)

    def __len__(self) -> int:
        return len(self.scores)

    def image(self, rows: slice) -> FloatArray:
        """The tensors of some images, FP32 (b, 3, H, W), bit for bit as they were."""
        channels = [levels[self.pixels[rows, i]] for i, levels in enumerate(self.levels)]
        return np.stack(channels, axis=1)

    def to_bytes(self) -> bytes:
        """The `.npz` file; equal answers give equal bytes."""
        rungs = {"low": self.low, "high": self.high, "truth": self.truth}
        arrays: dict[str, NDArray[Any]] = {
            "pixels": self.pixels,
            "levels": self.levels,
            "scores": self.scores,
        }
        for name, outputs in rungs.items():
            if outputs is not None:
                arrays[f"embedding_{name}"] = outputs.embedding
                if outputs.logits is not None:
                    arrays[f"logits_{name}"] = outputs.logits
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)
        return buffer.getvalue()

    @classmethod
    def load(cls, path: Path, calibration: Calibration) -> ReferenceAnswers:
        """Read the answers that an artifact names.

        Raises:
            AnswersError: it names none, or the file is missing or not the one that it names.
        """
        named = calibration.reference_answers
        if named is None:
            raise AnswersError(f"{NONE_STORED}; python -m calibration fit stores them")
        try:
            data = path.read_bytes()
        except OSError as error:
            raise AnswersError(
                f"{path}: {error.strerror}; copy it along with the artifact that names it, or fit "
                "again with --reference-images 0"
            ) from None
        if hashlib.sha256(data).hexdigest() != named["sha256"]:
            raise AnswersError(
                f"{path} is not the file that its artifact names (SHA-256 differs); restore it, or "
                "fit again"
            )
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as file:
                arrays = dict(file)
            return cls(
                arrays["pixels"],
                arrays["levels"],
                _outputs(arrays, "low"),
                _outputs(arrays, "high"),
                _outputs(arrays, "truth") if "embedding_truth" in arrays else None,
                arrays["scores"],
            )
        except (OSError, ValueError, KeyError, BadZipFile) as error:
            raise AnswersError(f"{path} is not readable ({error}); fit again") from None


@dataclass(frozen=True)
class ServedAnswers:
    """What is answered for the reference images where they are served.

    Attributes:
        answer: to requests without parameters.
        escalated: BOOL (N,), which of these answers are the full rung's.
        scores: FP32 (N,); NaN where the cheap rung is never asked.
        high: the full rung's answers to all.
    """

    answer: RungOutputs
    escalated: NDArray[np.bool_]
    scores: FloatArray
    high: RungOutputs


def ask(recorded: ReferenceAnswers, cascade: Cascade, batch: int = BATCH) -> ServedAnswers:
    """Have the reference images answered, and by the full rung those that were not all.

    The cascade answers a batch of images, FP32 (b, 3, H, W); what it raises is passed on.

    Raises:
        AnswersError: an answer is marked degraded: the cascade does not do what was calibrated.
    """
    auto, high = [], []
    for start in range(0, len(recorded), batch):
        image = recorded.image(slice(start, start + batch))
        auto.append(cascade(image, Overrides()))
        if auto[-1].degraded.any():
            raise AnswersError(
                "answers are marked degraded (under pressure, or the full rung fails), which the "
                "calibration's are not; compare again when that is over"
            )
        is_full = bool(auto[-1].escalated.all())
        high.append(auto[-1] if is_full else cascade(image, Overrides(Policy.HIGH)))
    return ServedAnswers(
        _joined(auto),
        np.concatenate([answer.escalated for answer in auto]),
        np.concatenate([answer.score for answer in auto]),
        _joined(high),
    )


@dataclass(frozen=True)
class RungDifference:
    """How far a rung's embeddings are from the recorded ones, in shares of those ones' norms.

    Attributes:
        images: that were compared: of the cheap rung those that it answers.
        median: NaN where there are none.
        largest: likewise; infinite where an answer holds NaN or Inf.
    """

    images: int
    median: float
    largest: float


@dataclass(frozen=True)
class Comparison:
    """What is answered now beside what was answered in the calibration.

    Attributes:
        images: N.
        rungs: `vit_low` and `vit_high`.
        score_change: the largest, in oracle units; NaN where nothing is scored.
        other_decisions: images that escalate now and did not, or the other way about.
        other_answers: images whose answer is not acceptable in place of the recorded one.
        lost: images whose answer is not acceptable in place of the recorded reference's.
        lost_before: the same of the recorded answers.
        allowed: the most that may be lost: `lost_before`, and what is plausible where the risk is
            just the certified one.
    """

    images: int
    rungs: Mapping[str, RungDifference]
    score_change: float
    other_decisions: int
    other_answers: int
    lost: int
    lost_before: int
    allowed: int

    @property
    def outcome(self) -> str:
        """One of `OUTCOMES`."""
        if self.lost > self.allowed:
            return OTHER
        return WITHIN_SLACK if self.other_decisions or self.other_answers else SAME

    @property
    def verdict(self) -> str:
        """The outcome for people, without figures."""
        return VERDICTS[self.outcome]

    @property
    def sentence(self) -> str:
        """Verdict and figures in one line."""
        differences = "; ".join(
            f"{name}'s embeddings differ by {found.median:.2g} of their norm in the median, "
            f"{found.largest:.2g} at most"
            for name, found in self.rungs.items()
            if found.images
        )
        return (
            f"{self.verdict}: of {self.images} reference images {self.other_decisions} have "
            f"another decision and {self.other_answers} another answer; {self.lost} are lost "
            f"against the recorded reference, {self.lost_before} were, {self.allowed} may be; "
            f"{differences}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON types; a figure that is not finite is null."""
        content = asdict(self)
        content["score_change"] = _finite(self.score_change)
        content["rungs"] = {
            name: {key: _finite(figure) for key, figure in asdict(found).items()}
            for name, found in self.rungs.items()
        }
        return {"outcome": self.outcome, "verdict": self.verdict, **content}


def compare(
    calibration: Calibration, recorded: ReferenceAnswers, served: ServedAnswers
) -> Comparison:
    """Hold answers against the recorded ones.

    The certificate promises a risk of `epsilon`, and was earned with `errors` of `n` images lost. A
    server where the share between the two is lost besides still keeps that promise, barely. What
    such a server shows on the reference images, but for the worst hundredth, may be lost beyond
    those that were in the calibration; where nothing is certified, none may.
    """
    decided = escalation_mask(recorded.scores, calibration.threshold, Overrides())
    before = _chosen(decided, recorded.low, recorded.high)
    truth = recorded.high if recorded.truth is None else recorded.truth

    def unlike(some: RungOutputs, other: RungOutputs) -> NDArray[np.bool_]:
        with np.errstate(invalid="ignore", over="ignore"):
            return fidelity_loss(calibration.chosen_by, some, other) | ~some.finite()

    lost_before = int(unlike(before, truth).sum())
    kept = np.flatnonzero(~served.escalated)
    change = np.abs(served.scores.astype(np.float64) - recorded.scores)
    return Comparison(
        images=len(recorded),
        rungs={
            "vit_low": _difference(served.answer.rows(kept), recorded.low.rows(kept)),
            "vit_high": _difference(served.high, recorded.high),
        },
        score_change=float(np.nanmax(change)) if np.isfinite(change).any() else float("nan"),
        other_decisions=int((served.escalated != decided).sum()),
        other_answers=int(unlike(served.answer, before).sum()),
        lost=int(unlike(served.answer, truth).sum()),
        lost_before=lost_before,
        allowed=lost_before + _slack(calibration.certificate, len(recorded) - lost_before),
    )


def _slack(certificate: Mapping[str, Any] | None, images: int) -> int:
    """How many of the images that were not lost may be, by what the certificate leaves."""
    if certificate is None or not certificate.get("certified"):
        return 0
    share = certificate["epsilon"] - certificate["errors"] / certificate["n"]
    # The quantile of a binomial distribution: the share itself is mostly less than one image.
    lost, probability = 0, (1 - share) ** images
    while probability < _PLAUSIBLE and lost < images:
        lost += 1
        probability += math.comb(images, lost) * share**lost * (1 - share) ** (images - lost)
    return lost


def _difference(served: RungOutputs, recorded: RungOutputs) -> RungDifference:
    if not len(served):
        return RungDifference(0, float("nan"), float("nan"))
    now, then = served.embedding.astype(np.float64), recorded.embedding.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        apart = np.linalg.norm(now - then, axis=1)
        apart /= np.maximum(np.linalg.norm(then, axis=1), np.finfo(np.float64).tiny)
    apart = np.where(np.isfinite(apart), apart, np.inf)
    return RungDifference(len(apart), float(np.median(apart)), float(apart.max()))


def _chosen(escalated: NDArray[np.bool_], low: RungOutputs, high: RungOutputs) -> RungOutputs:
    """The cascade's answers out of both rungs'."""
    which = escalated[:, np.newaxis]
    logits = None
    if low.logits is not None and high.logits is not None:
        logits = np.where(which, high.logits, low.logits)
    return RungOutputs(np.where(which, high.embedding, low.embedding), None, logits)


def _joined(answers: list[CascadeAnswer]) -> RungOutputs:
    logits = [answer.logits for answer in answers if answer.logits is not None]
    return RungOutputs(
        np.concatenate([answer.embedding for answer in answers]),
        None,
        np.concatenate(logits) if logits else None,
    )


def _indexed(image: FloatArray) -> tuple[NDArray[Any], FloatArray]:
    """Numbers of levels (N, 3, H, W) and the levels' values (3, K), padded with zeros."""
    values, numbers = [], []
    for channel in range(image.shape[1]):
        # By their bits, so that 0.0 and -0.0 are two values.
        bits = np.ascontiguousarray(image[:, channel]).view(np.uint32)
        found, index = np.unique(bits, return_inverse=True)
        values.append(found.view(np.float32))
        numbers.append(index.reshape(bits.shape))
    width = max(map(len, values))
    levels = np.stack([np.pad(found, (0, width - len(found))) for found in values])
    return np.stack(numbers, axis=1).astype(np.min_scalar_type(width - 1)), levels


def _outputs(arrays: Mapping[str, NDArray[Any]], name: str) -> RungOutputs:
    return RungOutputs(arrays[f"embedding_{name}"], None, arrays.get(f"logits_{name}"))


def _finite(number: float) -> float | None:
    return number if np.isfinite(number) else None
