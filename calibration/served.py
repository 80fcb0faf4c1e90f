"""The rungs of a running server as the source of outputs: what is certified is what is served.

Triton does not tell which files it has loaded, so the answers have to: the server and the local
graphs answer a few images, and the server answers them once more at the end.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import tritonclient.grpc as triton
from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException

from bundle.graphs import LOW, GraphSet
from client import InvalidRequestError, Tls
from client.grpc_clients import CHANNEL_ARGUMENTS
from client.proxies import grpc_options, is_here
from client.tls import wants_tls
from routing import RUNGS, RungOutputs, is_outage
from routing.provenance import processor

from .chunks import NpzError, load_npz, save_npz
from .running import open_session, run_session

VERSION = "1"  # of the rungs in an assembled repository
_TIMEOUT_S = 120.0
_TRIES = 5  # of a batch that a server with other clients refuses
_PAUSE_S = 0.5
_NO_CONNECTION = "failed to connect"  # in gRPC's words
PROBES = 8  # images that show which model a server has loaded
# How far, of their norm, answers of one graph may be apart on two runtimes. Seen: 5e-5 between
# releases and 1e-3 in half precision; int8 embeddings of one image 0.13, and logits move more.
SAME_GRAPH, SAME_INT8_GRAPH = 0.02, 0.3
# And on one server, where other requests change the batch. What is further apart is asked anew.
SAME_SERVER = 2e-3

Answers = Mapping[str, RungOutputs]


class ServedError(ValueError):
    """The server does not answer, or serves other rungs. One line."""


class ServedRungs:
    """`vit_low` and `vit_high` of a server, asked over gRPC; a context manager.

    Args:
        url: HOST:PORT of its gRPC port.
        graph_set: what it serves: the shapes are looked at here, the answers by `check_answers`.
        tls: files for an encrypted connection; None connects in the clear.

    Attributes:
        url: as given.
        runtime: what answers, as `Outputs.runtime`; its processor is known where it is this one.

    Raises:
        ServedError: no server there, or not these rungs.
    """

    def __init__(self, url: str, graph_set: GraphSet, tls: Tls | None = None) -> None:
        self.url = url
        self._tls = tls
        credentials = None if tls is None else tls.grpc_credentials()
        try:
            proxies = grpc_options(url, "http" if credentials is None else "https")
        except InvalidRequestError as error:
            raise ServedError(str(error)) from None
        options = [*CHANNEL_ARGUMENTS, *proxies]
        self._client = triton.InferenceServerClient(url, creds=credentials, channel_args=options)
        head = [] if graph_set.classes is None else ["logits"]
        self._outputs = {
            "vit_low": ["embedding", "cls_layers", *head],
            "vit_high": ["embedding", *head],
        }
        try:
            server = self._ask(self._client.get_server_metadata)
            for name in RUNGS:
                self._check(name, graph_set)
        except BaseException:
            self._client.close()
            raise
        self.runtime: dict[str, Any] = {
            "name": f"tritonserver {server.version}",
            "processor": processor() if is_here(url) else None,
        }

    def __enter__(self) -> ServedRungs:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._client.close()

    def graphs(self) -> dict[str, Callable[[NDArray[np.float32]], RungOutputs]]:
        """Each rung as a function of `image`, FP32 (B, 3, H, W); it raises `ServedError`."""
        return {name: partial(self._run, name) for name in RUNGS}

    def _run(self, name: str, image: NDArray[np.float32]) -> RungOutputs:
        tensor = triton.InferInput("image", list(image.shape), "FP32")
        tensor.set_data_from_numpy(image)
        outputs = [triton.InferRequestedOutput(output) for output in self._outputs[name]]
        answer = self._ask(
            self._client.infer, name, [tensor], model_version=VERSION, outputs=outputs
        )
        arrays = [answer.as_numpy(output) for output in ("embedding", "cls_layers", "logits")]
        return RungOutputs(*arrays)

    def _ask(self, call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Make a call, again where the server has too much to do."""
        for tries_left in reversed(range(_TRIES)):
            try:
                return call(*arguments, **options, client_timeout=_TIMEOUT_S)
            except InferenceServerException as error:
                reason = " ".join(error.message().split())
                if tries_left and is_outage(reason):
                    time.sleep(_PAUSE_S)
                    continue
                look = wants_tls if self._tls is None else self._tls.why_refused
                if _NO_CONNECTION in reason and (why := look(self.url)) is not None:
                    raise ServedError(why) from None
                raise ServedError(
                    f"no answer from the server at {self.url} ({reason}); is it the gRPC port of "
                    "one that serves these rungs?"
                ) from None
        raise AssertionError("a call that is out of tries raises")

    def _check(self, name: str, graph_set: GraphSet) -> None:
        """Whether a rung's tensors have these shapes: known before the first image is read."""
        served = self._ask(self._client.get_model_metadata, name, VERSION)
        found = {
            tensor.name: (tensor.datatype, [int(size) for size in tensor.shape[1:]])
            for tensor in (*served.inputs, *served.outputs)
        }
        expected = {
            "image": ("FP32", list(graph_set.image_shape)),
            "embedding": ("FP32", [graph_set.embedding_dim]),
        }
        if name == LOW:
            width = graph_set.layer_dim or graph_set.embedding_dim
            expected["cls_layers"] = ("FP32", [graph_set.low_layers + 1, width])
        if graph_set.classes is not None or "logits" in found:
            expected["logits"] = ("FP32", [graph_set.classes or 0])
        for tensor, (datatype, shape) in expected.items():
            if found.get(tensor) != (datatype, shape):
                has = "no such tensor" if tensor not in found else "{} {}".format(*found[tensor])
                raise ServedError(
                    f"{name} at {self.url} is not the rung in --onnx: {tensor} is {datatype} "
                    f"{shape} there and {has} on the server; give the folder that its repository "
                    "was assembled from"
                )


