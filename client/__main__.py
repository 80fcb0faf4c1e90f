"""`python -m client infer`."""

from __future__ import annotations

import asyncio
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .core import DEFAULT_TIMEOUT_S
from .errors import AccessDeniedError, ClientError, NotServedError
from .files import UsageError, find_images, read_admin_key, read_labels
from .grpc_clients import DEFAULT_GRPC_URL, GrpcClient
from .http_client import DEFAULT_HTTP_URL, HttpClient
from .many import Outcome, Question, ask_grpc, ask_http, summarise
from .messages import Task
from .render import as_dict, summary_line, table
from .retry import DEFAULT_RETRY, Retry
from .tls import Tls

POLICIES = ("auto", "low", "high")
PROTOCOLS = ("grpc", "http")

app = typer.Typer(
    help="Ask a served adaptive ViT about images.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback(invoke_without_command=True)
def _root(context: typer.Context) -> None:
    """Ask a served adaptive ViT about images."""
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(2)


@app.command()
def infer(
    paths: Annotated[list[Path], typer.Argument(help="Images, or folders to search for them.")],
    url: Annotated[
        str | None,
        typer.Option(help=f"HOST:PORT. [default: {DEFAULT_GRPC_URL}, http: {DEFAULT_HTTP_URL}]"),
    ] = None,
    protocol: Annotated[str, typer.Option(help="grpc or http.")] = "grpc",
    policy: Annotated[
        str, typer.Option(help="auto: the score decides; low or high: always that rung.")
    ] = "auto",
    threshold: Annotated[
        float | None, typer.Option(help="Instead of the calibrated one, in oracle units.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Classes to show per image.")] = 5,
    labels: Annotated[Path | None, typer.Option(help="Class names, one per line.")] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests in flight.")] = 1,
    timeout_s: Annotated[
        float, typer.Option(help="Seconds per image, with all tries.")
    ] = DEFAULT_TIMEOUT_S,
    retries: Annotated[
        int, typer.Option(min=0, help="Further tries where the server is away or overloaded.")
    ] = DEFAULT_RETRY.attempts - 1,
    tls_ca: Annotated[
        Path | None,
        typer.Option(help="Encrypt; trust servers whose certificate these sign (PEM)."),
    ] = None,
    tls_cert: Annotated[
        Path | None, typer.Option(help="Encrypt; our certificate, for mutual TLS (PEM).")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Key of --tls-cert (PEM).")] = None,
    admin_key_file: Annotated[
        Path | None, typer.Option(help="File with the key of the server's restricted APIs.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Send images, print each answer and a summary."""
    _one_of("--protocol", protocol, PROTOCOLS)
    _one_of("--policy", policy, POLICIES)
    if threshold is not None and math.isnan(threshold):
        raise UsageError("--threshold must be a number, in oracle units")
    if not 0 < timeout_s < math.inf:
        raise UsageError(f"--timeout-s must be a positive number of seconds; got {timeout_s:g}")
    if threshold is not None and policy != "auto":
        raise UsageError(f"--threshold has no meaning with --policy {policy}; give one of them")
    files = find_images(paths)
    names = read_labels(labels) if labels else None
    address = url or (DEFAULT_GRPC_URL if protocol == "grpc" else DEFAULT_HTTP_URL)
    options = {
        "retry": Retry(attempts=retries + 1),
        "tls": _tls(tls_ca, tls_cert, tls_key),
        "admin_key": read_admin_key(admin_key_file) if admin_key_file else None,
    }
    server, task = _look_at_server(address, protocol, names, options)
    question = Question(policy, threshold, timeout_s)
    started = time.perf_counter()
    outcomes = _ask(protocol, address, files, question, concurrency, options)
    summary = summarise(outcomes, time.perf_counter() - started)
    if as_json:
        asked = {"policy": policy, "threshold": threshold, "concurrency": concurrency}
        print(json.dumps({**server, **asked, **as_dict(outcomes, summary, top, names, task)}))
    else:
        Console().print(table(outcomes, top, names, task))
        print(summary_line(summary))
    if summary.errors:
        raise typer.Exit(1)


def _one_of(option: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        choices = f"{', '.join(allowed[:-1])} or {allowed[-1]}"
        raise UsageError(f"{option} must be {choices}; got {value!r}")


def _tls(ca: Path | None, cert: Path | None, key: Path | None) -> Tls | None:
    if (cert is None) != (key is None):
        raise UsageError("--tls-cert and --tls-key belong together; give both or none")
    return None if ca is None and cert is None else Tls(ca, cert, key)


def _look_at_server(
    address: str, protocol: str, labels: list[str] | None, options: dict[str, Any]
) -> tuple[dict[str, Any], Task]:
    """Fail before the first image where the server is absent or is not what was asked for."""
    kind = GrpcClient if protocol == "grpc" else HttpClient
    with kind(address, **options) as client:
        version = client.server_version()
        client.metadata()  # is the ensemble served?
        if labels is not None:
            _check_labels(labels, client.metadata(client.tensor_model))
        try:
            task = client.task()
        except (AccessDeniedError, NotServedError):
            # Who may ask about images need not see a configuration, and some gateways hide it.
            task = Task()
    described = {"url": address, "protocol": protocol, "triton_version": version, "task": task.kind}
    return described, task


def _check_labels(labels: list[str], router: dict[str, Any]) -> None:
    """Compare with the router, which declares its sizes; the ensemble leaves them open."""
    outputs = {output["name"]: output["shape"] for output in router["outputs"]}
    if "logits" not in outputs:
        raise UsageError("the served model has no head, so --labels names nothing; leave it out")
    classes = outputs["logits"][-1]
    if classes > 0 and classes != len(labels):
        raise UsageError(f"--labels has {len(labels)} names, the model {classes} classes")


def _ask(
    protocol: str,
    address: str,
    files: list[Path],
    question: Question,
    concurrency: int,
    options: dict[str, Any],
) -> list[Outcome]:
    columns = (TextColumn("infer"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("infer", total=len(files))
        done: Callable[[], None] = lambda: progress.advance(task)  # noqa: E731
        if protocol == "grpc":
            return asyncio.run(ask_grpc(address, files, question, concurrency, done, **options))
        return ask_http(address, files, question, concurrency, done, **options)


def main() -> None:
    """Run the command line; a foreseeable error is one line and exit code 2."""
    try:
        code = app(standalone_mode=False)
    except typer.TyperException as error:
        message = " ".join(error.format_message().split())
    except (ClientError, UsageError) as error:
        message = str(error)
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
    else:
        sys.exit(code)
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
