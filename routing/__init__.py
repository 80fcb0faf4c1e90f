"""The one numerical core: from a cheap rung's outputs to the decision to escalate.

numpy and the standard library only, Python 3.10+. Calibration imports this package; the router
imports the same code relatively, from the copy that `export repository` places beside it, so an
image gets the same score and the same decision offline and on the server.

Reading order: `outputs` (what a rung returns) -> `signals` (outputs to a raw number) ->
`scoremap` (raw number to predicted change) -> `calibration` (the artifact that holds both and the
threshold) -> `policy` (what a request may ask for) -> `relief` (what pressure may change) ->
`cascade` (the control flow). `fidelity` says when a cheap answer is a loss; `audit` holds the
certificate against live traffic, `shadow` compares two artifacts on it, `reference` a server's
answers with the calibration's. `decimals` writes thresholds and scores for people. `alignment`
and `manifest` read and guard the files; `provenance` names the processor.
"""

from .alignment import Alignment, AlignmentError
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
    run_cascade,
)
from .decimals import score_texts, threshold_text
from .fidelity import fidelity_loss
from .manifest import ManifestError
from .outputs import TASKS, RungOutputs, default_task
from .policy import PROBE_ID, Allowance, Overrides, Policy, escalation_mask, parse_overrides
from .reference import AnswersError, ReferenceAnswers, answers_path
from .relief import Relief
from .scoremap import ScoreMap
from .signals import SIGNALS, Signal
from .statuses import is_outage

__all__ = [
    "PROBE_ID",
    "REFERENCE_MODEL",
    "RUNGS",
    "SIGNALS",
    "TASKS",
    "WEIGHTS",
    "Alignment",
    "AlignmentError",
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
    "score_texts",
    "threshold_text",
]
