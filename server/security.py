"""What of tritonserver is open to whom: the options, what they require, the arguments they become.

Nothing here is on unless asked for, except that the models cannot be changed while it serves.
"""

from __future__ import annotations

import re
import secrets
import subprocess
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from .access import Access
from .admin_key import HOW_TO_MAKE, KEY_NAME, AdminKey
from .errors import ServerUsageError
from .ports import LOOPBACK, Addresses, is_loopback
from .serving_tls import HOW_TO_MAKE as HOW_TO_MAKE_TLS
from .serving_tls import ServingTls

# Of these, `logging` and `trace` can make the server write requests' content to any file it may.
ADMIN_APIS = ("model-repository", "trace", "logging")
SHARED_MEMORY = "shared-memory"
# The traffic of everybody. Open outside production, where perf and people look at it.
STATISTICS = "statistics"
# A key that no client library sends, as a header and a gRPC call hold no line break: so nothing is
# lost where tritonserver's arguments are read. And one that a client of another make cannot guess.
_SWITCHED_OFF = "switched-off", f"switched\r\n{secrets.token_hex(32)}"
_HTTP_MAX_BYTES = 64 * 2**20
_HELP_TIMEOUT_S = 60.0
HTTP_MAX_INPUT = "http-max-input-size"
CLIENT_SHARED_MEMORY = "allow-client-shm"
# Front ends beside HTTP and gRPC that the restrictions do not cover; the second one opens by itself
# in an environment with AIP_MODE=PREDICTION.
OTHER_FRONT_ENDS = ("allow-sagemaker", "allow-vertex-ai")


@dataclass(frozen=True)
class Security:
    """Who may do what to the server.

    Attributes:
        production: turn on everything below that Triton has (`arguments`), and refuse to start
            without the files that it takes.
        tls: encrypts gRPC, and with a client authority asks clients who they are.
        admin_key: requests to the administration APIs must carry it.
        allow_reload: models can be loaded and unloaded while the server runs.
        http_host: address for HTTP, which has no TLS; if not given the loopback address in
            production, else the server's.
        metrics_host: address for the metrics, likewise.

    Raises:
        ServerUsageError: `production` without TLS or a key.
    """

    production: bool = False
    tls: ServingTls | None = None
    admin_key: AdminKey | None = None
    allow_reload: bool = False
    http_host: str | None = None
    metrics_host: str | None = None

    def __post_init__(self) -> None:
        if self.production and self.tls is None:
            raise ServerUsageError(
                "--production serves gRPC over TLS only; give --tls-cert and --tls-key, for a "
                f"test made with: {HOW_TO_MAKE_TLS}"
            )
        if self.production and self.admin_key is None:
            raise ServerUsageError(
                "--production restricts the administration APIs to those who hold a key; give "
                f"--admin-key-file, made with: {HOW_TO_MAKE}"
            )

    def addresses(self, host: str) -> Addresses:
        """The addresses to bind when the server's is `host`.

        Raises:
            ServerUsageError: other machines could load models, which is to run code, without a key.
        """
        plain = host if is_loopback(host) or not self.production else LOOPBACK
        addresses = Addresses(
            http=plain if self.http_host is None else self.http_host,
            grpc=host,
            metrics=plain if self.metrics_host is None else self.metrics_host,
        )
        if self.allow_reload and self.admin_key is None and addresses.exposed:
            raise ServerUsageError(
                f"--allow-reload on {addresses.exposed[0]} would let everyone who reaches it load "
                f"models, and so run code; give --admin-key-file, made with: {HOW_TO_MAKE}"
            )
        return addresses

    def access(self, url: str) -> Access:
        """Check the files of TLS, and keep what our own calls need of them and of the key.

        Args:
            url: `host:port`.

        Raises:
            ServerUsageError: as `ServingTls.access`.
        """
        headers = {} if self.admin_key is None else self.admin_key.grpc_headers
        if self.tls is None:
            return Access(url, headers=headers, is_ours=True)
        return self.tls.access(url, headers)

    def arguments(self, known: Collection[str] = ()) -> list[str]:
        """Tritonserver's arguments.

        Args:
            known: names of the options that this tritonserver has, for those not all have.
        """
        arguments = ["--model-control-mode=none"]
        if self.allow_reload:
            arguments = ["--model-control-mode=explicit", "--load-model=*"]
        if self.tls is not None:
            arguments += self.tls.arguments()
        if self.admin_key is not None:
            open_to_key = (*ADMIN_APIS, STATISTICS if self.production else SHARED_MEMORY)
            arguments += _restricted(open_to_key, KEY_NAME, self.admin_key.value)
        if self.production:
            # Triton has no switch for it before --allow-client-shm.
            arguments += _restricted((SHARED_MEMORY,), *_SWITCHED_OFF)
            arguments += ["--strict-readiness=true", "--exit-on-error=true", "--log-verbose=0"]
            arguments += ["--trace-config=level=OFF"]
            switches = dict.fromkeys((*OTHER_FRONT_ENDS, CLIENT_SHARED_MEMORY), "false")
            switches[HTTP_MAX_INPUT] = str(_HTTP_MAX_BYTES)
            arguments += [f"--{name}={value}" for name, value in switches.items() if name in known]
        return arguments


def exposure_warning(security: Security, addresses: Addresses) -> str | None:
    """One line about a server that other machines reach without `--production`, else None."""
    if security.production or not addresses.exposed:
        return None
    return (
        f"{' and '.join(addresses.exposed)} can be reached from other machines, without the "
        "protection of --production (see SECURITY.md)"
    )


def _restricted(apis: Collection[str], name: str, value: str) -> list[str]:
    setting = f"{','.join(apis)}:{name}={value}"
    return [f"--grpc-restricted-protocol={setting}", f"--http-restricted-api={setting}"]


def known_options(binary: Path, environment: Mapping[str, str]) -> frozenset[str]:
    """Names of the options in a tritonserver's `--help`, without dashes; none if it does not tell.

    Options differ between releases and builds.

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
            timeout=_HELP_TIMEOUT_S,
        )
    except (OSError, subprocess.TimeoutExpired):
        return frozenset()
    return frozenset(re.findall(r"^\s*--([a-z0-9-]+)", done.stdout + done.stderr, re.M))
