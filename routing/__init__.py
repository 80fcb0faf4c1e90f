"""The one numerical core: from a cheap rung's outputs to the decision to escalate.

numpy and the standard library only, Python 3.10+. Calibration imports this package; the router
imports the same code relatively, from the copy that `export repository` places beside it, so an
image gets the same score and the same decision offline and on the server.

Reading order: `outputs` (what a rung returns) -> `signals` (outputs to a raw number) ->
`scoremap` (raw number to predicted change) -> `calibration` (the artifact that holds both and the
threshold) -> `policy` (what a request may ask for) -> `relief` (what pressure may change) ->
`cascade` (the control flow). `fidelity` says when a cheap answer is a loss; `audit` holds the
certificate against live traffic, `shadow` compares two artifacts on it, `reference` a server's
answers with the calibration's. `rungset`, `alignment`, `manifest` and `versions` read and guard the
files; `provenance` names the processor.
"""

from .alignment import Alignment, AlignmentError
from .audit import RiskTest
from .calibration import RUNGS, WEIGHTS, Calibration, CalibrationError, RungRecord
from .cascade import (
    CascadeAnswer,
    CascadeRequest,
    GoneError,
    RequestError,
    RungError,
    run_cascade,
)
from .fidelity import fidelity_loss
from .manifest import ManifestError
from .outputs import RungOutputs
from .policy import Allowance, Overrides, Policy, escalation_mask, parse_overrides
from .reference import AnswersError, ReferenceAnswers, answers_path
from .relief import Relief
from .rungset import RungSet, RungSetError
from .scoremap import ScoreMap
from .signals import SIGNALS, Signal
from .statuses import is_outage

__all__ = [
    "RUNGS",
    "SIGNALS",
    "WEIGHTS",
    "Alignment",
    "AlignmentError",
    "Allowance",
    "AnswersError",
    "Calibration",
    "CalibrationError",
    "CascadeAnswer",
    "CascadeRequest",
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
    "RungSet",
    "RungSetError",
    "ScoreMap",
    "Signal",
    "answers_path",
    "escalation_mask",
    "fidelity_loss",
    "is_outage",
    "parse_overrides",
    "run_cascade",
]
