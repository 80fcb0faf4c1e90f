"""The server under test: what is asked of it at first, and when it is refused."""

from types import SimpleNamespace

import numpy as np
import pytest

from calibration.running import open_session, run_session
from client import ClientError, InvalidRequestError
from perf import target as module
from perf.figures import PerfError
from perf.target import Target
from tests.unit.perf_workplace import calibration_of, write_rungs

ALL = {
    "vit_low": "READY",
    "vit_high": "READY",
    "router": "READY",
    "adaptive_tensor": "READY",
    "px6": "UNAVAILABLE",
}


class FakeServer:
    """Serves three models and scores an image; stands in for the clients of Triton and ours."""

    def __init__(self, models=ALL, score=None, error=None):
        self.models, self.score, self.error = models, score, error
        self.closed, self.checked = False, []

    def __call__(self, *arguments, **options):
        return self

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def close(self):
        self.closed = True

    def get_server_metadata(self, client_timeout):
        return SimpleNamespace(version="2.51.0")

    def get_model_repository_index(self, client_timeout):
        models = [SimpleNamespace(name=name, state=state) for name, state in self.models.items()]
        return SimpleNamespace(models=models)

    def infer_tensor(self, batch, threshold):
        assert threshold == 1e9  # policy=high would give no score
        if self.error is not None:
            raise self.error
        return [SimpleNamespace(score=self.score)]

    def check_answers(self, served, graphs, batch):
        self.checked.append((served, graphs, batch.shape))


@pytest.fixture
def local(tmp_path):
    return write_rungs(tmp_path / "local")


@pytest.fixture
def image():
    return np.random.default_rng(0).normal(size=(3, 8, 8)).astype(np.float32)


@pytest.fixture
def connect(monkeypatch):
    def connect(server):
        monkeypatch.setattr(module.triton, "InferenceServerClient", server)
        for name in ("ServedRungs", "GrpcClient"):
            monkeypatch.setattr(module, name, server)
        monkeypatch.setattr(module, "check_answers", server.check_answers)
        return Target("host:1", None, None)

    return connect


# --- connecting --------------------------------------------------------------------------------


def test_what_the_server_says_of_itself_is_kept(connect):
    server = FakeServer()
    with connect(server) as target:
        assert target.version == "2.51.0"
        assert target.models == {
            "vit_low",
            "vit_high",
            "router",
            "adaptive_tensor",
        }  # what is not ready is not there
        assert target.meter() is None
        assert target.url("grpc") == "host:1"
    assert server.closed


@pytest.mark.parametrize("urls", [("http://host:1", None), ("host:1", "host"), ("", None)])
def test_an_address_that_is_none_is_refused(urls):
    with pytest.raises(ClientError, match="HOST:PORT"):
        Target(*urls, None)


# --- checking ----------------------------------------------------------------------------------


def score_of(local, image):
    low = run_session(open_session(local.files["vit_low"]), image[np.newaxis], layers=True)
    return float(calibration_of(local).score(low)[0])


def test_a_server_of_the_local_files_passes(connect, local, image):
    server = FakeServer(score=score_of(local, image))
    connect(server).check(local, calibration_of(local), image)
    assert server.checked == [(server, local, (1, 3, 8, 8))]


@pytest.mark.parametrize("missing", ["vit_low", "vit_high", "router", "adaptive_tensor"])
def test_a_missing_model_is_named(connect, local, image, missing):
    server = FakeServer({**ALL, missing: "LOADING"})
    with pytest.raises(PerfError, match=f"does not serve {missing}; serve a repository"):
        connect(server).check(local, calibration_of(local), image)


@pytest.mark.parametrize("score", [np.nan, np.inf, 1e3])
def test_another_artifact_is_noticed_by_its_score(connect, local, image, score):
    with pytest.raises(PerfError, match="give the --calibration it was assembled with"):
        connect(FakeServer(score=score)).check(local, calibration_of(local), image)


@pytest.mark.parametrize(("factor", "same"), [(1.04, True), (0.96, True), (1.06, False)])
def test_a_score_may_differ_as_another_device_makes_it(connect, local, image, factor, same):
    score = factor * score_of(local, 10 * image)
    assert score > 1  # below, the difference is absolute
    target = connect(FakeServer(score=score))
    if same:
        target.check(local, calibration_of(local), 10 * image)
    else:
        with pytest.raises(PerfError, match="scores an image"):
            target.check(local, calibration_of(local), 10 * image)


def test_a_router_that_takes_no_threshold_is_told(connect, local, image):
    error = InvalidRequestError("requests may only lower the threshold")
    with pytest.raises(PerfError, match="assembled with --client-parameters any"):
        connect(FakeServer(error=error)).check(local, calibration_of(local), image)
