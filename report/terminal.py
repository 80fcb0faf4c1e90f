"""What people see on a terminal: tables, progress, and how a command ends."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text


def table(
    title: str,
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    bold: Sequence[int] = (),
    left: Sequence[int] = (0,),
) -> Table:
    """A table whose text is shown as it is.

    Rows in `bold` stand out. Columns in `left` are text; the others are numbers, and end at one
    place.
    """
    shown = Table(title=Text(title))
    for column, heading in enumerate(headings):
        shown.add_column(
            Text(heading),
            justify="left" if column in left else "right",
            overflow="fold",
        )
    for number, row in enumerate(rows):
        shown.add_row(*map(Text, row), style="bold" if number in bold else None)
    return shown


class Bar:
    """The progress of one stage."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress = progress
        self._task = task

    def advance(self, count: int = 1) -> None:
        """So many more steps are done."""
        self._progress.advance(self._task, count)

    def begin_again(self, text: str) -> None:
        """Everything of this stage is done once more."""
        self._progress.reset(self._task, description=text)

    def describe(self, text: str) -> None:
        """Say what is going on."""
        self._progress.update(self._task, description=text)


class Bars:
    """Where a long command tells what it does: lines, and a bar for each stage.

    Bars need no beginning or end of their own: a stage shows its bar while it runs. A quiet console
    silences everything.
    """

    def __init__(self, console: Console) -> None:
        self.console = console

    def say(self, line: str) -> None:
        """Print one line."""
        self.console.print(line, style="dim", markup=False, highlight=False, soft_wrap=True)

    @contextlib.contextmanager
    def stage(self, title: str, total: int | None) -> Iterator[Bar]:
        """A bar over `total` steps, full when the stage has come to its end."""
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console) as progress:
            task = progress.add_task(title, total=total)
            yield Bar(progress, task)
            progress.update(task, completed=total, description=title)


def run(app: Callable[..., object], errors: tuple[type[Exception], ...]) -> NoReturn:
    """Run a command line; a foreseeable error is one line on stderr and exit code 2.

    Foreseeable are `errors`, whose text is meant for the user, and an OSError. What the terminal
    cannot show, such as a name that is no Unicode, is escaped.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    message: str | None = None
    try:
        code = app(standalone_mode=False)
    except typer.TyperException as error:
        if not (words := error.format_message()):  # without a verb, the help was printed
            sys.exit(2)
        message = f"{words} (--help tells more)"
    except errors as error:
        message = str(error)
    except OSError as error:
        message = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    if message is None:
        if code == 130:  # what typer makes of Ctrl-C
            typer.echo("interrupted", err=True)
        sys.exit(code if isinstance(code, int) else 0)
    typer.echo("error: " + " ".join(message.split()), err=True)
    sys.exit(2)
