"""`python -m server rollout`: load, switch and roll back without dropping a request."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import grpc
import typer

from .admin_key import AdminKey
from .channel import PLAIN, Channel
from .errors import ServerUsageError
from .rollout import Access, RolloutInterruptedError, rollout


def rollout_command(
    repository: Annotated[Path, typer.Option(help="The repository that the server serves.")] = Path(
        "build/model_repository"
    ),
    to: Annotated[
        int | None,
        typer.Option(metavar="N", help="Let this version of the router answer, a former one too."),
    ] = None,
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
    timeout_s: Annotated[
        float,
        typer.Option(
            "--timeout-s", min=1.0, help="Seconds to wait for models to load, and to compare."
        ),
    ] = 120.0,
) -> None:
    """Make a running server serve what its repository says now; with --to N, switch or roll back.

    No request is dropped, unless the router was assembled to refuse other answers than calibrated:
    then none is answered while it compares. The server must have been started with --allow-reload.
    What it cannot load it refuses, and goes on with what it had; a failure says what answers then.
    """
    headers = {} if admin_key_file is None else AdminKey.read(admin_key_file).grpc_headers
    access = Access(url, channel_of(tls_ca, tls_cert, tls_key), headers, timeout_s)
    try:
        served = rollout(repository, access, switch_to=to)
    except KeyboardInterrupt:
        typer.echo("interrupted before anything was changed", err=True)
        raise typer.Exit(130) from None
    except RolloutInterruptedError as interruption:
        typer.echo(str(interruption), err=True)
        raise typer.Exit(130) from None
    typer.echo(served.sentence)


def channel_of(ca: Path | None, certificate: Path | None, key: Path | None) -> Channel:
    """The channel that the TLS options of a command mean.

    Raises:
        ServerUsageError: a file is missing, or its partner is.
    """
    if (certificate is None) != (key is None):
        raise ServerUsageError("--tls-cert and --tls-key go together")
    if ca is None:
        if certificate is not None:
            raise ServerUsageError("--tls-cert needs --tls-ca, the authority of the server's own")
        return PLAIN
    try:
        root, chain, secret = (
            None if path is None else path.read_bytes() for path in (ca, certificate, key)
        )
    except OSError as error:
        raise ServerUsageError(f"{error.filename}: {error.strerror}") from error
    return Channel(grpc.ssl_channel_credentials(root, secret, chain))
