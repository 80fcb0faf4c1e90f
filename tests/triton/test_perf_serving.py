"""Exported graphs on a real server: they answer, side by side, wherever their weights lie."""

from dataclasses import replace

import onnx
import pytest

from client import ClientError
from perf.costs.serving import Load, groups_of, measure_serving
from perf.measure.sets import load_pool
from routing import WEIGHTS, RungRecord, manifest

LOAD = Load(instances=2, threads=1, batches=(1, 4), turns=1)


@pytest.fixture(scope="module")
def pool(rung_set):
    return load_pool(rung_set, "sample", 8)


def with_outside_weights(rung_set, folder):
    """The rungs, and the cheap one once more with its weights in a file beside it."""
    file = folder / "static_outside.onnx"
    onnx.save_model(
        onnx.load(rung_set.files["vit_low"]),
        file,
        save_as_external_data=True,
        location=WEIGHTS,
    )
    hashes = (manifest.sha256_file(path) for path in (file, folder / WEIGHTS))
    record = RungRecord(rung_set.rungs["vit_low"].px, "px=32", *hashes)
    return replace(
        rung_set,
        alternatives={"static_outside": record},
        alternative_files={"static_outside": file},
    )


def test_graphs_are_measured_side_by_side_wherever_their_weights_lie(rung_set, pool, tmp_path):
    rungs = with_outside_weights(rung_set, tmp_path)
    done = []
    groups = groups_of(rungs)
    found = measure_serving(rungs, groups, pool, LOAD, lambda: done.append(1))
    assert set(found) == {"vit_high", "vit_low", "static_outside"} and len(done) == 3 * 3
    assert found["vit_high"].cost_ratio == [1.0]
    for cost in found.values():  # no test asserts how fast
        taken = [*cost.latency_ms, *cost.ms_per_image[1], *cost.ms_per_image[4], *cost.cost_ratio]
        assert len(taken) == 4 and all(0 < value < 60_000 for value in taken)
        assert cost.client_cpu_ms[4][0] > 0


def test_a_batch_that_the_server_refuses_is_one_line(rung_set, pool):
    many = replace(pool, tensors=[pool.tensors[0]] * 33, encoded=[b""] * 33)
    with pytest.raises(ClientError, match="batch-size must be <= 32") as caught:
        measure_serving(rung_set, [["vit_high"]], many, replace(LOAD, batches=(33,)), lambda: None)
    assert "\n" not in str(caught.value)
