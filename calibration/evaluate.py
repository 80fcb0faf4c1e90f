"""A deployed artifact on new images: does its certificate hold, and do the images still look alike?

Every test here asks for independent images, so one image of each group is drawn and counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.stats import betabinom, binom, binomtest, fisher_exact, ks_2samp

from bundle.prints import among
from routing import Calibration, Overrides, escalation_mask
from routing.calibration import FULL_RUNG

from .certify import one_per_group
from .fidelity import Fidelity
from .held_out import HeldOut
from .outputs import Made, Outputs
from .splits import group_keys

INTERVAL = 0.95
DRIFT_LEVEL = 0.01  # each of the two tests cries wolf once in a hundred evaluations
CRC_CONFIDENCE = 0.9  # at which a certificate without a confidence of its own is tested


class EvaluateError(ValueError):
    """The artifact cannot be evaluated on these outputs. One line."""


@dataclass(frozen=True)
class Evaluation:
    """What new images say about an artifact.

    Attributes:
        known: the number of images left out because the calibration has seen them.
        images: the number of independent images, one of each group; all that follows counts only
            these.
        errors: the number of images whose answer is not acceptable: they were kept low, or were
            escalated to a full rung that is not the reference.
        risk_interval: the exact 95 % interval of the risk (Clopper and Pearson 1934).
        reference_escalation_rate: share of the artifact's reference scores that would escalate.
        escalation_p: two-sided p-value of both rates coming from one population (Fisher 1922).
        score_distance: largest gap between the scores' distribution function and the reference's.
        score_p: p-value of this distance if both come from one population (Kolmogorov and
            Smirnov).
        contradiction_p: how likely so many errors are if the certificate is right; None where
            nothing is certified.
        figures: agreement and, where labels are known, accuracy; `intervals` has the 95 %
            bootstrap interval of each.
        answer: what an error is, to be read after "an answer that".
        reference: what answers are held against, as `Outputs.truth_words`.
    """

    source: str
    known: int
    images: int
    errors: int
    risk: float
    risk_interval: tuple[float, float]
    escalation_rate: float
    reference_escalation_rate: float
    escalation_p: float
    score_distance: float
    score_p: float
    certificate: Mapping[str, Any] | None
    contradiction_p: float | None
    figures: Mapping[str, float]
    intervals: Mapping[str, list[float]]
    answer: str
    reference: str

    @property
    def confidence(self) -> float:
        """The confidence at which the certificate is tested."""
        own = self.certificate["confidence"] if self.certificate else None
        return CRC_CONFIDENCE if own is None else float(own)

    @property
    def contradicted(self) -> bool:
        """Whether the images contradict the certificate, at its confidence."""
        return self.contradiction_p is not None and self.contradiction_p <= 1 - self.confidence

    @property
    def drift(self) -> bool:
        """Whether escalation or scores differ from those at calibration, at 1 %."""
        return min(self.escalation_p, self.score_p) <= DRIFT_LEVEL

    def lines(self) -> list[str]:
        """One plain sentence for each finding, the certificate first."""
        low, high = (_percent(bound) for bound in self.risk_interval)
        now, before = _percent(self.escalation_rate), _percent(self.reference_escalation_rate)
        got = "were kept low with" if self.reference == FULL_RUNG else "got"
        return [
            self._certificate_line(),
            f"Risk: {self.errors} of {self.images} independent images {got} an answer that "
            f"{self.answer}, {_percent(self.risk)} (95 % interval {low} to {high}).",
            f"Escalation: {now} now, {before} at calibration, {_drift(self.escalation_p)}.",
            f"Scores: their distribution is {self.score_distance:.3f} from that at calibration "
            f"(Kolmogorov-Smirnov distance), {_drift(self.score_p)}.",
            *self._figure_lines(),
            *([f"Left out: {self.known} images that the calibration has seen."] * bool(self.known)),
        ]

    def _certificate_line(self) -> str:
        if self.certificate is None:
            return "Certificate: none; the threshold was chosen without one."
        if self.contradiction_p is None:
            line = "Certificate: no threshold was certified; every image goes to the full rung"
            return f"{line}, so none can be lost." if self.reference == FULL_RUNG else f"{line}."
        crc = self.certificate["method"] == "crc"
        average = " on average over calibrations" if crc else ""
        level = f"its confidence of {100 * self.confidence:g} %"
        if crc:
            level = f"{100 * self.confidence:g} %, taken because it has no confidence of its own,"
        verdict = "CONTRADICTED" if self.contradicted else "not contradicted"
        return (
            f"Certificate {verdict}: if it is right "
            f"(risk at most {100 * self.certificate['epsilon']:g} %{average}), {self.errors} or "
            f"more errors among {self.images} images have a probability of at most "
            f"{self.contradiction_p:.2g}; {level} puts the limit at "
            f"{1 - self.confidence:.2g}."
        )

    def _figure_lines(self) -> list[str]:
        share = {name: _percent(value) for name, value in self.figures.items()}
        lines = []
        if "agreement_with_high" in share:
            lines.append(
                f"Agreement with the {self.reference}: {share['agreement_with_high']}; of the "
                f"cheap rung alone {share['agreement_low']}."
            )
        if "accuracy_adaptive" in share:
            lines.append(
                f"Accuracy on labelled images: {share['accuracy_adaptive']} adaptive, "
                f"{share['accuracy_low']} cheap rung, {share['accuracy_high']} full rung."
            )
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON types."""
        return {
            **asdict(self),
            "risk_interval": list(self.risk_interval),
            "contradicted": self.contradicted,
            "drift": self.drift,
            "readings": self.lines(),
        }


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _drift(p_value: float) -> str:
    verdict = "DRIFT" if p_value <= DRIFT_LEVEL else "no drift"
    return f"{verdict} at {100 * DRIFT_LEVEL:g} % (p = {p_value:.2g})"


