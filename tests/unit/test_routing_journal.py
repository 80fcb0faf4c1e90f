"""What the router writes of audited images: whole records or none, whatever the disk does."""

import json
import math
import os
import shutil
import subprocess
import sys

import pytest

from routing import journal as journals
from routing.journal import SUFFIX, Journal, JournalError, line, parse, retreat_file
from routing.journal import record as parse_record
from tests.unit.journal_files import HEADER, Disk, journal_of, numbers, read, record
from tests.unit.router_parts import wait_for


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "repository.live"


@pytest.fixture
def disk(monkeypatch):
    made = Disk()
    monkeypatch.setattr(journals, "open", made.open, raising=False)
    return made


def files(folder):
    return sorted(folder.glob(f"*{SUFFIX}"))


# --- lines ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", [0.25, 1e-38, -3.5, None])
def test_a_line_reads_back_as_the_record(score):
    written = record(7, score=score, lost=True)
    assert parse_record(line(written.__dict__)) == written


def test_a_line_that_differs_by_one_bit_anywhere_is_known():
    whole = line(record(7).__dict__)
    for place in range(len(whole) - 1):
        for bit in range(8):
            other = bytearray(whole)
            other[place] ^= 1 << bit
            with pytest.raises(JournalError):
                parse(bytes(other))


def test_a_record_of_another_release_is_known():
    for content in ({**record(7).__dict__, "colour": "red"}, {"score": 0.5}):
        with pytest.raises(JournalError):
            parse_record(line(content))


# --- files ---------------------------------------------------------------------------------------


def test_records_lie_under_a_header_in_the_order_in_which_they_came(folder):
    journal = Journal(folder, HEADER)
    assert not folder.exists()  # before there is something to write
    assert journal.append([record(1), record(2)]) and journal.append([record(3)])
    assert journal.fault == ""
    (file,) = folder.iterdir()
    first = parse(file.read_bytes().splitlines(keepends=True)[0])
    assert first == {"schema_version": 1, **HEADER.__dict__, "name": file.name}
    found, (part,) = read(folder)
    assert found == [1, 2, 3] and part.header.scoring == HEADER.scoring
    assert part.records[0] == record(1)
    journal.close()


def test_no_name_is_used_twice_and_each_instance_has_its_own(folder):
    writers = [Journal(folder, HEADER) for _ in range(5)]
    for number, journal in enumerate(writers):
        assert journal.append([record(number)])
        journal.close()
        assert journal.append([record(10 + number)])
        journal.close()
    assert len(files(folder)) == 10
    assert sorted(read(folder)[0]) == [0, 1, 2, 3, 4, 10, 11, 12, 13, 14]


def test_a_long_journal_goes_on_in_the_next_file_and_lets_the_former_go(folder):
    journal = Journal(folder, HEADER, segment_bytes=1000)
    for number in range(40):
        assert journal.append([record(number)])
    found, read_parts = read(folder)
    assert sorted(found) == list(range(40)) and len(read_parts) > 3
    assert all(part.place < 1200 for part in read_parts)
    assert sum(not part.is_over for part in read_parts) == 1
    journal.close()


def test_journals_that_nobody_reads_end_at_the_limit_and_go_on_once_they_are_read(folder):
    journal = Journal(folder, HEADER, segment_bytes=1000, limit_bytes=4000)
    kept = [number for number in range(100) if journal.append([record(number)])]
    assert kept == list(range(len(kept))) and len(kept) < 60
    assert sum(file.stat().st_size for file in files(folder)) < 4000 + 1200
    assert "calibration live" in journal.fault
    assert sorted(read(folder)[0]) == kept
    other = Journal(folder, HEADER, limit_bytes=4000)  # of all instances
    assert not other.append([record(200)])
    for part in read(folder)[1]:
        if part.is_over:
            part.file.unlink()
    assert journal.append([record(300)]) and journal.fault == ""
    assert 300 in read(folder)[0]
    journal.close()


def test_a_number_that_json_has_not_costs_its_records_and_no_others(folder):
    journal = Journal(folder, HEADER)
    assert journal.append([record(1)])
    assert not journal.append([record(2), record(3, score=math.nan)])
    assert journal.fault
    assert journal.append([record(4)]) and journal.fault == ""
    assert read(folder)[0] == [1, 4]
    journal.close()


