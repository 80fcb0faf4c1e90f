"""One real tritonserver for the whole session, serving `static-vit` assembled as a user would."""

import io
import re
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bundle.graphs import GraphSet
from calibration.images import SampleImages
from client import GrpcClient
from imaging import Preprocessing, decode
from routing import Calibration
from tests.commands import said
from tests.servers import grey_image, running, skip_stand_ins
from tests.shared_build import linked_copy, shared

ROOT = Path(__file__).resolve().parents[2]
ESCALATION_RATE = 0.3  # high enough that every batch of a few crops mixes easy and hard


def pytest_collection_modifyitems(items):
    """Skip what is the stand-in's where a tritonserver on PATH brings the C++ backend."""
    skip_stand_ins(items)


def run_command(*arguments):
    """Run `python -m ...` as README does; a failure shows what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def reference_outcome(server, version=1, image=None):
    """What the router found at its start: `same`, `within_slack` or `other`.

    It asks its rungs while requests are answered, so it is sent some: bytes for the version that
    answers, or, of another version that has been loaded, this image as a tensor.
    """
    deadline = time.monotonic() + 60
    while True:
        with GrpcClient(server.grpc_url) as client:
            if image is None:
                client.infer([grey_image()])
            else:
                client.infer_tensor(image[None], version=version)
        with urllib.request.urlopen(server.metrics_url, timeout=30) as response:
            text = response.read().decode()
        labels = rf'outcome="(\w+)",version="{version}"'
        pattern = r"^adaptive_vit_reference_answers\{" + labels + r"\} (\d)$"
        series = re.findall(pattern, text, re.M)
        assert len(series) == 3
        found = [outcome for outcome, value in series if value == "1"]
        if found:
            (outcome,) = found
            return outcome
        assert time.monotonic() < deadline, "the router does not say what it found"
        time.sleep(0.1)


def make_build(folder):
    """onnx/, outputs.json, calibration.json and model_repository/ of static-vit at 32/64 px."""
    onnx, outputs = folder / "onnx", folder / "outputs.json"
    artifact = folder / "calibration.json"
    run_command("export", "rungs", "--model", "static-vit", "--out", onnx)
    # The others here, as this process has imported what they need.
    said(
        *("calibration", "collect", "--images", "sample", "--limit", 400),
        *("--onnx", onnx, "--out", outputs, "--answers", folder / "answers"),
    )
    said(
        *("calibration", "fit", "--escalation-rate", ESCALATION_RATE, "--onnx", onnx),
        *("--outputs", outputs, "--out", artifact),
    )
    said(
        *("export", "repository", "--onnx", onnx, "--calibration", artifact),
        *("--out", folder / "model_repository", "--client-parameters", "any"),
    )


@pytest.fixture(scope="session")
def build(tmp_path_factory):
    """This process's copy of what `make_build` makes: a server writes into what it serves."""
    return linked_copy(shared("static_vit", make_build), tmp_path_factory.mktemp("build") / "build")


@pytest.fixture(scope="session")
def graph_set(build):
    return GraphSet.load(build / "onnx")


@pytest.fixture(scope="session")
def calibration(build):
    return Calibration.load(build / "calibration.json")


@pytest.fixture(scope="session")
def server(build):
    with running(build / "model_repository") as server:
        reference_outcome(server)  # from then on nothing but the tests' requests reaches a rung
        yield server


@pytest.fixture(scope="session")
def crops():
    """JPEG bytes that calibration has not seen."""
    return [crop.data for crop in SampleImages(48, seed=77)]


@pytest.fixture(scope="session")
def images(crops, graph_set):
    """The crops as the `image` tensor, FP32 (48, 3, 64, 64)."""
    preprocessing = Preprocessing.from_dict(graph_set.preprocessing)
    return np.stack([preprocessing(decode(data)) for data in crops])


@pytest.fixture(scope="session")
def unlike(crops):
    """PNG bytes of images unlike the calibration's: each a sheet of 64 small copies of a crop.

    What is in a copy is too fine for the cheap rung. A third of the images keep their cheap answer
    although its cosine to the full one is below 0.8; of crops 5 to 8 %.
    """
    return [_sheet(data) for data in crops]


def _sheet(data):
    pixels = np.tile(np.asarray(decode(data).convert("RGB"))[::8, ::8], (8, 8, 1))
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
