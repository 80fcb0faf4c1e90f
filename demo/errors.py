"""What can go wrong in the demo itself."""


class DemoError(RuntimeError):
    """A step failed, or something the demo shows did not hold. One line."""