def test_a_folder_that_is_removed_while_it_is_written_to_costs_what_was_in_it(folder):
    journal = Journal(folder, HEADER)
    assert journal.append([record(1)])
    shutil.rmtree(folder)
    assert journal.append([record(2)]) and journal.append([record(3)])
    assert read(folder)[0] == [2, 3]
    journal.close()


@pytest.mark.parametrize("in_the_way", ["a file", "no right"])
def test_a_folder_that_cannot_be_written_is_a_fault_and_no_exception(
    folder, in_the_way, monkeypatch
):
    if in_the_way == "a file":
        folder.write_text("")
    else:

        def refuse(*_, **options):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(journals, "open", refuse, raising=False)
    journal = Journal(folder, HEADER)
    assert not journal.append([record(1)])
    assert journal.fault
    if in_the_way == "a file":
        folder.unlink()
    monkeypatch.undo()
    assert journal.append([record(2)]) and read(folder)[0] == [2]
    journal.close()


# --- a full disk ---------------------------------------------------------------------------------


def sizes(folder):
    """Bytes of a header, and of three records."""
    whole = journal_of(folder, record(1), record(2), record(3)).read_bytes()
    header = whole.index(b"\n") + 1
    return header, len(whole) - header


def test_records_are_written_all_or_none_wherever_the_disk_is_full(tmp_path, disk):
    header, three = sizes(tmp_path / "measured")
    for room in range(header + three + 2):
        folder = tmp_path / str(room)
        disk.room, journal = room, Journal(folder, HEADER)
        fits = room >= header + three
        assert journal.append([record(1), record(2), record(3)]) == fits
        assert bool(journal.fault) != fits
        found, read_parts = read(folder)
        assert found == [1, 2, 3] * fits and sum(part.damaged for part in read_parts) == 0
        disk.room = None
        assert journal.append([record(4), record(5)]) and journal.fault == ""
        found, (part,) = read(folder)
        assert found == [1, 2, 3] * fits + [4, 5] and part.damaged == 0
        assert list(folder.iterdir()) == [part.file]
        journal.close()


def test_what_cannot_be_cut_off_again_is_left_behind_as_damaged(tmp_path, disk, monkeypatch):
    def refuse(*_):
        raise OSError(5, "Input/output error")

    header, three = sizes(tmp_path / "measured")
    one = three // 3
    monkeypatch.setattr(journals.os, "ftruncate", refuse)
    for room in range(header, header + three, 7):
        folder = tmp_path / str(room)
        journal = Journal(folder, HEADER)
        disk.room = None
        assert journal.append([record(0)])
        disk.room = room - header
        assert not journal.append([record(1), record(2), record(3)])
        disk.room = None
        assert journal.append([record(4)]) and journal.append([record(5)])
        journal.close()
        found, read_parts = read(folder)
        whole, rest = divmod(room - header, one)
        # What was written whole did happen: it may count, once.
        assert sorted(found) == [0, *range(1, 1 + whole), 4, 5]
        assert sum(part.damaged for part in read_parts) == bool(rest)
        assert all(part.is_over for part in read_parts)


# --- a sudden end --------------------------------------------------------------------------------

WRITER = """
import sys, time
from pathlib import Path
from routing.journal import Journal
from tests.unit.journal_files import HEADER, record
journal = Journal(Path(sys.argv[1]), HEADER)
assert journal.append([record(1), record(2)])
assert journal.append([record(3)])
print("written", flush=True)
time.sleep(600)
"""


def test_a_writer_that_is_killed_loses_nothing_and_lets_its_journal_go(folder):
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(folder)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    try:
        assert writer.stdout.readline() == b"written\n"
        found, (part,) = read(folder)
        assert found == [1, 2, 3] and not part.is_over
    finally:
        writer.kill()
        writer.wait()
        writer.stdout.close()
    wait_for(lambda: read(folder)[1][0].is_over)
    assert read(folder)[0] == [1, 2, 3]


def test_the_word_that_a_certificate_is_contradicted_is_no_journal(folder):
    journal_of(folder, record(1))
    retreat_file(folder, "c" * 64).touch()
    assert retreat_file(folder, "c" * 64) != retreat_file(folder, "d" * 64)
    assert read(folder)[0] == [1]


def test_a_header_tells_whose_a_journal_is(folder):
    file = journal_of(folder, record(1))
    content = json.loads(file.read_bytes().splitlines()[0].partition(b" ")[2])
    assert content["name"] == file.name and numbers(read(folder)[1][0]) == [1]
