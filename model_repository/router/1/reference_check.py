"""Whether this server answers as the calibration did: the router asks its own rungs, at its start.

The reference images go through the same cascade as every request, off the request path, by a thread
that ends when it is known. One by one: clients' images wait for the same rungs, the full one's
within a time budget that a batch could exceed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import triton_python_backend_utils as pb_utils

from .routing import (
    AnswersError,
    Calibration,
    CascadeAnswer,
    CascadeRequest,
    ReferenceAnswers,
    RequestError,
    RungError,
    answers_path,
    run_cascade,
)
from .routing.cascade import Rung
from .routing.outputs import FloatArray
from .routing.policy import Overrides
from .routing.provenance import processor, processor_words, runtime_words
from .routing.reference import COMPARING, OTHER, VERDICTS, ask, compare

_FIRST_TRY_S = 0.5  # No call may be made before `initialize` has returned; rungs load meanwhile.
_LONGEST_PAUSE_S = 5.0
_STOP_S = 10.0  # What a call of the full rung may still take when the server stops.


class _StoppedError(Exception):
    """The model is being unloaded."""


class ReferenceCheck:
    """The comparison of one instance.

    Args:
        mode: `off`, `warn` or `refuse`.
        calibration: the artifact.
        artifact: its file, beside which the reference answers lie.
        low: asks the cheap rung; called from this object's thread, like `high`.
        high: asks the full rung.
        report: told the outcome; None: another instance tells it, and this one compares only where
            it must know, for `refuse`.

    Attributes:
        refusal: what every request is answered with instead; None: they are answered.

    Raises:
        AnswersError: the reference answers cannot be read, or are needed and there are none.
    """

    def __init__(
        self,
        mode: str,
        calibration: Calibration,
        artifact: Path,
        low: Rung,
        high: Rung,
        report: Callable[[str], None] | None,
    ) -> None:
        self.refusal: str | None = COMPARING if mode == "refuse" else None
        self._refuses = mode == "refuse"
        self._calibration = calibration
        self._low, self._high = low, high
        self._report = report
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        told = mode == "warn" and report is not None and calibration.reference_answers is not None
        if self._refuses or told:
            recorded = ReferenceAnswers.load(answers_path(artifact), calibration)
            self._thread = threading.Thread(
                target=self._run, args=(recorded,), name="reference-check", daemon=True
            )
            self._thread.start()

    def stop(self) -> None:
        """End the thread after the image that it is at."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(_STOP_S)

    def _run(self, recorded: ReferenceAnswers) -> None:
        pause_s, told = _FIRST_TRY_S, ""
        while not self._stopping.wait(pause_s):
            try:
                served = ask(recorded, self._cascade, batch=1)
                found = compare(self._calibration, recorded, served)
                self._conclude(found.outcome, found.sentence)
                return
            except _StoppedError:
                return
            except RequestError as error:  # an answer that the calibration would have left out
                self._conclude(OTHER, f"{VERDICTS[OTHER]}: {error}")
                return
            except Exception as error:  # not known yet
                if not _is_expected(error) and str(error) != told:
                    told = str(error)
                    pb_utils.Logger.log_warn(f"router: reference answers not compared yet: {told}")
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _cascade(self, image: FloatArray, overrides: Overrides) -> CascadeAnswer:
        if self._stopping.is_set():
            raise _StoppedError
        (answer,) = run_cascade(
            [CascadeRequest(image, overrides)], self._calibration, self._low, self._high
        )
        if isinstance(answer, CascadeAnswer):
            return answer
        raise answer

    def _conclude(self, outcome: str, sentence: str) -> None:
        if self._report is not None:
            self._report(outcome)
        line = f"router: {sentence}"
        if outcome == OTHER:
            self.refusal = sentence if self._refuses else None
            calibrated = runtime_words(self._calibration.data.get("runtime"))
            line += f". Calibrated on {calibrated}; this is {processor_words(processor())}"
            pb_utils.Logger.log_warn(line)
        else:
            self.refusal = None
            pb_utils.Logger.log_info(line)


def _is_expected(error: Exception) -> bool:
    """Whether it passes by itself: rungs that are loading or away, too much to do."""
    if isinstance(error, RungError):
        return error.is_outage
    return isinstance(error, (AnswersError, pb_utils.TritonModelException))
