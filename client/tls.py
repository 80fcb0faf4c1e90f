"""Encrypted connections: whom to trust, and who we are."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc

from .errors import InvalidRequestError


@dataclass(frozen=True)
class Tls:
    """PEM files for TLS; with `cert` and `key` for mutual TLS.

    The server's certificate must name the host in the client's address.

    Attributes:
        ca: certificates that the server's is checked against; None for the well-known ones.
        cert: our certificate, followed by those that signed it.
        key: its private key, without a passphrase.

    Raises:
        InvalidRequestError: one of `cert` and `key` without the other.
    """

    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None

    def __post_init__(self) -> None:
        if (self.cert is None) != (self.key is None):
            given, missing = ("key", "cert") if self.cert is None else ("cert", "key")
            raise InvalidRequestError(
                f"TLS has a client {given} without a {missing}; give both or none"
            )

    def grpc_credentials(self) -> grpc.ChannelCredentials:
        """For a gRPC channel.

        Raises:
            InvalidRequestError: a file is unreadable or not what it should be.
        """
        self.http_context()  # gRPC would take anything, and fail at the first request
        return grpc.ssl_channel_credentials(
            *(path and path.read_bytes() for path in (self.ca, self.key, self.cert))
        )

    def http_context(self) -> ssl.SSLContext:
        """For HTTP connections.

        Raises:
            InvalidRequestError: as `grpc_credentials`.
        """
        try:
            for path in (self.ca, self.cert, self.key):
                if path is not None:
                    path.read_bytes()
        except OSError as error:
            raise InvalidRequestError(f"cannot read {path} for TLS: {error.strerror}") from None
        try:
            context = ssl.create_default_context(cafile=self.ca)
        except ssl.SSLError:
            raise InvalidRequestError(f"{self.ca} holds no certificate in PEM format") from None
        if self.cert is not None:
            try:
                # A passphrase of its own, or OpenSSL asks for one on the terminal.
                context.load_cert_chain(self.cert, self.key, password="")
            except ssl.SSLError as error:
                reason = f" ({error.reason.replace('_', ' ').lower()})" if error.reason else ""
                raise InvalidRequestError(
                    f"{self.cert} and {self.key} must be a certificate and its key in PEM format, "
                    f"without a passphrase{reason}"
                ) from None
        return context
