"""The server under test: what is asked of it at first, and when it is refused."""

from types import SimpleNamespace

import numpy as np
import pytest
from tritonclient.utils import InferenceServerException

from calibration.running import open_session, run_session
from client import ClientError
from perf import target as module
from perf.figures import PerfError
from perf.target import Target
from tests.unit.perf_workplace import calibration_of, write_rungs

ALL = {"vit_low": "READY", "vit_high": "READY", "router": "READY", "px6": "UNAVAILABLE"}


class FakeServer:
    """Serves a rung set and an artifact of its own; stands in for `InferenceServerClient`."""

    def __init__(self, rung_set, calibration, models=ALL, refuses=None):
        self.rung_set, self.calibration = rung_set, calibration
        self.models, self.refuses = models, refuses
        self.closed, self.parameters, self.score = False, {}, None

    def __call__(self, url):
        return self

    def close(self):
        self.closed = True

    def get_server_metadata(self, client_timeout):
        return SimpleNamespace(version="2.51.0")

    def get_model_repository_index(self, client_timeout):
        models = [SimpleNamespace(name=name, state=state) for name, state in self.models.items()]
        return SimpleNamespace(models=models)

    def infer(self, model, inputs, outputs, parameters):
        if model == self.refuses:
            raise InferenceServerException("[400] unexpected shape\nfor input", "400")
        (tensor,) = inputs
        image = np.frombuffer(tensor._get_content(), np.float32).reshape(tensor.shape())
        self.parameters[model] = parameters
        low = self._run("vit_low", image)
        score = self.calibration.score(low)[:, None] if self.score is None else self.score
        answers = {
            "vit_low": {"embedding": low.embedding},
            "vit_high": {"embedding": self._run("vit_high", image).embedding},
            "router": {"score": score},
        }
        return SimpleNamespace(as_numpy=answers[model].get)

    def _run(self, model, image):
        return run_session(open_session(self.rung_set.files[model]), image, layers=True)


@pytest.fixture
def local(tmp_path):
    return write_rungs(tmp_path / "local")


@pytest.fixture
def image():
    return np.random.default_rng(0).normal(size=(3, 8, 8)).astype(np.float32)


def connect(monkeypatch, server):
    monkeypatch.setattr(module.triton, "InferenceServerClient", server)
    return Target("host:1", None, None)


# --- connecting --------------------------------------------------------------------------------


def test_what_the_server_says_of_itself_is_kept(monkeypatch, local):
    server = FakeServer(local, calibration_of(local))
    with connect(monkeypatch, server) as target:
        assert target.version == "2.51.0"
        assert target.models == {"vit_low", "vit_high", "router"}  # what is not ready is not there
        assert target.meter() is None
        assert target.url("grpc") == "host:1"
    assert server.closed


@pytest.mark.parametrize("urls", [("http://host:1", None), ("host:1", "host"), ("", None)])
def test_an_address_that_is_none_is_refused(urls):
    with pytest.raises(ClientError, match="HOST:PORT"):
        Target(*urls, None)


# --- checking ----------------------------------------------------------------------------------


def test_a_server_of_the_local_files_passes(monkeypatch, local, image):
    server = FakeServer(local, calibration_of(local))
    connect(monkeypatch, server).check(local, calibration_of(local), image)
    assert server.parameters["router"] == {"threshold": 1e9}  # policy=high would give no score


@pytest.mark.parametrize("missing", ["vit_low", "vit_high", "router"])
def test_a_missing_model_is_named(monkeypatch, local, image, missing):
    server = FakeServer(local, calibration_of(local), {**ALL, missing: "LOADING"})
    with pytest.raises(PerfError, match=f"does not serve {missing}; serve the repository"):
        connect(monkeypatch, server).check(local, calibration_of(local), image)


@pytest.mark.parametrize(("seeds", "other"), [((3, 2), "vit_low"), ((1, 3), "vit_high")])
def test_other_weights_are_noticed(monkeypatch, tmp_path, local, image, seeds, other):
    theirs = write_rungs(tmp_path / "theirs", seeds=seeds)
    server = FakeServer(theirs, calibration_of(theirs))
    with pytest.raises(PerfError, match=rf"{other} at host:1 is not the local {other}\.onnx"):
        connect(monkeypatch, server).check(local, calibration_of(local), image)


@pytest.mark.parametrize("score", [np.nan, np.inf, 1e3])
def test_another_artifact_is_noticed_by_its_score(monkeypatch, local, image, score):
    server = FakeServer(local, calibration_of(local))
    server.score = np.array([[score]], np.float32)
    with pytest.raises(PerfError, match="give the --calibration it was assembled with"):
        connect(monkeypatch, server).check(local, calibration_of(local), image)


@pytest.mark.parametrize(("factor", "same"), [(1.04, True), (0.96, True), (1.06, False)])
def test_a_score_may_differ_as_another_device_makes_it(monkeypatch, local, image, factor, same):
    calibration = calibration_of(local)
    server = FakeServer(local, calibration)
    low = server._run("vit_low", 10 * image[np.newaxis])
    server.score = factor * calibration.score(low)[:, None]
    assert server.score.item() > 1  # below, the difference is absolute
    target = connect(monkeypatch, server)
    if same:
        target.check(local, calibration, 10 * image)
    else:
        with pytest.raises(PerfError, match="scores an image"):
            target.check(local, calibration, 10 * image)


def test_an_embedding_that_is_not_finite_is_no_match(monkeypatch, local, image):
    server = FakeServer(local, calibration_of(local))
    with pytest.raises(PerfError, match="is not the local"), np.errstate(invalid="ignore"):
        connect(monkeypatch, server).check(local, calibration_of(local), image * np.nan)


def test_a_server_of_other_images_is_told_in_one_line(monkeypatch, local, image):
    server = FakeServer(local, calibration_of(local), refuses="vit_low")
    with pytest.raises(PerfError, match="does not take the local rungs' images") as caught:
        connect(monkeypatch, server).check(local, calibration_of(local), image)
    assert "unexpected shape for input" in str(caught.value)
