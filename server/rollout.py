"""Let a running server load what its repository says now, without dropping a request.

`export repository --add-version` has put a version of the router beside the one that answers; here
the server loads it, and with `switch_to` lets it answer: forward, or back. Triton keeps the old
models until the new ones are ready, and requests that run end where they began.

The order matters. The router first: a version that does not load is refused while everything else
stays. But if the router no longer has the version that the server's ensemble names, the ensemble
would lose its footing; then the ensemble first, with which Triton loads what it is made of.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from routing import ManifestError, manifest
from routing.versions import VersionError, Versions, switch

from .channel import PLAIN, Channel
from .errors import ServerError, ServerUsageError
from .readiness import ENTRY_MODEL
from .triton_log import first_line

ROUTER = "router"
_QUESTION_TIMEOUT_S = 5.0
_POLL_S = 0.1


class RolloutError(ServerError):
    """The server did not load it; it goes on with what it had."""


@dataclass(frozen=True)
class Access:
    """How to reach the server's gRPC port.

    Attributes:
        url: `host:port`.
        channel: how to connect there.
        headers: what calls of restricted APIs carry.
        timeout_s: seconds to wait for models to load.
    """

    url: str
    channel: Channel = PLAIN
    headers: Mapping[str, str] = field(default_factory=dict)
    timeout_s: float = 120.0


def rollout(repository: Path, access: Access, switch_to: int | None = None) -> Versions:
    """Make the server serve what the repository says, having changed that first if asked to.

    Where the server does not load it, the repository says what it said before.

    Args:
        repository: the assembled repository that the server serves.
        access: how to reach the server, which must have been started with `--allow-reload`.
        switch_to: the version of the router that is to answer; None changes nothing on disk.

    Returns:
        What the server serves now.

    Raises:
        ServerUsageError: no such version, a repository that is not as it was assembled, or no
            server there.
        RolloutError: the server did not load it.
    """
    with access.channel.open(access.url) as client:
        server = _Server(client, access)
        answering = server.answering()
        try:
            manifest.verify(repository)
            before = Versions.load(repository)
            wanted = before if switch_to is None else switch(repository, switch_to)
        except (ManifestError, VersionError) as error:
            raise ServerUsageError(str(error)) from error
        except OSError as error:
            raise ServerUsageError(f"{repository} cannot be changed: {error}") from error
        try:
            server.load(wanted, answering)
        except RolloutError as refusal:
            if wanted != before:
                _change_back(repository, before, refusal)
            raise
    return wanted


def _change_back(repository: Path, before: Versions, refusal: RolloutError) -> None:
    try:
        manifest.update(repository, before.configs(repository))
    except (ManifestError, OSError) as error:
        raise RolloutError(
            f"{refusal}; and the repository still says otherwise, which matters when the server "
            f"starts again ({error}): run python -m export versions --live {before.live}"
        ) from error


class _Server:
    """The running server."""

    def __init__(self, client: triton.InferenceServerClient, access: Access) -> None:
        self._client = client
        self._access = access

    def answering(self) -> int | None:
        """The router's version that the ensemble names; None while there is no ensemble."""
        try:
            config = self._client.get_model_config(
                ENTRY_MODEL,
                headers=dict(self._access.headers),
                client_timeout=_QUESTION_TIMEOUT_S,
            ).config
        except InferenceServerException as error:
            if error.status() == "StatusCode.NOT_FOUND":
                return None
            raise ServerUsageError(
                f"no answer from a server at {self._access.url} ({first_line(error.message())}); "
                "start it with python -m server --allow-reload, or give its --url"
            ) from error
        steps = config.ensemble_scheduling.step
        return next((int(step.model_version) for step in steps if step.model_name == ROUTER), None)

    def load(self, wanted: Versions, answering: int | None) -> None:
        """Load both models in the order that the module's text gives, and wait until it shows."""
        order = (ROUTER, ENTRY_MODEL)
        if answering not in wanted.served:
            order = (ENTRY_MODEL, ROUTER)
        for model in order:
            try:
                self._client.load_model(
                    model,
                    headers=dict(self._access.headers),
                    client_timeout=self._access.timeout_s,
                )
            except InferenceServerException as error:
                raise self._refusal(model, answering, error) from error
        deadline = time.monotonic() + self._access.timeout_s
        while not self._serves(wanted):
            if time.monotonic() > deadline:
                raise RolloutError(
                    f"the server at {self._access.url} loaded its models, but they are not those "
                    "of this repository; give the --repository that it serves"
                )
            time.sleep(_POLL_S)

    def _serves(self, wanted: Versions) -> bool:
        try:
            ready = all(
                self._client.is_model_ready(
                    ROUTER, str(version), client_timeout=_QUESTION_TIMEOUT_S
                )
                for version in wanted.served
            )
        except InferenceServerException:
            return False
        return ready and self.answering() == wanted.live

    def _refusal(
        self, model: str, answering: int | None, error: InferenceServerException
    ) -> RolloutError:
        reason = first_line(error.message())
        goes_on = "" if answering is None else f"; router/{answering} goes on answering"
        if "explicit model load" in reason:
            return RolloutError(
                f"the server at {self._access.url} loads no models while it serves{goes_on}; start "
                "it with --allow-reload, or restart it to serve what the repository says"
            )
        if "restricted" in reason:
            return RolloutError(
                f"the server at {self._access.url} wants the admin key for this{goes_on}; give "
                "--admin-key-file"
            )
        return RolloutError(f"{model} was not loaded{goes_on}: {reason}")
