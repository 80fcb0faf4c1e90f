"""Triton's own times per model: how long its requests queued and computed."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import Any

import tritonclient.grpc as triton

_FIELDS = {
    "total_ns": "success",
    "queue_ns": "queue",
    "input_ns": "compute_input",
    "infer_ns": "compute_infer",
    "output_ns": "compute_output",
}


@dataclass(frozen=True)
class ModelTimes:
    """Sums over the successful requests of one model, or over those of a span of time.

    Attributes:
        requests: successful requests; one may be a batch, as the router's calls of a rung are.
        images: in them.
        total_ns: from arrival to response, as the following in nanoseconds.
        queue_ns: waiting for an instance.
        input_ns: copying inputs to the backend.
        infer_ns: in the backend.
        output_ns: copying outputs from it.
    """

    requests: int
    images: int
    total_ns: int
    queue_ns: int
    input_ns: int
    infer_ns: int
    output_ns: int

    def __sub__(self, before: ModelTimes) -> ModelTimes:
        return ModelTimes(*(a - b for a, b in zip(astuple(self), astuple(before), strict=True)))

    def __add__(self, other: ModelTimes) -> ModelTimes:
        return ModelTimes(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def per_request_ms(self) -> dict[str, float]:
        """Milliseconds per request by part; zeros where there was no request."""
        parts = ("queue", "input", "infer", "output")
        scale = 1e6 * max(1, self.requests)
        return {part: getattr(self, f"{part}_ns") / scale for part in parts}

    @property
    def compute_ms(self) -> float:
        """Milliseconds of all requests in and around the backend, without the queue."""
        return (self.input_ns + self.infer_ns + self.output_ns) / 1e6

    @property
    def queue_ms(self) -> float:
        """Milliseconds that all requests waited."""
        return self.queue_ns / 1e6

    @property
    def total_ms(self) -> float:
        """Milliseconds of all requests from arrival to response."""
        return self.total_ns / 1e6


def server_times(client: triton.InferenceServerClient) -> dict[str, ModelTimes]:
    """The server's times since it started, by model, over all of its versions that are loaded.

    Of the router there may be several, each with counters of its own. Who is asked which does not
    matter here: what passes between two readings are the requests that were sent, to whichever.

    Raises:
        InferenceServerException: no answer.
    """
    answer = client.get_inference_statistics(client_timeout=30.0)
    found: dict[str, ModelTimes] = {}
    for entry in answer.model_stats:
        times = _times(entry.inference_stats, entry.inference_count)
        found[entry.name] = found[entry.name] + times if entry.name in found else times
    return found


def since(before: dict[str, ModelTimes], after: dict[str, ModelTimes]) -> dict[str, ModelTimes]:
    """What passed between two readings, of the models that had requests."""
    differences = {name: times - before[name] for name, times in after.items() if name in before}
    return {name: times for name, times in differences.items() if times.requests}


def _times(stats: Any, images: int) -> ModelTimes:
    sums = {field: getattr(stats, name).ns for field, name in _FIELDS.items()}
    return ModelTimes(stats.success.count, images, **sums)
