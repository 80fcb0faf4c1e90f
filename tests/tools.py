"""Programs that tests run besides our own."""

from __future__ import annotations

import shutil
import subprocess

import pytest

# What a machine may do without, and the Debian package that has it: tests that need one are
# collected, and skipped with this reason. Whatever else is missing fails them.
OPTIONAL = {
    "java": "default-jdk-headless",
    "chromium": "chromium",
    "chromedriver": "chromium-driver",
}


def program(name: str) -> str:
    """The path of a program; the test is skipped where it may be missing and is."""
    found = shutil.which(name)
    if found is None and name in OPTIONAL:
        pytest.skip(f"there is no {name}: apt-get install --no-install-recommends {OPTIONAL[name]}")
    assert found is not None, f"there is no {name}, which this test runs"
    return found


def in_a_process_namespace() -> list[str]:
    """What begins a command that sees no process but its own.

    Empty where that is forbidden, as in a container by default: the command is another process
    then, and knows no more of those of the tests.
    """
    command = ["unshare", "--map-root-user", "--pid", "--fork"]
    allowed = subprocess.run([program("unshare"), *command[1:], "true"], capture_output=True)
    return command if allowed.returncode == 0 else []
