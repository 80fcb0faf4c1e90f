"""`python -m server check --answers`: does a server answer as its artifact was calibrated?"""

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
)
from routing.outputs import FloatArray
from routing.policy import Overrides
from routing.provenance import processor, runtime_words
from routing.reference import OTHER, VERDICTS, Comparison, ask, compare

from .access import ROUTER, WAY_OUT, Access, is_comparing, is_other
from .errors import ServerUsageError
from .triton_log import first_line

_TIMEOUT_S = 120.0  # of a batch of eight that all go through the full rung, on a busy machine


def check_answers(repository: Path, access: Access) -> tuple[bool, dict[str, Any], list[str]]:
    """Send the artifact's reference images to the version of the router that answers.

    Args:
        repository: the repository that the server serves.
        access: how to reach the server.

    Returns:
        Whether the answers agree, the result for machines, and lines for people.

    Raises:
        ServerUsageError: no such server or version, or answers that say nothing.
    """
    try:
        version = Versions.load(repository).live
        artifact = repository / ROUTER / str(version) / "calibration.json"
        calibration = Calibration.load(artifact)
        recorded = ReferenceAnswers.load(answers_path(artifact), calibration)
    except (AnswersError, CalibrationError, VersionError) as error:
        raise ServerUsageError(str(error)) from error
    try:
        served, runtime = _serve(access, version, recorded)
    except InferenceServerException as error:
        said = first_line(error.message())
        if is_other(said):  # The router has compared by itself, and refuses requests for that.
            said = said[said.index(VERDICTS[OTHER]) :]
            found = {"version": version, "outcome": OTHER, "refused": said}
            return False, found, [f"router/{version} refuses every request: {said}; {WAY_OUT}"]
        if is_comparing(said):
            raise ServerUsageError(f"router/{version} at {access.url}: {said}") from error
        raise ServerUsageError(
            f"no answer from router/{version} at {access.url} ({said}); give the --url of the "
            "server, and the --repository that it serves"
        ) from error
    except AnswersError as error:
        raise ServerUsageError(str(error)) from error
    compared = compare(calibration, recorded, served)
    sides = {"calibrated": calibration.data.get("runtime") or None, "serving": runtime}
    lines = [
        *_rows(compared, version),
        *(f"{side} on {runtime_words(known)}" for side, known in sides.items()),
        compared.sentence,
    ]
    found = {"version": version, **compared.to_dict(), "runtimes": sides}
    return compared.outcome != OTHER, found, lines


def _serve(access: Access, version: int, recorded: ReferenceAnswers) -> tuple[Any, dict[str, Any]]:
    """The server's answers, and what it says of itself: `name`, and `processor` if it is here."""
    with access.open() as client:

        def cascade(image: FloatArray, overrides: Overrides) -> CascadeAnswer:
            return _ask(client, version, image, overrides)

        metadata = client.get_server_metadata(
            headers=dict(access.headers), client_timeout=_TIMEOUT_S
        )
        served = ask(recorded, cascade)
    name = f"tritonserver {metadata.version}"
    return served, {"name": name, "processor": processor() if access.is_here else None}


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
        score,
        degraded,
        relieved=np.zeros_like(degraded),
    )


def _rows(found: Comparison, version: int) -> list[str]:
    rows = [f"router/{version} on {found.images} reference images"]
    for name, rung in found.rungs.items():
        figures = f", differs by {rung.median:.2e} in the median, {rung.largest:.2e} at most"
        rows.append(f"  {name}: {rung.images} embeddings{figures if rung.images else ''}")
    if np.isfinite(found.score_change):
        rows.append(f"  score: differs by {found.score_change:.2e} oracle units at most")
    rows.append(f"  another decision: {found.other_decisions}; answer: {found.other_answers}")
    rows.append(f"  lost: {found.lost} (were {found.lost_before}, may be {found.allowed})")
    return rows
