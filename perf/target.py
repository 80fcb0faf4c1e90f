"""The server under test: one of our own, or one that already runs somewhere."""

from __future__ import annotations

import os

import numpy as np
import tritonclient.grpc as triton
from numpy.typing import NDArray

from bundle.graphs import GraphSet
from calibration.running import open_session, run_session
from calibration.served import ServedRungs, check_answers
from client import ClientError, GrpcClient
from client.errors import check_url, server_errors
from client.grpc_clients import CHANNEL_ARGUMENTS
from client.proxies import grpc_options
from report.words import score_texts
from routing import Calibration
from server import TritonServer

from .cpu import CpuMeter
from .environment import gpus
from .figures import PerfError
from .server_times import Times, server_times
from .systems import NEVER

NEEDED = ("vit_low", "vit_high", "router", "adaptive_tensor")
SAME_SCORE = 0.05  # relative: another device or precision changes a score a little


class Target:
    """A server that is ready to be measured. Use as a context manager.

    Attributes:
        grpc_url: HOST:PORT.
        http_url: HOST:PORT; None where it is not known.
        server: the server, where it is ours.
        client: gRPC client.
        version: Triton's.
        models: names of the models that are ready.
    """

    def __init__(self, grpc_url: str, http_url: str | None, server: TritonServer | None) -> None:
        """Connect.

        Raises:
            ClientError: the URL is malformed, or nobody answers.
        """
        self.grpc_url = check_url(grpc_url)
        self.http_url = None if http_url is None else check_url(http_url)
        self.server = server
        self.client = triton.InferenceServerClient(
            self.grpc_url, channel_args=[*CHANNEL_ARGUMENTS, *grpc_options(self.grpc_url)]
        )
        with server_errors(self.grpc_url):
            self.version = str(self.client.get_server_metadata(client_timeout=10.0).version)
            index = self.client.get_model_repository_index(client_timeout=10.0)
        self.models = {model.name for model in index.models if model.state == "READY"}

    def __enter__(self) -> Target:
        return self

    def __exit__(self, *error: object) -> None:
        self.client.close()

    def url(self, protocol: str) -> str:
        """The URL for `grpc` or `http`."""
        url = self.grpc_url if protocol == "grpc" else self.http_url
        assert url is not None
        return url

    def times(self) -> Times:
        """Triton's times by model since the server started."""
        with server_errors(self.grpc_url):
            return server_times(self.client)

    def meter(self) -> CpuMeter | None:
        """Of the server's processes as they are now; None for a remote server."""
        return None if self.server is None else CpuMeter(self.server.process_ids())

    def cpu_threads(self) -> int | None:
        """CPU threads of a rung; None where the rungs run on a GPU or the server is remote."""
        with gpus() as handles:
            if self.server is None or handles:
                return None
        threads = []
        with server_errors(self.grpc_url):
            for model in ("vit_low", "vit_high"):
                config = self.client.get_model_config(model, client_timeout=10.0).config
                threads.append(int(config.parameters["intra_op_thread_count"].string_value or 0))
        cores = len(os.sched_getaffinity(0))
        return max(threads) if min(threads) > 0 else cores  # 0 is ONNX Runtime's own: all cores

    def check_models(self) -> None:
        """Refuse a server without a model that is asked, as of an earlier release's repository.

        Raises:
            PerfError: naming what is missing.
        """
        missing = [model for model in NEEDED if model not in self.models]
        if missing:
            raise PerfError(
                f"{self.grpc_url} does not serve {', '.join(missing)}; serve a repository that "
                "`python -m export repository` writes now"
            )

    def check(self, graphs: GraphSet, calibration: Calibration, image: NDArray[np.float32]) -> None:
        """Refuse a server whose models are not those of the local files.

        Args:
            graphs: the local rungs.
            calibration: the local artifact.
            image: FP32 (3, H, W).

        Raises:
            PerfError: naming what is missing or differs.
            ServedError: its rungs answer otherwise than the local ones.
            ClientError: the router does not answer.
        """
        self.check_models()
        batch = image[np.newaxis]
        with ServedRungs(self.grpc_url, graphs) as served:
            check_answers(served, graphs, batch)
        local = run_session(open_session(graphs.files["vit_low"]), batch, layers=True)
        expected = float(calibration.score(local)[0])
        try:
            with GrpcClient(self.grpc_url) as client:
                # A threshold, as the systems that are measured will ask.
                (answer,) = client.infer_tensor(batch, threshold=float(NEVER))
        except ClientError as error:
            if "may only lower" not in str(error):
                raise
            raise PerfError(
                f"the router at {self.grpc_url} lets requests only lower the threshold, and "
                "measuring needs others too; serve a repository assembled with "
                "--client-parameters any"
            ) from None
        score = answer.score
        if not abs(score - expected) <= SAME_SCORE * max(1.0, abs(expected)):  # nor where it is NaN
            served_score, local_score = score_texts([score, expected])
            raise PerfError(
                f"the router at {self.grpc_url} scores an image {served_score}, the local artifact "
                f"{local_score}; give the --calibration it was assembled with"
            )
