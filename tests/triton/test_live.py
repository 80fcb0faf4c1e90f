"""A repository that starts without a calibration, on a real server: what it earns, and gives back.

The fidelity loss is a cosine at a tolerance that divides the crops: half of them, the *good* ones,
are never lost, and the others always are. So a stream of good ones certifies every threshold, and
one of the others contradicts it.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from bundle import manifest
from bundle.versions import Versions, live_folder
from calibration.anytime import images_needed, share_of_delta
from calibration.journals import parts
from client import GrpcClient
from routing import Calibration
from routing.fidelity import cosine
from routing.journal import RETREAT
from server import Security
from tests.commands import run, said
from tests.servers import metrics, running, stubs, wait_for

ROOT = Path(__file__).resolve().parents[2]
EPSILON = 0.3
LEAST = images_needed(EPSILON, 0.1 * share_of_delta(1))
RELOADABLE = {"security": Security(allow_reload=True)}


@pytest.fixture(scope="module")
def divided(server, images):
    """The tolerance, the crops that are never lost at it, and those that always are."""
    with GrpcClient(server.grpc_url) as client:
        low, high = (
            np.stack([answer.embedding for answer in client.infer_tensor(images, policy=policy)])
            for policy in ("low", "high")
        )
    found = cosine(low, high)
    order = np.argsort(found)
    middle = len(order) // 2
    tolerance = 1 - float(found[order[middle - 1 : middle + 1]].mean())
    return tolerance, images[order[middle:]], images[order[:middle]]


@pytest.fixture
def assemble(build, divided, tmp_path):
    """Makes a live repository."""

    def make(*more, floor=0.5):
        said(
            *("export", "repository", "--live", "--max-risk", EPSILON, "--onnx", build / "onnx"),
            *("--fidelity", "cosine", "--tolerance", divided[0], "--audit-floor", floor),
            *("--out", tmp_path / "repository", *more),
        )
        return tmp_path / "repository"

    return make


def certify(server, repository):
    """`calibration live --once`, and its exit code and what it said on both streams."""
    url = ("--url", server.grpc_url)
    return run("calibration", "live", "--once", "--repository", repository, *url)


def ask(server, images, count, batch=4):
    """Ask for at least so many images, in turn; returns the answers."""
    answers = []
    with GrpcClient(server.grpc_url) as client:
        while len(answers) < count:
            start = len(answers) % len(images)
            answers += client.infer_tensor(images[start : start + batch])
    return answers


def state(repository):
    return json.loads((live_folder(repository) / "state.json").read_text())


def counted(server, name, **labels):
    """A counter of the router's, over all its versions."""
    wanted = [f'{label}="{value}"' for label, value in labels.items()]
    return sum(
        value
        for key, value in metrics(server).items()
        if key.startswith(f"adaptive_vit_{name}{{") and all(label in key for label in wanted)
    )


def gauges_of_threshold(server):
    """Series that tell of a threshold, or of what is certified of it."""
    figures = "threshold", "certified_risk", "calibrated_escalation_rate"
    names = tuple(f"adaptive_vit_{figure}" for figure in figures)
    return [key for key in metrics(server) if key.startswith(names)]


def artifact(repository):
    version = Versions.load(repository).live
    return Calibration.load(repository / f"router/{version}/calibration.json")


