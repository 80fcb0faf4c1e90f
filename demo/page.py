"""`python -m demo page`: drop a picture into a browser and see what the served router does with it.

    browser ── page, picture ──► this, on loopback ── gRPC ──► adaptive_vit
                                       └── HTTP ──► its metrics, for the threshold

The page comes from here and speaks to nobody else; Triton's own ports are not for browsers, and
need not be reachable by one.
"""

from __future__ import annotations

import io
import logging
import math
import socket
import time
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import tritonclient.grpc as triton
from flask import Flask, Response, jsonify, request
from PIL import Image
from tritonclient.utils import InferenceServerException
from werkzeug.exceptions import Forbidden, HTTPException, RequestEntityTooLarge
from werkzeug.serving import BaseWSGIServer, make_server

from client import (
    AccessDeniedError,
    ClientError,
    GrpcClient,
    NotServedError,
    Prediction,
    Task,
)
from client.files import read_labels
from client.grpc_clients import CHANNEL_ARGUMENTS
from client.images import as_rows
from client.outcomes import Shown
from client.proxies import grpc_options, is_here
from imaging import Limits
from routing import PROBE_ID, threshold_text

from .steps import DemoError

HOST = "127.0.0.1"
HOSTS = ["127.0.0.1", "localhost"]  # by which a browser on this machine may know the page
MAX_BYTES = Limits().max_bytes
SHOWN = 5  # classes of an answer
# The page's own files and pictures, and nothing else. Without inline scripts a file name that were
# taken for markup could still run nothing.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_GRPC_PORT, _METRICS_PORT = "8001", 8002  # what `python -m server` listens on
_METRICS_TIMEOUT_S = 2.0
_LABELS_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Served:
    """What the page asks.

    Attributes:
        client: of the server; threads share it.
        version: Triton's.
        shown: what its logits mean, and the names of the classes.
        threshold: the one in force, in oracle units; None where there is none, or none is known.
    """

    client: GrpcClient
    version: str
    shown: Shown
    threshold: Callable[[], float | None]

    @classmethod
    def look(cls, client: GrpcClient, labels: Sequence[str], metrics_url: str | None) -> Served:
        """Ask a server what it serves.

        Args:
            client: of it.
            labels: one name for each class; none: as the server names them.
            metrics_url: where it tells its threshold; None: nowhere.

        Raises:
            ClientError: no server there, or it serves no adaptive ViT.
            DemoError: there are more or fewer names than classes.
        """
        version = client.server_version()
        client.metadata()
        router = client.metadata(client.router)
        sizes = {output["name"]: output["shape"][-1] for output in router["outputs"]}
        classes = sizes.get("logits", 0)
        if labels and len(labels) != classes:
            raise DemoError(f"--labels has {len(labels)} names, the model {classes} classes")
        try:
            task = client.task()
        except (AccessDeniedError, NotServedError):  # some gateways hide it
            task = Task()
        names = labels or (served_labels(client, classes) if classes else ())
        known = partial(served_threshold, metrics_url) if metrics_url else lambda: None
        return cls(client, version, Shown(task, SHOWN, names), known)

    def answer(self, image: bytes, policy: str) -> dict[str, Any]:
        """What the page shows of a picture.

        Args:
            image: the encoded picture.
            policy: `auto`, or `high` for the full rung's answer.

        Returns:
            `route` (`cheap`, `full` or `degraded`), `score` and `threshold` in oracle units or
            None, `kind` of the answer, `outputs` with `name` and `value` (a probability in 0..1, of
            a value the value), the likeliest first, `norm` of the embedding, and `time_ms`.

        Raises:
            ClientError: there is no answer.
        """
        started = time.perf_counter()
        (found,) = self.client.infer([image], policy=policy)
        time_ms = 1e3 * (time.perf_counter() - started)
        kind, outputs = self.shown.outputs(found)
        noun = {"labels": "label", "value": "value"}.get(kind or "", "class")
        return {
            "route": _route(found),
            "score": found.score if math.isfinite(found.score) else None,
            "threshold": self.threshold(),
            "kind": kind,
            "outputs": [
                {"name": self.shown.name(index) or f"{noun} {index}", "value": value}
                for index, value in outputs[:SHOWN]
            ],
            "norm": float(np.linalg.norm(found.embedding)),
            "time_ms": time_ms,
        }


def _route(found: Prediction) -> str:
    return "degraded" if found.degraded else "full" if found.escalated else "cheap"


def served_labels(client: GrpcClient, classes: int) -> tuple[str, ...]:
    """The names that a server has for its classes, by Triton's classification extension.

    Returns:
        One name per class, `class N` where that one has none; empty where no class has a name, or
        the server does not tell.
    """
    picture = io.BytesIO()
    Image.new("RGB", (64, 64), (128, 128, 128)).save(picture, "PNG")
    rows = as_rows([picture.getvalue()])
    tensor = triton.InferInput("image_bytes", list(rows.shape), "BYTES")
    tensor.set_data_from_numpy(rows)
    asked = triton.InferRequestedOutput("logits", class_count=classes)
    arguments = [*CHANNEL_ARGUMENTS, *grpc_options(client.url)]
    try:
        with triton.InferenceServerClient(client.url, channel_args=arguments) as connection:
            answer = connection.infer(
                client.model,
                [tensor],
                outputs=[asked],
                request_id=PROBE_ID,
                client_timeout=_LABELS_TIMEOUT_S,
            )
    except InferenceServerException:
        return ()
    names = {}
    for element in answer.as_numpy("logits")[0]:  # value:index:name
        _, index, *name = element.decode("utf-8", "replace").split(":", 2)
        names[int(index)] = name[0] if name else ""
    if not any(names.values()):
        return ()
    return tuple(names.get(index) or f"class {index}" for index in range(classes))


