"""What the audit has seen, on disk: written by each instance of the router, read by `calibration`.

A journal is one file of one process: a first line that says whose it is, then a line for each
audited image, with its score and whether the cheap answer was a loss, and never the image. Each
line begins with the CRC-32 of the rest, so that one that was cut in the middle, by a full disk or
a killed process, is known for what it is. A file appears under its name with its first line in it,
and its writer holds a lock on it as long as it may write more. No name is ever used twice.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

SUFFIX = ".journal"
RETREAT = "retreat"  # in the same folder, followed by the SHA-256 of the artifact that it is about
SEGMENT_BYTES = 1 << 20  # then the next file begins, and what was read can be removed
LIMIT_BYTES = 64 << 20  # of all journals: what nobody reads must not fill the disk


class JournalError(ValueError):
    """A journal cannot be read as one. One line."""


@dataclass(frozen=True)
class Header:
    """Whose journal it is.

    Attributes:
        name: of the file, so that a copy under another name is known as one.
        scoring: `Calibration.scoring_sha256`: records are evidence about that score only.
        artifact: SHA-256 of the file `calibration.json` that the router ran with.
        version: of the router.
    """

    name: str
    scoring: str
    artifact: str
    version: int


@dataclass(frozen=True)
class Record:
    """One audited image.

    Attributes:
        score: in oracle units; None: it is not a number, and the image always escalates.
        lost: whether the cheap answer is not acceptable in place of the full rung's.
        change: the L2 distance between both embeddings, which a score shall predict.
        chance: the probability with which the image was drawn.
        at: seconds since 1970, for people only: clocks jump.
    """

    score: float | None
    lost: bool
    change: float
    chance: float
    at: float


def line(content: Mapping[str, Any]) -> bytes:
    """One line of a journal."""
    text = json.dumps(content, separators=(",", ":"), allow_nan=False).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def parse(written: bytes) -> dict[str, Any]:
    """What `line` was given.

    Raises:
        JournalError: it is not whole.
    """
    crc, _, text = written.rstrip(b"\n").partition(b" ")
    if crc != b"%08x" % zlib.crc32(text):
        raise JournalError("a line is damaged")
    content: dict[str, Any] = json.loads(text)
    return content


def record(written: bytes) -> Record:
    """The record in a line; JournalError: it is not whole, or of another release."""
    try:
        return Record(**parse(written))
    except TypeError as error:
        raise JournalError(f"a line is of another release: {error}") from None


class Journal:
    """Writes the journals of one process, one file after the other. It never raises.

    Args:
        folder: where they lie; made where it is missing.
        header: of each; its name is filled in.
        segment_bytes: from which size on a file is followed by the next.
        limit_bytes: of all journals in the folder; beyond it nothing is written.

    Attributes:
        fault: why the last records were not written; empty: they were.
    """

    def __init__(
        self,
        folder: Path,
        header: Header,
        segment_bytes: int = SEGMENT_BYTES,
        limit_bytes: int = LIMIT_BYTES,
    ) -> None:
        self.fault = ""
        self._folder, self._header = folder, header
        self._segment_bytes, self._limit_bytes = segment_bytes, limit_bytes
        self._file: IO[bytes] | None = None
        self._size = 0

    def append(self, records: Sequence[Record]) -> bool:
        """Write records, all of them or none; whether they are written."""
        try:
            self._append(b"".join(line(asdict(each)) for each in records))
        except (OSError, ValueError) as error:  # no space, no right, or a number that JSON has not
            self.fault = str(error)
            return False
        self.fault = ""
        return True

    def close(self) -> None:
        """Write no more."""
        if self._file is not None:
            self._file.close()  # and with it goes the lock
            self._file = None

    def _append(self, lines: bytes) -> None:
        if self._file is None or self._size >= self._segment_bytes or self._is_gone():
            self.close()
            self._open()
        assert self._file is not None
        try:
            if self._file.write(lines) != len(lines):
                raise OSError("the disk is full")
        except OSError:
            # What was written of them is cut off again, or nothing follows it.
            try:
                os.ftruncate(self._file.fileno(), self._size)
            except OSError:
                self.close()
            raise
        self._size += len(lines)

    def _is_gone(self) -> bool:
        """Whether somebody removed the file: what is written to it nobody would read."""
        return self._file is not None and os.fstat(self._file.fileno()).st_nlink == 0

    def _open(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        taken = sum(file.stat().st_size for file in self._folder.glob(f"*{SUFFIX}"))
        if taken >= self._limit_bytes:
            raise OSError(
                f"{self._folder} holds {taken >> 20} MiB of journals, which nobody reads: run "
                "python -m calibration live"
            )
        name = f"{time.time():.0f}-{os.getpid()}-{os.urandom(6).hex()}{SUFFIX}"
        first = line({"schema_version": 1, **asdict(self._header), "name": name})
        hidden = self._folder / f".{name}"
        file = open(hidden, "ab", buffering=0)  # noqa: SIM115, it stays open
        try:
            with contextlib.suppress(OSError):  # a file system without locks: nobody removes it
                fcntl.flock(file, fcntl.LOCK_EX)
            if file.write(first) != len(first):
                raise OSError("the disk is full")
            hidden.rename(self._folder / name)
        except OSError:
            file.close()
            hidden.unlink(missing_ok=True)
            raise
        self._file, self._size = file, len(first)


def live_folder(repository: Path, given: str) -> Path:
    """Where the routers of a repository write their journals.

    Args:
        repository: the model repository; a link to it is followed.
        given: `live_folder` of the router's configuration; empty: beside the repository.
    """
    whole = repository.resolve()
    return Path(given) if given else whole.with_name(f"{whole.name}.live")


def retreat_file(folder: Path, artifact: str) -> Path:
    """The file whose presence says that traffic contradicts an artifact's certificate."""
    return folder / f"{RETREAT}-{artifact}"
