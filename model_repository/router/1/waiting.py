"""How many images of a batch had to wait: what the router knows of the queue in front of it.

The python backend tells a model neither the queue's length nor a request's time in it. But Triton
hands a request to an idle instance alone and at once. So where an instance was idle, the first
request of its batch has not waited, whatever its size, and the others have; where the batch came as
soon as the instance was free, all of it has.
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


class Waiting:
    """The count for one instance.

    Attributes:
        free_since_s: when its last batch was answered, on the clock of `images`.
    """

    def __init__(self) -> None:
        self.free_since_s = -math.inf

    def images(self, batch: Sequence[Any], started_s: float) -> int:
        """How many images of a batch had to wait.

        Args:
            batch: each request's images, (b, ...), in the order they came.
            started_s: when the instance was given them.
        """
        copied_s = sum(images.nbytes for images in batch) / _COPIED_BYTES_PER_S
        was_idle = started_s - self.free_since_s > _HANDOVER_S + copied_s
        return sum(len(images) for images in batch[was_idle:])
