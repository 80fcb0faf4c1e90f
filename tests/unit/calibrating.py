"""`python -m calibration` in a test's folder."""

import sys

import pytest

from calibration.__main__ import main


def run(folder, *arguments):
    """The exit code of `python -m calibration ...` in `folder`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["calibration", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
    return stop.value.code or 0
