"""Progress on stderr: one bar over the steps, and one over the items of a step that has many."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

Item = TypeVar("Item")


class _ItemsTimeRemaining(TimeRemainingColumn):
    """Time left for items, which are alike; the steps are not."""

    def render(self, task: Task) -> Text:
        return Text() if task.fields.get("steps") else super().render(task)


class Steps:
    """Tells the user what is going on.

    A bar counts finished steps, not time: one step may take longer than all others together.

    Attributes:
        console: where to; a quiet one silences everything.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            _ItemsTimeRemaining(),
        )
        self._progress = Progress(*columns, console=console, transient=True)
        self._overall = self._progress.add_task("", total=None, visible=False, steps=True)

    @contextlib.contextmanager
    def expect(self, count: int) -> Iterator[None]:
        """Show the bar while the block goes through so many steps."""
        self._progress.reset(self._overall, total=count, description="", visible=True)
        # Where nothing can move, rich would leave an empty line.
        with self._progress if self.console.is_interactive else contextlib.nullcontext():
            yield

    @contextlib.contextmanager
    def step(self, text: str) -> Iterator[None]:
        """Name the step on the bar while it runs; advance and print its duration afterwards."""
        start = time.perf_counter()
        self._progress.update(self._overall, description=escape(text))
        yield
        self._progress.advance(self._overall)
        self.console.print(f"[green]✓[/] {escape(text)}  {time.perf_counter() - start:.1f} s")

    def track(self, items: Iterable[Item], text: str, total: int) -> Iterator[Item]:
        """A step with a bar of its own, which the caller moves by going through the items."""
        with self.step(text):
            task = self._progress.add_task("", total=total)
            try:
                yield from self._progress.track(items, total, task_id=task)
            finally:
                self._progress.remove_task(task)

    def note(self, text: str) -> None:
        """Print one line that the user should read."""
        self.console.print(f"[yellow]note:[/] {escape(text)}", soft_wrap=True)
