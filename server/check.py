"""`python -m server check`: one look at a server, for systemd, a container or Kubernetes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .access import ENTRY, HIGH, LOW, PREPROCESS, ROUTER, Access
from .launcher import models_in
from .probe import Finding, Memory, look
from .serving import READY, Serving, local_processes

# Not adaptive_tensor, which repositories of an earlier release have not.
_MODELS = (PREPROCESS, LOW, HIGH, ROUTER, ENTRY)


def check(
    access: Access, repository: Path | None, timeout_s: float
) -> tuple[bool, dict[str, Any], list[str]]:
    """Look at a server once.

    Args:
        access: how to reach it.
        repository: the repository that it serves, whose every model must be ready; None takes the
            models that the server has, or those of every repository of ours where it does not say.
        timeout_s: seconds that a canary may take before the server's progress is looked at.

    Returns:
        Whether all is well, the result for machines, and lines for people.

    Raises:
        ServerUsageError: no such repository.
    """
    expected = set() if repository is None else set(models_in(repository))
    unseen = []
    memory = Memory()
    with Serving(access, local_processes(access)) as server:
        # None, too, where a tunnel's end listens here: it has no model's process below it.
        states, stubs = server.states(), server.stubs() or None
        if stubs is None:
            unseen.append("its processes, which are not on this machine")
        if states is None:
            unseen.append("its index of models, which wants --admin-key-file")
            if stubs is not None:
                unseen.append("whether a process is missing")
            expected = expected or set(_MODELS)
            ready = {model for model in expected if server.is_ready(model)}
        else:
            expected = expected or {model for model, _ in states}
            served = [key for key, state in states.items() if state == READY]
            ready = {model for model, _ in served}
            if stubs is not None:
                memory.with_processes = {key for key in served if server.is_python(*key)}
        missing = sorted(expected - ready)
        if missing and (states is not None or ready):
            why = {model: state for (model, _), state in (states or {}).items() if state}
            said = [f"{model} ({why[model]})" if model in why else model for model in missing]
            finding = Finding(f"not ready: {', '.join(said)}")
        else:
            memory.known = expected
            finding = look(server, memory, timeout_s)
    found = {
        "healthy": not finding.failure,
        "failure": finding.failure,
        "models": len(ready & expected),
        "processes": None if stubs is None else len(stubs),
        "latency_ms": finding.latency_ms,
        "warnings": list(finding.warnings),
        "not_looked_at": [] if finding.failure else unseen,
    }
    parts = [f"{found['models']} models ready"]
    parts += [] if stubs is None else [f"{len(stubs)} processes alive"]
    parts += [] if finding.latency_ms is None else [f"answered in {finding.latency_ms:.0f} ms"]
    line = ", ".join(parts) + (f"; not looked at: {', '.join(unseen)}" if unseen else "")
    warnings = [f"warning: {warning}" for warning in finding.warnings]
    return not finding.failure, found, [finding.failure or line, *warnings]
