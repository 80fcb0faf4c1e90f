"""A run as it goes: what is kept at each stage, at the end, and when it is cut off."""

import io
import json

import pytest
from rich.console import Console

from perf.figures import PerfError
from perf.record import Record
from tests.unit.perf_summary import sample_summary

MEASURED = sample_summary()
HEADER = {key: MEASURED[key] for key in ("command", "suite", "model", "certificate", "fidelity")}
ANSWERED = {**HEADER, "answers": MEASURED["answers"]}


@pytest.fixture
def folder(tmp_path):
    """Where an earlier run has left its page."""
    folder = tmp_path / "perf"
    folder.mkdir()
    (folder / "report.html").write_text("of an earlier run")
    return folder


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=200)


def printed(console):
    return console.file.getvalue()


def read(folder):
    return json.loads((folder / "summary.json").read_text())


def test_a_run_that_ends_says_so_and_has_its_page(folder, console):
    with Record(folder, console, HEADER) as record:
        with record.stage("systems in turn", 3) as bar:
            bar.advance()
            record.summary["answers"] = MEASURED["answers"]
        assert not (folder / "report.html").exists()  # it would contradict the new summary
    found = read(folder)
    assert found["complete"] is True and found["notes"] == []
    assert found["answers"] == MEASURED["answers"]
    assert {key: found[key] for key in HEADER} == HEADER
    assert found["schema_version"] == 1 and found["seconds"] >= 0
    page = record.report_path.read_text()
    assert record.report_path == folder / "report.html"
    assert MEASURED["answers"]["adaptive"]["title"] in page


def test_every_stage_is_kept_at_its_end(folder, console):
    with Record(folder, console, HEADER) as record:
        with record.stage("first", 1):
            record.summary["answers"] = MEASURED["answers"]
        kept = read(folder)
        assert kept["answers"] == MEASURED["answers"]
        assert kept["complete"] is False  # as long as it runs
        with record.stage("second", 1):
            record.summary["memory"] = MEASURED["memory"]
            assert "memory" not in read(folder)
        assert read(folder)["memory"] == MEASURED["memory"]


def test_an_interruption_keeps_what_was_measured_and_writes_its_page(folder, console):
    with pytest.raises(KeyboardInterrupt), Record(folder, console, HEADER) as record:
        with record.stage("systems in turn", 3):
            record.summary["answers"] = MEASURED["answers"]
        with record.stage("closed loop", 3):
            record.summary["systems"] = MEASURED["systems"][:2]
            raise KeyboardInterrupt
    found = read(folder)
    assert found["complete"] is False
    assert found["notes"] == ["stopped before its end: interrupted"]
    assert found["systems"] == MEASURED["systems"][:2]  # of the stage that was cut off, too
    assert "stopped before its end" in (folder / "report.html").read_text()


def test_an_interruption_before_there_are_answers_leaves_what_was_there_alone(folder, console):
    with pytest.raises(KeyboardInterrupt), Record(folder, console, HEADER) as record:
        with record.stage("read images", 3):
            record.summary["images"] = MEASURED["images"]
        with record.stage("score images", 3):
            raise KeyboardInterrupt
    assert not (folder / "summary.json").exists()
    assert (folder / "report.html").read_text() == "of an earlier run"
    assert not record.has_figures


@pytest.mark.parametrize(
    ("error", "noted"),
    [(PerfError("no image"), "no image"), (RuntimeError("first\n  second"), "first second")],
)
def test_an_error_is_one_note_and_goes_on_to_whoever_asked(folder, console, error, noted):
    with pytest.raises(type(error)), Record(folder, console, ANSWERED):
        raise error
    assert read(folder)["notes"] == [f"stopped before its end: {noted}"]
    assert read(folder)["complete"] is False


def test_a_note_is_kept_and_said_at_once(folder, console):
    with Record(folder, console, ANSWERED) as record:
        record.note("left out [b]a.png")
        assert "note: left out [b]a.png\n" in printed(console)  # names are no markup
    assert read(folder)["notes"] == ["left out [b]a.png"]


def test_a_stage_shows_how_far_it_is(folder):
    console = Console(file=io.StringIO(), width=200, force_terminal=True)
    with Record(folder, console, HEADER) as record, record.stage("read images", 7) as bar:
        bar.advance(2)
        bar.describe("read images: a.png")
        bar._progress.refresh()
        assert "read images: a.png" in printed(console) and "2/7" in printed(console)
    assert "7/7" in printed(console)
