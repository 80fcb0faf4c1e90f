"""Command line: `python -m server --repository build/model_repository`."""

from __future__ import annotations

import io
import json
import shlex
import signal
import sys
import threading
import time
from contextlib import suppress
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer import Option

from bundle.versions import VersionError, Versions

from .access import Access
from .admin_key import AdminKey
from .check import check, check_answers
from .errors import ServerError, ServerStartError, ServerUsageError
from .events import Events
from .launcher import STANDARD_OUTPUT, TritonServer
from .ports import Ports
from .probe import Finding, Memory, look
from .rollout import RolloutInterruptedError, rollout
from .security import Security, exposure_warning
from .serving import Serving
from .serving_tls import ServingTls
from .supervise import (
    DEFAULT_MAX_RESTARTS,
    DEFAULT_TIMEOUT_S,
    Supervisor,
)

_TAIL_LINES = 20
_POLL_S = 0.2
BUILT = Path("build/model_repository")
LOCAL = "127.0.0.1:8001"
_SUPERVISION: dict[str, Any] = {"rich_help_panel": "Supervision"}
_SECURITY: dict[str, Any] = {"rich_help_panel": "Security"}
_SILENCE = "Seconds without any answer that mean failure; more than the slowest batch takes."

# The options of the commands that call a running server.
Url = Annotated[str, Option(help="HOST:PORT of its gRPC port.")]
KeyFile = Annotated[Path | None, Option(help="The key file that the server was started with.")]
TlsCa = Annotated[
    Path | None, Option(help="Connect over TLS to a server whose certificate this vouches for.")
]
TlsCert = Annotated[Path | None, Option(help="Certificate for a server that asks for one.")]
TlsKey = Annotated[Path | None, Option(help="Its private key.")]
KeyOfIt = Annotated[Path | None, Option(help="Its private key.", **_SECURITY)]

app = typer.Typer(add_completion=False)
progress = Console(stderr=True)
events = Events()


class LogFormat(str, Enum):
    """What form lines of the log and events have."""

    TEXT = "text"
    JSON = "json"


