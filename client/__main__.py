"""`python -m client infer`."""

from __future__ import annotations

import io
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .core import DEFAULT_TIMEOUT_S, BlockingCore
from .errors import AccessDeniedError, ClientError, NotServedError
from .files import SUFFIXES, FilesError, find_files, read_labels, read_text
from .files import shown as file_name
from .grpc_clients import DEFAULT_GRPC_URL, GrpcClient
from .http_client import DEFAULT_HTTP_URL, HttpClient
from .messages import Task
from .outcomes import Shown, as_dict, ask, sentence, summarise, table
from .retry import DEFAULT_RETRY, Retry
from .tls import Tls


class UsageError(ValueError):
    """The command line asks for what cannot be. The message is one line."""


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
    protocol: Annotated[Literal["grpc", "http"], typer.Option(help="What carries them.")] = "grpc",
    policy: Annotated[
        Literal["auto", "low", "high"],
        typer.Option(help="auto: the score decides; low or high: always that rung."),
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
    if threshold is not None and math.isnan(threshold):
        raise UsageError("--threshold must be a number, in oracle units")
    if not 0 < timeout_s < math.inf:
        raise UsageError(f"--timeout-s must be a positive number of seconds; got {timeout_s:g}")
    if threshold is not None and policy != "auto":
        raise UsageError(f"--threshold has no meaning with --policy {policy}")
    files, notes = find_images(paths)
    for note in notes:
        print(note, file=sys.stderr)
    names = read_labels(labels) if labels else []
    options: dict[str, Any] = {
        "retry": Retry(attempts=retries + 1),
        "tls": Tls(tls_ca, tls_cert, tls_key) if tls_ca or tls_cert or tls_key else None,
        "admin_key": read_text(admin_key_file, "the admin key").strip() if admin_key_file else None,
    }
    question = {"policy": policy, "threshold": threshold}
    with (
        GrpcClient(url or DEFAULT_GRPC_URL, **options)
        if protocol == "grpc"
        else HttpClient(url or DEFAULT_HTTP_URL, concurrency=concurrency, **options)
    ) as client:
        version, task = _look_at_server(client, names)
        started = time.perf_counter()
        columns = (TextColumn("infer"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            bar = progress.add_task("infer", total=len(files))
            options = {"timeout_s": timeout_s, **question}
            outcomes = ask(client, files, concurrency, lambda: progress.advance(bar), **options)
    summary, shown = summarise(outcomes, time.perf_counter() - started), Shown(task, top, names)
    if as_json:
        asked = {"url": client.url, "protocol": protocol, "triton_version": version}
        found = {"task": task.kind, **question, "concurrency": concurrency}
        images = [as_dict(outcome, shown) for outcome in outcomes]
        print(json.dumps({**asked, **found, "images": images, "summary": summary}))
    else:
        Console().print(table(outcomes, shown))
        print(sentence(summary))
    if summary["errors"] or len(outcomes) < len(files):
        raise typer.Exit(1 if len(outcomes) == len(files) else 130)


def find_images(paths: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """The images that files, whatever their names, and folders, by `find_files`, stand for.

    Returns:
        Files in the order of `paths`, sorted within a folder, each once; and a line for each
        folder in which others were skipped.

    Raises:
        UsageError: a path does not exist, or a folder holds no image.
        FilesError: a folder cannot be searched.
    """
    found: dict[Path, None] = {}
    notes = []
    for path in paths:
        if not path.exists():
            raise UsageError(f"{file_name(path)} does not exist")
        if not path.is_dir():
            found[path] = None
            continue
        inside = find_files(path)
        note = f"{file_name(path)}: {inside.note}" if inside.note else ""
        if not inside.names:
            holds = f"{file_name(path)} holds no image ({', '.join(SUFFIXES)})"
            raise UsageError(f"{holds}; {inside.note}" if note else holds)
        found.update(dict.fromkeys(path / name for name in inside.names))
        notes += [note] * bool(note)
    return list(found), notes


def _look_at_server(client: BlockingCore, labels: list[str]) -> tuple[str, Task]:
    """Fail before the first image where the server is absent or is not what was asked for."""
    version = client.server_version()
    client.metadata()  # is the ensemble served?
    if labels:
        # The router declares its sizes; the ensemble leaves them open.
        router = client.metadata(client.router)
        sizes = {output["name"]: output["shape"][-1] for output in router["outputs"]}
        if "logits" not in sizes:
            raise UsageError("the served model has no head, so --labels names nothing")
        if 0 < sizes["logits"] != len(labels):
            raise UsageError(
                f"--labels has {len(labels)} names, the model {sizes['logits']} classes"
            )
    try:
        return version, client.task()
    except (AccessDeniedError, NotServedError):
        # Who may ask about images need not see a configuration, and some gateways hide it.
        return version, Task()


def main() -> None:
    """Run the command line; a foreseeable error is one line and exit code 2."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal need not know every letter
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = app(standalone_mode=False)
    except typer.TyperException as error:
        message = " ".join(error.format_message().split())
    except (ClientError, FilesError, UsageError) as error:
        message = str(error)
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
    else:
        sys.exit(code)
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
