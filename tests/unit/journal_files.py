"""Journals for tests: whose they are, records that can be told apart, and a disk that gets full."""

import errno

from calibration.journals import parts
from routing.journal import Header, Journal, Record

HEADER = Header(name="", scoring="a" * 64, artifact="b" * 64, version=1)


def record(number, **changes):
    """The record of this number, which stands in its `change`."""
    fields = {"score": number / 1000, "lost": number % 3 == 0, "change": float(number)}
    return Record(**{**fields, "chance": 1.0, "at": 1.7e9 + number, **changes})


def numbers(part):
    return [int(each.change) for each in part.records]


def journal_of(folder, *records, header=HEADER):
    """Write a journal whose writer has ended; its file."""
    before = set(folder.glob("*")) if folder.exists() else set()
    journal = Journal(folder, header)
    assert journal.append(records)
    journal.close()
    (file,) = set(folder.glob("*")) - before
    return file


def read(folder, places=()):
    """All that is new, as one list of numbers, and the parts."""
    found = list(parts(folder, dict(places)))
    return [number for part in found for number in numbers(part)], found


class Disk:
    """Opens files for a journal and has room for so many bytes; None: for all.

    As a real one it takes what still fits of a write, and refuses the next.
    """

    def __init__(self, room=None):
        self.room = room

    def open(self, path, mode, buffering):
        return _File(self, open(path, mode, buffering=buffering))


class _File:
    def __init__(self, disk, file):
        self._disk, self._file = disk, file
        self.fileno, self.close = file.fileno, file.close

    def write(self, content):
        if self._disk.room is None:
            return self._file.write(content)
        if not self._disk.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = self._file.write(content[: self._disk.room])
        self._disk.room -= taken
        return taken
