"""Which connections go through a proxy that the environment names.

None to this machine. Others as curl's (https://everything.curl.dev/usingcurl/proxies/env.html),
over gRPC as gRPC's own, with what curl knows besides.
"""

from __future__ import annotations

import base64
import os
from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from urllib.parse import unquote, urlsplit

from .errors import InvalidRequestError

_DEFAULT_PORT = 1080  # curl's
# gRPC's own (https://github.com/grpc/grpc/blob/master/doc/environment_variables.md).
_GRPC_READS = ("grpc_proxy", "https_proxy", "http_proxy")
GrpcOptions = list[tuple[str, int | str]]


@dataclass(frozen=True)
class Proxy:
    """An HTTP proxy: its address, and the header that it is shown, empty where it wants none."""

    host: str
    port: int
    authorization: str = ""


def is_here(url: str) -> bool:
    """Whether HOST:PORT, or a HOST, is this machine's own by its words alone, asking nobody."""
    host = _host(url)
    try:
        address = ip_address(host)
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
    address = getattr(address, "ipv4_mapped", None) or address
    return address.is_loopback or address.is_unspecified  # Which connects to loopback.


def proxy_of(url: str, scheme: str) -> Proxy | None:
    """The proxy for HOST:PORT, or None.

    Args:
        url: HOST:PORT.
        scheme: `http` or `https`.

    Raises:
        InvalidRequestError: it is of a kind that is not spoken here.
    """
    named = _named(url, scheme)
    return None if named is None else _spoken(url, *named)


def grpc_options(url: str, scheme: str = "http") -> GrpcOptions:
    """What a gRPC channel to HOST:PORT is to be told about proxies.

    Raises:
        InvalidRequestError: as `proxy_of`.
    """
    host = _host(url)
    if is_here(url) or _is_exempt(host) or _is_exempt(host, "no_grpc_proxy"):
        return [("grpc.enable_http_proxy", 0)]
    own = ((variable, os.environ.get(variable)) for variable in _GRPC_READS)
    named = next(((variable, value) for variable, value in own if value), _named(url, scheme))
    if named is None:
        return []
    # Of what it cannot read itself gRPC only logs a line, and goes without a proxy.
    _spoken(url, *named)
    return [("grpc.http_proxy", _with_scheme(named[1]))]


def _spoken(url: str, variable: str, value: str) -> Proxy:
    """The proxy for HOST:PORT that a variable names, if it is of a kind that is spoken here."""
    try:
        parts = urlsplit(_with_scheme(value))
        host, port = parts.hostname, parts.port or _DEFAULT_PORT
    except ValueError:  # brackets that do not close, a port that is no number
        host = None
    if not host or parts.scheme != "http":
        raise InvalidRequestError(
            f"{variable} names a proxy that is not http://HOST:PORT; for {url} name one that is, "
            f"or put {_host(url)} into no_proxy"
        )
    user = f"{unquote(parts.username or '')}:{unquote(parts.password or '')}"
    basic = base64.b64encode(user.encode()).decode()
    return Proxy(host, port, "" if parts.username is None else f"Basic {basic}")


def _with_scheme(value: str) -> str:
    return value if "://" in value else f"http://{value}"


def _named(url: str, scheme: str) -> tuple[str, str] | None:
    """The variable that names the proxy, and what it says."""
    if is_here(url) or _is_exempt(_host(url)):
        return None
    # In capitals it could be a header of a request to a CGI program, `Proxy`.
    variables = ["http_proxy"] if scheme == "http" else ["https_proxy", "HTTPS_PROXY"]
    for variable in (*variables, "all_proxy", "ALL_PROXY"):
        if os.environ.get(variable):
            return variable, os.environ[variable]
    return None


def _is_exempt(host: str, *variables: str) -> bool:
    names = variables or ("no_proxy", "NO_PROXY")
    said = next((value for name in names if (value := os.environ.get(name))), "")
    return any(_matches(host, each) for each in said.lower().replace(",", " ").split())


def _matches(host: str, exempt: str) -> bool:
    if exempt == "*":
        return True
    try:
        return ip_address(host) in ip_network(exempt.strip("[]"), strict=False)
    except ValueError:  # One of the two is a name.
        name = exempt.strip(".")
        return bool(name) and f".{host.rstrip('.')}".endswith(f".{name}")


def _host(url: str) -> str:
    """The host of HOST:PORT or of a HOST, in lower case and without brackets."""
    host = url.lower()
    if host.startswith("["):
        return host[1:].partition("]")[0].partition("%")[0]
    return host.partition(":")[0] if host.count(":") == 1 else host
