"""The one numerical core: from a cheap rung's outputs to the decision to escalate.

numpy and the standard library only, Python 3.10+. Calibration imports this package; the router
imports the same code relatively, from the copy that `export repository` places beside it, so an
image gets the same score and the same decision offline and on the server.

Reading order: `outputs` (what a rung returns) -> `signals` (outputs to a raw number) ->
`scoremap` (raw number to predicted change) -> `calibration` (the artifact that holds both and the
threshold) -> `policy` (what a request may ask for) -> `cascade` (the control flow).
`rungset`, `alignment` and `manifest` read and guard the files.
"""

from .alignment import Alignment, AlignmentError
from .calibration import RUNGS, WEIGHTS, Calibration, CalibrationError, RungRecord
from .cascade import CascadeAnswer, CascadeRequest, RequestError, RungError, run_cascade
from .manifest import ManifestError
from .outputs import RungOutputs
from .policy import Overrides, Policy, escalation_mask, parse_overrides
from .rungset import RungSet, RungSetError
from .scoremap import ScoreMap
from .signals import SIGNALS, Signal

__all__ = [
    "RUNGS",
    "SIGNALS",
    "WEIGHTS",
    "Alignment",
    "AlignmentError",
    "Calibration",
    "CalibrationError",
    "CascadeAnswer",
    "CascadeRequest",
    "ManifestError",
    "Overrides",
    "Policy",
    "RequestError",
    "RungError",
    "RungOutputs",
    "RungRecord",
    "RungSet",
    "RungSetError",
    "ScoreMap",
    "Signal",
    "escalation_mask",
    "parse_overrides",
    "run_cascade",
]
