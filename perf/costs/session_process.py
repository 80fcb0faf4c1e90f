"""One ONNX Runtime session in a process of its own, as the stand-in backend serves a model."""

from __future__ import annotations

import contextlib
import multiprocessing
import time
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import onnxruntime as ort

from ..figures import PerfError
from ..measure.memory import read_rollup


class SessionProcess:
    """A process with one session on one thread, asked over a pipe."""

    def __init__(self, file: Path, prepacking: bool) -> None:
        """Start the process, without its session.

        Args:
            file: the ONNX file.
            prepacking: whether ONNX Runtime reorders the weights.

        Raises:
            PerfError: it does not start.
        """
        # Not forked: a copy of this process would share its pages with it.
        context = multiprocessing.get_context("spawn")
        self._pipe, far_end = context.Pipe()
        self._name = file.name
        arguments = (str(file), prepacking, far_end)
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        far_end.close()
        self._receive()

    def open(self) -> None:
        """Open the session.

        Raises:
            PerfError: the file does not load, with the reason.
        """
        self._pipe.send(None)
        self._receive()

    def run(self, shape: tuple[int, ...]) -> float:
        """Run a batch of a shape; returns seconds of CPU time."""
        self._pipe.send(shape)
        return self._receive()

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join()

    def pss(self) -> int:
        """PSS in bytes."""
        pss, _ = read_rollup(self._process.pid or 0) or (None, None)
        if pss is None:
            raise PerfError("no process's memory could be read; /proc/PID/smaps_rollup is needed")
        return pss

    def _receive(self) -> float:
        try:
            answer = self._pipe.recv()
        except EOFError:
            raise PerfError(f"{self._name}: the process that served it ended") from None
        if isinstance(answer, str):
            raise PerfError(f"{self._name}: {answer}")
        return float(answer)


def _serve(file: str, prepacking: bool, pipe: Connection) -> None:
    """Answer each message with a number, or with the text of an error, until the pipe closes."""
    session = None
    pipe.send(0.0)
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            shape = pipe.recv()
            try:
                if shape is None:
                    session = _session(file, prepacking)
                    pipe.send(0.0)
                else:
                    pipe.send(_cpu_seconds(session, shape))
            except Exception as error:  # ONNX Runtime's have no common class
                pipe.send(" ".join(str(error).split()))


def _session(file: str, prepacking: bool) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    if not prepacking:
        options.add_session_config_entry("session.disable_prepacking", "1")
    return ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def _cpu_seconds(session: ort.InferenceSession, shape: tuple[int, ...]) -> float:
    image = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    start = time.thread_time()
    session.run(None, {"image": image})
    return time.thread_time() - start
