"""Another calibration beside the served one, switched to and back from while clients ask."""

import json
import re
import socket
import threading
import time
import urllib.request
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from bundle import manifest
from bundle.versions import Versions, put
from client import ClientError, GrpcClient, HttpClient, NotServedError
from export.repository import RepositorySettings, assemble
from perf.attribution import attribute
from perf.harness import Asker
from perf.images import Pool
from perf.systems import System
from perf.target import Target
from server import AdminKey, Security, ServingTls
from tests.commands import refused, said
from tests.servers import running
from tests.shared_build import linked_copy
from tests.triton.conftest import reference_outcome, run_command
from tests.unit.certificate_files import authority, issued
from tests.unit.client_servers import AwaitedClient
from tests.unit.test_export_versions import as_an_earlier_release

BATCH = 6
PAUSE_S = 0.1  # of a client between two requests: a server with all to do loads at a crawl
WAIT_S = 60.0


def add_version(repository, artifact, *more):
    options = ("--calibration", artifact, "--out", repository, *more)
    return said("export", "repository", "--add-version", *options)


def drop(repository, version):
    said("export", "versions", "--repository", repository, "--drop", version)


def rollout(server, repository, *more, run=said):
    url = ("--url", server.grpc_url)
    return run("server", "rollout", "--repository", repository, *url, *more)


def refused_rollout(server, repository, *more):
    return rollout(server, repository, *more, run=refused)


def serving(repository, allow_reload=True):
    return running(repository, security=Security(allow_reload=allow_reload))


def flip_a_bit(path):
    """What a bad disk does to a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.fixture(scope="module")
def artifacts(build, images, server, tmp_path_factory):
    """The session's artifact, and the same score with another threshold."""
    with GrpcClient(server.grpc_url) as client:
        scores = [answer.score for answer in client.infer_tensor(images)]
    second = tmp_path_factory.mktemp("second") / "calibration.json"
    said(
        *("calibration", "fit", "--threshold", float(np.median(scores)), "--onnx", build / "onnx"),
        *("--outputs", build / "outputs.json", "--out", second),
    )
    return build / "calibration.json", second


@pytest.fixture
def repository(build, tmp_path):
    """A repository of a test's own, with the first artifact."""
    return linked_copy(build / "model_repository", tmp_path / "repository")


@pytest.fixture(scope="module")
def reloadable(build, tmp_path_factory):
    """A server that loads models when told to, and its repository, which tests leave as it is."""
    folder = tmp_path_factory.mktemp("reloadable")
    repository = linked_copy(build / "model_repository", folder / "repository")
    with serving(repository) as server:
        yield server, repository


class Question:
    """One batch, and each version's right answers to it from the rungs and thresholds alone."""

    def __init__(self, server, artifacts, images, crops):
        thresholds = [json.loads(path.read_text())["threshold"] for path in artifacts]
        with GrpcClient(server.grpc_url) as client:
            scores = np.array([answer.score for answer in client.infer_tensor(images)])
            chosen = np.argsort(scores)[np.linspace(0, len(scores) - 1, BATCH).astype(int)]
            self.images, self.crops = images[chosen], [crops[index] for index in chosen]
            low = client.infer_tensor(self.images, policy="low")
            high = client.infer_tensor(self.images, policy="high")
        embeddings = [np.stack([answer.embedding for answer in rung]) for rung in (low, high)]
        self._right = {}
        for version, threshold in enumerate(thresholds, start=1):
            escalated = scores[chosen] > threshold
            self._right[version] = escalated, np.where(escalated[:, np.newaxis], *embeddings[::-1])
        assert (self._right[1][0] != self._right[2][0]).any()  # else every answer suits both

    def version_of(self, answers):
        """Which version gave these answers; None: they are right for neither."""
        for version, (escalated, embeddings) in self._right.items():
            if [answer.escalated for answer in answers] == escalated.tolist():
                found = np.stack([answer.embedding for answer in answers])
                if np.allclose(found, embeddings, rtol=1e-3, atol=1e-4):
                    return version
        return None


@pytest.fixture(scope="module")
def question(server, artifacts, images, crops):
    return Question(server, artifacts, images, crops)


