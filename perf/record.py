"""A run as it goes: its summary, kept after every stage, and a bar for the one that runs."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console

from report.performance_page import write_performance
from report.terminal import Bar, Bars

from .compare import NAME, SCHEMA_VERSION
from .figures import conclude


class Record:
    """Use as a context manager around all that is measured.

    On the way out the summary says whether the run came to its end, and the report is written of
    what there is. A run that ends before it has any figures leaves those of an earlier one alone.

    Attributes:
        summary: the content of summary.json so far.
        folder: where everything is written.
    """

    def __init__(self, folder: Path, console: Console, header: dict[str, Any]) -> None:
        """Begin, with what the summary says of the run itself."""
        self.folder = folder
        self._started = time.monotonic()
        self.summary: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "seconds": 0.0,
            "complete": False,
            "disturbed": False,
            "doubts": {},
            "notes": [],
            **header,
        }
        self._bars = Bars(console)

    @property
    def report_path(self) -> Path:
        """Where the page is."""
        return self.folder / "report.html"

    @property
    def has_figures(self) -> bool:
        """Whether anything was measured that is worth a page."""
        return "answers" in self.summary

    def note(self, line: str) -> None:
        """Keep one line for the reader of the summary, and say it now."""
        self.summary["notes"].append(line)
        self._bars.console.print(f"note: {line}", markup=False, highlight=False)

    def doubt(self, load: str, reasons: Sequence[str]) -> None:
        """Keep why the figures under a load, `c1` or `saturated`, cannot be believed, if so."""
        self.summary["doubts"][load] = list(reasons)
        self.summary["disturbed"] = any(self.summary["doubts"].values())

    @contextlib.contextmanager
    def stage(self, title: str, total: int) -> Iterator[Bar]:
        """A bar for one stage; the summary is kept at its end."""
        self.folder.mkdir(parents=True, exist_ok=True)  # what cannot be written is said at once
        with self._bars.stage(title, total) as bar:
            yield bar
        self._keep()

    def _keep(self) -> None:
        if not self.has_figures:
            return  # what an earlier run measured is worth more
        # A report of that run beside a summary of this one would contradict it.
        self.report_path.unlink(missing_ok=True)
        self.summary["seconds"] = round(time.monotonic() - self._started, 1)
        write(self.summary, self.folder / NAME)

    def __enter__(self) -> Record:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.summary["complete"] = error is None
        if error is not None:
            reason = "interrupted" if isinstance(error, KeyboardInterrupt) else str(error)
            reason = " ".join(reason.split())
            self.summary["notes"].append(f"stopped before its end: {reason}")
        self._keep()
        if self.has_figures:
            write_performance(self.report_path, conclude(self.summary))


def write(summary: dict[str, Any], path: Path) -> None:
    """Write it in one piece: a run that is killed while writing leaves the last one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n")
    os.replace(partial, path)
