"""What a terminal shows, and how a command ends."""

import io

import pytest
import typer
from rich.console import Console

from report.terminal import Bars, run, table


def test_a_table_shows_text_as_it_is():
    out = io.StringIO()
    rows = [("[red]a", "1.5"), ("b", "12.25")]
    Console(file=out, width=60).print(table("what [b]", ["name", "value"], rows, bold=[1]))
    shown = out.getvalue()
    assert "[red]a" in shown and "what [b]" in shown
    assert "   1.5 " in shown and " 12.25 " in shown


def test_bars_say_lines_and_show_a_stage():
    out = io.StringIO()
    bars = Bars(Console(file=out, width=100))
    bars.say("$ [x]")
    with bars.stage("reading", 3) as bar:
        bar.advance()
        bar.begin_again("reading again")
        bar.advance(2)
        bar.describe("nearly")
    assert "$ [x]" in out.getvalue() and "reading" in out.getvalue() and "3/3" in out.getvalue()


def test_a_stage_that_fails_is_not_shown_as_done():
    out = io.StringIO()
    with pytest.raises(KeyError), Bars(Console(file=out, width=100)).stage("reading", 3):
        raise KeyError
    assert "3/3" not in out.getvalue()


def raising(error):
    def app(standalone_mode):
        assert not standalone_mode
        if error is not None:
            raise error
        return 3

    return app


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (None, 3, ""),
        (KeyError("two\n  lines"), 2, "error: 'two\\n lines'"),
        (ValueError("two\n  lines"), 2, "error: two lines"),
        (FileNotFoundError(2, "No such file", "x"), 2, "error: x: No such file"),
        (OSError("broken"), 2, "error: broken"),
        (typer.BadParameter("bad"), 2, "error: Invalid value: bad (--help tells more)"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (typer.Abort(), 130, "interrupted"),
    ],
)
def test_a_command_ends_with_one_line_and_its_code(error, code, line, capsys):
    with pytest.raises(SystemExit) as ended:
        run(raising(error), (ValueError, KeyError))
    assert ended.value.code == code
    assert capsys.readouterr().err.strip() == line


def test_other_errors_are_bugs_and_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        run(raising(ZeroDivisionError()), (ValueError,))
