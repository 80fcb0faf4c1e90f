"""`python -m server check`: one look at a server, for systemd, a container or Kubernetes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .access import ENTRY, HIGH, LOW, PREPROCESS, ROUTER, Access
from .probe import Finding, Memory, look
from .repository import models_in
from .serving import READY, Serving, local_processes

_MODELS = (PREPROCESS, LOW, HIGH, ROUTER, ENTRY)


@dataclass(frozen=True)
class Health:
    """How a server was found.

    Attributes:
        failure: what failed, in one line; empty if all is well.
        models: models that are ready.
        processes: processes of their instances; None where they cannot be seen from here.
        latency_ms: milliseconds until `adaptive_vit` answered an image; None if it was not asked.
        warnings: lines about what is worth knowing but no failure.
        not_looked_at: what the server does not show without its admin key, or from afar.
    """

    failure: str
    models: int
    processes: int | None
    latency_ms: float | None
    warnings: tuple[str, ...]
    not_looked_at: tuple[str, ...]

    @property
    def sentence(self) -> str:
        """One line for people."""
        if self.failure:
            return self.failure
        parts = [f"{self.models} models ready"]
        parts += [] if self.processes is None else [f"{self.processes} processes alive"]
        parts += [] if self.latency_ms is None else [f"answered in {self.latency_ms:.0f} ms"]
        unseen = f"; not looked at: {', '.join(self.not_looked_at)}" if self.not_looked_at else ""
        return ", ".join(parts) + unseen

    def to_dict(self) -> dict[str, Any]:
        """The same for machines."""
        return {"healthy": not self.failure, **asdict(self)}


def check(access: Access, repository: Path | None, timeout_s: float) -> Health:
    """Look at a server once.

    Args:
        access: how to reach it.
        repository: the repository that it serves, whose every model must be ready; None takes the
            models that the server has, or those of every repository of ours where it does not say.
        timeout_s: seconds that a canary may take before the server's progress is looked at.

    Raises:
        ServerUsageError: no such repository.
    """
    expected = set() if repository is None else set(models_in(repository))
    with Serving(access, local_processes(access)) as server:
        states, stubs = server.states(), server.stubs()
        unseen = [] if stubs is not None else ["its processes, which are not on this machine"]
        memory = Memory()
        if states is None:
            unseen.append("its index of models, which wants --admin-key-file")
            expected = expected or set(_MODELS)
            ready = {model for model in expected if server.is_ready(model)}
        else:
            expected = expected or {model for model, _ in states}
            served = [key for key, state in states.items() if state == READY]
            ready = {model for model, _ in served}
            memory.with_processes = {key for key in served if server.is_python(*key)}
        talks = states is not None or bool(ready)
        missing = sorted(expected - ready)
        if missing and talks:
            why = {model: state for (model, _), state in (states or {}).items() if state}
            said = [f"{model} ({why[model]})" if model in why else model for model in missing]
            finding = Finding(f"not ready: {', '.join(said)}")
        else:
            memory.known = expected
            finding = look(server, memory, timeout_s)
    return Health(
        finding.failure,
        len(ready & expected),
        None if stubs is None else len(stubs),
        finding.latency_ms,
        finding.warnings,
        tuple(unseen) if talks else (),
    )
