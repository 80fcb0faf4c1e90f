"""Encrypted connections: whom to trust, and who we are."""

from __future__ import annotations

import socket
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from .errors import InvalidRequestError

LOOK_S = 3.0  # for a handshake that is to tell why one failed
_VERDICT_S = 1.0  # for what the server makes of our certificate after it
# OpenSSL's codes (X509_V_ERR_*); the standard library has no names for them.
_OTHER_NAME = (62, 64)  # HOSTNAME_MISMATCH, IP_ADDRESS_MISMATCH
_NOT_YET_VALID, _EXPIRED, _SELF_SIGNED = 9, 10, 18
_UNKNOWN_AUTHORITY = (2, 19, 20, 21)  # no issuer, or a root that is not ours
_ABOUT_OURS = ("certificate", "unknown ca", "eof")  # in alerts; TLS 1.2 servers may just hang up


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

    def why_refused(self, url: str, timeout_s: float = LOOK_S) -> str | None:
        """Why no encrypted connection to a server comes about, by a handshake with it.

        For after a failure: gRPC tells a certificate of another name and a missing client
        certificate from nothing.

        Args:
            url: HOST:PORT.
            timeout_s: for each of two connections at most, in seconds.

        Returns:
            One line that says what to do; None where nothing is wrong with the handshake, or no
            server is there.
        """
        host = url.rpartition(":")[0].strip("[]")
        context = self.http_context()
        try:
            return self._look(context, url, timeout_s)
        except ssl.SSLCertVerificationError as error:
            if error.verify_code not in _OTHER_NAME:
                return self._distrusted(url, error)
        except (OSError, ValueError):
            return None
        context.check_hostname = False  # its names are told only of a certificate that is trusted
        names: list[str] = []
        try:
            self._look(context, url, timeout_s, names)
        except ssl.SSLCertVerificationError as error:
            return self._distrusted(url, error)
        except (OSError, ValueError):
            pass
        return (
            f"the certificate of the server at {url} is for {', '.join(names) or 'no host'}, not "
            f"for {host}; connect by a name that it holds, or make a certificate for {host}"
        )

    def _look(
        self,
        context: ssl.SSLContext,
        url: str,
        timeout_s: float,
        names: list[str] | None = None,
    ) -> str | None:
        """Shake hands and wait for what the server makes of our certificate.

        Args:
            context: of the handshake.
            url: HOST:PORT.
            timeout_s: to connect, and for each word of the server's.
            names: takes the names of the server's certificate, which then is all that is asked.
        """
        host, _, port = url.rpartition(":")
        host = host.strip("[]")
        context.set_alpn_protocols(["h2", "http/1.1"])  # a gRPC server hangs up without
        with socket.create_connection((host, int(port)), timeout_s) as plain:
            try:
                with context.wrap_socket(plain, server_hostname=host) as held:
                    if names is not None:
                        names += _names(held.getpeercert())
                        return None
                    # A gRPC server speaks first. With TLS 1.3 our certificate is looked at after
                    # the handshake has ended on this side.
                    held.settimeout(min(timeout_s, _VERDICT_S))
                    if not held.recv(1):
                        return self._ended(url, "")
            except TimeoutError:  # as good as accepted: an HTTP server waits for a request
                return None
            except ssl.SSLCertVerificationError:
                raise
            except ssl.SSLError as error:
                return self._ended(url, (error.reason or "").replace("_", " ").lower())
            except ConnectionError:
                return self._ended(url, "")
        return None

    def _ended(self, url: str, reason: str) -> str:
        said = f" ({reason})" if reason else ""
        if reason == "wrong version number":
            return f"what answers at {url} does not speak TLS{said}; connect without it"
        about_ours = not reason or any(word in reason for word in _ABOUT_OURS)
        if about_ours and self.cert is not None:
            return (
                f"the server at {url} does not accept our certificate {self.cert}{said}; it must "
                "be signed by the authority that the server trusts, and valid today"
            )
        if about_ours:
            return (
                f"the server at {url} ended the TLS handshake{said}, as one does that wants a "
                "client certificate; give one (--tls-cert and --tls-key)"
            )
        return f"no TLS connection to {url}{said}"

    def _distrusted(self, url: str, error: ssl.SSLCertVerificationError) -> str:
        its = f"the certificate of the server at {url}"
        ours = "those that this machine trusts" if self.ca is None else f"those in {self.ca}"
        if error.verify_code == _EXPIRED:
            return f"{its}, or of who signed it, has expired; renew it, or set the clock here right"
        if error.verify_code == _NOT_YET_VALID:
            return f"{its}, or of who signed it, is not valid yet; set the clocks right, or wait"
        if error.verify_code == _SELF_SIGNED:
            return (
                f"{its} is self-signed and not among {ours}; trust that very certificate "
                "(--tls-ca), or none"
            )
        if error.verify_code in _UNKNOWN_AUTHORITY:
            return (
                f"{its} is signed by an authority that is not among {ours}; trust the certificate "
                "of that authority (--tls-ca), or none"
            )
        return f"{its} cannot be trusted: {error.verify_message}"


def wants_tls(url: str, timeout_s: float = LOOK_S) -> str | None:
    """One line where a server that hung up on a plain connection speaks TLS; else None."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # nothing is sent over it
    host, _, port = url.rpartition(":")
    try:
        with (
            socket.create_connection((host.strip("[]"), int(port)), timeout_s) as plain,
            context.wrap_socket(plain),
        ):
            return (
                f"the server at {url} wants TLS; give the certificate of who signed its own "
                "(--tls-ca)"
            )
    except (OSError, ValueError):
        return None


def _names(certificate: Any) -> list[str]:
    """Hosts that a certificate is for; where it lists none, its common name."""
    listed = certificate.get("subjectAltName", ())
    hosts = [str(name) for kind, name in listed if kind in ("DNS", "IP Address")]
    subject = [entry for group in certificate.get("subject", ()) for entry in group]
    return hosts or [str(name) for kind, name in subject if kind == "commonName"]
