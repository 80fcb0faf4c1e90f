"""Addresses and ports for a server: check the ports asked for, or pick free ones."""

from __future__ import annotations

import ipaddress
import random
import socket
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from .errors import ServerUsageError

LOOPBACK = "127.0.0.1"
ANY_HOST = "check"  # in place of a certificate's asterisk, for our own calls
_EPHEMERAL_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_LOWEST_PORT = 20000
_ATTEMPTS = 200


@dataclass(frozen=True)
class Ports:
    """The three ports that a server listens on."""

    http: int = 8000
    grpc: int = 8001
    metrics: int = 8002

    @property
    def all(self) -> tuple[int, int, int]:
        """The three of them."""
        return self.http, self.grpc, self.metrics


@dataclass(frozen=True)
class Addresses:
    """The addresses to bind, one for each port."""

    http: str = LOOPBACK
    grpc: str = LOOPBACK
    metrics: str = LOOPBACK

    @property
    def exposed(self) -> list[str]:
        """Those that other machines may reach, each once."""
        all_three = dict.fromkeys((self.http, self.grpc, self.metrics))
        return [address for address in all_three if not is_loopback(address)]


def is_loopback(address: str) -> bool:
    """Whether only this machine reaches an address; a name other than localhost counts as not."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


def is_wildcard(address: str) -> bool:
    """Whether it stands for every address of this machine: one to bind, not one to call."""
    try:
        return ipaddress.ip_address(address).is_unspecified
    except ValueError:
        return False


def url(address: str, port: int) -> str:
    """`host:port` to call, from here, a server that binds this address."""
    host = address
    if is_wildcard(address):
        host = "::1" if ":" in address else LOOPBACK
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def public_url(address: str, port: int) -> str:
    """`host:port` to call from another machine, as far as one can know here.

    Of a wildcard address the one that this machine has on its way out; loopback where it has none.
    """
    ways = [(socket.AF_INET6, "2001:db8::1")] if ":" in address else []
    for family, elsewhere in [*ways, (socket.AF_INET, "192.0.2.1")] if is_wildcard(address) else ():
        with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as way:
            way.connect((elsewhere, 9))  # of addresses for examples; UDP sends nothing for that
            return url(way.getsockname()[0], port)
    return url(address, port)


def public_urls(addresses: Addresses, ports: Ports, name: str | None) -> tuple[str, str, str]:
    """Where to call HTTP, gRPC and the metrics, for whom the server is open to.

    Args:
        addresses: that it binds.
        ports: that it listens on.
        name: that its certificate holds; None without TLS. By another address than one that the
            certificate is for, a client would not trust it.
    """
    grpc = public_url(addresses.grpc, ports.grpc)
    if name and is_wildcard(addresses.grpc) and not name.startswith(f"{ANY_HOST}."):
        grpc = url(name, ports.grpc)
    metrics = f"http://{public_url(addresses.metrics, ports.metrics)}/metrics"
    return public_url(addresses.http, ports.http), grpc, metrics


def check_ports(addresses: Addresses, ports: Ports) -> None:
    """Refuse ports that cannot be bound, before a server is started for nothing.

    Raises:
        ServerUsageError: naming the port and what is wrong with it.
    """
    named = dict(zip(("HTTP", "gRPC", "metrics"), ports.all, strict=True))
    hosts = (addresses.http, addresses.grpc, addresses.metrics)
    for name, port in named.items():
        if not 0 < port < 65536:
            raise ServerUsageError(f"{name} port {port} is not between 1 and 65535")
    if len(set(named.values())) < len(named):
        listed = ", ".join(f"{name} {port}" for name, port in named.items())
        raise ServerUsageError(f"the three ports must differ: {listed}")
    with ExitStack() as held:
        for host, (name, port) in zip(hosts, named.items(), strict=True):
            try:
                held.enter_context(_bound(host, port))
            except OSError as error:
                flag = f"--{name.lower()}-port"
                raise ServerUsageError(
                    f"{name} port {port} on {host} cannot be used ({error.strerror or error}); "
                    f"give another {flag} or --free-ports"
                ) from error


def pick_free_ports(host: str) -> Ports:
    """Pick three ports that are free now.

    They lie below the range that the kernel hands out to outgoing connections, so that none of
    those takes one while the server loads its models. Another server may still be quicker: start
    again with new ones then.

    Raises:
        ServerUsageError: none can be bound on this host.
    """
    highest = max(_first_ephemeral_port() - 1, _LOWEST_PORT + 1000)
    with ExitStack() as held:
        ports: set[int] = set()  # Binding one again would work as long as nobody listens.
        reason = "all taken"
        for _ in range(_ATTEMPTS):
            port = random.randint(_LOWEST_PORT, highest)
            try:
                if port not in ports:
                    held.enter_context(_bound(host, port))
                    ports.add(port)
            except OSError as error:
                reason = str(error.strerror)
            if len(ports) == 3:
                return Ports(*ports)
    raise ServerUsageError(f"no free port on {host} ({reason}); give --host an address of yours")


def _bound(host: str, port: int) -> socket.socket:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, kind, protocol, _, address = found[0]
    bound = socket.socket(family, kind, protocol)
    try:
        # As Triton binds: a closed connection in TIME_WAIT is no obstacle.
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError:
        bound.close()
        raise
    return bound


def _first_ephemeral_port() -> int:
    try:
        return int(_EPHEMERAL_RANGE.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return 32768  # Linux's default.
