"""What an operator chose for the router: the parameters of its config.pbtxt, checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .routing import Relief


@dataclass(frozen=True)
class RouterSettings:
    """The router's parameters.

    Attributes:
        degrade_on_high_failure: answer with the cheap rung, marked `degraded`, where the full rung
            fails; else with an error.
        high_timeout_s: seconds that a call of the full rung may take.
        careful_only: requests may only make routing more careful.
        relief: raises the threshold under pressure; None: never.
        audit_fraction: share of images whose realised risk is measured, 0..1.
        shadow_version: version of the router whose artifact is tried beside this one's; 0: none.
        shadow_fraction: share of images that it sees, 0..1.
        instances: of the router.
        queue_limit: requests that may wait for the router.
        reference_check: `off`, `warn` or `refuse`: what becomes of other answers than the
            calibration's.
        live_folder: where evidence from live traffic is written; empty: beside the repository.
    """

    degrade_on_high_failure: bool
    high_timeout_s: float
    careful_only: bool
    relief: Relief | None
    audit_fraction: float
    shadow_version: int
    shadow_fraction: float
    instances: int
    queue_limit: int
    reference_check: str
    live_folder: str

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> RouterSettings:
        """Read them.

        Args:
            config: the model's configuration as Triton gives it.

        Raises:
            ValueError: a parameter that is missing or has no such value, by name.
        """
        given = {key: value["string_value"] for key, value in config["parameters"].items()}
        depth = _number(given, "degrade_queue_depth", 0, config["max_batch_size"])
        return cls(
            degrade_on_high_failure=_one_of(given, "on_high_failure", ("error", "low")) == "low",
            high_timeout_s=_number(given, "high_timeout_ms", 1, 3_600_000) / 1000,
            careful_only=_one_of(given, "client_parameters", ("careful", "any")) == "careful",
            relief=Relief(
                depth=int(depth),
                full=config["max_batch_size"],
                highest=_number(given, "degrade_threshold", -math.inf, math.inf),
            )
            if depth
            else None,
            audit_fraction=_number(given, "audit_fraction", 0, 1),
            shadow_version=int(_number(given, "shadow_version", 0, math.inf)),
            shadow_fraction=_number(given, "shadow_fraction", 0, 1),
            instances=sum(
                group["count"] * max(1, len(group.get("gpus", ())))
                for group in config["instance_group"]
            ),
            queue_limit=config["dynamic_batching"]["default_queue_policy"]["max_queue_size"],
            reference_check=_one_of(given, "reference_check", ("off", "warn", "refuse")),
            live_folder=_text(given, "live_folder"),
        )


def _one_of(given: Mapping[str, str], name: str, allowed: tuple[str, ...]) -> str:
    value = _text(given, name)
    if value not in allowed:
        raise ValueError(f"{name} {value!r} is none of {', '.join(allowed)}")
    return value


def _number(given: Mapping[str, str], name: str, lowest: float, highest: float) -> float:
    text = _text(given, name)
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not lowest <= value <= highest:
        raise ValueError(f"{name} {text!r} is no number between {lowest:g} and {highest:g}")
    return value


def _text(given: Mapping[str, str], name: str) -> str:
    if name not in given:
        raise ValueError(f"the router's config.pbtxt has no parameter {name}; assemble again")
    return given[name]
