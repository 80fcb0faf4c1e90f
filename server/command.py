"""The command line that tritonserver is started with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .ports import Addresses, Ports

# Per Python model instance. Holds a batch of 8 images of 3x224x224 FP32 (4.6 MiB) without growing.
# An adaptive ViT on the stand-in backend has six; they start with 48 of the 64 MiB of /dev/shm that
# a container gets by default; larger batches grow beyond that (deploy/compose.yaml gives 1 GiB).
_SHM_BYTES = 8 * 2**20

# Told to stop, Triton waits this long for open HTTP connections, idle ones included; its default
# is 30 s, which looks like a hang.
_EXIT_TIMEOUT_S = 10


def triton_command(
    binary: Path,
    server_id: str,
    repository: Path,
    backends: Path,
    addresses: Addresses,
    ports: Ports,
    extra_args: Sequence[str] = (),
) -> list[str]:
    """Build the command.

    Triton's own strictness stays on: a model that does not load ends the server.

    Args:
        binary: the tritonserver.
        server_id: name that the server reports, and begins its shared-memory segments with.
        repository: the model repository.
        backends: the backend directory.
        addresses: addresses to bind; Triton's own default is every address.
        ports: the ports.
        extra_args: arguments that come last and so win.
    """
    command = [
        str(binary),
        f"--id={server_id}",
        f"--model-repository={repository}",
        f"--backend-directory={backends}",
    ]
    for name in ("http", "grpc", "metrics"):
        address, port = getattr(addresses, name), getattr(ports, name)
        command += [f"--{name}-address={address}", f"--{name}-port={port}"]
    command.append(f"--exit-timeout-secs={_EXIT_TIMEOUT_S}")
    for setting in (
        f"shm-region-prefix-name={server_id}_",
        f"shm-default-byte-size={_SHM_BYTES}",
        f"shm-growth-byte-size={_SHM_BYTES}",
    ):
        command.append(f"--backend-config=python,{setting}")
    return [*command, *extra_args]
