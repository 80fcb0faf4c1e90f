"""Exported graphs on a real server: they answer, side by side, wherever their weights lie."""

import shutil
from dataclasses import replace

import onnx
import pytest

from bundle import manifest
from bundle.graphs import Graph
from client import ClientError
from perf.images import QUIET, load_pool
from perf.prices import Served, price
from routing import WEIGHTS, RungRecord

SERVED = Served(instances=2, threads=1, batch=4, turns=1)


@pytest.fixture(scope="module")
def pool(graph_set):
    return load_pool(graph_set, "sample", 8)


def with_outside_weights(graph_set, folder):
    """The rungs, and the cheap one once more with its weights in a file beside it."""
    file = folder / "outside.onnx"
    (folder / "own").mkdir()
    # onnx reads no weights that have several links
    own = graph_set.low.place(folder / "own", "own")
    for path in (own.file, own.file.parent / WEIGHTS):
        copied = path.with_suffix(".copy")
        shutil.copy(path, copied)
        copied.replace(path)
    onnx.save_model(
        onnx.load(own.file),
        file,
        save_as_external_data=True,
        location=WEIGHTS,
    )
    hashes = (manifest.sha256_file(path) for path in (file, folder / WEIGHTS))
    record = RungRecord(graph_set.rungs["vit_low"].px, "px=32", *hashes)
    return graph_set.adding(Graph("outside", record, file))


def test_graphs_are_measured_side_by_side_wherever_their_weights_lie(graph_set, pool, tmp_path):
    rungs = with_outside_weights(graph_set, tmp_path)
    found = price(rungs, [], pool, SERVED, QUIET)
    assert set(found) == {"full", "px32", "outside"}
    assert found["full"]["cost_ratio"]["values"] == [1.0]
    for cost in found.values():  # no test asserts how fast
        spreads = [value for value in cost.values() if isinstance(value, dict)]
        assert len(spreads) == 5
        assert all(spread["runs"] == 1 and 0 < spread["median"] < 60_000 for spread in spreads)


def test_a_batch_that_the_server_refuses_is_one_line(graph_set, pool):
    many = replace(pool, tensors=[pool.tensors[0]] * 33, encoded=[b""] * 33)
    with pytest.raises(ClientError, match="batch-size must be <= 32") as caught:
        price(graph_set, ["full"], many, replace(SERVED, batch=33), QUIET)
    assert "\n" not in str(caught.value)
