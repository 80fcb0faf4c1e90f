"""The one numerical core: from a cheap rung's outputs to the decision to escalate.

numpy and the standard library only, Python 3.10+. Calibration imports this package; the router
imports the same code relatively, from the copy that `export repository` places beside it, so an
image gets the same score and the same decision offline and on the server.

Reading order: `outputs` (what a rung returns) -> `signals` (outputs to a raw number) -> `scoremap`
(raw number to predicted change) -> `calibration` (the artifact that holds both and the threshold)
-> `policy` (what a request may ask for, and pressure may change) -> `cascade` (the control flow).
`fidelity` says when a cheap answer is a loss; `audit` holds the certificate against live traffic,
and two artifacts' decisions on it; `reference` compares a server's answers with the calibration's;
`journal` is what the router writes of audited images. `manifest` reads and guards the files;
`provenance` names the processor.
"""

from .audit import RiskTest as RiskTest
from .calibration import REFERENCE_MODEL as REFERENCE_MODEL
from .calibration import RUNGS as RUNGS
from .calibration import WEIGHTS as WEIGHTS
from .calibration import Calibration as Calibration
from .calibration import CalibrationError as CalibrationError
from .calibration import RungRecord as RungRecord
from .calibration import answer_depends_on_batch as answer_depends_on_batch
from .cascade import UNSCORED as UNSCORED
from .cascade import Audit as Audit
from .cascade import Audited as Audited
from .cascade import CascadeAnswer as CascadeAnswer
from .cascade import CascadeRequest as CascadeRequest
from .cascade import Decision as Decision
from .cascade import GoneError as GoneError
from .cascade import RequestError as RequestError
from .cascade import RungError as RungError
from .cascade import answered_score as answered_score
from .cascade import is_outage as is_outage
from .cascade import run_cascade as run_cascade
from .cascade import score_of_answer as score_of_answer
from .fidelity import fidelity_loss as fidelity_loss
from .manifest import ManifestError as ManifestError
from .outputs import TASKS as TASKS
from .outputs import RungOutputs as RungOutputs
from .outputs import default_task as default_task
from .policy import PROBE_ID as PROBE_ID
from .policy import Allowance as Allowance
from .policy import Overrides as Overrides
from .policy import Policy as Policy
from .policy import Relief as Relief
from .policy import escalation_mask as escalation_mask
from .policy import parse_overrides as parse_overrides
from .policy import threshold_text as threshold_text
from .reference import AnswersError as AnswersError
from .reference import ReferenceAnswers as ReferenceAnswers
from .reference import answers_path as answers_path
from .scoremap import ScoreMap as ScoreMap
from .signals import SIGNALS as SIGNALS
from .signals import Signal as Signal
