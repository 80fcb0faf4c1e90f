"""What the command line tells while a server runs: lines for people, or a JSON object a line."""

from __future__ import annotations

import json
import os
import sys
import threading
from contextlib import suppress
from dataclasses import asdict
from datetime import datetime, timezone
from typing import Any

import typer

from .launcher import TritonServer
from .ports import public_urls

_PATIENCE_S = 1.0  # with who reads the standard output
_SOURCE = "server"  # Triton's own lines have "tritonserver" (`guard.py`).


class Events:
    """Events on stderr as lines of text, or on stdout as lines of JSON.

    Attributes:
        as_json: which.
    """

    def __init__(self, as_json: bool = False) -> None:
        """Say in what form events are told."""
        self.as_json = as_json
        self._writer: threading.Thread | None = None

    def say(self, line: str, level: str = "info") -> None:
        """Tell an event; does nothing where nobody can be told, for the server is worth more."""
        if self.as_json:
            self._say_json({"level": level, "message": line})
            return
        now = datetime.now().astimezone().isoformat(timespec="milliseconds")
        with suppress(OSError):
            typer.echo(f"{now} {line}", err=True)

    def serves(self, server: TritonServer, as_json: bool) -> None:
        """Tell where a server that is ready serves.

        Args:
            server: it.
            as_json: as one line of JSON, whatever the form of events.
        """
        http_url, grpc_url, metrics_url = public_urls(
            server.addresses, server.ports, server.access.name
        )
        facts = {
            "http_url": http_url,
            "grpc_url": grpc_url,
            "metrics_url": metrics_url,
            "pid": server.pid,
            "triton_version": server.version,
            "tritonserver": str(server.installation.binary) if server.installation else "",
            "log": str(server.log_path),
        }
        controls = server.controls()
        listed = {"controls": [asdict(control) for control in controls]} if controls else {}
        title = f"Triton {server.version} serves {server.repository}"
        if self.as_json:
            self._say_json({"level": "info", "message": title, **facts, **listed})
            return
        if as_json:
            typer.echo(json.dumps({**facts, **listed}))
            return
        lines = [title, f"  HTTP     {http_url}", f"  gRPC     {grpc_url}"]
        lines += [f"  metrics  {metrics_url}", f"  log      {server.log_path}"]
        for control in controls:
            state = "on " if control.is_on else "OFF"
            lines.append(f"  {state}  {control.name:<20}  {control.detail}")
        typer.echo("\n".join([*lines, "Stop with Ctrl-C."]))

    def _say_json(self, what: dict[str, Any]) -> None:
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        line = {"time": now.replace("+00:00", "Z"), "source": _SOURCE, **what}
        if self._writer is not None and self._writer.is_alive():
            return  # Who reads stands still: the line is lost, as those of Triton are.
        self._writer = threading.Thread(target=_write, args=(f"{json.dumps(line)}\n",), daemon=True)
        self._writer.start()
        self._writer.join(_PATIENCE_S)


def _write(line: str) -> None:
    with suppress(OSError, ValueError):
        try:
            descriptor = sys.stdout.fileno()
        except (AttributeError, ValueError):  # closed, or no file
            typer.echo(line, nl=False)
            return
        # Past Python's buffer, whose lock a thread that never comes back would hold at the end.
        os.write(descriptor, line.encode())