def evaluate(calibration: Calibration, outputs: Outputs) -> Evaluation:
    """Test an artifact on images that its calibration has not seen.

    Raises:
        EvaluateError: outputs of other ONNX files or another preprocessing, no image that the
            calibration has not seen, or an artifact without reference scores.
    """
    check_artifact(calibration, outputs.made, outputs.truth_words)
    outputs, known = _unseen(calibration, outputs)
    groups = np.array(group_keys(outputs, calibration.data["group_by"]))
    seed, fidelity = calibration.data["seed"], Fidelity.of(calibration)
    rows = one_per_group(groups, np.arange(len(outputs)), seed)
    scores, threshold = calibration.score(outputs.low)[rows], calibration.threshold
    outputs, reference = outputs.rows(rows), calibration.reference_scores
    held_out = HeldOut(outputs, groups[rows], scores, threshold, fidelity, seed)
    reference_escalated = escalation_mask(reference, threshold, Overrides())
    errors, n = int(held_out.lost.sum()), len(rows)
    exact = binomtest(errors, n).proportion_ci(INTERVAL, "exact")
    distance = ks_2samp(scores, reference)
    both = (held_out.escalated, reference_escalated)
    counts = [[int(which.sum()), int((~which).sum())] for which in both]
    measured = held_out.figures()
    names = [name for name in measured if name.startswith(("agreement", "accuracy"))]
    return Evaluation(
        source=outputs.title,
        known=known,
        images=n,
        errors=errors,
        risk=errors / n,
        risk_interval=(float(exact.low), float(exact.high)),
        escalation_rate=float(held_out.escalated.mean()),
        reference_escalation_rate=float(reference_escalated.mean()),
        escalation_p=float(fisher_exact(counts).pvalue),
        score_distance=float(distance.statistic),
        score_p=float(distance.pvalue),
        certificate=calibration.certificate,
        contradiction_p=contradiction_p_value(calibration.certificate, errors, n),
        figures={name: measured[name] for name in names},
        intervals={name: measured["intervals"][name] for name in names},
        answer=fidelity.words(outputs.truth_words),
        reference=outputs.truth_words,
    )


def _unseen(calibration: Calibration, outputs: Outputs) -> tuple[Outputs, int]:
    """The images that the calibration has not seen, and how many it has."""
    if not len(outputs):
        raise EvaluateError(
            "all of these images were used to fit a graph or its head; evaluate it on others"
        )
    new = ~among(outputs.hashes, outputs.looks, calibration.data["image_prints"])
    if not new.any():
        raise EvaluateError(
            "all of these images were used in the calibration; evaluate it on others"
        )
    return outputs.rows(np.flatnonzero(new)), int((~new).sum())


def check_artifact(calibration: Calibration, made: Made, truth_words: str | None = None) -> None:
    """Refuse an artifact that outputs made so, and held against `truth_words`, say nothing of.

    Raises:
        EvaluateError: naming what differs, or an artifact of an earlier release.
    """
    if "image_prints" not in calibration.data:
        raise EvaluateError(
            "the artifact is of an earlier release, which knew its images by their files only; "
            "run calibration collect and fit again"
        )
    difference = made.difference(Made.of(calibration))
    if difference is not None:
        raise EvaluateError(
            f"the outputs are not as the artifact's were: {difference}; collect with the graphs "
            "that it was calibrated with, or calibrate again"
        )
    truth_words = truth_words or made.truth_words
    proved_about = (calibration.certificate or {}).get("reference", truth_words)
    if proved_about != truth_words:
        raise EvaluateError(
            f"the certificate is about the {proved_about}, the outputs hold answers against the "
            f"{truth_words}; collect with the graphs that it was calibrated with"
        )
    if not len(calibration.reference_scores):
        raise EvaluateError("the artifact has no reference scores; run calibration fit again")


def contradiction_p_value(
    certificate: Mapping[str, Any] | None, errors: int, n: int
) -> float | None:
    """The largest probability of so many errors that the certificate leaves possible.

    None where nothing is certified. `ltt`: P(Bin(n, ε) ≥ errors). `crc` promises an average over
    calibrations, of which many exceed ε: with k errors allowed among m certify images, the risk is
    stochastically at most Beta(k + 1, m - k), an order statistic's distribution, of mean
    (k + 1) / (m + 1) ≤ ε, and the errors among n new images are at most beta-binomial.
    """
    if certificate is None or not certificate["certified"]:
        return None
    if certificate["method"] == "crc":
        k, m = certificate["allowed"], certificate["n"]
        return float(betabinom.sf(errors - 1, n, k + 1, m - k))
    return float(binom.sf(errors - 1, n, certificate["epsilon"]))
