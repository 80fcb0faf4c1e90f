"""How many images of a batch had to wait: what the router knows of the queue in front of it.

The python backend tells a model neither the queue's length nor a request's time in it. But Triton
hands a request to an idle instance alone and at once. So where an instance was idle, the first
request of its batch has not waited, whatever its size, and the others have; where the batch came as
soon as the instance was free, all of it has.

How soon that is depends on what else the cores do: with a rung on every core the hand-over of a
batch took 2 to 20 ms and now and then 500, after batches of 2 to 5 s. Several instances make up for
it. Triton takes the one that has been idle longest, so that a lone client's requests go round, and
each instance is idle while the others answer. One that gets its next batch a small part of a
batch's time after its last came next in a row of instances that were all busy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

# How long an instance that has work waiting is free: Triton's hand-over (a millisecond), and the
# copy of the batch into the instance's memory. A client that sends the next request only after the
# answer takes longer: its images come through a socket, or are decoded.
_HANDOVER_S = 0.001
_COPIED_BYTES_PER_S = 2e9
# Of the time that its last batch took one of several instances may have been free, and still be
# one that had work waiting. A lone client's are free for as long as the others take.
_HANDOVER_SHARE = 0.1


class Waiting:
    """The count for one instance.

    Args:
        instances: of the router.
    """

    def __init__(self, instances: int) -> None:
        self._share = _HANDOVER_SHARE if instances > 1 else 0.0
        self._started_s = self._free_since_s = -math.inf
        self._took_s = 0.0

    def images(self, batch: Sequence[Any], started_s: float) -> int:
        """How many images of a batch had to wait.

        Args:
            batch: each request's images, (b, ...), in the order they came.
            started_s: when the instance was given them, in seconds.
        """
        copied_s = sum(images.nbytes for images in batch) / _COPIED_BYTES_PER_S
        handed_over_s = max(_HANDOVER_S + copied_s, self._share * self._took_s)
        was_idle = started_s - self._free_since_s > handed_over_s
        self._started_s = started_s
        return sum(len(images) for images in batch[was_idle:])

    def answered(self, now_s: float) -> None:
        """Take note that the batch is answered, on the clock of `images`."""
        self._took_s = now_s - self._started_s
        self._free_since_s = now_s
