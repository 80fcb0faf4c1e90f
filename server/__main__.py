"""Command line: `python -m server --repository build/model_repository`."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .errors import ServerStartError, ServerUsageError
from .launcher import TritonServer

_TAIL_LINES = 20

app = typer.Typer(add_completion=False)
progress = Console(stderr=True)


@app.callback(invoke_without_command=True)
def serve(
    context: typer.Context,
    repository: Annotated[
        Path, typer.Option(help="Model repository to serve.", show_default=True)
    ] = Path("build/model_repository"),
    http_port: Annotated[int, typer.Option(help="HTTP port.")] = 8000,
    grpc_port: Annotated[int, typer.Option(help="gRPC port.")] = 8001,
    metrics_port: Annotated[int, typer.Option(help="Prometheus port.")] = 8002,
    free_ports: Annotated[
        bool, typer.Option("--free-ports", help="Pick three free ports instead.")
    ] = False,
    host: Annotated[
        str, typer.Option(help="Address to bind; the default is reachable from here only.")
    ] = "127.0.0.1",
    timeout_s: Annotated[
        float, typer.Option("--timeout-s", help="Seconds until every model must be ready.")
    ] = 120.0,
    tritonserver: Annotated[
        Path | None,
        typer.Option(help="Binary to run. Default: from PATH, else from nvidia-pytriton."),
    ] = None,
    backend_directory: Annotated[
        Path | None, typer.Option(help="Its backends, where they are not beside it.")
    ] = None,
    log: Annotated[Path | None, typer.Option(help="Keep Triton's log in this file.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print where it serves as one line of JSON.")
    ] = False,
) -> None:
    """Serve a model repository on NVIDIA Triton until Ctrl-C.

    Ready means: every model by name, and an answered request if the repository has `adaptive_vit`.
    """
    if context.invoked_subcommand is not None:
        return
    status = progress.status("preparing")
    server = TritonServer(
        repository,
        http_port=http_port,
        grpc_port=grpc_port,
        metrics_port=metrics_port,
        free_ports=free_ports,
        host=host,
        timeout_s=timeout_s,
        tritonserver=tritonserver,
        backend_directory=backend_directory,
        log=log,
        on_progress=status.update,
    )
    try:
        with status:
            server.start()
        _report(server, as_json)
        server.wait()
    finally:
        try:
            with progress.status("stopping tritonserver"):
                server.stop()
        finally:
            server.stop()  # Where that line could not be written; else it does nothing.


def _report(server: TritonServer, as_json: bool) -> None:
    facts = {
        "http_url": server.http_url,
        "grpc_url": server.grpc_url,
        "metrics_url": server.metrics_url,
        "pid": server.pid,
        "triton_version": server.version,
        "tritonserver": str(server.server.binary) if server.server else "",
        "log": str(server.log_path),
    }
    if as_json:
        print(json.dumps(facts), flush=True)
        return
    print(f"Triton {server.version} serves {server.repository}")
    print(f"  HTTP     {server.http_url}")
    print(f"  gRPC     {server.grpc_url}")
    print(f"  metrics  {server.metrics_url}")
    print(f"  log      {server.log_path}")
    print("Stop with Ctrl-C.", flush=True)


def _interrupt(number: int, frame: object) -> None:
    if number == signal.SIGHUP:
        progress.quiet = True  # The terminal is gone, and a line written to it would fail.
    raise KeyboardInterrupt


def main(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code: 0 when it was told to stop, 1 when the server failed, 2 for bad usage.
    """
    # A supervisor's SIGTERM, and a Ctrl-C where the shell started us with SIGINT ignored.
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGINT, _interrupt)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # As nohup leaves it.
        signal.signal(signal.SIGHUP, _interrupt)
    try:
        app(args=arguments, standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        return 0
    except typer.TyperException as error:
        message = error.format_message().rstrip(".")
        return _complain(f"{message}; see python -m server --help", error.exit_code)
    except ServerUsageError as error:
        return _complain(str(error), 2)
    except ServerStartError as error:
        print("\n".join(error.log_tail.splitlines()[-_TAIL_LINES:]), file=sys.stderr)
        return _complain(str(error), 1)
    return 0


def _complain(message: str, code: int) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
