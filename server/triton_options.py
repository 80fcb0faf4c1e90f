"""Ask a tritonserver which options it has: they differ between releases and builds."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

_OPTION = re.compile(r"^\s*--([a-z0-9-]+)", re.M)
_TIMEOUT_S = 60.0


def known_options(binary: Path, environment: Mapping[str, str]) -> frozenset[str]:
    """Names of the options in its `--help`, without dashes; none if it does not tell.

    Args:
        binary: the tritonserver, or a wrapper of it.
        environment: as the server is started with, for its libraries.
    """
    try:
        done = subprocess.run(
            [str(binary), "--help"],
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TIMEOUT_S,
        )
    except (OSError, subprocess.TimeoutExpired):
        return frozenset()
    return frozenset(_OPTION.findall(done.stdout + done.stderr))