def usual_metrics_url(url: str) -> str | None:
    """Where the server at HOST:PORT has its metrics; None where that is not its usual port."""
    host, _, port = url.rpartition(":")
    return f"http://{host}:{_METRICS_PORT}/metrics" if port == _GRPC_PORT else None


def served_threshold(metrics_url: str) -> float | None:
    """The threshold of the router's version that answers, in oracle units.

    None where that has none, so that every image escalates, or the metrics cannot be read.
    """
    try:
        here = is_here(urlsplit(metrics_url).netloc)
        proxies = urllib.request.ProxyHandler({} if here else None)
        with urllib.request.build_opener(proxies).open(
            metrics_url, timeout=_METRICS_TIMEOUT_S
        ) as answer:
            lines = answer.read().decode("utf-8", "replace").splitlines()
    except (OSError, ValueError):
        return None
    found: dict[int, float | None] = {}
    for line in lines:
        name, _, rest = line.partition('{version="')
        if name == "adaptive_vit_queue_limit":  # which every version that is loaded has
            found.setdefault(int(rest.partition('"')[0]), None)
        elif name == "adaptive_vit_threshold":
            found[int(rest.partition('"')[0])] = float(line.rsplit(" ", 1)[1])
    return found[max(found)] if found else None  # no version above the one that answers is loaded


def make_app(served: Served) -> Flask:
    """The page and what it asks, for any WSGI server."""
    app = Flask(__name__, static_folder="page", static_url_path="/")
    app.config["MAX_CONTENT_LENGTH"] = MAX_BYTES
    # A page elsewhere whose name was made to mean this machine (DNS rebinding) has another host.
    app.config["TRUSTED_HOSTS"] = HOSTS

    @app.before_request
    def own_page_only() -> None:
        # A browser says where a POST comes from; other pages may not spend this machine's time.
        if request.method == "POST" and request.headers.get("Origin") != request.host_url[:-1]:
            raise Forbidden("only the page itself may ask")

    @app.after_request
    def keep_to_itself(response: Response) -> Response:
        response.headers["Content-Security-Policy"] = POLICY
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Referrer-Policy"] = "no-referrer"
        response.headers["Cross-Origin-Resource-Policy"] = "same-origin"
        response.headers["Cache-Control"] = "no-store"
        return response

    @app.get("/")
    def page() -> Response:
        return app.send_static_file("index.html")

    @app.get("/server")
    def server() -> Response:
        return jsonify(
            url=served.client.url,
            model=served.client.model,
            version=served.version,
            threshold=served.threshold(),
            max_bytes=MAX_BYTES,
        )

    @app.post("/ask/<any(auto, high):policy>")
    def ask(policy: str) -> Response:
        return jsonify(served.answer(request.get_data(cache=False), policy))

    # What became of a picture is what the page asked for: a browser tells other statuses as faults.
    @app.errorhandler(ClientError)
    def unanswered(error: ClientError) -> Response:
        return jsonify(error=str(error))

    @app.errorhandler(RequestEntityTooLarge)
    def too_large(error: RequestEntityTooLarge) -> Response:
        return jsonify(error=f"the picture has more than {MAX_BYTES:,} bytes; send a smaller file")

    @app.errorhandler(HTTPException)
    def refused(error: HTTPException) -> tuple[Response, int]:
        return jsonify(error=error.description), error.code or 500

    return app


def open_page(served: Served, port: int) -> BaseWSGIServer:
    """Listen, on loopback only; the page is there once `serve_forever()` of the result runs.

    Args:
        served: what it asks.
        port: 0 for a free one.

    Raises:
        DemoError: the port cannot be had.
    """
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((HOST, port))
        listening.listen()
    except (OSError, OverflowError) as error:
        listening.close()
        raise DemoError(f"--port {port} cannot be had ({error}); give another, or 0") from None
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line per request is for nobody
    with listening:
        fd = listening.fileno()
        return make_server(HOST, port, make_app(served), threaded=True, fd=fd)


def run_page(
    url: str,
    port: int,
    metrics_url: str | None,
    labels: Path | None,
    say: Callable[[str], object],
) -> None:
    """Serve the page until Ctrl-C.

    Args:
        url: HOST:PORT of the server's gRPC.
        port: of the page; 0 for a free one.
        metrics_url: where the server tells its threshold; None: at the usual port.
        labels: a file of class names; None: those of the server.
        say: takes each line for people.

    Raises:
        ClientError: no server at `url`, or it serves no adaptive ViT.
        FilesError: the labels cannot be read.
        DemoError: they are more or fewer than classes, or the port cannot be used.
    """
    names = read_labels(labels) if labels else []
    metrics_url = metrics_url or usual_metrics_url(url)
    with GrpcClient(url) as client:
        served = Served.look(client, names, metrics_url)
        with open_page(served, port) as page:
            threshold = served.threshold()
            if threshold is not None:
                found = f"threshold {threshold_text(threshold)}, from {metrics_url}"
            else:
                where = f"at {metrics_url}" if metrics_url else "without --metrics-url"
                found = f"no threshold found {where}"
            say(f"{client.model} at {client.url}, Triton {served.version}; {found}")
            say(f"Open http://{HOST}:{page.port}/ in a browser. Stop with Ctrl-C.")
            page.serve_forever()