class Traffic:
    """Clients that pause little and never try again; `found` is what became of their requests."""

    def __init__(self, server, question, pins=True):
        grpc, http = server.grpc_url, server.http_url
        self.found = Counter()
        self._question = question
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._ask, args=arguments)
            for arguments in (
                ("ensemble", GrpcClient, grpc),
                ("ensemble", HttpClient, http),
                ("router", GrpcClient, grpc),
                ("pinned", HttpClient, http),
            )
            if pins or arguments[0] != "pinned"
        ]

    def _ask(self, kind, protocol, url):
        with protocol(url, retry=None) as client:
            while not self._stop.is_set():
                try:
                    if kind == "ensemble":
                        answers = client.infer(self._question.crops)
                    else:
                        version = 1 if kind == "pinned" else None
                        answers = client.infer_tensor(self._question.images, version=version)
                    outcome = self._question.version_of(answers)
                except Exception as error:
                    outcome = str(error)
                self.found[kind, outcome] += 1
                time.sleep(PAUSE_S)

    def goes_on(self):
        """Wait until clients have had a good many answers more."""
        enough, deadline = self.found.total() + 20, time.monotonic() + WAIT_S
        while self.found.total() < enough:
            assert time.monotonic() < deadline, f"no answers any more; so far {self.found}"
            time.sleep(0.05)

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        self.goes_on()
        return self

    def __exit__(self, *error):
        self._stop.set()
        for thread in self._threads:
            thread.join()


def versions_that_answer(server, question):
    """Of the ensemble, of a request pinned to 1, of one pinned to 2 (None: not there)."""
    with GrpcClient(server.grpc_url, retry=None) as client:
        found = [question.version_of(client.infer(question.crops))]
        for version in (1, 2):
            try:
                answers = client.infer_tensor(question.images, version=version)
            except ClientError:
                found.append(None)
            else:
                found.append(question.version_of(answers))
    return found


def unpinned(server, image):
    """The version of the router that answers a request to it that names none, as the answer says.

    And the highest of those that answer a request that names them.
    """
    found = []
    with triton.InferenceServerClient(server.grpc_url) as client:
        tensor = triton.InferInput("image", [1, *image.shape], "FP32")
        tensor.set_data_from_numpy(image[np.newaxis])
        for version in ("", "1", "2"):
            try:
                answer = client.infer("router", [tensor], model_version=version).get_response()
                found.append(int(answer.model_version))
            except InferenceServerException as error:
                assert f"'router' version {version} is not" in error.message(), error
    return found[0], found[1:]


def wait_for_disagreement(server):
    """Until images were counted that one of the two versions alone would escalate."""
    pattern = r'adaptive_vit_shadow_images_total{(.*outcome="only_.*)} ([1-9]\d*)'
    deadline = time.monotonic() + WAIT_S
    while True:
        with urllib.request.urlopen(server.metrics_url, timeout=WAIT_S) as answer:
            found = re.findall(pattern, answer.read().decode())
        if found:
            assert all('candidate="2"' in labels for labels, _ in found)
            return
        assert time.monotonic() < deadline, "the shadow has seen no difference"
        time.sleep(0.1)


def load_by_hand(server, *models):
    """As other tools do, past the checks of `server rollout`."""
    with triton.InferenceServerClient(server.grpc_url) as control:
        for model in models:
            control.load_model(model)


# --- while clients ask -------------------------------------------------------------------------


def test_no_request_fails_while_a_version_comes_answers_and_goes_back(
    repository, artifacts, question
):
    with serving(repository) as server, Traffic(server, question) as traffic:
        assert versions_that_answer(server, question) == [1, 1, None]
        added = add_version(repository, artifacts[1], "--shadow", "0.5")
        assert "added router/2" in added
        traffic.goes_on()  # it lies there, and nobody has loaded it
        assert versions_that_answer(server, question) == [1, 1, None]

        told = rollout(server, repository, run=run_command)
        assert told == "router/1 answers; router/2 shadows 50% of the images\n"
        # A candidate answers nobody: not who pins none, not who pins it.
        assert unpinned(server, question.images[0]) == (1, [1])
        assert versions_that_answer(server, question) == [1, 1, None]
        wait_for_disagreement(server)
        traffic.goes_on()
        assert {o for kind, o in traffic.found if kind == "router"} == {1}, traffic.found

        told = rollout(server, repository, "--to", 2, run=run_command)
        assert told == "router/2 answers; router/1 can be pinned too\n"
        assert versions_that_answer(server, question) == [2, 1, 2]
        assert unpinned(server, question.images[0]) == (2, [1, 2])
        traffic.goes_on()

        assert rollout(server, repository, "--to", 1) == "router/1 answers\n"
        assert versions_that_answer(server, question) == [1, 1, None]
        assert unpinned(server, question.images[0]) == (1, [1])
        traffic.goes_on()

        drop(repository, 2)
        assert rollout(server, repository) == "router/1 answers\n"
        traffic.goes_on()
    manifest.verify(repository)
    kinds = {kind: {o for k, o in traffic.found if k == kind} for kind, _ in traffic.found}
    assert kinds == {"ensemble": {1, 2}, "router": {1, 2}, "pinned": {1}}, traffic.found


