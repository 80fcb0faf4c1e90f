"""What can go wrong while measuring."""


class PerfError(ValueError):
    """Measuring cannot start or go on. The message is one line that says what to do."""
