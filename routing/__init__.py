"""The one numerical core: from a cheap rung's outputs to the decision to escalate.

numpy and the standard library only, Python 3.10+. Calibration imports this package; the router
imports the same code relatively, from the copy that `export repository` places beside it, so an
image gets the same score and the same decision offline and on the server.

Reading order: `outputs` (what a rung returns) -> `signals` (outputs to a raw number) ->
`scoremap` (raw number to predicted change) -> `calibration` (the artifact that holds both and the
threshold) -> `policy` (what a request may ask for, and pressure may change) -> `cascade` (the
control flow). `fidelity` says when a cheap answer is a loss; `audit` holds the certificate against
live traffic, and two artifacts' decisions on it; `reference` compares a server's answers with the
calibration's. `manifest` reads and guards the files; `provenance` names the processor.
"""

from .audit import RiskTest
from .calibration import (
    REFERENCE_MODEL,
    RUNGS,
    WEIGHTS,
    Calibration,
    CalibrationError,
    RungRecord,
    answer_depends_on_batch,
)
from .cascade import (
    CascadeAnswer,
    CascadeRequest,
    Decision,
    GoneError,
    RequestError,
    RungError,
    is_outage,
    run_cascade,
)
from .fidelity import fidelity_loss
from .manifest import ManifestError
from .outputs import TASKS, RungOutputs, default_task
from .policy import (
    PROBE_ID,
    Allowance,
    Overrides,
    Policy,
    Relief,
    escalation_mask,
    parse_overrides,
    threshold_text,
)
from .reference import AnswersError, ReferenceAnswers, answers_path
from .scoremap import ScoreMap
from .signals import SIGNALS, Signal

__all__ = [
    "PROBE_ID",
    "REFERENCE_MODEL",
    "RUNGS",
    "SIGNALS",
    "TASKS",
    "WEIGHTS",
    "Allowance",
    "AnswersError",
    "Calibration",
    "CalibrationError",
    "CascadeAnswer",
    "CascadeRequest",
    "Decision",
    "GoneError",
    "ManifestError",
    "Overrides",
    "Policy",
    "ReferenceAnswers",
    "Relief",
    "RequestError",
    "RiskTest",
    "RungError",
    "RungOutputs",
    "RungRecord",
    "ScoreMap",
    "Signal",
    "answer_depends_on_batch",
    "answers_path",
    "default_task",
    "escalation_mask",
    "fidelity_loss",
    "is_outage",
    "parse_overrides",
    "run_cascade",
    "threshold_text",
]
