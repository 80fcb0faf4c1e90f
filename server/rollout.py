"""Let a running server load what its repository says now, without dropping a request.

`export repository --add-version` has put a version of the router beside the one that answers; here
the server lets it answer, or score as a shadow: forward, or back. Triton keeps the old models until
the new ones are ready, and requests that run end where they began.

The ensembles must never name a version that the router has not, on disk or in the server. So first
the router gets both versions, then one ensemble after the other names the other, then the router
keeps what is to stay. Where the router refuses to give other answers than calibrated, the ensembles
name the other version once that has found that it gives none. A version that does not load is
refused at the first step, while everything else stays. Only where the version that answers is no
longer on disk do the ensembles go first, with which Triton loads what they are made of.

Whatever goes wrong, an answer that does not come or Ctrl-C too: the server is asked what it serves.
If that is what was wanted, it is kept; else disk and server go the same way back; and where that
cannot be, the error says what the disk says, what the server says, and what makes them agree.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from bundle import manifest
from bundle.versions import (
    VersionError,
    Versions,
    is_careful,
    present,
    put,
    refuses_other_answers,
    switched,
)
from routing import ManifestError

from .access import ENTRY, ROUTER, TENSORS, Access
from .errors import ServerError, ServerUsageError
from .loading import LoadingServer, NoAnswerError, RefusalError, StepError
from .triton_log import first_line

# For a connection that was lost to come back.
_ASK_AGAIN_S = 15.0
_DISK_ERRORS = (ManifestError, VersionError, OSError)


class RolloutError(ServerError):
    """The server did not load it. One line: what went wrong, and what answers now."""


class RolloutInterruptedError(RolloutError):
    """Somebody interrupted it. One line: what answers now."""


def rollout(
    repository: Path, access: Access, switch_to: int | None = None, timeout_s: float = 120.0
) -> Versions:
    """Make the server serve what the repository says, having changed that first if asked to.

    Where the server does not load it, the repository says what it said before.

    Args:
        repository: the assembled repository that the server serves.
        access: how to reach the server, which must have been started with `--allow-reload`.
        switch_to: the version of the router that is to answer; None changes nothing on disk, but
            for versions that should not be loaded (see `bundle.versions`).
        timeout_s: seconds to wait for models to load, and for each comparison of answers.

    Returns:
        What the server serves now, and the repository says.

    Raises:
        ServerUsageError: no such version, a repository that is not as it was assembled or cannot be
            changed, or no server there. Nothing has changed.
        RolloutError: the server did not load it, or did not say so.
        RolloutInterruptedError: by Ctrl-C.
    """
    with access.open() as client:
        server = LoadingServer(client, access, timeout_s)
        try:
            answering = server.answering()
        except NoAnswerError as error:
            raise ServerUsageError(
                access.why_refused()
                or f"no answer from a server at {access.url} ({error}); start it with python -m "
                "server --allow-reload, or give its --url"
            ) from error
        try:
            manifest.verify(repository)
            before = Versions.load(repository)
            if switch_to is None:
                wanted = before.settled(is_careful(repository))
            else:
                wanted = switched(repository, switch_to)
        except _DISK_ERRORS as error:
            raise ServerUsageError(str(error)) from error
        change = _Change(repository, server, answering, before, wanted, switch_to is not None)
        try:
            change.make(wanted, answering)
        except BaseException as error:
            change.settle(error)
    return wanted


@dataclass
class _Change:
    """From what disk and server say to what they are to say.

    Attributes:
        answering: what the server's ensembles named before.
        before: what the repository said before.
        wanted: what both are to say.
        goes_back: whether the server is to serve again what it did where it fails. Not where the
            repository had been changed earlier: the server is to follow that.
    """

    repository: Path
    server: LoadingServer
    answering: Versions
    before: Versions
    wanted: Versions
    goes_back: bool

    def make(self, target: Versions, answering: Versions) -> None:
        """Take disk and server to a target, step by step, from what the ensembles name."""
        ensembles = [ENTRY] if target.tensors == 0 else [ENTRY, TENSORS]
        way, order = target, [*ensembles, ROUTER]
        if answering.named and answering.named <= set(present(self.repository)):
            way, order = target.beside(answering.named), [ROUTER, *ensembles]
        self._step(way, order, target.live)
        if way != target:
            self._step(target, [ROUTER], target.live)

    def _step(self, versions: Versions, order: list[str], live: int) -> None:
        put(self.repository, versions)
        for model in order:
            self.server.load(model)
            if refuses_other_answers(self.repository):
                self.server.wait_for_answers(live)
        self.server.wait_until(versions)

    def settle(self, error: BaseException) -> None:
        """After a failure: confirm what was wanted, or go back, and say where both stand."""
        try:
            self._settle(error)
        except KeyboardInterrupt:
            with suppress(Exception, KeyboardInterrupt):
                put(self.repository, self.before)
            raise RolloutInterruptedError(
                f"interrupted twice; the repository says {self._said_on_disk()}, and the server at "
                f"{self.server.url} was not asked what it serves; to make them agree, run "
                f"{self._command()}"
            ) from error

    def _settle(self, error: BaseException) -> None:
        seen = self.server.look(_ASK_AGAIN_S) if self.server.is_touched else None
        is_interrupted = isinstance(error, KeyboardInterrupt)
        kind = RolloutInterruptedError if is_interrupted else RolloutError
        if seen == self.wanted == self._on_disk() and self._answers(error):
            if is_interrupted:
                raise kind(f"interrupted; {seen.sentence}, as the repository says") from error
            return
        troubles = []
        if seen is not None and self.goes_back:
            trouble = _attempt(lambda: self.make(self.before, seen))
            troubles += [f"the way back failed: {trouble}"] if trouble else []
        if self._on_disk() != self.before:  # There was no way back, or it ended early.
            trouble = _attempt(lambda: put(self.repository, self.before))
            troubles += [f"the repository cannot be changed back: {trouble}"] if trouble else []
        what = f"{type(error).__name__}: {first_line(str(error))}"
        if isinstance(error, StepError):
            what = str(error)
        elif is_interrupted:
            what = "interrupted"
        elif isinstance(error, _DISK_ERRORS):
            what = f"the repository cannot be changed: {error}"
            if not self.server.is_touched and not troubles:
                raise ServerUsageError(f"{self.repository} cannot be changed: {error}") from error
        raise kind(self._outcome(what, troubles)) from error

    def _answers(self, error: BaseException) -> bool:
        """Whether the version that was wanted, and is loaded, does not refuse requests."""
        if isinstance(error, RefusalError):
            return False
        if not refuses_other_answers(self.repository):
            return True
        return not _attempt(lambda: self.server.wait_for_answers(self.wanted.live))

    def _outcome(self, failure: str, troubles: list[str]) -> str:
        """One line: what failed, and what disk and server say now."""
        on_disk, server = self._on_disk(), self.server
        seen = server.look(_ASK_AGAIN_S if server.is_touched else 0.0)
        live = (self.answering if seen is None else seen).live
        agree = seen is not None and seen == on_disk
        if seen is None and not server.is_touched:  # Without the admin key it does not say.
            agree = on_disk == self.before and live == self.before.live
        parts = [failure, *troubles]
        if not agree:
            silent = f"does not say what it serves ({server.silence})"
            says = silent if seen is None else f"says {_said(seen)}"
            parts.append(f"the repository says {self._said_on_disk()}")
            parts.append(f"but the server at {server.url} {says}")
            parts.append(f"to make them agree, run {self._command()}")
        elif live and live == self.answering.live and live != server.refusing:
            parts.append(f"router/{live} goes on answering")
        else:
            parts.append(f"the repository and the server say {self._said_on_disk()}")
        if agree and troubles:
            parts.append("the server may still be loading what it was told to")
            parts.append(f"look again with {self._command()}")
        return "; ".join(parts)

    def _on_disk(self) -> Versions | None:
        try:
            return Versions.load(self.repository)
        except VersionError:
            return None

    def _said_on_disk(self) -> str:
        on_disk = self._on_disk()
        return "nothing that can be read" if on_disk is None else _said(on_disk)

    def _command(self) -> str:
        """What makes disk and server agree."""
        command = f"python -m server rollout --repository {self.repository} --url {self.server.url}"
        if self._on_disk() != self.before:
            command += f" --to {self.before.live}"
        return command


def _said(versions: Versions) -> str:
    return versions.sentence if versions.live else "nothing answers"


def _attempt(step: Callable[[], None]) -> str:
    """Do it, and say why it could not be done; empty: it was."""
    try:
        step()
    except Exception as error:
        return first_line(str(error))
    return ""
