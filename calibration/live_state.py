"""What `calibration live` knows: the tests, what was read of the journals, and how it came there.

All of it is one file, replaced in one step. So a process that is killed at any point goes on from
the last whole state, with every record counted once: the counts and the places up to which the
journals have been read are written down together.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from routing import Calibration, RiskTest, ScoreMap
from routing.journal import Record

from .anytime import AnytimeTest, FloatVector, confidence_sequence, share_of_delta
from .scoring import fit_score_map, learn_sign

NAME = "state.json"
SCHEMA_VERSION = 1
STRETCH = 200  # audited images that teach the range and the sign of a score, and are no evidence
QUANTILES = 100  # of their scores, to be tested
MAX_POINTS, MAX_EVENTS, MAX_SCORES = 1000, 200, 1000
GAIN = 0.01  # of escalation: for less no server loads a version
ALARM = 0.01  # probability of ever going back although the risk is at most epsilon, in one test


def _steps(first: float, last: float, count: int) -> FloatVector:
    """Thresholds in equal ratios, to three digits, as people can type them."""
    return np.array([float(f"{step:.3g}") for step in np.geomspace(first, last, count)])


# Fixed beforehand. Of a margin, 0 is a sure answer and 1 a tie; softmax is often surer than 1 %.
MARGINS = np.concatenate([_steps(1e-7, 0.008, 30), np.arange(1, 101) / 100])
LABEL_DISTANCES = -_steps(32.0, 0.01, 120)  # logits between the nearest label and its cut
FIXED: Mapping[str, FloatVector] = {"margin": MARGINS, "label_margin": LABEL_DISTANCES}


class LiveError(ValueError):
    """Nothing can be certified from live traffic here. One line."""


@dataclass
class Served:
    """The threshold that answers, and what has been audited since it does.

    Attributes:
        threshold: in the score's units; None: every image escalates.
        audit_share: of the images that both rungs answer.
        ordinal: which one it is of its test, from 1 on; 0: none.
        images: audited since.
        lost: of them, kept low by this threshold with a loss.
        moments: as in `RiskTest`.
    """

    threshold: float | None = None
    audit_share: float = 1.0
    ordinal: int = 0
    images: int = 0
    lost: int = 0
    moments: list[tuple[int, int]] = field(default_factory=list)

    @property
    def alarm(self) -> float:
        """What this threshold may use of `ALARM`: the sum over all of a test's is all of it."""
        return ALARM / (self.ordinal * (self.ordinal + 1)) if self.ordinal else ALARM


