"""Say in one line why a server is not there, out of what Triton logged."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from . import triton_log
from .errors import ServerStartError

_TAIL_LINES = 40


def start_error(what: str, log_path: Path, missing: Sequence[str] = ()) -> ServerStartError:
    """Describe a failure.

    Args:
        what: what was seen from outside, such as `not ready after 120 s`.
        log_path: Triton's log.
        missing: models that are not ready.
    """
    log = log_path.read_text(errors="replace") if log_path.is_file() else ""
    reasons = triton_log.failure_reasons(log)
    # An ensemble is down because of a model below it, and that one says why.
    causes = {m: r for m, r in reasons.items() if not r.startswith("ensemble ")} or reasons
    parts = [f"model '{model}' failed to load: {reason}" for model, reason in causes.items()]
    if not parts:
        last = triton_log.last_error(log)
        parts = [f"{what}: {last}" if last else what]
    others = [model for model in missing if model not in causes]
    if others:
        parts.append(f"{'not ready either' if causes else 'not ready'}: {', '.join(others)}")
    not_ready = {model: reasons.get(model, "") for model in [*causes, *others]}
    # Triton's tables repeat what the entries say, many screens wide.
    lines = [line for line in log.splitlines() if line and line[0] not in "|+"]
    return ServerStartError("; ".join(parts), not_ready, "\n".join(lines[-_TAIL_LINES:]))
