"""`python -m server check`: does a running server answer as the calibration of its artifact did?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tritonclient.grpc as triton
import typer
from rich.console import Console
from rich.table import Table
from tritonclient.utils import InferenceServerException

from routing import (
    PROBE_ID,
    AnswersError,
    Calibration,
    CalibrationError,
    CascadeAnswer,
    ReferenceAnswers,
    answers_path,
)
from routing.outputs import FloatArray
from routing.policy import Overrides
from routing.provenance import processor, runtime_words
from routing.reference import OTHER, VERDICTS, Comparison, ask, compare
from routing.versions import VersionError, Versions

from .admin_key import AdminKey
from .channel import PLAIN, Channel
from .comparing import WAY_OUT, is_comparing, is_other
from .errors import ServerError, ServerUsageError
from .rollout import ROUTER
from .rollout_command import channel_of
from .triton_log import first_line

_TIMEOUT_S = 120.0  # of a batch of eight that all go through the full rung, on a busy machine
_HERE = ("127.0.0.1", "localhost", "[::1]")


class RefusedError(ServerError):
    """The router has compared by itself, and refuses requests: what it says of its answers."""


def check_command(
    repository: Annotated[Path, typer.Option(help="The repository that the server serves.")] = Path(
        "build/model_repository"
    ),
    url: Annotated[str, typer.Option(help="HOST:PORT of its gRPC port.")] = "127.0.0.1:8001",
    admin_key_file: Annotated[
        Path | None, typer.Option(help="The key file that the server was started with.")
    ] = None,
    tls_ca: Annotated[
        Path | None,
        typer.Option(help="Connect over TLS to a server whose certificate this one vouches for."),
    ] = None,
    tls_cert: Annotated[
        Path | None, typer.Option(help="Certificate to show to a server that asks for one.")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its private key.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Compare a running server's answers with those of the calibration; exit 1 where they differ.

    The artifact's reference images are sent to the version of the router that answers. More of them
    lost than the certificate leaves room for means: calibrate on this server. A router that refuses
    requests for that says what it found itself.
    """
    channel = channel_of(tls_ca, tls_cert, tls_key)
    headers = {} if admin_key_file is None else AdminKey.read(admin_key_file).grpc_headers
    calibration, recorded, version = _live(repository)
    try:
        found, runtime = check(url, version, calibration, recorded, channel, headers)
    except KeyboardInterrupt:  # 0 would mean that the answers agree
        raise typer.Exit(130) from None
    except RefusedError as error:
        if as_json:
            verdict = {"version": version, "outcome": OTHER, "refused": str(error)}
            typer.echo(json.dumps(verdict))
        else:
            typer.echo(f"router/{version} refuses every request: {error}; {WAY_OUT}")
        raise typer.Exit(1) from None
    sides = {"calibrated": calibration.data.get("runtime") or None, "serving": runtime}
    if as_json:
        typer.echo(json.dumps({"version": version, **found.to_dict(), "runtimes": sides}))
    else:
        _print(found, version)
        for side, known in sides.items():
            typer.echo(f"{side} on {runtime_words(known)}")
        typer.echo(found.sentence)
    if found.outcome == OTHER:
        raise typer.Exit(1)


def check(
    url: str,
    version: int,
    calibration: Calibration,
    recorded: ReferenceAnswers,
    channel: Channel = PLAIN,
    headers: dict[str, str] | None = None,
) -> tuple[Comparison, dict[str, Any]]:
    """Ask a server about the reference images.

    Args:
        url: `host:port` of its gRPC port.
        version: of the router, whose artifact it is.
        calibration: the artifact.
        recorded: its reference answers.
        channel: how to connect there.
        headers: what calls of restricted APIs carry.

    Returns:
        What became of the answers, and what the server says of itself: `name` and, if it runs on
        this machine, `processor`.

    Raises:
        RefusedError: the router refuses to give other answers than calibrated.
        ServerUsageError: no such server or version, or answers that say nothing.
    """
    with channel.open(url) as client:

        def cascade(image: FloatArray, overrides: Overrides) -> CascadeAnswer:
            return _ask(client, version, image, overrides)

        try:
            metadata = client.get_server_metadata(headers=headers, client_timeout=_TIMEOUT_S)
            served = ask(recorded, cascade)
        except InferenceServerException as error:
            said = first_line(error.message())
            if is_other(said):
                raise RefusedError(said[said.index(VERDICTS[OTHER]) :]) from error
            if is_comparing(said):
                raise ServerUsageError(f"router/{version} at {url}: {said}") from error
            raise ServerUsageError(
                f"no answer from router/{version} at {url} ({said}); give "
                "the --url of the server, and the --repository that it serves"
            ) from error
        except AnswersError as error:
            raise ServerUsageError(str(error)) from error
    is_here = url.rpartition(":")[0] in _HERE
    runtime = {
        "name": f"tritonserver {metadata.version}",
        "processor": processor() if is_here else None,
    }
    return compare(calibration, recorded, served), runtime


def _live(repository: Path) -> tuple[Calibration, ReferenceAnswers, int]:
    """The artifact of the version that answers, its reference answers, and its number."""
    try:
        version = Versions.load(repository).live
        artifact = repository / ROUTER / str(version) / "calibration.json"
        calibration = Calibration.load(artifact)
        return calibration, ReferenceAnswers.load(answers_path(artifact), calibration), version
    except (AnswersError, CalibrationError, VersionError) as error:
        raise ServerUsageError(str(error)) from error


def _ask(
    client: triton.InferenceServerClient, version: int, image: FloatArray, overrides: Overrides
) -> CascadeAnswer:
    tensor = triton.InferInput("image", list(image.shape), "FP32")
    tensor.set_data_from_numpy(image)
    answer = client.infer(
        ROUTER,
        [tensor],
        model_version=str(version),
        parameters=None if overrides == Overrides() else {"policy": overrides.policy.value},
        request_id=PROBE_ID,
        client_timeout=_TIMEOUT_S,
    )
    escalated, score, degraded = (
        answer.as_numpy(name)[:, 0] for name in ("escalated", "score", "degraded")
    )
    return CascadeAnswer(
        answer.as_numpy("embedding"),
        answer.as_numpy("logits"),
        escalated,
        score,
        degraded,
        relieved=np.zeros_like(degraded),
    )


def _print(found: Comparison, version: int) -> None:
    table = Table(title=f"router/{version} on {found.images} reference images")
    table.add_column("")
    for column in ("images", "median difference", "largest"):
        table.add_column(column, justify="right")
    for name, rung in found.rungs.items():
        figures = (f"{rung.median:.2e}", f"{rung.largest:.2e}") if rung.images else ("", "")
        table.add_row(f"{name}, embedding", str(rung.images), *figures)
    if np.isfinite(found.score_change):
        table.add_row("score, oracle units", "", "", f"{found.score_change:.2e}")
    table.add_row("another decision", str(found.other_decisions))
    table.add_row("another answer", str(found.other_answers))
    lost = f"{found.lost} (were {found.lost_before}, may be {found.allowed})"
    table.add_row("lost", lost)
    Console().print(table)