@dataclass
class State:
    """All that is known.

    Attributes:
        scoring: `Calibration.scoring_sha256`; records of another score are no evidence.
        epsilon: ε.
        confidence: 1 - δ.
        number: of the test, from 1 on; each has its own share of δ.
        thresholds: what it tests, ascending; None: the first images are to teach them.
        images, kept, lost, certified: as in `AnytimeTest`.
        first_certified: images of this test when a threshold that keeps some low was certified, as
            many as `GAIN`; 0: none is.
        served: what answers.
        pending: version of the router that is being rolled out; 0: none.
        places: up to where each journal has been read, bytes.
        audited: images in all tests.
        other: records that were of another score, in journals that are read.
        damaged: lines that were not whole.
        stretch: score, change and loss of the first images, as long as they teach.
        scores: some of the scores of this test, the latest.
        window: when the first and the last record of this test were written, seconds since 1970.
        points: what the page draws, see `point`.
        events: what happened: `at`, `audited`, `kind` and `words`.
    """

    scoring: str
    epsilon: float
    confidence: float
    number: int = 1
    thresholds: list[float] | None = None
    images: int = 0
    kept: list[int] = field(default_factory=list)
    lost: list[int] = field(default_factory=list)
    certified: int = 0
    first_certified: int = 0
    served: Served = field(default_factory=Served)
    pending: int = 0
    places: dict[str, int] = field(default_factory=dict)
    audited: int = 0
    other: int = 0
    damaged: int = 0
    stretch: list[tuple[float, float, bool]] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    window: list[float] = field(default_factory=list)
    points: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def begin(cls, calibration: Calibration) -> State:
        """The state of a repository about which nothing is known yet."""
        goal = calibration.chosen_by
        state = cls(calibration.scoring_sha256, goal["max_risk"], goal["confidence"])
        fixed = FIXED.get(calibration.signal)
        state.thresholds = None if fixed is None else fixed.tolist()
        return state

    @classmethod
    def load(cls, file: Path, calibration: Calibration) -> State:
        """Read the state of a repository, or begin.

        Raises:
            LiveError: it cannot be read, or is that of another promise.
        """
        try:
            content = json.loads(file.read_text())
            if content.pop("schema_version") != SCHEMA_VERSION:
                raise LiveError(f"{file} is of another release; remove it to begin anew")
            content["served"] = Served(**content["served"])
            content["stretch"] = [tuple(entry) for entry in content["stretch"]]
            state = cls(**content)
        except FileNotFoundError:
            return cls.begin(calibration)
        except LiveError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise LiveError(f"{file} cannot be read ({error}); remove it to begin anew") from None
        goal = calibration.chosen_by
        if (state.epsilon, state.confidence) != (goal["max_risk"], goal["confidence"]):
            raise LiveError(
                f"{file} is about a risk of {state.epsilon:g} with confidence "
                f"{state.confidence:g}, and the repository promises {goal['max_risk']:g} with "
                f"{goal['confidence']:g}; remove that folder, or assemble with another "
                "--live-folder"
            )
        return state

    def save(self, file: Path) -> None:
        """Replace the state in one step.

        Raises:
            OSError: it cannot be written; the one before stays.
        """
        text = json.dumps({"schema_version": SCHEMA_VERSION, **asdict(self)}, allow_nan=False)
        fresh = file.with_suffix(".new")
        with fresh.open("w") as opened:
            opened.write(text)
            opened.flush()
            os.fsync(opened.fileno())
        fresh.replace(file)

    @property
    def delta(self) -> float:
        """δ of the running test."""
        return (1 - self.confidence) * share_of_delta(self.number)

    def test(self) -> AnytimeTest | None:
        """The running test; None: it has no thresholds yet."""
        if self.thresholds is None:
            return None
        thresholds = np.array(self.thresholds)
        counts = (np.array(self.kept, np.int64), np.array(self.lost, np.int64))
        return AnytimeTest(
            self.epsilon, self.delta, thresholds, self.images, *counts, self.certified
        )

    def observe(self, records: Iterable[Record]) -> tuple[int, int] | None:
        """Count records in their order; one that contradicts what answers begins the next test.

        Returns:
            The losses and the images that contradicted it; None: nothing did.
        """
        found, test, alarm = None, self.test(), self._alarm()
        for record in records:
            self.audited += 1
            self.window = [*(self.window[:1] or [record.at]), record.at]
            if record.score is not None:
                self.scores = [*self.scores[1 - MAX_SCORES :], record.score]
            if test is None:
                if record.score is not None:
                    self.stretch.append((record.score, record.change, record.lost))
                continue
            test.observe(record.score, record.lost)
            if test.certified and not self.first_certified:
                if test.counts(test.threshold)[0] >= GAIN * test.images:
                    self.first_certified = test.images
            threshold = self.served.threshold
            if alarm is None or threshold is None:
                continue
            lost = record.lost and record.score is not None and record.score <= threshold
            alarm.observe(lost)
            if lost and alarm.is_contradicted:  # an image without a loss only calms it
                found = (alarm.losses, alarm.images)
                self.retreat()
                test, alarm = self.test(), None
        if test is not None:
            self._keep(test)
        if alarm is not None:
            self.served.images, self.served.lost = alarm.images, alarm.losses
            self.served.moments = alarm.moments
        return found

    def _keep(self, test: AnytimeTest) -> None:
        self.images, self.certified = test.images, test.certified
        self.kept, self.lost = test.kept.tolist(), test.lost.tolist()

    def _alarm(self) -> RiskTest | None:
        """The test of "the risk is at most epsilon" for what answers, as far as it has come."""
        if self.served.threshold is None:
            return None
        served, alarm = self.served, RiskTest(self.epsilon, self.served.alarm)
        if served.moments:
            alarm.images, alarm.losses = served.images, served.lost
            alarm.moments = [(images, losses) for images, losses in served.moments]
        return alarm

    def retreat(self) -> None:
        """Let every image escalate, and begin the next test with nothing counted."""
        self.served, self.pending = Served(), 0  # no bolder threshold that waits may follow
        self.next_test()

    def next_test(self) -> None:
        """Begin a test with the next share of δ, which sees only what comes from now on."""
        self.number += 1
        self.images = self.certified = self.first_certified = 0
        self.kept, self.lost, self.scores, self.window = [], [], [], []

    def teach(self) -> ScoreMap:
        """Learn a score's sign and units from the first images, and the thresholds to test.

        Returns:
            What takes the scores so far to the new ones, of which later records are to be.
        """
        raw, change = (np.array([entry[at] for entry in self.stretch]) for at in (0, 1))
        lost = np.array([entry[2] for entry in self.stretch], np.bool_)
        score_map = fit_score_map(raw, change, learn_sign(raw, change, lost))
        self.test_quantiles(score_map(raw))
        return score_map

    def test_quantiles(self, scores: NDArray[np.float32]) -> None:
        """Take thresholds at quantiles of scores, (M,), whose images are no evidence."""
        quantiles = np.quantile(scores, np.arange(1, QUANTILES + 1) / QUANTILES)
        self.thresholds = np.unique(quantiles.astype(np.float64)).tolist()
        self.stretch, self.scores, self.window = [], [], []

    def wanted(self, floor: float) -> tuple[float | None, float]:
        """The threshold that is certified, and the share of images to audit with it.

        The share is 1 up to the first certificate and falls then as the evidence grows, down to a
        floor: the number of audited images grows with the root of that of all images.
        """
        test = self.test()
        if test is None or not self.first_certified:
            return None, 1.0
        return test.threshold, max(floor, min(1.0, self.first_certified / test.images))

    def serve(self, threshold: float | None, audit_share: float) -> None:
        """Take note of what answers from now on."""
        if threshold == self.served.threshold:
            self.served.audit_share = audit_share
            return
        ordinal = 0 if threshold is None else self.served.ordinal + 1
        self.served = Served(threshold, audit_share, ordinal)

    def figures(self) -> dict[str, Any]:
        """Escalation and risk of the threshold that answers, over the running test's images."""
        test, threshold = self.test(), self.served.threshold
        if test is None or threshold is None or not test.images:
            return {"lost": 0, "escalation": None, "risk": None, "interval": None}
        kept, lost = test.counts(threshold)
        return {
            "lost": lost,
            "escalation": 1 - kept / test.images,
            "risk": lost / test.images,
            "interval": list(confidence_sequence(lost, test.images)),
        }

    def point(self, at: float) -> None:
        """Note where things stand, for the page; of many points every other one stays."""
        figures = self.figures()
        low, high = figures["interval"] or (None, None)
        escalation = 1.0 if figures["escalation"] is None else figures["escalation"]
        self.points.append(
            {
                "at": at,
                "audited": self.audited,
                "threshold": self.served.threshold,
                "audit_share": self.served.audit_share,
                "escalation": escalation,
                "risk": figures["risk"],
                "low": low,
                "high": high,
            }
        )
        if len(self.points) > MAX_POINTS:
            self.points = [*self.points[:-1:2], self.points[-1]]

    def event(self, kind: str, words: str, at: float) -> None:
        """Note what happened."""
        happened = {"at": at, "audited": self.audited, "kind": kind, "words": words}
        self.events = [*self.events[1 - MAX_EVENTS :], happened]
