"""What a failed call of a rung means, read from its text.

Triton gives every failure of a model called by another model the status INTERNAL: only the text
tells an outage, after which a client may try again, from a fault of the model.
"""

from __future__ import annotations

import re

# As tritonserver 2.51 and its python backend word them.
_OUTAGE = re.compile(
    r"is not ready"  # unloaded, or still loading
    r"|server not ready"  # while other models load, or while it stops
    r"|is not found"  # never there
    r"|has no available versions"
    r"|is not healthy"  # its process has died
    r"|exceeds maximum queue size"
    r"|request timeout expired"
    r"|server is stopping",
    re.IGNORECASE,
)


def is_outage(message: str) -> bool:
    """Whether a rung's error says that it cannot be had now, and not that it failed.

    Args:
        message: the error of a call of one model by another.
    """
    return bool(_OUTAGE.search(message))
