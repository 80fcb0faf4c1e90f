"""Rows of the table of results, and the table."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tests.faults.asking import Request
from tests.faults.load import counts

HEADER = (
    *("fault", "requests", "ok", "of them degraded", "refused", "failed", "timed out", "wrong"),
    *("recovery s", "longest s", "note"),
)


@dataclass(frozen=True)
class Row:
    """What one fault did to the requests from its injection on.

    Attributes:
        fault: what was done, and to which configuration.
        requests: answered or given up from the injection on.
        ok: with the right answer.
        degraded: of those, with at least one image answered `degraded`.
        refused: UNAVAILABLE from the server itself.
        failed: any other error.
        timed_out: no answer within the client's patience.
        wrong: an answer that is not the one worked out offline.
        recovery_s: from the injection until success lasted; None if it never did.
        longest_s: the longest time that a request took.
        note: what else is worth knowing.
    """

    fault: str
    requests: int
    ok: int
    degraded: int
    refused: int
    failed: int
    timed_out: int
    wrong: int
    recovery_s: float | None
    longest_s: float
    note: str = ""

    def noting(self, note: str) -> Row:
        """The same row with something to note."""
        return replace(self, note=note)


def row(fault: str, after: Sequence[Request], recovery_s: float | None, note: str = "") -> Row:
    """Sum up the requests that ended after the injection."""
    found = counts(after)
    return Row(
        fault=fault,
        requests=len(after),
        ok=found["ok"],
        degraded=sum(request.degraded > 0 for request in after),
        refused=found["refused"],
        failed=found["failed"],
        timed_out=found["timeout"],
        wrong=found["wrong"],
        recovery_s=None if recovery_s is None else round(recovery_s, 2),
        longest_s=round(max((request.seconds for request in after), default=math.nan), 2),
        note=note,
    )


def write(rows: Sequence[Row], figures: dict[str, object], path: Path) -> None:
    """Write rows and other figures as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"matrix": [asdict(found) for found in rows], **figures}
    path.write_text(json.dumps(content, indent=2) + "\n")


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    lines = ["| " + " | ".join(HEADER) + " |", "| --- |" + " ---: |" * 9 + " --- |"]
    for found in rows:
        values = asdict(found)
        never = found.recovery_s is None
        values["recovery_s"] = "never" if never else f"{found.recovery_s:.1f}"
        values["longest_s"] = f"{found.longest_s:.1f}"
        lines.append("| " + " | ".join(str(value) for value in values.values()) + " |")
    return "\n".join(lines)
