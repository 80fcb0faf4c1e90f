"""`python -m server check`: is a server well, and with --answers, does it answer as calibrated?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from bundle.versions import VersionError, Versions
from routing import (
    PROBE_ID,
    AnswersError,
    Calibration,
    CalibrationError,
    CascadeAnswer,
    ReferenceAnswers,
    answers_path,
    score_of_answer,
)
from routing.outputs import FloatArray
from routing.policy import Overrides
from routing.provenance import processor, runtime_words
from routing.reference import OTHER, ask, compare

from .access import (
    ENTRY,
    HIGH,
    LOW,
    OTHER_ANSWERS,
    PREPROCESS,
    ROUTER,
    STILL_COMPARING,
    WAY_OUT,
    Access,
)
from .errors import ServerUsageError
from .launcher import models_in
from .probe import Finding, Memory, look
from .serving import READY, Serving, local_processes
from .triton_log import first_line

# Whether all is well, the result for machines, and lines for people.
Checked = tuple[bool, dict[str, Any], list[str]]
# Not adaptive_tensor, which repositories of an earlier release have not.
_MODELS = {PREPROCESS, LOW, HIGH, ROUTER, ENTRY}
_TIMEOUT_S = 120.0  # Of a batch of eight that all go through the full rung, on a busy machine.


def check(access: Access, repository: Path | None, timeout_s: float) -> Checked:
    """Look at a server once, for systemd, a container or Kubernetes.

    Args:
        access: how to reach it.
        repository: the repository that it serves, whose every model must be ready; None takes the
            models that the server has, or those of every repository of ours where it does not say.
        timeout_s: seconds that a canary may take before the server's progress is looked at.

    Raises:
        ServerUsageError: no such repository.
    """
    expected = set() if repository is None else set(models_in(repository))
    unseen = []
    memory = Memory()
    with Serving(access, local_processes(access)) as server:
        # None, too, where a tunnel's end listens here: it has no model's process below it.
        states, stubs = server.states(), server.stubs() or None
        distrust = None
        if stubs is None:
            unseen.append("its processes, which are not on this machine")
        if states is None:
            unseen.append("its index of models, which wants --admin-key-file")
            if stubs is not None:
                unseen.append("whether a process is missing")
            expected = expected or _MODELS
            ready = {model for model in expected if server.is_ready(model)}
            distrust = None if ready else access.why_refused()
        else:
            expected = expected or {model for model, _ in states}
            served = [key for key, state in states.items() if state == READY]
            ready = {model for model, _ in served}
            if stubs is not None:
                memory.with_processes = {key for key in served if server.is_python(*key)}
        if distrust is not None:
            finding = Finding(distrust)
        elif expected - ready and (states is not None or ready):
            why = {model: f" ({state})" for (model, _), state in (states or {}).items() if state}
            missing = [model + why.get(model, "") for model in sorted(expected - ready)]
            finding = Finding(f"not ready: {', '.join(missing)}")
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


def check_answers(repository: Path, access: Access) -> Checked:
    """Send the artifact's reference images to the version of the router that answers.

    Args:
        repository: the repository that the server serves.
        access: how to reach the server.

    Raises:
        ServerUsageError: no such server or version, or answers that say nothing.
    """
    try:
        version = Versions.load(repository).live
        artifact = repository / ROUTER / str(version) / "calibration.json"
        calibration = Calibration.load(artifact)
        recorded = ReferenceAnswers.load(answers_path(artifact), calibration)
        with access.open() as client:
            metadata = client.get_server_metadata(
                headers=dict(access.headers), client_timeout=_TIMEOUT_S
            )
            served = ask(recorded, lambda image, how: _ask(client, version, image, how))
    except InferenceServerException as error:
        said = first_line(error.message())
        if OTHER_ANSWERS in said:  # The router has compared by itself, and refuses for that.
            said = said[said.index(OTHER_ANSWERS) :]
            refused = {"version": version, "outcome": OTHER, "refused": said}
            return False, refused, [f"router/{version} refuses every request: {said}; {WAY_OUT}"]
        if STILL_COMPARING in said:
            raise ServerUsageError(f"router/{version} at {access.url}: {said}") from error
        if (distrust := access.why_refused()) is not None:
            raise ServerUsageError(distrust) from error
        raise ServerUsageError(
            f"no answer from router/{version} at {access.url} ({said}); give the --url of the "
            "server, and the --repository that it serves"
        ) from error
    except (AnswersError, CalibrationError, VersionError) as error:
        raise ServerUsageError(str(error)) from error
    compared = compare(calibration, recorded, served)
    here = processor() if access.is_here else None
    serving = {"name": f"tritonserver {metadata.version}", "processor": here}
    sides = {"calibrated": calibration.data.get("runtime") or None, "serving": serving}
    lines = [f"{side} on {runtime_words(known)}" for side, known in sides.items()]
    found = {"version": version, **compared.to_dict(), "runtimes": sides}
    return compared.outcome != OTHER, found, [*lines, compared.sentence]


def _ask(
    client: triton.InferenceServerClient, version: int, image: FloatArray, overrides: Overrides
) -> CascadeAnswer:
    tensor = triton.InferInput("image", list(image.shape), "FP32")
    tensor.set_data_from_numpy(image)
    answer = client.infer(
        ROUTER,
        [tensor],
        model_version=str(version),
        parameters=None if overrides == Overrides() else {"policy": overrides.policy.value},
        request_id=PROBE_ID,
        client_timeout=_TIMEOUT_S,
    )
    escalated, score, degraded = (
        answer.as_numpy(name)[:, 0] for name in ("escalated", "score", "degraded")
    )
    return CascadeAnswer(
        answer.as_numpy("embedding"),
        answer.as_numpy("logits"),
        escalated,
        score_of_answer(score),
        degraded,
        relieved=np.zeros_like(degraded),
        wanted=escalated | degraded,
        audited=np.zeros_like(degraded),
    )
