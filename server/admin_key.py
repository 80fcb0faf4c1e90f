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
# Without tritonserver's own separators in `--grpc-restricted-protocol=APIS:NAME=VALUE`.
_SAFE = re.compile(r"[!-+\--9;<>-~]*")


@dataclass(frozen=True)
class AdminKey:
    """What a request must carry to be let into an administration API; `repr` leaves it out."""

    value: str = field(repr=False)

    @classmethod
    def read(cls, path: Path) -> AdminKey:
        """Read the key: the file's only line.

        Raises:
            ServerUsageError: no such file, one that others can read, or no usable key in it.
        """
        make = f"make one with {HOW_TO_MAKE}"
        try:
            with path.open(encoding="utf-8") as file:
                # Of what is read, not of what may replace it.
                mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
                value = file.read().rstrip("\r\n")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not a text file"
            raise ServerUsageError(
                f"the admin key file {path} cannot be read ({reason}); {make}"
            ) from error
        refused = "must be one line of printable ASCII without blanks and without , : ="
        weak = f"has {len(value)} characters of {_SHORTEST} that withstand guessing"
        shared = f"can be read or written by others than its owner (mode {mode:04o})"
        for is_so, what in (
            (mode & 0o077, f"{shared}; chmod 600 {path}"),
            (not value, f"is empty; {make}"),
            (not _SAFE.fullmatch(value), f"{refused} (tritonserver's separators); {make}"),
            (len(value) < _SHORTEST, f"{weak}; {make}"),
        ):
            if is_so:
                raise ServerUsageError(f"the admin key file {path} {what}")
        return cls(value)

    @property
    def grpc_headers(self) -> dict[str, str]:
        """The metadata that a gRPC call to a restricted API carries."""
        return {f"triton-grpc-protocol-{KEY_NAME}": self.value}