def check_answers(served: ServedRungs, graph_set: GraphSet, image: NDArray[np.float32]) -> Answers:
    """What the server answers about images, FP32 (B, 3, H, W), once the local graphs agree.

    Raises:
        ServedError: it does not answer, or not as these rungs do: it serves other ones.
    """
    answers = {name: graph(image) for name, graph in served.graphs().items()}
    for name, answer in answers.items():
        local = run_session(open_session(graph_set.files[name]), image, layers=name == LOW)
        is_int8 = "int8" in graph_set.rungs[name].recipe
        how, found = "in another shape", float("inf")
        if _shapes(answer) == _shapes(local):
            found = apart(answer, local)
            how = f"{found:.0%} of the norm apart"
        if not found <= (SAME_INT8_GRAPH if is_int8 else SAME_GRAPH):
            raise ServedError(
                f"{name} at {served.url} is not the rung in --onnx: it answers the same images "
                f"otherwise, {how}; give the folder that its repository was assembled from, or "
                "assemble this one and serve it"
            )
    return answers


def _shapes(answer: RungOutputs) -> list[object]:
    outputs = (answer.embedding, answer.cls_layers, answer.logits)
    return [None if values is None else (values.shape, values.dtype) for values in outputs]


def apart(one: RungOutputs, other: RungOutputs) -> float:
    """How far two answers to the same images are apart, of the norm of `other`.

    The larger one of embeddings and logits, over the images on which neither overflows; infinite
    where there is none, and where shapes differ.
    """
    rows = np.flatnonzero(one.finite() & other.finite())
    if not len(rows):
        return float("inf")
    found = []
    for name in ("embedding", "logits"):
        first, second = getattr(one.rows(rows), name), getattr(other.rows(rows), name)
        if first is None or second is None:
            continue
        if first.shape != second.shape:
            return float("inf")
        away = np.linalg.norm(first.astype(np.float64) - second)
        found.append(float(away / max(np.linalg.norm(second), np.finfo(np.float32).tiny)))
    return max(found)


def remembered(file: Path, answers: Answers) -> Answers:
    """What the server answered an earlier run, where it still answers that; else what it does now.

    Rounding differs from call to call, so a hash of the answers themselves would tell servers
    apart that are one. What is returned is in the file, an `.npz`.
    """
    try:
        arrays = load_npz(file)
    except (FileNotFoundError, NpzError):
        arrays = {}
    before = {
        name: RungOutputs(arrays[f"embedding_{name}"], None, arrays.get(f"logits_{name}"))
        for name in RUNGS
        if f"embedding_{name}" in arrays
    }
    if before.keys() == answers.keys() and same_server(answers, before):
        return before
    kept = {
        f"{field}_{name}": value
        for name, answer in answers.items()
        for field in ("embedding", "logits")
        if (value := getattr(answer, field)) is not None
    }
    save_npz(file, kept)
    return answers


def same_server(one: Answers, other: Answers) -> bool:
    """Whether these are answers of one server to the same images, but for rounding."""
    return all(apart(one[name], other[name]) <= SAME_SERVER for name in RUNGS)
