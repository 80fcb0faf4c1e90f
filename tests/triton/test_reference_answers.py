"""Whether a server answers as its artifact was calibrated: one that does, and one that does not."""

import json
import time

import numpy as np
import pytest

from bundle.versions import Versions
from calibration.fit import EscalationRate
from calibration.outputs import Outputs
from client import GrpcClient
from export.repository import RepositorySettings, assemble
from export.versions import add_version
from server import Security, ServerStartError, TritonServer
from tests.commands import run, said
from tests.servers import running
from tests.triton.conftest import reference_outcome
from tests.unit.reference_files import collected, fitted

OTHER = "this server computes other answers than the calibration did; calibrate here"


def check(server, repository, *more):
    options = ("--answers", "--repository", repository, "--url", server.grpc_url)
    return run("server", "check", *options, *more)


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """Rungs, and an artifact in their name whose answers other graphs of the same shapes gave.

    Every hash fits, as it does where another runtime computes otherwise from the same files.
    """
    folder = tmp_path_factory.mktemp("foreign")
    graph_set, outputs = collected(folder, answering=(1, 2), served=(5, 6))
    fitted(graph_set, outputs).save(folder / "calibration.json")
    return graph_set, folder / "calibration.json"


def test_a_server_that_answers_as_calibrated_passes(build, server):
    assert reference_outcome(server) == "same"
    done = check(server, build / "model_repository")
    assert done.code == 0, done.err
    assert "this server answers as the calibration did: of 32 reference images 0" in done.out
    assert "calibrated on onnxruntime 1." in done.out
    assert "serving on tritonserver 2." in done.out
    done = check(server, build / "model_repository", "--json")
    found = json.loads(done.out)
    assert (found["outcome"], found["images"], found["version"]) == ("same", 32, 1)
    assert found["rungs"]["vit_high"]["images"] == 32
    assert found["rungs"]["vit_high"]["largest"] < 1e-4


def test_other_answers_under_the_same_hashes_are_told(foreign, tmp_path):
    graph_set, artifact = foreign
    repository = assemble(graph_set, artifact, tmp_path / "repository")
    with running(repository) as server:
        assert reference_outcome(server) == "other"
        deadline = time.monotonic() + 10  # Triton's log may come after its metric
        while (line := f"router: {OTHER}: of 32") not in server.log_path.read_text():
            assert time.monotonic() < deadline, f"not in the log: {line}"
            time.sleep(0.1)
        done = check(server, repository)
        assert done.code == 1 and OTHER in done.out and done.err == ""
        with GrpcClient(server.grpc_url) as client:  # only told: whoever asks is answered
            (answer,) = client.infer_tensor(np.zeros((1, 3, 8, 8), np.float32))
        assert np.isfinite(answer.embedding).all()


def test_a_router_that_shall_refuse_other_answers_does_not_start(foreign, tmp_path):
    graph_set, artifact = foreign
    settings = RepositorySettings(reference_check="refuse")
    repository = assemble(graph_set, artifact, tmp_path / "repository", settings)
    with pytest.raises(ServerStartError, match=OTHER), TritonServer(repository, free_ports=True):
        pass


def test_a_rollout_to_a_version_that_would_refuse_everything_is_taken_back(foreign, tmp_path):
    graph_set, artifact = foreign
    _, outputs = collected(tmp_path, answering=(5, 6), served=(5, 6))  # as they are served
    for name, rate in (("first", 0.3), ("second", 0.6)):
        fitted(graph_set, outputs, EscalationRate(rate)).save(tmp_path / f"{name}.json")
    settings = RepositorySettings(reference_check="refuse")
    repository = assemble(graph_set, tmp_path / "first.json", tmp_path / "repository", settings)
    add_version(repository, tmp_path / "second.json")
    add_version(repository, artifact)
    picture = (tmp_path / "images" / "000.png").read_bytes()

    def rollout(*more):
        options = ("--repository", repository, "--url", server.grpc_url, *more)
        return run("server", "rollout", *options)

    security = Security(allow_reload=True)
    with (
        running(repository, security=security) as server,
        GrpcClient(server.grpc_url, retry=None) as client,
    ):
        done = rollout("--to", 3)
        assert done.code == 1 and len(done.err.splitlines()) == 1
        assert "router/3 refuses every request: " + OTHER in done.err
        assert Versions.load(repository) == Versions(1, (1,))
        for _ in range(8):  # of each instance
            client.infer([picture])
        done = rollout("--to", 2)
        assert (done.code, done.out) == (0, "router/2 answers\n"), done.err
        for _ in range(8):  # it says so when it is true
            client.infer([picture])


def test_a_check_that_cannot_be_made_is_one_line(build, server, tmp_path):
    done = check(server, tmp_path)
    assert done.code == 2 and len(done.err.splitlines()) == 1 and done.out == ""


def test_outputs_are_collected_from_the_server_that_will_be_calibrated(build, server, tmp_path):
    options = ("--images", "sample", "--limit", 40, "--onnx", build / "onnx")
    options += ("--answers", tmp_path / "answers")
    for name, more in (("served", ("--url", server.grpc_url)), ("local", ())):
        said("calibration", "collect", *options, "--out", tmp_path / f"{name}.json", *more)
    served, local = (Outputs.load(tmp_path / f"{name}.json") for name in ("served", "local"))
    assert served.names == local.names and served.made == local.made
    for found, expected in ((served.low, local.low), (served.high, local.high)):
        np.testing.assert_allclose(found.embedding, expected.embedding, rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(found.logits, expected.logits, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(served.low.cls_layers, local.low.cls_layers, rtol=1e-3, atol=1e-3)
    assert served.high.cls_layers is None
    assert served.runtime["name"].startswith("tritonserver 2.")
    assert local.runtime["name"].startswith("onnxruntime ")
    assert served.runtime["processor"] == local.runtime["processor"]  # both are this machine


def test_a_server_of_other_rungs_is_no_source(foreign, server, tmp_path):
    onnx = foreign[0].files["vit_low"].parent
    options = ("--images", "sample", "--onnx", onnx, "--out", tmp_path / "o.json")
    done = run("calibration", "collect", *options, "--url", server.grpc_url)
    assert done.code == 2 and len(done.err.splitlines()) == 1
    assert "vit_low at" in done.err and "is not the rung in --onnx: image is" in done.err
    assert not (tmp_path / "o.json").exists()
