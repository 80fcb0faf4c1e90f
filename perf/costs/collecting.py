"""What `calibration collect` costs beside the time its two ONNX sessions need anyway."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from calibration.collect import BATCH, collect
from calibration.images import open_images
from calibration.running import open_session, run_session
from imaging import Preprocessing, decode
from routing import RUNGS, RungSet


@dataclass(frozen=True)
class Rounds:
    """Seconds of each round, wall clock and CPU time of the process.

    Attributes:
        sessions: both sessions, open and warm, over tensors that lie ready.
        whole: `collect` from the encoded images to the finished file.
    """

    sessions: list[tuple[float, float]]
    whole: list[tuple[float, float]]

    def ratio(self, clock: int) -> float:
        """Median of `whole` over median of `sessions`; clock 0 is the wall's, 1 the CPU's."""
        medians = [
            statistics.median(r[clock] for r in rows) for rows in (self.whole, self.sessions)
        ]
        return medians[0] / medians[1]


def measure(
    rung_set: RungSet, images: str, limit: int, rounds: int, progress: Callable[[], None]
) -> Rounds:
    """Time `collect` and the sessions alone in turn.

    Args:
        rung_set: the exported rungs.
        images: as `calibration collect --images`.
        limit: number of images.
        rounds: how often each is timed.
        progress: called after each round.
    """
    source = open_images("sample:1" if images == "sample" else images, limit)
    preprocessing = Preprocessing.from_dict(rung_set.preprocessing)
    tensors = [preprocessing(decode(source[i].data)) for i in range(len(source))]
    batches = [np.stack(tensors[i : i + BATCH]) for i in range(0, len(tensors), BATCH)]
    sessions = {name: open_session(rung_set.files[name]) for name in RUNGS}

    def run_sessions() -> None:
        for batch in batches:
            for name in RUNGS:
                run_session(sessions[name], batch, layers=name == "vit_low")

    def run_collect() -> None:
        with tempfile.TemporaryDirectory() as folder:
            collect(rung_set, source, Path(folder) / "outputs.npz")

    run_sessions()  # warm up
    found = Rounds([], [])
    for _ in range(rounds):
        found.sessions.append(_timed(run_sessions))
        found.whole.append(_timed(run_collect))
        progress()
    return found


def _timed(run: Callable[[], None]) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - cpu