@app.callback(invoke_without_command=True)
def serve(
    context: typer.Context,
    repository: Annotated[Path, Option(help="Model repository to serve.")] = BUILT,
    http_port: Annotated[int, Option(help="HTTP port.")] = 8000,
    grpc_port: Annotated[int, Option(help="gRPC port.")] = 8001,
    metrics_port: Annotated[int, Option(help="Prometheus port.")] = 8002,
    free_ports: Annotated[
        bool, Option("--free-ports", help="Pick three free ports instead.")
    ] = False,
    host: Annotated[
        str, Option(help="Address to bind; the default is reachable from here only.")
    ] = "127.0.0.1",
    timeout_s: Annotated[
        float,
        Option(
            "--timeout-s",
            help="Seconds until every model must be ready; as many more to compare answers, where "
            "the router refuses others than calibrated.",
        ),
    ] = 120.0,
    tritonserver: Annotated[
        Path | None, Option(help="Binary to run. Default: from PATH, else from nvidia-pytriton.")
    ] = None,
    backend_directory: Annotated[
        Path | None, Option(help="Its backends, where they are not beside it.")
    ] = None,
    log: Annotated[
        Path | None,
        Option(
            help="Append Triton's log to this file, which logrotate may move or empty; - for the "
            "standard output."
        ),
    ] = None,
    log_format: Annotated[
        LogFormat,
        Option(
            help="json: each line of the log, and on the standard output each event, is a JSON "
            "object; without --log all of it goes there."
        ),
    ] = LogFormat.TEXT,
    as_json: Annotated[
        bool, Option("--json", help="Print where it serves as one line of JSON.")
    ] = False,
    supervise: Annotated[
        bool,
        Option(
            "--supervise",
            help="Look after it with canary images; restart it when it fails.",
            **_SUPERVISION,
        ),
    ] = False,
    max_restarts: Annotated[
        int,
        Option(
            help="Restarts without a healthy minute between them before it gives up.",
            min=0,
            **_SUPERVISION,
        ),
    ] = DEFAULT_MAX_RESTARTS,
    canary_timeout_s: Annotated[
        float, Option("--canary-timeout-s", help=_SILENCE, min=0.1, **_SUPERVISION)
    ] = DEFAULT_TIMEOUT_S,
    production: Annotated[
        bool,
        Option(
            "--production",
            help="Turn on every protection there is, and say what cannot be (SECURITY.md).",
            **_SECURITY,
        ),
    ] = False,
    allow_reload: Annotated[
        bool,
        Option("--allow-reload", help="Models can be loaded and unloaded meanwhile.", **_SECURITY),
    ] = False,
    admin_key_file: Annotated[
        Path | None, Option(help="Administration APIs ask for the key in this file.", **_SECURITY)
    ] = None,
    tls_cert: Annotated[
        Path | None, Option(help="Certificate: serve gRPC over TLS.", **_SECURITY)
    ] = None,
    tls_key: KeyOfIt = None,
    tls_client_ca: Annotated[
        Path | None, Option(help="Clients must show a certificate of this authority.", **_SECURITY)
    ] = None,
    tls_own_cert: Annotated[
        Path | None, Option(help="What our own checks show. Default: --tls-cert.", **_SECURITY)
    ] = None,
    tls_own_key: KeyOfIt = None,
    http_host: Annotated[
        str | None,
        Option(
            help="Address for HTTP, which has no TLS. Default: --host; loopback in production.",
            **_SECURITY,
        ),
    ] = None,
    metrics_host: Annotated[
        str | None, Option(help="Address for the metrics. Default: likewise.", **_SECURITY)
    ] = None,
) -> None:
    """Serve a model repository on NVIDIA Triton until Ctrl-C.

    Ready means: every model by name, and an answered request if the repository has `adaptive_vit`.
    """
    if context.invoked_subcommand is not None:
        return
    events.as_json = log_format is LogFormat.JSON
    if as_json and not events.as_json and str(log) in STANDARD_OUTPUT:
        raise ServerUsageError(
            "--json prints one line, and --log - more; give --log FILE, or --log-format json"
        )
    if events.as_json and log is None:
        log = Path(STANDARD_OUTPUT[0])
    security = Security(
        production=production,
        tls=ServingTls.of_options(tls_cert, tls_key, tls_client_ca, tls_own_cert, tls_own_key),
        admin_key=None if admin_key_file is None else AdminKey.read(admin_key_file),
        allow_reload=allow_reload,
        http_host=http_host,
        metrics_host=metrics_host,
    )
    # A version above the one that answers would answer requests that pin none. Not looked at before
    # a restart by the supervisor: one in the middle of a rollout back finds both loaded.
    with suppress(VersionError):  # None of ours.
        found = Versions.load(repository)
        if found.fault:
            raise ServerUsageError(
                f"{repository}: {found.fault}; run python -m export versions --repository "
                f"{shlex.quote(str(repository))} --live {found.live}, and start again"
            )
    warning = exposure_warning(security, security.addresses(host))
    if warning and events.as_json:
        events.say(warning, "warning")
    elif warning:
        print(f"warning: {warning}", file=sys.stderr)
    status = progress.status("preparing")

    def make_server(ports: Ports | None = None) -> TritonServer:
        return TritonServer(
            repository,
            ports=ports or Ports(http_port, grpc_port, metrics_port),
            free_ports=free_ports and ports is None,
            host=host,
            timeout_s=timeout_s,
            tritonserver=tritonserver,
            backend_directory=backend_directory,
            log=log,
            log_as_json=events.as_json,
            security=security,
            on_progress=status.update,
        )

    def look_at(server: TritonServer, memory: Memory) -> Finding:
        with Serving(server.access, server.process_ids, server.why_it_ended) as serving:
            finding = look(serving, memory, canary_timeout_s)
        _stop_if_told()
        return finding

    server = make_server()
    supervisor = Supervisor(
        server,
        make_server,
        look_at,
        events.say,
        max_restarts=max_restarts,
        sleep=_sleep,
    )
    try:
        with status:
            server.start()
        _stop_if_told()
        events.serves(server, as_json)
        if supervise:
            supervisor.run()
        while server.is_running():  # Waiting in one call could miss a signal just before it.
            _sleep(_POLL_S)
        server.wait()
    except KeyboardInterrupt:  # Told to stop, which typer would make exit code 130.
        return
    finally:
        try:
            with progress.status("stopping tritonserver"):
                supervisor.stop()
        finally:
            supervisor.stop()  # Where that line could not be written; else it does nothing.


