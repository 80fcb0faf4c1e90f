"""Command lines, run in the test's own process, which has imported what they need already."""

from __future__ import annotations

import contextlib
import importlib
import io
import signal
import sys
from typing import NamedTuple

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # a command may change what they do


class Ran(NamedTuple):
    """What a command did."""

    code: int
    out: str
    err: str


def run(folder: str, *arguments: object) -> Ran:
    """`python -m folder ...`, here."""
    main = importlib.import_module(f"{folder}.__main__").main
    before, handlers = sys.argv, [signal.getsignal(number) for number in SIGNALS]
    out, err = io.StringIO(), io.StringIO()
    sys.argv = [folder, *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main()
    except SystemExit as stop:
        code = stop.code
    finally:
        sys.argv = before
        for number, handler in zip(SIGNALS, handlers, strict=True):
            signal.signal(number, handler)
    return Ran(code or 0, out.getvalue(), err.getvalue())


def said(*arguments: object) -> str:
    """What a command printed that is to succeed."""
    done = run(*arguments)
    assert done.code == 0, done.out + done.err
    return done.out


def refused(*arguments: object) -> tuple[int, str]:
    """The exit code and the one line of complaint of a command that is to fail."""
    done = run(*arguments)
    assert done.out == "" and len(done.err.splitlines()) == 1, done.out + done.err
    return done.code, done.err
