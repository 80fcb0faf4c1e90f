"""The router's own scores of a pool, to choose easy and hard images by."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from client import GrpcClient

from .sets import Pool
from .systems import NEVER
from .target import Target

BATCH = 8


def score_pool(target: Target, pool: Pool, advance: Callable[[int], None]) -> NDArray[np.float32]:
    """Scores in oracle units, FP32 (N,).

    Args:
        target: the server.
        pool: N images.
        advance: called with the number of images that were scored since it was called last.

    Raises:
        ClientError: the server did not answer as it should.
    """
    scores: list[float] = []
    with GrpcClient(target.grpc_url) as client:
        for start in range(0, len(pool), BATCH):
            batch = np.stack(pool.tensors[start : start + BATCH])
            # Nothing escalates: a score needs the cheap rung only.
            answers = client.infer_tensor(batch, threshold=float(NEVER))
            scores += [answer.score for answer in answers]
            advance(len(batch))
    return np.asarray(scores, dtype=np.float32)
