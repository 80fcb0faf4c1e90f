"""Triton's log: make sure that it can be written, and read out of it why models failed to load."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from .errors import ServerStartError, ServerUsageError

_TAIL_LINES = 40
# A log can be kept for months; what is read of it stands at its end.
_READ_BYTES = 2**20

# E1121 11:40:12.388730 6959 model_lifecycle.cc:642] "failed to load 'p' version 1: Internal: ..."
_ERROR = re.compile(r'^E\d{4} [\d:.]+ \d+ [\w.]+:\d+\] "?(.*?)"?$', re.M)
_REASONS = re.compile(
    r"failed to load '(?P<loaded>[^']+)' version \d+: (?P<why>.+)"
    r"|Poll failed for model directory '(?P<polled>[^']+)': (?P<fault>.+)"
    r"|(?P<reason>ensemble '?(?P<ensemble>\w+)'? (?:depends on|contains) .+)"
)
_LOADED = re.compile(r"successfully loaded '([^']+)'")
# "Internal: " is Triton's status, "ValueError: " the class of a Python model's exception.
_NOISE = re.compile(
    r"^(?:(?:Internal|Invalid argument|Unavailable|Unknown|Unsupported|Not found)(?: -|:) "
    r"|(?:[a-z_]\w*\.)*[A-Z]\w*(?:Error|Exception): )+"
)
# "error: creating server: ..." ends a failed start, "tritonserver: unrecognized option" a bad call.
_ENDING = re.compile(
    r"^(?:error: (?:creating server: )?(?!.*failed to load all models)|\S*tritonserver: )(.+)$",
    re.M,
)
# A refused argument is named after all of the help.
_USAGE = re.compile(r"^Usage: tritonserver ", re.M)
# Logged as errors on every machine without a GPU.
_HARMLESS = re.compile("CudaDriverHelper|CUDA driver version is insufficient")
# Protobuf's own line says what is wrong in a configuration, Triton's only which one it is.
_CONFIG_UNREADABLE = "failed to read text proto from"
_CONFIG_ERROR = re.compile(r"Error parsing text-format inference\.ModelConfig: (.+)")
_PORT_TAKEN = re.compile(r"Socket '[^']*' already in use")


def make_writable(path: Path) -> None:
    """Make the log's file and folder, before a server is started for nothing.

    Raises:
        ServerUsageError: they cannot be made, or it is a device, a pipe or one of this process's
            own descriptors, which the server's guard cannot open by that name.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        named = [path, path.parent / path.readlink()] if path.is_symlink() else [path]
        is_descriptor = any(name.parent.resolve().is_relative_to("/proc") for name in named)
        is_other = path.exists() and not (path.is_file() or path.is_dir())
        if is_descriptor or (is_other and str(path) != os.devnull):
            raise ServerUsageError(
                f"the log {path} is no file; give one with --log, or - for the standard output"
            )
        path.open("ab").close()
    except OSError as error:
        raise ServerUsageError(
            f"the log {path} cannot be written ({error.strerror}); give another --log"
        ) from error


def read(path: Path) -> str:
    """The last MiB of a log; empty where there is none."""
    with suppress(FileNotFoundError), path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _READ_BYTES))
        return file.read().decode(errors="replace")
    return ""


def start_error(what: str, log_path: Path, missing: Sequence[str] = ()) -> ServerStartError:
    """Say in one line why a server is not there, out of what Triton logged.

    Args:
        what: what was seen from outside, such as `not ready after 120 s`.
        log_path: Triton's log.
        missing: models that are not ready.
    """
    log = read(log_path)
    reasons = failure_reasons(log)
    # An ensemble is down because of a model below it, and that one says why.
    causes = {m: r for m, r in reasons.items() if not r.startswith("ensemble ")} or reasons
    parts = [f"model '{model}' failed to load: {reason}" for model, reason in causes.items()]
    if not parts:
        last = last_error(log)
        parts = [f"{what}: {last}" if last else what]
    others = [model for model in missing if model not in causes]
    if others:
        parts.append(f"{'not ready either' if causes else 'not ready'}: {', '.join(others)}")
    not_ready = {model: reasons.get(model, "") for model in [*causes, *others]}
    # Triton's tables repeat what the entries say, many screens wide.
    lines = [line for line in log.splitlines() if line and line[0] not in "|+"]
    return ServerStartError("; ".join(parts), not_ready, "\n".join(lines[-_TAIL_LINES:]))


def failure_reasons(log: str) -> dict[str, str]:
    """Map each model that failed to load to one line saying why, in the log's order."""
    reasons: dict[str, str] = {}
    config_errors = iter(_CONFIG_ERROR.findall(log))
    for text in _ERROR.findall(log):
        if found := _REASONS.search(text):
            reason = first_line(found["why"] or found["fault"] or found["reason"])
            if reason.startswith(_CONFIG_UNREADABLE):
                reason = f"{reason}: {next(config_errors, 'see the log')}"
            reasons.setdefault(found["loaded"] or found["polled"] or found["ensemble"], reason)
    return reasons


def last_error(log: str) -> str:
    """The line in which Triton says why it ended, or an empty string."""
    endings = _ENDING.findall(log)
    if not endings and _USAGE.search(log):
        return log.rstrip().split("\n")[-1]
    errors = endings or [text for text in _ERROR.findall(log) if not _HARMLESS.search(text)]
    return first_line(errors[-1]) if errors else ""


def loaded_models(log: str) -> set[str]:
    """Names of the models that the log reports as loaded."""
    return set(_LOADED.findall(log))


def is_port_taken(log: str) -> bool:
    """Whether the server ended because a port was taken."""
    return bool(_PORT_TAKEN.search(log))


def first_line(reason: str) -> str:
    """The first line of a reason, without Triton's status and Python's exception class."""
    # Inside an entry Triton writes line breaks and quotes as escapes.
    line = reason.replace("\\n", "\n").replace('\\"', '"').strip().split("\n")[0].strip()
    return _NOISE.sub("", line)
