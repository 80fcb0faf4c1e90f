"""What `--production` turned on, and what it could not turn on and why."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Collection
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
    """One measure, whether it is in force, and how, or why not and what to do."""

    name: str
    is_on: bool
    detail: str


def controls(
    security: Security,
    repository: Path,
    addresses: Addresses,
    triton_version: str,
    known_options: Collection[str],
    mounts: Path = Path("/proc/mounts"),
) -> list[Control]:
    """List every measure of a server in production: those in force first.

    Args:
        security: its options.
        repository: the model repository.
        addresses: the addresses bound.
        triton_version: such as `2.51.0`.
        known_options: names of this tritonserver's options.
        mounts: the file systems that this process sees, as the kernel lists them.
    """
    tls = security.tls
    assert tls is not None
    closed = [f"--{name}=false" for name in OTHER_FRONT_ENDS if name in known_options]
    shut = CLIENT_SHARED_MEMORY in known_options and f"--{CLIENT_SHARED_MEMORY}=false"
    is_recent = tuple(int(part) for part in triton_version.split(".")[:2]) >= RECENT_TRITON
    writable = first_writable(repository)
    is_private = not tls.key.stat().st_mode & stat.S_IROTH
    # Name, what is said where it is on (else nothing), and what where it is not.
    rows: list[tuple[str, object, str]] = [
        ("gRPC over TLS", "plain connections are refused", ""),
        (
            "client certificates",
            tls.client_ca and f"issued by {tls.client_ca}",
            "every client that reaches gRPC may ask; --tls-client-ca",
        ),
        (
            "fixed models",
            not security.allow_reload and "none can be loaded or unloaded",
            "--allow-reload: the admin key's holder runs code",
        ),
        ("restricted APIs", "model-repository, trace, logging, statistics: admin key only", ""),
        ("shared memory", shut or "clients cannot register any (nobody has its key)", ""),
        ("other front ends", ", ".join(closed) or "not built in", ""),
        ("strict start", "a model that does not load ends the server", ""),
        ("quiet log", "no request content; tracing off", ""),
        *(
            (
                f"{name} on loopback",
                is_loopback(address) and address,
                f"{address}: readable and open to who reaches it",
            )
            for name, address in (("HTTP", addresses.http), ("metrics", addresses.metrics))
        ),
        ("TLS for HTTP", "", "Triton has none; put a proxy that has in front, on this machine"),
        ("image limits", "preprocess: max_bytes, max_pixels of its config.pbtxt", ""),
        (
            "HTTP request size",
            HTTP_MAX_INPUT in known_options and f"--{HTTP_MAX_INPUT}, 64 MiB",
            f"this Triton has no --{HTTP_MAX_INPUT}; limit it in the proxy",
        ),
        (
            "gRPC request size",
            "",
            "Triton has no option and takes up to 2 GiB; limit it in a proxy",
        ),
        (
            "hidden admin key",
            hides_arguments(mounts) and "/proc is mounted with hidepid",
            "every local user can read it in tritonserver's arguments; mount /proc with hidepid=2",
        ),
        (
            "Triton's fixes",
            is_recent and f"Triton {triton_version}",
            f"Triton {triton_version} predates known security fixes; use {RECENT_IMAGE} or later",
        ),
        (
            "read-only repository",
            writable is None and "the server cannot change it",
            f"the server could change {writable}; give it to another user or mount it read-only",
        ),
        ("own user", os.geteuid() != 0 and "not root", "runs as root; start it as another"),
        (
            "private TLS key",
            is_private and "not everyone's",
            f"every user can read {tls.key}; chmod 600 it",
        ),
    ]
    found = [Control(name, bool(on), str(on or off)) for name, on, off in rows]
    return sorted(found, key=lambda control: not control.is_on)


def hides_arguments(mounts: Path) -> bool:
    """Whether the kernel shows the arguments of a user's processes to that user and root alone."""
    fields = (line.split() for line in mounts.read_text().splitlines())
    options = [field[3] for field in fields if field[1:3] == ["/proc", "proc"]]
    return bool(options and _HIDDEN.search(options[-1]))  # The last mount covers those before.


def first_writable(repository: Path) -> Path | None:
    """The first folder or file of a repository that this process could change; None for none."""
    paths = (repository, *sorted(repository.rglob("*")))
    return next((path for path in paths if os.access(path, os.W_OK, effective_ids=True)), None)
