"""`python -m calibration live`: keep a repository that live traffic certifies."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from routing import Calibration

from . import options as given


def live_command(
    url: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Its gRPC port.")
    ] = "localhost:8001",
    repository: Annotated[
        Path, typer.Option(help="The repository it serves, of export repository --live.")
    ] = Path("build/model_repository"),
    once: Annotated[
        bool, typer.Option("--once", help="Read, test and roll out once, as for cron.")
    ] = False,
    every_s: Annotated[
        float, typer.Option("--every-s", min=0.5, help="Seconds between two looks.")
    ] = 10.0,
    score: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Test the score of this artifact of `fit` from now on, in place of the signal.",
        ),
    ] = None,
    admin_key_file: Annotated[
        Path | None, typer.Option(help="Key of a server that was started with one.")
    ] = None,
    tls_ca: given.TlsCa = None,
    tls_cert: given.TlsCert = None,
    tls_key: given.TlsKey = None,
    timeout_s: Annotated[
        float, typer.Option("--timeout-s", min=1, help="Seconds that a version may load.")
    ] = 120.0,
) -> None:
    """Certify from live traffic: test what the routers wrote, roll out what is certified.

    The server must run with --allow-reload. Goes on until Ctrl-C; exit 1 after --once where the
    server did not load what is certified.
    """
    # Servers, versions and pages take long to import; no other command needs them.
    from server.access import Access

    from .live import keeping

    access = Access.of_files(url, admin_key_file, tls_ca, tls_cert, tls_key)
    with keeping(repository, access, given.BARS.say, timeout_s) as keeper:
        if score is not None:
            keeper.take_score(Calibration.load(score))
        said = ""
        while True:
            keeper.step()
            if (line := keeper.summary()) != said:
                typer.echo(line)
            said = line
            if once:
                raise typer.Exit(1 if keeper.trouble else 0)
            time.sleep(every_s)
