"""gRPC connections that survive idle hours, dead peers and restarts; admin keys for both protocols.

A client has one connection and uses it for every request, until an answer shows that it is not to
be trusted.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from .errors import InvalidRequestError
from .forks import start_grpc
from .tls import Tls

GRPC_ADMIN_HEADER = "triton-grpc-protocol-admin-key"
HTTP_ADMIN_HEADER = "admin-key"

CHANNEL_ARGUMENTS = [
    ("grpc.max_send_message_length", -1),  # the server sets the limits
    ("grpc.max_receive_message_length", -1),
    # Triton, as gRPC servers do, ends a connection (GOAWAY, too_many_pings) after the third ping
    # that comes within 5 minutes of the last one without data, or, where no request is open,
    # within 2 hours. So: a ping after 5 minutes and a margin, and only while a request is open.
    ("grpc.keepalive_time_ms", 330_000),
    ("grpc.keepalive_permit_without_calls", 0),
    # Also how long sent bytes may stay unacknowledged (TCP_USER_TIMEOUT): a peer that has
    # vanished is noticed after this long instead of the kernel's quarter of an hour.
    ("grpc.keepalive_timeout_ms", 10_000),
    # By default gRPC waits 1 s before it connects again and, later, up to 2 minutes: no retry
    # would find a server that has come back.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 5_000),
    # By default channels to one address share a connection: a forked child's new channel would
    # get its parent's, and a connection that is not to be trusted would go on in another client.
    ("grpc.use_local_subchannel_pool", 1),
]


def open_channel(
    module: ModuleType,
    url: str,
    tls: Tls | None,
    admin_key: str | None,
    asyncio_client: object | None = None,
) -> Any:
    """A client of `tritonclient.grpc` or `tritonclient.grpc.aio`.

    Args:
        module: one of those two.
        url: HOST:PORT.
        tls: None for a plain connection.
        admin_key: sent with every request; None for none.
        asyncio_client: whose channel it is, where `module` is that for asyncio.

    Raises:
        InvalidRequestError: a TLS file or the key cannot be used.
        ForkedError: gRPC cannot be used in this process.
    """
    start_grpc(asyncio_client)
    credentials = None if tls is None else tls.grpc_credentials()
    client = module.InferenceServerClient(url, creds=credentials, channel_args=CHANNEL_ARGUMENTS)
    if admin_key is not None:
        key = {GRPC_ADMIN_HEADER: admin_key}
        client.register_plugin(lambda request: request.headers.update(key))
    return client


class Channels:
    """The channel of one client, and those before it that calls have not left yet.

    Who gets another's answer gives its channel up; closing it then and there would cancel the calls
    of others in it, so that is left to the last of them. The caller keeps threads apart, and closes
    what it is given to close.

    Args:
        first: an open channel.
    """

    def __init__(self, first: Any) -> None:
        self._current: Any = first
        self._calls: dict[Any, int] = {}

    def enter(self, open_one: Callable[[], Any]) -> Any:
        """The channel for a new call, which has to `leave` it.

        Args:
            open_one: opens a channel; called for the first call after one is given up. It is not
                kept: who lets go of a client closes its channel then and there.
        """
        if self._current is None:
            self._current = open_one()
        self._calls[self._current] = self._calls.get(self._current, 0) + 1
        return self._current

    def give_up(self, channel: Any) -> None:
        """Have no new calls in this channel."""
        if self._current is channel:
            self._current = None

    def leave(self, channel: Any) -> list[Any]:
        """End a call; returns the channels to close now."""
        others = self._calls.pop(channel, 1) - 1
        if others:
            self._calls[channel] = others
        return [] if others or channel is self._current else [channel]

    def forget(self) -> list[Any]:
        """Have none any more; returns those that were open."""
        were_open = {channel: None for channel in (self._current, *self._calls) if channel}
        self._current = None
        self._calls = {}
        return list(were_open)


def check_admin_key(key: str | None) -> str | None:
    """The key, if it fits into a header.

    Raises:
        InvalidRequestError: it does not. The message does not repeat it.
    """
    if key is not None and not (key and key.isascii() and key.isprintable() and key == key.strip()):
        raise InvalidRequestError(
            "the admin key must be one line of ASCII characters, without spaces around it"
        )
    return key
