"""What `--production` turned on, and what it could not turn on and why."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from .ports import Addresses, is_loopback
from .security import CLIENT_SHARED_MEMORY, HTTP_MAX_INPUT, OTHER_FRONT_ENDS, Security

# The first release after NVIDIA's bulletin 5828 of May 2026 (CVE-2026-24206 and -24207, ways around
# restricted APIs), and so after those of 2025 (HTTP chunks, shared memory).
RECENT_TRITON = (2, 69)
RECENT_IMAGE = "26.05"
# proc(5): of others' processes, 1 hides what is in /proc/PID, 2 that they exist; older kernels list
# the numbers, newer ones these names.
_HIDDEN = re.compile(r"\bhidepid=(?:1|2|4|noaccess|invisible|ptraceable)\b")


@dataclass(frozen=True)
class Control:
    """One measure, and whether it is in force.

    Attributes:
        name: what it is about.
        is_on: whether it is in force.
        detail: how, or why not and what to do.
    """

    name: str
    is_on: bool
    detail: str


@dataclass(frozen=True)
class Situation:
    """What the measures depend on beside the options.

    Attributes:
        repository: the model repository.
        addresses: the addresses bound.
        triton_version: such as `2.51.0`.
        known_options: names of this tritonserver's options.
        mounts: the file systems that this process sees, as the kernel lists them.
    """

    repository: Path
    addresses: Addresses
    triton_version: str
    known_options: Collection[str]
    mounts: Path = Path("/proc/mounts")


def controls(security: Security, now: Situation) -> list[Control]:
    """List every measure: those in force first."""
    found = [
        *_gates(security, now),
        *_plain_text(now),
        *_limits(now),
        *_surroundings(security, now),
    ]
    return sorted(found, key=lambda control: not control.is_on)


def _gates(security: Security, now: Situation) -> Iterator[Control]:
    assert security.tls is not None
    yield Control("gRPC over TLS", True, "plain connections are refused")
    if security.tls.client_ca is None:
        yield Control(
            "client certificates", False, "every client that reaches gRPC may ask; --tls-client-ca"
        )
    else:
        yield Control("client certificates", True, f"issued by {security.tls.client_ca}")
    if security.allow_reload:
        yield Control("fixed models", False, "--allow-reload: the admin key's holder runs code")
    else:
        yield Control("fixed models", True, "none can be loaded or unloaded")
    yield Control(
        "restricted APIs", True, "model-repository, trace, logging, statistics: admin key only"
    )
    how = f"--{CLIENT_SHARED_MEMORY}=false" if CLIENT_SHARED_MEMORY in now.known_options else ""
    yield Control(
        "shared memory",
        True,
        how or "clients cannot register any (its key fits no request)",
    )
    closed = [name for name in OTHER_FRONT_ENDS if name in now.known_options]
    yield Control(
        "other front ends", True, ", ".join(f"--{name}=false" for name in closed) or "not built in"
    )
    yield Control("strict start", True, "a model that does not load ends the server")
    yield Control("quiet log", True, "no request content; tracing off")


def _plain_text(now: Situation) -> Iterator[Control]:
    for name, address in (("HTTP", now.addresses.http), ("metrics", now.addresses.metrics)):
        if is_loopback(address):
            yield Control(f"{name} on loopback", True, address)
        else:
            yield Control(
                f"{name} on loopback", False, f"{address}: readable and open to who reaches it"
            )
    yield Control(
        "TLS for HTTP", False, "Triton has none; put a proxy that has in front, on this machine"
    )


def _limits(now: Situation) -> Iterator[Control]:
    yield Control("image limits", True, "preprocess: max_bytes, max_pixels of its config.pbtxt")
    if HTTP_MAX_INPUT in now.known_options:
        yield Control("HTTP request size", True, f"--{HTTP_MAX_INPUT}, 64 MiB")
    else:
        yield Control(
            "HTTP request size",
            False,
            f"this Triton has no --{HTTP_MAX_INPUT}; limit it in the proxy",
        )
    yield Control(
        "gRPC request size",
        False,
        "Triton has no option and takes up to 2 GiB; limit it in a proxy",
    )


def _surroundings(security: Security, now: Situation) -> Iterator[Control]:
    is_hidden = hides_arguments(now.mounts)
    yield Control(
        "hidden admin key",
        is_hidden,
        "/proc is mounted with hidepid"
        if is_hidden
        else "every local user can read it in tritonserver's arguments; mount /proc with hidepid=2",
    )
    version = tuple(int(part) for part in now.triton_version.split(".")[:2])
    is_recent = version >= RECENT_TRITON
    yield Control(
        "Triton's fixes",
        is_recent,
        f"Triton {now.triton_version}"
        + ("" if is_recent else f" predates known security fixes; use {RECENT_IMAGE} or later"),
    )
    writable = first_writable(now.repository)
    yield Control(
        "read-only repository",
        writable is None,
        "the server cannot change it"
        if writable is None
        else f"the server could change {writable}; give it to another user or mount it read-only",
    )
    is_root = os.geteuid() == 0
    yield Control(
        "own user", not is_root, "runs as root; start it as another" if is_root else "not root"
    )
    assert security.tls is not None
    is_open = bool(security.tls.key.stat().st_mode & stat.S_IROTH)
    yield Control(
        "private TLS key",
        not is_open,
        f"every user can read {security.tls.key}; chmod 600 it" if is_open else "not everyone's",
    )


def hides_arguments(mounts: Path) -> bool:
    """Whether the kernel shows the arguments of a user's processes to that user and root alone.

    Args:
        mounts: the mounted file systems, such as `/proc/mounts`.
    """
    fields = (line.split() for line in mounts.read_text().splitlines())
    options = [field[3] for field in fields if field[1:3] == ["/proc", "proc"]]
    return bool(options and _HIDDEN.search(options[-1]))  # The last mount covers those before.


def first_writable(repository: Path) -> Path | None:
    """The first folder or file of a repository that this process could change; None for none."""
    for path in (repository, *sorted(repository.rglob("*"))):
        if os.access(path, os.W_OK, effective_ids=True):
            return path
    return None
