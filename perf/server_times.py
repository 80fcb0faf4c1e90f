"""Triton's own times per model: how long its requests queued and computed.

The times of a model are sums over successful requests: how many `requests`, of which one may be a
batch, as the router's calls of a rung are; the `images` in them; and nanoseconds, in `total` from
arrival to response, waiting in the `queue`, for copying `input` and `output`, and in the backend
(`infer`).
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping

import tritonclient.grpc as triton

from .figures import PerfError

PATIENCE_S = 5.0  # for the server to count a request

Times = Mapping[str, Counter[str]]
"""Times by model."""


def server_times(client: triton.InferenceServerClient) -> Times:
    """The server's times since it started, by model, over all of its versions that are loaded.

    Of the router there may be several, each with counters of its own. Who is asked which does not
    matter here: what passes between two readings are the requests that were sent, to whichever.

    Raises:
        InferenceServerException: no answer.
    """
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for entry in client.get_inference_statistics(client_timeout=30.0).model_stats:
        stats = entry.inference_stats
        found[entry.name] += Counter(
            requests=stats.success.count,
            images=entry.inference_count,
            total=stats.success.ns,
            queue=stats.queue.ns,
            input=stats.compute_input.ns,
            infer=stats.compute_infer.ns,
            output=stats.compute_output.ns,
        )
    return found


def since(before: Times, after: Times) -> dict[str, Counter[str]]:
    """What passed between two readings, of the models that had requests."""
    differences = {name: times - before.get(name, Counter()) for name, times in after.items()}
    return {name: times for name, times in differences.items() if times["requests"]}


def counted(
    read: Callable[[], Times], before: Times, models: Collection[str], requests: int
) -> dict[str, Counter[str]]:
    """Triton's times since `before`: it counts a request a moment after it has answered.

    Args:
        read: reads them.
        before: as they were read before the requests were sent.
        models: that were sent so many requests.
        requests: how many.

    Raises:
        PerfError: the server answers, and does not count it.
    """
    deadline = time.monotonic() + PATIENCE_S
    while True:
        times = since(before, read())
        if all(model in times and times[model]["requests"] >= requests for model in models):
            return times
        if time.monotonic() > deadline:
            raise PerfError("the server answers, but its statistics do not count the requests")
        time.sleep(0.002)


def ms(times: Counter[str], *parts: str) -> float:
    """Milliseconds of all requests in these parts."""
    return sum(times[part] for part in parts) / 1e6
