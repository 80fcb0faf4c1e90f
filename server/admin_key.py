"""The key that opens Triton's restricted administration APIs, read from a file."""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path

from .errors import ServerUsageError

KEY_NAME = "admin-key"
HOW_TO_MAKE = "(umask 077; openssl rand -hex 32 > admin.key)"
_SHORTEST = 16
_SAFE = re.compile(r"[!-~]+")
# tritonserver's own separators in `--grpc-restricted-protocol=APIS:NAME=VALUE`.
_SEPARATORS = re.compile(r"[,:=]")


@dataclass(frozen=True)
class AdminKey:
    """What a request must carry to be let into an administration API.

    Attributes:
        value: the secret; `repr` leaves it out.
    """

    value: str = field(repr=False)

    @classmethod
    def read(cls, path: Path) -> AdminKey:
        """Read the key: the file's only line.

        Raises:
            ServerUsageError: no such file, one that others can read, or no usable key in it.
        """
        try:
            with path.open(encoding="utf-8") as file:
                status = os.fstat(file.fileno())  # Of what is read, not of what may replace it.
                text = file.read()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not a text file"
            raise ServerUsageError(
                f"the admin key file {path} cannot be read ({reason}); make one with {HOW_TO_MAKE}"
            ) from error
        if stat.S_IMODE(status.st_mode) & 0o077:
            raise ServerUsageError(
                f"the admin key file {path} can be read or written by others than its owner "
                f"(mode {stat.S_IMODE(status.st_mode):04o}); chmod 600 {path}"
            )
        return cls(_checked(text.rstrip("\r\n"), path))

    @property
    def grpc_headers(self) -> dict[str, str]:
        """The metadata that a gRPC call to a restricted API carries."""
        return {f"triton-grpc-protocol-{KEY_NAME}": self.value}

    @property
    def http_headers(self) -> dict[str, str]:
        """The headers that an HTTP request to a restricted API carries."""
        return {KEY_NAME: self.value}


def _checked(value: str, path: Path) -> str:
    if not value:
        raise ServerUsageError(f"the admin key file {path} is empty; make one with {HOW_TO_MAKE}")
    if not _SAFE.fullmatch(value) or _SEPARATORS.search(value):
        raise ServerUsageError(
            f"the admin key in {path} must be one line of printable ASCII without blanks and "
            f"without , : = (tritonserver's separators); make one with {HOW_TO_MAKE}"
        )
    if len(value) < _SHORTEST:
        raise ServerUsageError(
            f"the admin key in {path} has {len(value)} characters, too few to withstand guessing; "
            f"give at least {_SHORTEST}, such as {HOW_TO_MAKE}"
        )
    return value
