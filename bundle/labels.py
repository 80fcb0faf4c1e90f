"""The names of a model's classes as they lie beside its graphs, one on each line."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

NAME = "labels.txt"


def write(folder: Path, labels: Iterable[str]) -> None:
    """Write `labels.txt`: one label per line, for whatever takes a character for its end.

    What is no Unicode in a label, which may be a folder's name, is escaped.

    Raises:
        OSError: it cannot be written.
    """
    lines = "".join(f"{' '.join(label.split())}\n" for label in labels)
    (folder / NAME).write_text(lines, "utf-8", "backslashreplace")
