"""Every record counts once: whatever is cut, damaged, copied, killed or restarted."""

import fcntl
import shutil
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from routing import journal as journals
from routing.journal import Journal, line
from tests.unit.journal_files import HEADER, journal_of, read, record

RECORDS = [record(1), record(2), record(3)]


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "repository.live"


@pytest.fixture
def written(tmp_path):
    """A journal's name and its lines."""
    file = journal_of(tmp_path / "written", *RECORDS)
    return file.name, file.read_bytes().splitlines(keepends=True)


def laid(folder, name, content):
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(content)
    return folder / name


def test_without_a_folder_there_is_nothing_new(folder):
    assert read(folder) == ([], [])


def test_what_has_been_read_is_not_read_again(folder):
    journal = Journal(folder, HEADER)
    places, found = {}, []
    for number in range(5):
        assert journal.append([record(number)])
        for _ in range(2):
            new, read_parts = read(folder, places)
            found.append(new)
            places = {part.file.name: part.place for part in read_parts}
    assert found == [[0], [], [1], [], [2], [], [3], [], [4], []]
    journal.close()


# --- cut and damaged -----------------------------------------------------------------------------


def test_a_journal_that_its_writer_left_cut_at_any_byte_counts_what_is_whole(folder, written):
    name, (first, *lines) = written
    ends = [len(first) + sum(map(len, lines[: i + 1])) for i in range(3)]
    whole = b"".join([first, *lines])
    for cut in range(1, len(whole) + 1):
        laid(folder, name, whole[:cut])
        found, (part,) = read(folder)
        if cut < len(first) - 1:
            assert found == [] and part.header is None and part.damaged == 1
        else:
            # A line that lacks its end alone is whole.
            complete = sum(end - 1 <= cut for end in ends)
            rest = cut not in {len(first) - 1, len(first), *ends, *(end - 1 for end in ends)}
            assert found == [1, 2, 3][:complete]
            assert part.damaged == rest
        assert part.is_over and part.place == cut
        again, (part,) = read(folder, {name: part.place})
        assert again == [] and part.damaged == 0 and part.is_over


def test_a_journal_that_is_being_written_is_read_up_to_its_last_whole_line(folder, written):
    name, (first, *lines) = written
    whole = b"".join([first, *lines])
    ends = [len(first) + sum(map(len, lines[: i + 1])) for i in range(3)]
    for cut in range(len(first), len(whole) + 1):
        file = laid(folder, name, whole[:cut])
        with file.open("ab", buffering=0) as writer:
            fcntl.flock(writer, fcntl.LOCK_EX)
            found, (part,) = read(folder)
            assert found == [1, 2, 3][: sum(end <= cut for end in ends)]
            assert part.damaged == 0 and not part.is_over
            writer.write(whole[cut:])
            rest, (after,) = read(folder, {name: part.place})
            assert found + rest == [1, 2, 3]
            assert after.damaged == 0 and after.place == len(whole)


def test_a_line_that_is_damaged_anywhere_costs_itself_alone(folder, written):
    name, (first, *lines) = written
    for place in range(len(lines[1]) - 1):
        other = bytearray(lines[1])
        other[place] ^= 0x80
        laid(folder, name, b"".join([first, lines[0], other, lines[2]]))
        found, (part,) = read(folder)
        assert found == [1, 3] and part.damaged == 1
    # Where its end is not known for one, the next goes with it.
    laid(folder, name, b"".join([first, lines[0], lines[1][:-1] + b"?", lines[2]]))
    found, (part,) = read(folder)
    assert found == [1] and part.damaged == 1


def test_a_first_line_that_is_damaged_or_of_another_release_makes_it_nobodys(folder, written):
    name, (first, *lines) = written
    content = {**HEADER.__dict__, "name": name}
    for header in (
        first.replace(b"version", b"Version"),
        line({"schema_version": 2, **content}),
        line(content),
        line({"schema_version": 1, **content, "colour": "red"}),
    ):
        laid(folder, name, b"".join([header, *lines]))
        found, (part,) = read(folder)
        assert found == [] and part.header is None and part.damaged == 1 and part.is_over
        assert read(folder, {name: part.place})[1][0].damaged == 0