def test_a_candidate_loaded_by_hand_answers_nobody_who_did_not_pin_it(
    repository, artifacts, question
):
    """Triton gives it the requests to `router` that pin no version, and no client sends any."""
    add_version(repository, artifacts[1], "--shadow", "0.5")
    with serving(repository) as server:
        put(repository, replace(Versions.load(repository), served=(1, 2)))
        load_by_hand(server, "router")
        assert unpinned(server, question.images[0]) == (2, [1, 2])
        clients = (
            GrpcClient(server.grpc_url),
            HttpClient(server.http_url),
            AwaitedClient(server.grpc_url),
        )
        for client in clients:
            assert question.version_of(client.infer_tensor(question.images)) == 1
            assert question.version_of(client.infer(question.crops)) == 1
            assert question.version_of(client.infer_tensor(question.images, version=2)) == 2
            client.close()
        rollout(server, repository)
        assert unpinned(server, question.images[0]) == (1, [1])


def test_a_repository_of_an_earlier_release_is_served_and_switched(repository, artifacts, question):
    as_an_earlier_release(repository)
    with serving(repository) as server:
        add_version(repository, artifacts[1])
        told = rollout(server, repository, "--to", 2)
        assert told == "router/2 answers, without adaptive_tensor\n"
        assert versions_that_answer(server, question) == [2, None, 2]
        with GrpcClient(server.grpc_url) as client:
            with pytest.raises(NotServedError, match="'adaptive_tensor' is not found") as refusal:
                client.infer_tensor(question.images)
            assert "\n" not in str(refusal.value)
            assert client.task().kind == "classes"
        with GrpcClient(server.grpc_url, tensor_model="router") as client:
            assert question.version_of(client.infer_tensor(question.images)) == 2


def test_a_careful_repository_serves_what_answers_and_nothing_else(
    graph_set, artifacts, question, tmp_path
):
    # Its own calls of the rungs, for the audit and the reference answers, are under way meanwhile.
    repository = assemble(
        graph_set, artifacts[0], tmp_path / "repository", RepositorySettings(audit_fraction=1.0)
    )
    with serving(repository) as server, Traffic(server, question, pins=False) as traffic:
        add_version(repository, artifacts[1])
        for version in (2, 1, 2, 1):
            told = rollout(server, repository, "--to", version)
            assert told == f"router/{version} answers\n"
            assert unpinned(server, question.images[0]) == (version, [version])
            traffic.goes_on()
        assert server.is_running()
    # None of them failed, on the way neither.
    kinds = {kind: {o for k, o in traffic.found if k == kind} for kind, _ in traffic.found}
    assert kinds == {"ensemble": {1, 2}, "router": {1, 2}}, traffic.found


def test_a_repository_changed_twice_while_nobody_looked_is_loaded_without_a_failure(
    repository, artifacts, question
):
    with serving(repository) as server, Traffic(server, question) as traffic:
        add_version(repository, artifacts[1])
        said("export", "versions", "--repository", repository, "--live", 2, "--drop", 1)
        # The server's ensemble names a version that its router is about to lose.
        rollout(server, repository)
        assert versions_that_answer(server, question)[0] == 2
    ensemble = {outcome for kind, outcome in traffic.found if kind == "ensemble"}
    assert ensemble == {1, 2}, traffic.found


def test_a_switched_repository_is_served_by_a_new_server_and_can_be_measured(
    repository, artifacts, question
):
    add_version(repository, artifacts[1])
    said("export", "versions", "--repository", repository, "--live", 2)
    ensemble = System("ensemble", "from image bytes", "adaptive_vit", takes_bytes=True)
    pool = Pool("crops", question.crops, question.images, [None] * BATCH, ())
    with (
        serving(repository, allow_reload=False) as server,
        Target(server.grpc_url, None, server) as target,
    ):
        assert versions_that_answer(server, question) == [2, 1, 2]
        for version in (1, 2):  # nothing else is to reach a rung
            reference_outcome(server, version, question.images[0])
        time.sleep(0.5)  # a request is counted a moment after its answer
        asker = Asker(target, pool, has_head=False)
        found = attribute(target, asker, ensemble, range(BATCH), 0.0, lambda: None)
    # Both versions have counters; time that is nobody's would be far below zero. A server may
    # count a little of the time after its answer has arrived.
    assert found["requests"] == BATCH
    assert all(part["ms"] >= -0.05 * found["total_ms"] for part in found["parts"]), found


