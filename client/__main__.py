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

from .errors import ClientError
from .files import UsageError, find_images, read_labels
from .many import Outcome, Question, ask_grpc, ask_http, summarise
from .render import as_dict, summary_line, table
from .sync import DEFAULT_GRPC_URL, DEFAULT_HTTP_URL, GrpcClient, HttpClient

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
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Send images, print each answer and a summary."""
    _one_of("--protocol", protocol, PROTOCOLS)
    _one_of("--policy", policy, POLICIES)
    if threshold is not None and math.isnan(threshold):
        raise UsageError("--threshold must be a number, in oracle units")
    if threshold is not None and policy != "auto":
        raise UsageError(f"--threshold has no meaning with --policy {policy}; give one of them")
    files = find_images(paths)
    names = read_labels(labels) if labels else None
    address = url or (DEFAULT_GRPC_URL if protocol == "grpc" else DEFAULT_HTTP_URL)
    server = _look_at_server(address, protocol, names)
    question = Question(policy, threshold)
    started = time.perf_counter()
    outcomes = _ask(protocol, address, files, question, concurrency)
    summary = summarise(outcomes, time.perf_counter() - started)
    if as_json:
        asked = {"policy": policy, "threshold": threshold, "concurrency": concurrency}
        print(json.dumps({**server, **asked, **as_dict(outcomes, summary, top, names)}))
    else:
        Console().print(table(outcomes, top, names))
        print(summary_line(summary))
    if summary.errors:
        raise typer.Exit(1)


def _one_of(option: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        choices = f"{', '.join(allowed[:-1])} or {allowed[-1]}"
        raise UsageError(f"{option} must be {choices}; got {value!r}")


def _look_at_server(address: str, protocol: str, labels: list[str] | None) -> dict[str, Any]:
    """Fail before the first image where the server is absent or is not what was asked for."""
    kind = GrpcClient if protocol == "grpc" else HttpClient
    with kind(address) as client:
        version = client.server_version()
        client.metadata()  # is the ensemble served?
        if labels is not None:
            _check_labels(labels, client.metadata(client.tensor_model))
    return {"url": address, "protocol": protocol, "triton_version": version}


def _check_labels(labels: list[str], router: dict[str, Any]) -> None:
    """Compare with the router, which declares its sizes; the ensemble leaves them open."""
    outputs = {output["name"]: output["shape"] for output in router["outputs"]}
    if "logits" not in outputs:
        raise UsageError("the served model has no head, so --labels names nothing; leave it out")
    classes = outputs["logits"][-1]
    if classes > 0 and classes != len(labels):
        raise UsageError(f"--labels has {len(labels)} names, the model {classes} classes")


def _ask(
    protocol: str, address: str, files: list[Path], question: Question, concurrency: int
) -> list[Outcome]:
    columns = (TextColumn("infer"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("infer", total=len(files))
        done: Callable[[], None] = lambda: progress.advance(task)  # noqa: E731
        if protocol == "grpc":
            return asyncio.run(ask_grpc(address, files, question, concurrency, done))
        return ask_http(address, files, question, concurrency, done)


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