@app.command("check")
def check_command(
    url: Url = LOCAL,
    repository: Annotated[
        Path | None,
        Option(
            help="The repository that it serves: every model in it must be ready. Default: the "
            "models that the server has; with --answers build/model_repository."
        ),
    ] = None,
    answers: Annotated[
        bool,
        Option("--answers", help="Compare its answers with those of the calibration instead."),
    ] = False,
    timeout_s: Annotated[float, Option("--timeout-s", min=0.1, help=_SILENCE)] = DEFAULT_TIMEOUT_S,
    admin_key_file: KeyFile = None,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    as_json: Annotated[bool, Option("--json", help="Print JSON.")] = False,
) -> None:
    """Look at a running server once: exit 0 if every model is ready and answers, else 1.

    With --answers the artifact's reference images are sent to the version of the router that
    answers. More of them lost than the certificate leaves room for is exit 1 and means: calibrate
    on this server. A router that refuses requests for that says what it found itself.
    """
    access = Access.of_files(url, admin_key_file, tls_ca, tls_cert, tls_key)
    try:
        if answers:
            is_well, found, lines = check_answers(repository or BUILT, access)
        else:
            is_well, found, lines = check(access, repository, timeout_s)
    except KeyboardInterrupt:  # 0 would mean that all is well.
        raise typer.Exit(130) from None
    for line in [json.dumps(found)] if as_json else lines:
        print(line)
    raise typer.Exit(0 if is_well else 1)


@app.command("rollout")
def rollout_command(
    repository: Annotated[Path, Option(help="The repository that the server serves.")] = BUILT,
    to: Annotated[
        int | None,
        Option(metavar="N", help="Let this version of the router answer, a former one too."),
    ] = None,
    url: Url = LOCAL,
    admin_key_file: KeyFile = None,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    timeout_s: Annotated[
        float,
        Option("--timeout-s", min=1.0, help="Seconds to wait for models to load, and to compare."),
    ] = 120.0,
) -> None:
    """Make a running server serve what its repository says now; with --to N, switch or roll back.

    No request is dropped, unless the router was assembled to refuse other answers than calibrated:
    then none is answered while it compares. The server must have been started with --allow-reload.
    What it cannot load it refuses, and goes on with what it had; a failure says what answers then.
    """
    access = Access.of_files(url, admin_key_file, tls_ca, tls_cert, tls_key)
    try:
        served = rollout(repository, access, to, timeout_s)
    except KeyboardInterrupt:
        print("interrupted before anything was changed", file=sys.stderr)
        raise typer.Exit(130) from None
    except RolloutInterruptedError as interruption:
        print(str(interruption), file=sys.stderr)
        raise typer.Exit(130) from None
    print(served.sentence)


# Python drops what a handler raises where a destructor runs, as of a connection that is let go of.
_told_to_stop = threading.Event()


def _stop_if_told() -> None:
    if _told_to_stop.is_set():
        raise KeyboardInterrupt


def _sleep(seconds: float) -> None:
    time.sleep(seconds)
    _stop_if_told()


def _interrupt(number: int, frame: object) -> None:
    _told_to_stop.set()
    if number == signal.SIGHUP:
        progress.quiet = True  # The terminal is gone, and a line written to it would fail.
    raise KeyboardInterrupt


def main(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code: 0 when it was told to stop or all is well, 1 when the server failed, is not
        well, refused a rollout or answers otherwise than its artifact was calibrated with, 2 for
        bad usage, 130 for a rollout or a check that was interrupted.
    """
    _told_to_stop.clear()
    events.as_json = False
    if isinstance(sys.stdout, io.TextIOWrapper):  # Paths need not be text.
        sys.stdout.reconfigure(errors="backslashreplace")
    # A supervisor's SIGTERM, and a Ctrl-C where the shell started us with SIGINT ignored.
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGINT, _interrupt)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # As nohup leaves it.
        signal.signal(signal.SIGHUP, _interrupt)
    try:
        return app(args=arguments, standalone_mode=False) or 0
    except (KeyboardInterrupt, typer.Abort):
        return 0
    except typer.TyperException as error:
        message = error.format_message().rstrip(".")
        return _complain(f"{message}; see python -m server --help", error.exit_code)
    except ServerError as error:
        if isinstance(error, ServerStartError) and not events.as_json:
            print("\n".join(error.log_tail.splitlines()[-_TAIL_LINES:]), file=sys.stderr)
        return _complain(str(error), 2 if isinstance(error, ServerUsageError) else 1)
    except OSError as error:  # A disk that is full, a folder that is gone.
        where = f"{error.filename}: " if error.filename else ""
        return _complain(f"{where}{error.strerror or error}", 2)


def _complain(message: str, code: int) -> int:
    line = " ".join(message.split())
    if events.as_json:
        events.say(line, "error")
    print(f"error: {line}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
