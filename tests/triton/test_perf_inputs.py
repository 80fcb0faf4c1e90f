"""What the server receives from perf_analyzer is the image that was written for it, bit by bit."""

import hashlib
from collections import Counter

import pytest

from perf.analyzer_install import find_analyzer
from perf.perf_analyzer import Level, run, write_inputs
from perf.systems import System
from tests.servers import running
from tests.triton.test_perf_analyzer import possible_counts

COUNT = 6
# Keeps the hash of every element it receives.
MODEL = """
import hashlib, json
from pathlib import Path
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def initialize(self, args):
        config = json.loads(args["model_config"])
        self.log = Path(config["parameters"]["log"]["string_value"])
        self.name = config["input"][0]["name"]

    def execute(self, requests):
        answers = []
        for request in requests:
            rows = pb_utils.get_input_tensor_by_name(request, self.name).as_numpy()
            with self.log.open("a") as log:
                for row in rows:
                    data = row.tobytes() if row.dtype == np.float32 else row.item()
                    log.write(hashlib.sha256(data).hexdigest() + "\\n")
            done = pb_utils.Tensor("done", np.ones((len(rows), 1), np.bool_))
            answers.append(pb_utils.InferenceResponse([done]))
        return answers
"""
CONFIG = """
backend: "python"
max_batch_size: 4
input [ {{ name: "{name}" data_type: {kind} dims: [ {dims} ] }} ]
output [ {{ name: "done" data_type: TYPE_BOOL dims: [ 1 ] }} ]
instance_group [ {{ count: 1 kind: KIND_CPU }} ]
parameters [ {{ key: "log" value: {{ string_value: "{log}" }} }} ]
"""
INPUTS = {
    "tensors": ("image", "TYPE_FP32", "3, 64, 64"),
    "encoded": ("image_bytes", "TYPE_STRING", "1"),
}


@pytest.fixture(scope="module")
def receiver(tmp_path_factory):
    """A server with a model for each kind of input, and where each keeps what it received."""
    folder = tmp_path_factory.mktemp("receiver")
    logs = {}
    for model, (name, kind, dims) in INPUTS.items():
        logs[model] = folder / f"{model}.txt"
        version = folder / "repository" / model / "1"
        version.mkdir(parents=True)
        (version / "model.py").write_text(MODEL)
        config = CONFIG.format(name=name, kind=kind, dims=dims, log=logs[model])
        (version.parent / "config.pbtxt").write_text(config)
    with running(folder / "repository") as server:
        yield server, logs


@pytest.mark.parametrize(
    ("shared_memory", "concurrency"), [("none", 1), ("none", 3), ("system", 1), ("system", 3)]
)
@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_image_tensors_arrive_as_they_are(
    receiver, images, tmp_path, protocol, shared_memory, concurrency
):
    inputs = write_inputs(tmp_path / "image.json", list(images[:COUNT]))
    expected = [image.tobytes() for image in images[:COUNT]]
    check(receiver, "tensors", inputs, expected, protocol, shared_memory, concurrency)


@pytest.mark.parametrize("concurrency", [1, 3])
@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_encoded_images_arrive_as_they_are(receiver, crops, tmp_path, protocol, concurrency):
    inputs = write_inputs(tmp_path / "bytes.json", crops[:COUNT])
    check(receiver, "encoded", inputs, crops[:COUNT], protocol, "none", concurrency)


def check(receiver, model, inputs, expected, protocol, shared_memory, concurrency):
    """Every image arrives in two last rounds; before them comes a warm-up, and nothing else."""
    server, logs = receiver
    logs[model].unlink(missing_ok=True)
    url = server.grpc_url if protocol == "grpc" else server.http_url
    level = Level(
        *(System("any", "any", model), "mixed", concurrency, None, protocol, shared_memory)
    )
    run(level, url, inputs, 2, find_analyzer(), logs[model].with_suffix(".csv"))
    received = logs[model].read_text().split()
    hashes = [hashlib.sha256(data).hexdigest() for data in expected]
    assert len(received) in possible_counts(2 * COUNT)
    # All of them: none is the random one that perf_analyzer repeats by default.
    assert len(set(hashes)) == COUNT and set(received) == set(hashes)
    assert Counter(received[-2 * COUNT :]) == dict.fromkeys(hashes, 2)
