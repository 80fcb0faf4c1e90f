"""TLS on the gRPC port: the files, checked against each other before a server is started.

A wrong file would otherwise show as a server that is never ready, or as clients that are refused
for no reason they are told. So the handshake that clients will make is made here first, in memory.
"""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from client import Tls

from .access import Access
from .errors import ServerUsageError
from .ports import ANY_HOST

HOW_TO_MAKE = (
    "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 30 "
    "-subj /CN=localhost -addext subjectAltName=DNS:localhost,IP:127.0.0.1 "
    "-keyout tls.key -out tls.crt"
)


@dataclass(frozen=True)
class ServingTls:
    """The files of the gRPC port's TLS, all PEM.

    Attributes:
        certificate: the server's certificate, with its intermediate ones after it.
        key: its private key, without a password.
        client_ca: clients must show a certificate of this authority; None asks for none.
        own_certificate: shown by this program's own calls where `client_ca` asks for one; the
            server's certificate if not given.
        own_key: private key of `own_certificate`.
    """

    certificate: Path
    key: Path
    client_ca: Path | None = None
    own_certificate: Path | None = None
    own_key: Path | None = None

    def arguments(self) -> list[str]:
        """Tritonserver's arguments, with absolute paths: it starts in another folder."""
        arguments = [
            "--grpc-use-ssl=true",
            f"--grpc-server-cert={self.certificate.absolute()}",
            f"--grpc-server-key={self.key.absolute()}",
        ]
        if self.client_ca is not None:
            arguments += ["--grpc-use-ssl-mutual=true"]
            arguments += [f"--grpc-root-cert={self.client_ca.absolute()}"]
        return arguments

    @classmethod
    def of_options(
        cls,
        certificate: Path | None,
        key: Path | None,
        client_ca: Path | None,
        own_certificate: Path | None,
        own_key: Path | None,
    ) -> ServingTls | None:
        """What the command line's options mean; None where the port is in the clear.

        Raises:
            ServerUsageError: options that only make sense together.
        """
        for flag, cert, secret in (
            ("tls", certificate, key),
            ("tls-own", own_certificate, own_key),
        ):
            if (cert is None) != (secret is None):
                given, missing = ("cert", "key") if secret is None else ("key", "cert")
                raise ServerUsageError(f"--{flag}-{given} needs --{flag}-{missing}")
        if own_certificate is not None and client_ca is None:
            raise ServerUsageError("--tls-own-cert is for --tls-client-ca; give both or neither")
        if certificate is not None and key is not None:
            return cls(certificate, key, client_ca, own_certificate, own_key)
        if client_ca is not None:
            raise ServerUsageError("--tls-client-ca needs --tls-cert and --tls-key")
        return None

    def access(self, url: str, headers: Mapping[str, str]) -> Access:
        """Check the files, and keep what our own calls need of them.

        Our calls trust this one certificate and nothing else. They keep what the files hold now,
        which is what the server reads at its start: files renewed later change nothing for either.

        Args:
            url: `host:port`.
            headers: what calls of restricted APIs carry.

        Raises:
            ServerUsageError: a file is missing or not PEM, the key is not the certificate's, the
                certificate is out of date, or `client_ca` does not accept our own.
        """
        chain = secret = None
        if self.client_ca is not None:
            chain, secret = self.certificate, self.key
            if self.own_certificate is not None and self.own_key is not None:
                chain, secret = self.own_certificate, self.own_key
        name = _name_of(self._handshake(chain, secret))
        if name is None:
            raise ServerUsageError(
                f"the certificate {self.certificate} holds no host name, so no client can check "
                f"it; make one with a subjectAltName, such as {HOW_TO_MAKE}"
            )
        credentials = Tls(self.certificate, chain, secret).grpc_credentials()
        return Access(url, credentials, name, headers, is_ours=True)

    def _handshake(self, chain: Path | None, secret: Path | None) -> dict[str, Any]:
        """Let a client and a server with these files meet; returns the server's certificate."""
        server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        _load_pair(server, self.certificate, self.key)
        client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        client.check_hostname = False  # Which name to check is what this is to find out.
        client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # Trusts a certificate, not its CA.
        client.load_verify_locations(self.certificate)
        if self.client_ca is not None:
            server.verify_mode = ssl.CERT_REQUIRED
            _require_readable(self.client_ca)
            try:
                server.load_verify_locations(self.client_ca)
            except ssl.SSLError as error:
                raise ServerUsageError(f"{self.client_ca} is not a PEM certificate") from error
        if chain is not None and secret is not None:
            _load_pair(client, chain, secret)
        to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
        asking = client.wrap_bio(to_client, to_server)
        answering = server.wrap_bio(to_server, to_client, server_side=True)
        problems = {
            asking: f"the certificate {self.certificate} is not valid",
            answering: f"{self.client_ca} does not accept the certificate of our own checks, "
            f"{chain}; give --tls-own-cert and --tls-own-key",
        }
        for side in (asking, answering) * 4:  # TLS 1.3 needs two turns, TLS 1.2 three.
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLError as error:
                reason = getattr(error, "verify_message", "") or error.reason or str(error)
                raise ServerUsageError(f"{problems[side]} ({reason})") from error
        return dict(asking.getpeercert() or {})


def _load_pair(context: ssl.SSLContext, certificate: Path, key: Path) -> None:
    _require_readable(certificate)
    _require_readable(key)
    try:
        # A password would be asked for at the terminal.
        context.load_cert_chain(certificate, key, password="")
    except ssl.SSLError as error:
        problem = f"{certificate} and {key} are not a PEM certificate and its unencrypted key"
        if error.reason == "KEY_VALUES_MISMATCH":
            problem = f"{key} is not the private key of the certificate {certificate}"
        raise ServerUsageError(f"{problem}; a pair for tests: {HOW_TO_MAKE}") from error


def _require_readable(path: Path) -> None:
    try:
        path.open("rb").close()
    except OSError as error:
        raise ServerUsageError(f"the TLS file {path} cannot be read ({error.strerror})") from error


def _name_of(certificate: dict[str, Any]) -> str | None:
    """A name that the certificate is good for: of a host, else an address, else its common one."""
    names = list(certificate.get("subjectAltName", ()))
    names += [entry for group in certificate.get("subject", ()) for entry in group]
    for wanted in ("DNS", "IP Address", "commonName"):
        for kind, value in names:
            if kind == wanted:
                return str(value).replace("*", ANY_HOST, 1)
    return None
