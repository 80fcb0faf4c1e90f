"""Read what the routers wrote of audited images, each record once.

What has been read is a place in each file, which the caller keeps together with what it made of the
records: written down in one step, no record counts twice and none is lost, whenever it is stopped.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from routing.journal import SUFFIX, Header, JournalError, Record, parse, record


@dataclass
class Part:
    """What is new in one journal.

    Attributes:
        file: it.
        header: whose it is; None: its first line cannot be read, or it is a copy of another.
        records: complete ones, in the order in which they were written.
        place: up to where it has been read now, in bytes.
        damaged: lines that are not whole and never will be.
        is_over: whether nothing will be written to it any more, so that it may be removed once
            the place is kept.
    """

    file: Path
    header: Header | None
    records: list[Record] = field(default_factory=list)
    place: int = 0
    damaged: int = 0
    is_over: bool = False


def parts(folder: Path, places: Mapping[str, int]) -> Iterator[Part]:
    """What is new in the journals of a folder, the oldest first.

    Args:
        folder: where they lie; there may be none yet.
        places: up to where each has been read, in bytes, by its name.

    Raises:
        OSError: a journal cannot be read.
    """
    # Not those in the making, which are hidden, and by pathlib's patterns are not.
    for file in sorted(folder.glob(f"[!.]*{SUFFIX}")):
        yield _part(file, places.get(file.name, 0))


def _part(file: Path, place: int) -> Part:
    with file.open("rb") as opened:
        is_over = _is_over(opened.fileno())  # before it is read: then nothing follows
        first = opened.readline()
        part = Part(file, _header(first, file.name), place=max(place, len(first)), is_over=is_over)
        if part.header is None:
            part.damaged = int(place == 0)
            part.place = opened.seek(0, 2)
            return part
        opened.seek(part.place)
        for line in opened:
            if not line.endswith(b"\n") and not is_over:
                break  # the rest of it may still come
            part.place += len(line)
            try:
                part.records.append(record(line))
            except JournalError:
                part.damaged += 1
    return part


def _header(line: bytes, name: str) -> Header | None:
    try:
        content = parse(line)
        if content.pop("schema_version") != 1 or content["name"] != name:
            return None
        return Header(**content)
    except (JournalError, KeyError, TypeError):
        return None


def _is_over(descriptor: int) -> bool:
    """Whether no process holds the lock of its writer."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:  # held, or a file system without locks: then it is never removed
        return False
    return True
