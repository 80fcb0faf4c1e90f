"""What the demo measures, written by hand: systems in turn on crops, each system of one cost."""

import numpy as np

from perf.cascade import Measured
from perf.harness import Paired
from tests.unit.perf_measured import make_answer


def measured(classes, escalated, shares, never=None, cpu=1.0, doubts=()):
    """Shares of the crops, neighbours in the same one.

    Args:
        classes: by system, the class that each crop is given.
        escalated: of each crop.
        shares: for each share the milliseconds of a request by system.
        never: for each share those of the router told never to escalate.
        cpu: CPU time of a request, in parts of its milliseconds.
        doubts: why not to believe it.
    """
    found = []
    for number, rows in enumerate(np.array_split(np.arange(len(escalated)), len(shares))):
        share = {
            system: [
                make_answer(
                    ms,
                    escalated=system == "adaptive" and bool(escalated[row]),
                    names=classes[system][row],
                    cpu_ms=cpu * ms,
                )
                for row in rows
            ]
            for system, ms in shares[number].items()
        }
        if never is not None:
            share["adaptive-0"] = [make_answer(never[number]) for _ in rows]
        found.append(share)
    return Measured(Paired(found), doubts)
