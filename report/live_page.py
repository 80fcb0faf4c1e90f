"""The page of a live certificate (placeholder until it is merged)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_live(path: Path, data: Mapping[str, Any]) -> None:
    """Write it."""
    path.write_text(json.dumps(data))
