"""The errors an export raises, each with a message fit for a command line."""

from __future__ import annotations


class ExportError(Exception):
    """The export went wrong; the message is one line that says what to do next."""


class UsageError(ExportError):
    """The request itself cannot be carried out."""


def first_line(error: BaseException) -> str:
    """The first non-empty line of an error, for libraries whose messages run over many."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)
