"""The names of a model's classes as they lie beside its graphs, one on each line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

NAME = "labels.txt"


def distinct(names: Iterable[object]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """One label per class, each another.

    Args:
        names: of the classes, in their order, as a checkpoint has them.

    Returns:
        The labels, each one line, and what to say of them, a line each.
    """
    labels = [" ".join(str(name).split()) or f"LABEL_{i}" for i, name in enumerate(names)]
    notices = []
    # ImageNet has two cranes, a bird and a machine.
    while twice := [label for label, count in Counter(labels).items() if count > 1]:
        notices.append(f"there are several classes called {twice[0]}: told apart by their numbers")
        labels = [f"{name} ({i})" if name in twice else name for i, name in enumerate(labels)]
    return tuple(labels), tuple(notices)


def write(folder: Path, labels: Iterable[str]) -> None:
    """Write `labels.txt`: one label per line, for whatever takes a character for its end.

    What is no Unicode in a label, which may be a folder's name, is escaped.

    Raises:
        OSError: it cannot be written.
    """
    lines = "".join(f"{' '.join(label.split())}\n" for label in labels)
    (folder / NAME).write_text(lines, "utf-8", "backslashreplace")
