"""A router that shall refuse other answers than calibrated: wait until it knows which it gives.

It answers no request before it has compared, and none where it computes other answers.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from tritonclient.utils import InferenceServerException

from routing.reference import COMPARING, OTHER, VERDICTS

# Each of the router's instances is a process and knows for itself; they take turns when idle.
ANSWERS = 8
WAY_OUT = (
    "to calibrate here, assemble with python -m export repository --reference-check warn and "
    "serve that, then collect --url, fit and assemble anew"
)
_POLL_S = 0.5


def is_comparing(message: str) -> bool:
    """Whether an error says that the router does not know yet."""
    return COMPARING in message


def is_other(message: str) -> bool:
    """Whether an error says that the router knows, and refuses for good."""
    return VERDICTS[OTHER] in message


def wait_out(ask: Callable[[], None], answers: int, timeout_s: float) -> None:
    """Ask until so many answers in a row do not say that the router is still comparing.

    Args:
        ask: sends a request, raises what it is refused with.
        answers: 1 where the router does not refuse, else `ANSWERS`.
        timeout_s: seconds to wait for the comparison.

    Raises:
        InferenceServerException: it is still comparing, or another error of a request.
    """
    deadline = time.monotonic() + timeout_s
    in_a_row = 0
    while in_a_row < answers:
        try:
            ask()
            in_a_row += 1
        except InferenceServerException as error:
            if not is_comparing(error.message()) or time.monotonic() > deadline:
                raise
            in_a_row = 0
            time.sleep(_POLL_S)
