"""How an assembled repository behaves: the options of `export repository`, and their place.

Each becomes a number or a word in a `config.pbtxt` of `model_repository/`, whose comments say what
it does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from tritonclient.grpc.model_config_pb2 import ModelConfig

from bundle.config import set_parameter
from export.errors import UsageError
from routing import REFERENCE_MODEL, RUNGS, threshold_text
from routing.reference import NONE_STORED

MAX_BATCH_SIZE = 32  # of every model, as written in model_repository/


class OnHighFailure(str, Enum):
    """What becomes of images that need the full rung when it fails."""

    ERROR = "error"
    LOW = "low"


class ClientParameters(str, Enum):
    """What a request's own `policy` and `threshold` may change."""

    CAREFUL = "careful"
    ANY = "any"


class ReferenceCheck(str, Enum):
    """What becomes of reference answers that the server does not give."""

    OFF = "off"
    WARN = "warn"
    REFUSE = "refuse"


@dataclass(frozen=True)
class Settings:
    """What an operator chooses when a repository is assembled.

    Attributes:
        intra_op_threads: CPU threads of each rung's instance.
        instances: of each rung, where it runs on a CPU.
        max_queue: requests that may wait, in front of each model.
        on_high_failure: answer of an image whose full rung failed.
        high_timeout_ms: how long one call of the full rung may take.
        client_parameters: what a request may change.
        degrade_queue_depth: images of one batch of the router that had to wait from which on the
            threshold rises; 0: never.
        degrade_threshold: where it arrives when a full batch has waited; oracle units, above the
            calibrated one.
        audit_fraction: share of the images that also run through the full rung, to watch the risk,
            and through the full model where that is another.
        reference_check: whether the router compares its answers with the calibration's when it
            starts, and refuses requests until they agree.
    """

    intra_op_threads: int = 1
    instances: int = 1
    max_queue: int = 64
    on_high_failure: OnHighFailure = OnHighFailure.ERROR
    high_timeout_ms: int = 10_000
    client_parameters: ClientParameters = ClientParameters.CAREFUL
    degrade_queue_depth: int = 0
    degrade_threshold: float | None = None
    audit_fraction: float = 0.0
    reference_check: ReferenceCheck = ReferenceCheck.WARN

    def check(self, threshold: float | None) -> None:
        """Refuse what makes no sense.

        Args:
            threshold: the calibrated one.

        Raises:
            UsageError: naming the option.
        """
        for option, number in (
            ("--intra-op-threads", self.intra_op_threads),
            ("--instances", self.instances),
            ("--max-queue", self.max_queue),
            ("--high-timeout-ms", self.high_timeout_ms),
        ):
            if number < 1:
                raise UsageError(f"{option} {number} must be 1 or more")
        check_fraction("--audit-fraction", self.audit_fraction)
        self._check_degradation(threshold)

    def check_reference(self, named: Mapping[str, Any] | None) -> None:
        """Refuse to wait for a comparison that can never be made.

        Args:
            named: `Calibration.reference_answers`.

        Raises:
            UsageError: there are none.
        """
        if self.reference_check is ReferenceCheck.REFUSE and named is None:
            raise UsageError(f"--reference-check refuse: {NONE_STORED}; fit again")

    def _check_degradation(self, threshold: float | None) -> None:
        depth, raised = self.degrade_queue_depth, self.degrade_threshold
        if not 0 <= depth <= MAX_BATCH_SIZE:
            raise UsageError(
                f"--degrade-queue-depth {depth} must be 1 to {MAX_BATCH_SIZE} (the largest batch), "
                "or 0 for never"
            )
        if (depth > 0) != (raised is not None):
            raise UsageError("--degrade-queue-depth and --degrade-threshold go together")
        if raised is None:
            return
        if threshold is None:
            raise UsageError(
                "--degrade-threshold needs an artifact with a threshold; this one always escalates"
            )
        if not (math.isfinite(raised) and raised > threshold):
            raise UsageError(
                f"--degrade-threshold {threshold_text(raised)} must be finite and above the "
                f"calibrated threshold {threshold_text(threshold)}: under pressure fewer images "
                "escalate"
            )

    def configure(self, model: str, config: ModelConfig) -> None:
        """Write these settings into a model's configuration."""
        if config.HasField("dynamic_batching"):  # an ensemble queues nothing itself
            config.dynamic_batching.default_queue_policy.max_queue_size = self.max_queue
        if model in (*RUNGS, REFERENCE_MODEL):
            set_parameter(config, "intra_op_thread_count", str(self.intra_op_threads))
        if model in RUNGS:
            config.instance_group[0].count = self.instances
        if model == "router":
            for key, value in self._router_parameters().items():
                set_parameter(config, key, value)

    def _router_parameters(self) -> dict[str, str]:
        raised = self.degrade_threshold
        return {
            "on_high_failure": self.on_high_failure.value,
            "high_timeout_ms": str(self.high_timeout_ms),
            "client_parameters": self.client_parameters.value,
            "degrade_queue_depth": str(self.degrade_queue_depth),
            "degrade_threshold": "" if raised is None else repr(raised),
            "audit_fraction": f"{self.audit_fraction:g}",
            "reference_check": self.reference_check.value,
        }


def check_fraction(option: str, value: float) -> None:
    """Refuse what is no share.

    Raises:
        UsageError: naming the option.
    """
    if not 0.0 <= value <= 1.0:  # NaN is neither
        raise UsageError(f"{option} {value:g} must be between 0 and 1")
