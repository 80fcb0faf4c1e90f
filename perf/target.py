"""The server under test: one of our own, or one that already runs somewhere."""

from __future__ import annotations

import os
from collections.abc import Mapping

import numpy as np
import tritonclient.grpc as triton
from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException

from bundle.graphs import GraphSet
from calibration.running import open_session, run_session
from client.errors import check_url, server_errors
from report.words import score_texts
from routing import Calibration
from server import TritonServer

from .cpu import CpuMeter
from .environment import Nvml
from .figures import PerfError
from .server_times import Times, server_times
from .systems import NEVER

NEEDED = ("vit_low", "vit_high", "router")
# Another device, precision or batch changes embeddings a little; other weights change them a lot.
SAME_COSINE = 0.98
SAME_SCORE = 0.05  # relative


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
        self.client = triton.InferenceServerClient(self.grpc_url)
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
        with Nvml() as nvml:
            if self.server is None or nvml.handles:
                return None
        threads = []
        with server_errors(self.grpc_url):
            for model in ("vit_low", "vit_high"):
                config = self.client.get_model_config(model, client_timeout=10.0).config
                threads.append(int(config.parameters["intra_op_thread_count"].string_value or 0))
        cores = len(os.sched_getaffinity(0))
        return max(threads) if min(threads) > 0 else cores  # 0 is ONNX Runtime's own: all cores

    def check(
        self, rung_set: GraphSet, calibration: Calibration, image: NDArray[np.float32]
    ) -> None:
        """Refuse a server whose models are not those of the local files.

        Args:
            rung_set: the local rungs.
            calibration: the local artifact.
            image: one image tensor, FP32 (3, H, W).

        Raises:
            PerfError: naming what is missing or differs.
        """
        missing = [model for model in NEEDED if model not in self.models]
        if missing:
            raise PerfError(
                f"{self.grpc_url} does not serve {', '.join(missing)}; serve the repository that "
                "`python -m export repository` wrote"
            )
        batch = image[np.newaxis]
        for model in ("vit_low", "vit_high"):
            local = run_session(open_session(rung_set.files[model]), batch, layers=True)
            served = self._ask(model, batch, ["embedding"])["embedding"]
            if served.shape != local.embedding.shape or not (
                cosine(served[0], local.embedding[0]) >= SAME_COSINE
            ):
                raise PerfError(
                    f"{model} at {self.grpc_url} is not the local {rung_set.files[model].name}: it "
                    "answers the same image differently; give the --onnx it was exported to"
                )
            if model == "vit_low":
                expected = float(calibration.score(local)[0])
        parameters = {"threshold": float(NEVER)}  # as the systems that are measured will ask
        score = float(self._ask("router", batch, ["score"], parameters)["score"].item())
        if not abs(score - expected) <= SAME_SCORE * max(1.0, abs(expected)):  # nor where it is NaN
            served_score, local_score = score_texts([score, expected])
            raise PerfError(
                f"the router at {self.grpc_url} scores an image {served_score}, the local artifact "
                f"{local_score}; give the --calibration it was assembled with"
            )

    def _ask(
        self,
        model: str,
        batch: NDArray[np.float32],
        outputs: list[str],
        parameters: Mapping[str, float] | None = None,
    ) -> dict[str, NDArray[np.float32]]:
        tensor = triton.InferInput("image", list(batch.shape), "FP32")
        tensor.set_data_from_numpy(batch)
        wanted = [triton.InferRequestedOutput(name) for name in outputs]
        try:
            result = self.client.infer(
                model, [tensor], outputs=wanted, parameters=dict(parameters or {})
            )
        except InferenceServerException as error:
            if "may only lower" in str(error.message()):
                raise PerfError(
                    f"the router at {self.grpc_url} lets requests only lower the threshold, and "
                    "measuring needs others too; serve a repository assembled with "
                    "--client-parameters any"
                ) from None
            raise PerfError(
                f"{model} at {self.grpc_url} does not take the local rungs' images: "
                f"{' '.join(str(error.message()).split())}"
            ) from None
        return {name: result.as_numpy(name) for name in outputs}


def cosine(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """Of two embeddings, each FP32 (D,)."""
    first, second = one.astype(np.float64), other.astype(np.float64)
    return float(first @ second / (np.linalg.norm(first) * np.linalg.norm(second)))
