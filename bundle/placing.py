"""Where output lies until it is complete, and how files get there."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def folder_beside(out: Path) -> Iterator[Path]:
    """A temporary folder next to `out`, so that moving what is in it to `out` is one rename.

    Raises:
        OSError: there can be none; the path that is in the way is its `filename`.
    """
    # Of a file in the place of the parent, mkdir(exist_ok=True) would say that it exists.
    if not out.parent.exists():
        out.parent.mkdir(parents=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as folder:
        yield Path(folder)


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name, or copy it where that cannot be."""
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, target)
