"""The stand-in backend against ONNX Runtime on the real server: Triton's own time of a request."""

import pytest

from perf.backend import measure_backend
from perf.target import Target
from tests.triton.test_keystone import statistics

pytestmark = pytest.mark.alone


@pytest.mark.parametrize("batch", [1, 8])
def test_a_request_is_timed_beside_a_direct_run(server, build, images, batch):
    before = statistics(server, "vit_high")
    steps = []
    file = build / "onnx/full.onnx"
    with Target(server.grpc_url, None, server) as target:
        found = measure_backend(target, file, images, batch, 2, 3, lambda: steps.append(1))
    assert len(steps) == 6 and len(found.values) == 2
    # Each pair asked the server once, and one more per round to warm up.
    statistics(server, "vit_high", answered=before[0] + 2 * (3 + 1))
    # Both did the same work: no test asserts how fast, but not one of them did nothing.
    assert 0.2 < found.median < 5
