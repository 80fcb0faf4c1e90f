"""Watch one running server: its process, its model instances and its answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Protocol

from .canary import PARTS, Canaries, ModelState
from .canary_round import Round
from .errors import ServerStartError
from .launcher import TritonServer
from .readiness import ENTRY_MODEL
from .stubs import cpu_s, find_stubs

DEFAULT_INTERVAL_S = 2.0
DEFAULT_TIMEOUT_S = 5.0
# A reload's processes come and go for moments; an instance that died stays away.
_CONFIRM_S = 0.8

Key = tuple[str, str]  # model, version


class Watched(Protocol):
    """What a watch needs of a server; `launcher.TritonServer` has it."""

    def is_running(self) -> bool:
        """Whether its process is alive."""

    def wait(self) -> None:
        """Wait until it ends; raises why."""

    def process_ids(self) -> list[int]:
        """Ids of all its processes."""


class Watch:
    """Looks after one server from its start to its first failure."""

    def __init__(
        self,
        server: Watched,
        connect: Callable[[], Canaries],
        warn: Callable[[str], None],
        *,
        interval_s: float = DEFAULT_INTERVAL_S,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> None:
        """Say what to watch.

        Args:
            server: a server that is ready.
            connect: opens a connection to it, a new one for each round: a server that takes no
                more connections still answers on old ones.
            warn: called with a line about what is worth knowing but no failure.
            interval_s: seconds between the end of one round of canaries and the next.
            timeout_s: seconds a canary may take before the server's progress is looked at.
        """
        self._server = server
        self._connect = connect
        self._warn = warn
        self._interval_s = interval_s
        self._timeout_s = timeout_s
        self._canaries: Canaries | None = None
        self._round: Round | None = None
        self._next_round_at: float | None = None
        self._known: set[str] | None = None
        self._absent: set[str] = set()
        self._answered_at: dict[str, float] = {}
        self._process_ids: set[int] = set()
        self._with_processes: set[Key] = set()
        self._short: dict[Key, float] = {}

    def look(self, now: float) -> str:
        """Look once; to be called several times a second.

        Args:
            now: the time in seconds.

        Returns:
            What failed, in one line; an empty string if nothing did.
        """
        if not self._server.is_running():
            return self._why_it_ended()
        if self._round is None and (self._next_round_at is None or now >= self._next_round_at):
            self._begin_round(now)
        process_ids = set(self._server.process_ids())
        if self._process_ids - process_ids or self._short:
            failure = self._count_instances(now)
            if failure:
                return failure
        self._process_ids = process_ids
        return self._step(now)

    def close(self) -> None:
        """Close the connection."""
        if self._canaries is not None:
            self._canaries.close()
            self._canaries = None

    def _why_it_ended(self) -> str:
        try:
            self._server.wait()
        except ServerStartError as error:
            return str(error)
        return "tritonserver ended by itself"

    def _begin_round(self, now: float) -> None:
        self._canaries = self._connect()
        states = self._canaries.states()
        if states is not None:
            self._note_absent(states)
        present = (self._known or set()) - self._absent
        self._round = Round(
            self._canaries,
            present & {ENTRY_MODEL, *PARTS} if ENTRY_MODEL in (self._known or ()) else (),
            bool(self._absent),
            self._timeout_s,
            now,
            self._model_cpu_s,
            self._answered_at,
        )
        if states is not None:
            self._count_instances(now)  # What it finds is confirmed, and told, at a later look.

    def _note_absent(self, states: list[ModelState]) -> None:
        ready = {state.model for state in states if state.is_ready}
        if self._known is None:
            self._known = ready
        self._known |= ready
        for model in sorted(self._known - ready - self._absent):
            state = ", ".join(state.state for state in states if state.model == model)
            self._warn(f"{model} is not served any more ({state or 'gone'}); watching the others")
        for model in sorted(self._absent & ready):
            self._warn(f"{model} is served again")
        self._absent = self._known - ready

    def _step(self, now: float) -> str:
        if self._round is None or self._canaries is None:
            return ""
        verdict = self._round.step(now)
        if verdict is None:
            return ""
        failure = verdict.failure if not self._was_changed() else ""
        if verdict.warning:
            self._warn(verdict.warning)
        self._round = None
        self._next_round_at = now + self._interval_s
        self.close()
        return failure

    def _was_changed(self) -> bool:
        """Whether an operator took a model out, or put one back, since the round began."""
        states = self._canaries.states() if self._canaries is not None else None
        if states is None:
            return False
        ready = {state.model for state in states if state.is_ready}
        return ready != (self._known or set()) - self._absent

    def _count_instances(self, now: float) -> str:
        """Compare the processes of each model with the instances it should have.

        A canary would not do: of two instances one answers, and under load it answers most.
        """
        counted = self._missing_instances()
        if counted is None:
            return ""
        self._short = {key: self._short.get(key, now) for key in counted}
        for (model, version), (alive, wanted) in counted.items():
            if now - self._short[model, version] >= _CONFIRM_S:
                return (
                    f"{wanted - alive} of {wanted} instances of {model} (version {version}) ended; "
                    "Triton does not start them again"
                )
        return ""

    def _missing_instances(self) -> Mapping[Key, tuple[int, int]] | None:
        """Processes alive and wanted, of the models that have too few; None if it cannot tell."""
        canaries = self._canaries or self._connect()
        try:
            states = canaries.states()
            if states is None:
                return None
            alive = Counter(
                (stub.model, stub.version) for stub in find_stubs(self._server.process_ids())
            )
            self._with_processes |= alive.keys()
            missing = {}
            for state in states:
                key = state.model, state.version
                if not state.is_ready or key not in self._with_processes:
                    continue
                wanted = canaries.instances(*key)
                if wanted is not None and alive[key] < wanted:
                    missing[key] = (alive[key], wanted)
            return missing
        finally:
            if canaries is not self._canaries:
                canaries.close()

    def _model_cpu_s(self, model: str) -> float:
        stubs = find_stubs(self._server.process_ids())
        return cpu_s([stub for stub in stubs if stub.model == model])


def watch_triton(
    server: TritonServer, warn: Callable[[str], None], interval_s: float, timeout_s: float
) -> Watch:
    """Watch a server of ours.

    Args:
        server: a server that is ready.
        warn: as for `Watch`.
        interval_s: as for `Watch`.
        timeout_s: as for `Watch`.
    """
    key = server.security.admin_key
    headers = key.grpc_headers if key is not None else {}

    shapes: dict[str, list[int]] = {}

    def connect() -> Canaries:
        return Canaries(server.grpc_url, channel=server.channel, headers=headers, shapes=shapes)

    return Watch(server, connect, warn, interval_s=interval_s, timeout_s=timeout_s)
