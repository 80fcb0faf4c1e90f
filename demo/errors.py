"""What can go wrong in the demo itself."""

from pathlib import Path


class DemoError(RuntimeError):
    """A step failed, or something the demo shows did not hold. One line."""


class StepError(DemoError):
    """A command of the demo failed; what it printed is on the terminal.

    Attributes:
        makes: what the command was to make.
    """

    def __init__(self, message: str, makes: Path) -> None:
        super().__init__(message)
        self.makes = makes
