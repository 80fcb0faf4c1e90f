"""How this program's own calls reach the server's gRPC port: in the clear or over TLS."""

from __future__ import annotations

from dataclasses import dataclass

import grpc
import tritonclient.grpc as triton


@dataclass(frozen=True)
class Channel:
    """What a connection needs beyond the address.

    Attributes:
        credentials: of TLS; None connects in the clear.
        name: the name that the server's certificate must hold, in place of the address: the
            certificate is for the name that clients use, and we call the loopback address.
    """

    credentials: grpc.ChannelCredentials | None = None
    name: str | None = None

    def open(self, grpc_url: str) -> triton.InferenceServerClient:
        """Open a connection to `host:port`; the caller closes it."""
        if self.credentials is None:
            return triton.InferenceServerClient(grpc_url)
        override = [("grpc.ssl_target_name_override", self.name)] if self.name else None
        return triton.InferenceServerClient(grpc_url, creds=self.credentials, channel_args=override)


PLAIN = Channel()