def test_a_service_earns_its_threshold_and_gives_it_back(assemble, divided):
    repository = assemble()
    _, good, bad = divided
    with running(repository, **RELOADABLE) as server:
        first = ask(server, good, 2 * LEAST)
        assert all(answer.escalated for answer in first)
        assert certify(server, repository).code == 0
        served = artifact(repository)
        assert served.threshold == 1.0  # nothing is lost, so the boldest of all
        assert served.certificate["certified"] and served.certificate["method"] == "live"
        assert served.certificate["n"] == len(first) and served.certificate["errors"] == 0
        answers = ask(server, good, 100)
        audited = sum(answer.escalated for answer in answers)
        assert 25 <= audited <= 75  # every other one, by a coin
        assert not any(answer.degraded for answer in answers)
        assert gauges_of_threshold(server)

        # The stream changes. The router goes back by itself; nobody else looks.
        asked = 0
        while not list(live_folder(repository).glob(f"{RETREAT}-*")):
            asked += len(ask(server, bad, 4))
            assert asked < 200
        time.sleep(1.1)  # the other instance looks once a second
        assert all(answer.escalated for answer in ask(server, bad, 40))
        assert wait_for(lambda: counted(server, "certificate_contradicted_total") >= 1)
        assert wait_for(lambda: not gauges_of_threshold(server))

        assert certify(server, repository).code == 0
        now = state(repository)
        assert now["number"] == 2 and now["served"]["threshold"] is None
        assert artifact(repository).threshold is None
        assert all(answer.escalated for answer in ask(server, good, 20))
        kinds = [event["kind"] for event in now["events"]]
        assert kinds.count("retreat") == 1 and kinds.count("failed") == 0
    manifest.verify(repository)
    assert (live_folder(repository) / "live.html").stat().st_size > 1000


def test_requests_with_parameters_and_probes_are_no_evidence(assemble, divided):
    repository = assemble()
    with running(repository, **RELOADABLE) as server, GrpcClient(server.grpc_url) as client:
        ask(server, divided[1], 8)
        client.infer_tensor(divided[2], policy="high")
        assert certify(server, repository).code == 0
    assert state(repository)["audited"] == 8


def test_no_record_is_lost_or_counted_twice_when_the_keeper_is_killed(assemble, divided):
    repository = assemble(floor=1.0)  # every image is audited
    rng = random.Random(5)
    with running(repository, **RELOADABLE) as server:
        asked, deadline = 0, time.monotonic() + 20
        while time.monotonic() < deadline:
            keeper = subprocess.Popen(
                [sys.executable, "-m", "calibration", "live", "--every-s", "0.5"]
                + ["--url", server.grpc_url, "--repository", str(repository)],
                cwd=ROOT,
                stderr=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )
            until = time.monotonic() + rng.uniform(1.5, 5.0)
            while time.monotonic() < until:
                asked += len(ask(server, divided[1], 4))
            keeper.kill()
            keeper.wait()
        for _ in range(3):  # a rollout that was killed half way is finished, and another may follow
            assert certify(server, repository).code == 0
        assert state(repository)["audited"] == asked
        assert state(repository)["damaged"] == 0
        assert state(repository)["served"]["threshold"] == artifact(repository).threshold == 1.0
    manifest.verify(repository)


def test_what_a_killed_router_has_written_counts(assemble, divided):
    repository = assemble()
    with running(repository, **RELOADABLE) as server:
        ask(server, divided[1], 40)
        for pid in stubs(server.process_ids(), "router"):
            os.kill(pid, signal.SIGKILL)
    written = sum(len(part.records) for part in parts(live_folder(repository), {}))
    assert written == 40
    with running(repository, **RELOADABLE) as server:
        ask(server, divided[1], 20)
        assert certify(server, repository).code == 0
    assert state(repository)["audited"] == 60
    # The dead instances' journals were read to their end and are gone.
    assert len(list(live_folder(repository).glob("*.journal"))) <= 2 + 2


def test_a_server_that_loads_nothing_goes_on_and_is_tried_again(assemble, divided):
    repository = assemble()
    with running(repository) as server:
        ask(server, divided[1], 2 * LEAST)
        done = certify(server, repository)
        assert done.code == 1
        assert all(answer.escalated for answer in ask(server, divided[1], 8))
    assert Versions.load(repository).live == 1
    with running(repository, **RELOADABLE) as server:
        assert certify(server, repository).code == 0
        assert not all(answer.escalated for answer in ask(server, divided[1], 40))
    assert artifact(repository).threshold == 1.0


def test_where_evidence_cannot_be_written_answers_go_on(assemble, divided, tmp_path):
    (tmp_path / "file").touch()
    repository = assemble("--live-folder", tmp_path / "file" / "below")
    with running(repository, **RELOADABLE) as server:
        assert all(answer.escalated for answer in ask(server, divided[1], 12))
        assert wait_for(lambda: counted(server, "audit_dropped_total") == 12)
        assert "evidence is not written" in server.log_path.read_text()