def test_a_copy_counts_nothing(folder):
    file = journal_of(folder, *RECORDS)
    shutil.copy(file, folder / f"copy-{file.name}")
    found, read_parts = read(folder)
    assert found == [1, 2, 3]
    assert sorted(part.header is None for part in read_parts) == [False, True]


def test_a_journal_in_the_making_is_left_alone(folder, written):
    name, lines = written
    for content in (b"", lines[0], b"".join(lines)):
        laid(folder, f".{name}", content)
        assert read(folder) == ([], [])


def test_a_reader_that_comes_by_while_a_journal_is_made_is_not_in_its_way(folder, monkeypatch):
    """In the moment between the file and its first line."""
    seen = []

    def lock(file, operation):
        for part in read(folder)[1]:
            seen.append(part)
            if part.is_over:
                part.file.unlink()
        return fcntl.flock(file, operation)

    class Locks:
        LOCK_EX = fcntl.LOCK_EX
        flock = staticmethod(lock)

    monkeypatch.setattr(journals, "fcntl", Locks)
    journal = Journal(folder, HEADER)
    assert journal.append(RECORDS) and seen == []
    assert read(folder)[0] == [1, 2, 3]
    journal.close()


# --- exactly once --------------------------------------------------------------------------------

ACTIONS = st.one_of(
    st.tuples(st.just("append"), st.integers(0, 1), st.integers(1, 4)),
    st.tuples(st.just("tear"), st.integers(0, 1), st.integers(1, 60)),
    st.tuples(st.just("kill"), st.integers(0, 1), st.just(0)),
    st.tuples(st.sampled_from(["read", "keep", "remove", "restart"]), st.just(0), st.just(0)),
)


class Story:
    """Two routers that write and may die, and a reader that may die between any two steps."""

    def __init__(self, folder):
        self.folder, self.written, self.torn = folder, 0, 0
        self.routers = [Journal(folder, HEADER, segment_bytes=700) for _ in range(2)]
        self.is_torn = [False, False]
        self.kept = ({}, Counter(), 0)  # what is on disk: places, records, damaged lines
        self.places, self.counted, self.damaged = {}, Counter(), 0
        self.over = []

    def append(self, router, count):
        if self.is_torn[router]:  # it died there; another takes its place
            self.kill(router, 0)
        new = [record(self.written + i) for i in range(count)]
        assert self.routers[router].append(new)
        self.written += count

    def tear(self, router, size):
        journal = self.routers[router]
        if journal._file is None or self.is_torn[router]:
            return
        text = line(record(10**6).__dict__)
        journal._file.write(text[: min(size, len(text) - 2)])
        self.is_torn[router], self.torn = True, self.torn + 1

    def kill(self, router, _):
        self.routers[router].close()
        self.is_torn[router] = False

    def read(self, *_):
        new, found = read(self.folder, self.places)
        self.counted.update(new)
        self.damaged += sum(part.damaged for part in found)
        self.places = {part.file.name: part.place for part in found}
        self.over = [(part.file, part.place) for part in found if part.is_over]

    def keep(self, *_):
        self.kept = (dict(self.places), Counter(self.counted), self.damaged)

    def remove(self, *_):
        for file, place in self.over:
            if self.kept[0].get(file.name) == place:
                file.unlink(missing_ok=True)

    def restart(self, *_):
        places, counted, self.damaged = self.kept
        self.places, self.counted, self.over = dict(places), Counter(counted), []


@settings(deadline=None, max_examples=150)
@given(actions=st.lists(ACTIONS, min_size=10, max_size=50))
def test_each_record_counts_once_whoever_dies_when(tmp_path_factory, actions):
    story = Story(tmp_path_factory.mktemp("story"))
    for name, router, number in actions:
        getattr(story, name)(router, number)
        assert max(story.counted.values(), default=1) == 1
    for router in range(2):
        story.kill(router, 0)
    story.restart()
    story.read()
    assert story.counted == Counter(range(story.written))
    assert story.damaged == story.torn
    story.keep()
    story.remove()
    assert list(story.folder.iterdir()) == []
