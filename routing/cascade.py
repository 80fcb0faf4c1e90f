"""The cascade's control flow, without Triton: one cheap call, one score, at most one full call.

The router gives it the requests of one `execute` and two callables; tests give it fakes and count.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .calibration import Calibration
from .outputs import FloatArray, RungOutputs
from .policy import Overrides, Relief, always_high, escalation_mask

Rung = Callable[[FloatArray], RungOutputs]

# Answered where there is no score: the largest FP32, for JSON knows neither NaN nor infinity. What
# has no score escalates, as what is above every threshold does.
UNSCORED = float(np.finfo(np.float32).max)


def answered_score(score: FloatArray) -> FloatArray:
    """Scores as they are answered, all of them finite: `UNSCORED` for NaN."""
    return np.nan_to_num(score, nan=UNSCORED, posinf=UNSCORED, neginf=-UNSCORED)


def score_of_answer(answered: FloatArray) -> FloatArray:
    """The scores behind answered ones: NaN for `UNSCORED`."""
    return np.where(answered >= UNSCORED, np.float32(np.nan), answered)


class RequestError(Exception):
    """A request that cannot be answered because of what it contains."""


class RungError(Exception):
    """A rung that did not answer; raised by the callables given to `run_cascade`.

    Attributes:
        is_outage: it cannot be had now, so that a later try may be answered; else it failed.
    """

    def __init__(self, message: str, is_outage: bool = False) -> None:
        super().__init__(message)
        self.is_outage = is_outage


# Triton gives every failure of a model called by another model the status INTERNAL: only the text
# tells an outage from a fault of the model. As tritonserver 2.51 and its python backend word them.
_OUTAGE = re.compile(
    r"is not ready"  # unloaded, or still loading
    r"|server not ready"  # while other models load, or while it stops
    r"|is not found"  # never there
    r"|has no available versions"
    r"|is not healthy"  # its process has died
    r"|exceeds maximum queue size"
    r"|request timeout expired"
    r"|server is stopping",
    re.IGNORECASE,
)


def is_outage(message: str) -> bool:
    """Whether the error of a call of one model by another says that it cannot be had now."""
    return bool(_OUTAGE.search(message))


class GoneError(Exception):
    """A request whose client no longer waits.

    Attributes:
        cancelled: the client hung up; else the request's own timeout has passed.
    """

    def __init__(self, message: str, cancelled: bool) -> None:
        super().__init__(message)
        self.cancelled = cancelled


Failure = RequestError | RungError | GoneError


def _still_waiting() -> None:
    return None


@dataclass(frozen=True)
class CascadeRequest:
    """One client's request.

    Attributes:
        image: FP32 (b, 3, H, W).
        overrides: its checked parameters.
        gone: asked before the full rung is called for it; the error if its client no longer waits.
        is_probe: it watches the service and is no part of the traffic.
    """

    image: FloatArray
    overrides: Overrides
    gone: Callable[[], GoneError | None] = _still_waiting
    is_probe: bool = False


@dataclass(frozen=True)
class CascadeAnswer:
    """One request's answer for its b images.

    Attributes:
        embedding: FP32 (b, D).
        logits: FP32 (b, C), or None for a model without a head.
        escalated: BOOL (b,), answered by the full rung.
        score: FP32 (b,), oracle units; NaN where the cheap rung was not asked.
        degraded: BOOL (b,), escalation was wanted but the low answer is returned.
        relieved: BOOL (b,), those of the degraded that pressure kept low.
        wanted: BOOL (b,), those that the threshold or the request escalates.
        audited: BOOL (b,), drawn for the audit and answered by both rungs.
    """

    embedding: FloatArray
    logits: FloatArray | None
    escalated: NDArray[np.bool_]
    score: FloatArray
    degraded: NDArray[np.bool_]
    relieved: NDArray[np.bool_]
    wanted: NDArray[np.bool_]
    audited: NDArray[np.bool_]


@dataclass(frozen=True)
class Audited:
    """What both rungs said of the n images of one request that were drawn for the audit.

    Attributes:
        score: FP32 (n,), oracle units.
        low: the cheap rung's answers.
        high: the full rung's.
    """

    score: FloatArray
    low: RungOutputs
    high: RungOutputs


@dataclass(frozen=True)
class Audit:
    """Images to be answered by both rungs, whatever the threshold says of them.

    Attributes:
        draw: which of n images are drawn, BOOL (n,); asked before anything is known of them.
        seen: told what both rungs said of those of one request, unless one of them failed or the
            client hung up: calls fail for all images of a batch alike.
    """

    draw: Callable[[int], NDArray[np.bool_]]
    seen: Callable[[Audited], None]


@dataclass(frozen=True)
class Decision:
    """What was decided about one request's b images, whatever becomes of the request then.

    Attributes:
        request: it.
        low: what the cheap rung said of the images.
        wanted: BOOL (b,), which of them the threshold escalates: those that pressure kept low too,
            and those of a request that got no answer because the full rung failed.
    """

    request: CascadeRequest
    low: RungOutputs
    wanted: NDArray[np.bool_]


@dataclass
class _Case:
    """One request on its way through the cascade."""

    request: CascadeRequest
    error: Failure | None = None
    low: RungOutputs | None = None
    high: RungOutputs | None = None  # only the rows that are asked about, in order
    score: FloatArray = field(init=False)
    wanted: NDArray[np.bool_] = field(init=False)
    relieved: NDArray[np.bool_] = field(init=False)
    drawn: NDArray[np.bool_] = field(init=False)

    def __post_init__(self) -> None:
        rows = len(self.request.image)
        self.score = np.full(rows, np.nan, dtype=np.float32)
        self.wanted = np.ones(rows, dtype=np.bool_)
        self.relieved = np.zeros(rows, dtype=np.bool_)
        self.drawn = np.zeros(rows, dtype=np.bool_)
        self.error = _not_finite(self.request.image)

    @property
    def asked(self) -> NDArray[np.bool_]:
        """Which images the full rung is asked about, BOOL (b,)."""
        return self.wanted | self.drawn


def run_cascade(
    requests: Sequence[CascadeRequest],
    calibration: Calibration,
    low: Rung,
    high: Rung,
    *,
    degrade_on_high_failure: bool = False,
    relief: Relief | None = None,
    waiting: int = 0,
    decided: Callable[[Decision], None] = lambda _: None,
    audit: Audit | None = None,
) -> list[CascadeAnswer | Failure]:
    """Answer several requests with at most one call of each rung.

    Args:
        requests: in the order of the answers.
        calibration: signal, score map and threshold.
        low: the cheap rung, called once with every image that needs a score or a low answer, or
            not at all.
        high: the full rung, called once with every image that escalates, or not at all.
        degrade_on_high_failure: when the full rung fails, return the low answers marked
            `degraded`, where there are any, instead of an error.
        relief: raises the threshold of requests without parameters when many images wait; the
            images that it keeps low are marked `degraded`.
        waiting: images of these requests that had to wait for the router.
        decided: told of every request that the cheap rung was asked about, before the full rung is
            asked: how long that takes must not tell whoever listens which images escalate.
        audit: draws among the images of requests without parameters, probes left out; those drawn
            get the full rung's answer, or the cheap one where it fails and they need no other.

    Returns:
        For each request its answer or its own error; a bad request never fails its neighbours.
    """
    cases = [_Case(request) for request in requests]
    sound = [case for case in cases if case.error is None]
    for case in sound:
        if audit and case.request.overrides == Overrides() and not case.request.is_probe:
            case.drawn = audit.draw(len(case.wanted))
    needs_low = [not always_high(calibration.threshold, c.request.overrides) for c in sound]
    scored = [c for c, needs in zip(sound, needs_low, strict=True) if needs or c.drawn.any()]
    _ask_low(scored, calibration, low, relief, waiting)
    for case in scored:
        if case.low is not None:
            decided(Decision(case.request, case.low, case.wanted | case.relieved))
    _ask_high([case for case in sound if case.error is None and case.asked.any()], high)
    if audit:
        _tell(scored, audit)
    return [_answer(case, degrade_on_high_failure) for case in cases]


def _ask_low(
    cases: list[_Case], calibration: Calibration, low: Rung, relief: Relief | None, waiting: int
) -> None:
    if not cases:
        return
    try:
        outputs = low(_concatenate([case.request.image for case in cases]))
    except RungError as error:
        for case in cases:
            case.drawn = np.zeros_like(case.drawn)
            if not always_high(calibration.threshold, case.request.overrides):
                case.error = error
        return
    scores = calibration.score(outputs)  # (rows of all cases,)
    start = 0
    for case in cases:
        rows = slice(start, start + len(case.request.image))
        start = rows.stop
        case.low = outputs.rows(rows)
        case.score = scores[rows]
        case.wanted = escalation_mask(case.score, calibration.threshold, case.request.overrides)
        if relief is not None and calibration.threshold is not None:
            _relieve(case, relief.threshold(calibration.threshold, waiting))


def _relieve(case: _Case, threshold: float) -> None:
    if case.request.overrides != Overrides():
        return  # it said itself how careful it wants the router to be
    still_wanted = escalation_mask(case.score, threshold, case.request.overrides)
    case.relieved = case.wanted & ~still_wanted
    case.wanted = still_wanted


def _ask_high(wanting: list[_Case], high: Rung) -> None:
    for case in wanting:
        case.error = case.request.gone()
    cases = [case for case in wanting if case.error is None]
    if not cases:
        return
    images = [
        case.request.image if case.asked.all() else case.request.image[case.asked] for case in cases
    ]
    try:
        outputs = high(_concatenate(images))
    except RungError as error:
        for case in cases:
            case.drawn = np.zeros_like(case.drawn)
            case.error = error if case.wanted.any() else None
        return
    start = 0
    for case, image in zip(cases, images, strict=True):
        case.high = outputs.rows(slice(start, start + len(image)))
        start += len(image)


def _tell(cases: list[_Case], audit: Audit) -> None:
    for case in cases:
        if case.error is None and case.drawn.any():
            assert case.low is not None and case.high is not None
            low = case.low.rows(np.flatnonzero(case.drawn))
            high = case.high.rows(np.flatnonzero(case.drawn[case.asked]))
            audit.seen(Audited(case.score[case.drawn], low, high))


def _answer(case: _Case, degrade: bool) -> CascadeAnswer | Failure:
    failed = np.zeros_like(case.wanted)
    if case.error is not None:
        if not (isinstance(case.error, RungError) and degrade and case.low is not None):
            return case.error
        failed = case.wanted
    if case.low is None:
        chosen = case.high
    elif case.high is None:
        chosen = case.low
    else:
        chosen = _merge(case.low, case.high, case.asked)
    assert chosen is not None  # a sound case was answered by at least one rung
    answered = (chosen.embedding, chosen.logits)
    if not all(np.isfinite(values).all() for values in answered if values is not None):
        return RequestError("the model answers with NaN or Inf: is `image` normalised?")
    return CascadeAnswer(
        chosen.embedding,
        chosen.logits,
        escalated=case.asked & ~failed,
        score=case.score,
        degraded=(failed | case.relieved) & ~case.drawn,
        relieved=case.relieved & ~case.drawn,
        wanted=case.wanted | case.relieved,
        audited=case.drawn,
    )


def _merge(low: RungOutputs, high: RungOutputs, asked: NDArray[np.bool_]) -> RungOutputs:
    embedding = low.embedding.copy()
    embedding[asked] = high.embedding
    logits = None if low.logits is None else low.logits.copy()
    if logits is not None:
        logits[asked] = high.logits
    return RungOutputs(embedding, None, logits)


def _concatenate(images: Sequence[FloatArray]) -> FloatArray:
    # A lone request keeps its very array, which the router can hand on without a copy.
    return images[0] if len(images) == 1 else np.concatenate(images)


def _not_finite(image: FloatArray) -> RequestError | None:
    # A finite sum proves every pixel finite in one cheap pass; an overflowing one proves nothing.
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(image.sum()):
            return None
    bad = np.flatnonzero(~np.isfinite(image).all(axis=(1, 2, 3)))
    if bad.size == 0:
        return None
    return RequestError(f"image {bad[0] + 1} of {len(image)} holds NaN or Inf; send finite pixels")