# --- refused, and the old version goes on --------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (flip_a_bit, "router/2/calibration.json differs from its SHA-256"),
        (lambda path: path.write_bytes(path.read_bytes()[:100]), "calibration.json differs"),
        (lambda path: path.unlink(), "router/2/calibration.json is listed .* but missing"),
    ],
    ids=["a flipped bit", "half written", "missing"],
)
def test_a_damaged_artifact_is_refused_by_hash(reloadable, artifacts, question, damage, words):
    server, repository = reloadable
    add_version(repository, artifacts[1])
    path = repository / "router/2/calibration.json"
    intact = path.read_bytes()
    damage(path)
    try:
        with triton.InferenceServerClient(server.grpc_url) as control:
            with pytest.raises(InferenceServerException) as refusal:
                control.load_model("router")  # past our own check, as other tools do
        code, complaint = refused_rollout(server, repository, "--to", 2)
        assert versions_that_answer(server, question) == [1, 1, None]
    finally:
        path.write_bytes(intact)
        drop(repository, 2)
    assert re.search(words, complaint) and code == 2
    if damage is flip_a_bit:
        assert re.search(words, refusal.value.message())


def test_a_version_that_does_not_load_leaves_server_and_repository_as_they_were(
    reloadable, artifacts, question
):
    server, repository = reloadable
    add_version(repository, artifacts[1], "--shadow", "0.5")
    before = Versions.load(repository)
    with (repository / "router/2/model.py").open("a") as file:
        file.write("raise RuntimeError('no such luck')\n")
    manifest.write(repository)  # its hashes are right, its code is not
    try:
        code, complaint = refused_rollout(server, repository, "--to", 2)
        assert versions_that_answer(server, question) == [1, 1, None]
        assert Versions.load(repository) == before
        manifest.verify(repository)
    finally:
        drop(repository, 2)
    assert code == 1
    assert complaint.startswith("error: router was not loaded: ") and "no such luck" in complaint
    shadow = "router/1 answers; router/2 shadows 50% of the images"  # on disk, and never loaded
    assert f"the repository says {shadow}; but the server at" in complaint
    assert "says router/1 answers; to make them agree, run python -m server rollout" in complaint


def test_a_server_with_fixed_models_says_how_to_start_it(server, build):
    repository = build / "model_repository"
    code, complaint = refused_rollout(server, repository)
    assert code == 1
    assert "loads no models while it serves; start it with --allow-reload" in complaint
    assert "router/1 goes on answering" in complaint


def test_an_unknown_version_is_refused_before_anything_is_touched(reloadable):
    server, repository = reloadable
    files = {path: path.read_bytes() for path in repository.rglob("*") if path.is_file()}
    code, complaint = refused_rollout(server, repository, "--to", 7)
    assert (code, files) == (2, {path: path.read_bytes() for path in files})
    assert "the router has no version 7" in complaint


def test_where_no_server_answers_the_repository_stays(repository, artifacts):
    add_version(repository, artifacts[1])
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        url = f"127.0.0.1:{held.getsockname()[1]}"
        options = ("--repository", repository, "--url", url)
        code, complaint = refused("server", "rollout", *options, "--to", 2)
    assert code == 2 and f"no answer from a server at {url}" in complaint
    assert Versions.load(repository).live == 1


# --- in production -------------------------------------------------------------------------------


def test_over_tls_and_with_the_admin_key_and_not_without(repository, artifacts, tmp_path):
    key = tmp_path / "admin.key"
    key.write_text("0123456789abcdef0123456789abcdef\n")
    key.chmod(0o600)
    ca = authority(tmp_path, "ca")
    pair = issued(tmp_path, ca, "server", "DNS:localhost,IP:127.0.0.1")
    add_version(repository, artifacts[1])
    security = Security(
        production=True,
        allow_reload=True,
        tls=ServingTls(pair.certificate, pair.key),
        admin_key=AdminKey.read(key),
    )
    trusting = ("--tls-ca", ca.certificate)
    with running(repository, security=security) as server:
        code, complaint = refused_rollout(server, repository, "--to", 2)
        assert code == 2 and "wants TLS" in complaint
        code, complaint = refused_rollout(server, repository, "--to", 2, *trusting)
        assert code == 1 and "--admin-key-file" in complaint and "0123456789" not in complaint
        assert Versions.load(repository).live == 1
        more = ("--to", 2, *trusting, "--admin-key-file", key)
        told = rollout(server, repository, *more, run=run_command)
        assert told.startswith("router/2 answers; ")
