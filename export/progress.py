"""Progress on stderr: a spinner for each step, a bar where the number of items is known."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Item = TypeVar("Item")


class Steps:
    """Tells the user what is going on.

    Attributes:
        console: where to; a quiet one silences everything.
    """

    def __init__(self, console: Console) -> None:
        self.console = console

    @contextlib.contextmanager
    def step(self, text: str) -> Iterator[None]:
        """Show a spinner while the step runs and a line with its duration afterwards."""
        start = time.perf_counter()
        with self.console.status(escape(text)):
            yield
        self.console.print(f"[green]✓[/] {escape(text)}  {time.perf_counter() - start:.1f} s")

    def track(self, items: Iterable[Item], text: str, total: int) -> Iterator[Item]:
        """Show a bar while the caller goes through the items."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console) as progress:
            yield from progress.track(items, total=total, description=escape(text))

    def note(self, text: str) -> None:
        """Print one line that the user should read."""
        self.console.print(f"[yellow]note:[/] {escape(text)}", soft_wrap=True)
