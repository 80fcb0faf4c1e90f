"""A repository that live traffic is to certify, routers that write of it, and a rollout."""

import json
from pathlib import Path

import pytest

import calibration.live
from bundle import manifest
from bundle.fidelity import FidelityLoss
from bundle.graphs import GraphSet
from bundle.versions import Versions, live_folder, put, switch, switched
from calibration.anytime import images_needed
from calibration.live import LiveKeeper
from calibration.live_state import NAME
from export.live import live_artifact
from export.repository import RepositorySettings, assemble
from routing import Calibration
from routing.journal import Header, Journal, Record, retreat_file
from server.errors import ServerError
from tests.unit.loading_triton import without_pauses
from tests.unit.onnx_files import CLASSES, write_graph_set

EPSILON = 0.1
NEEDED = images_needed(EPSILON, 0.05)  # audited images, where none is lost, in the first test


class Killed(BaseException):
    """As kill -9 ends a process: nobody handles it."""


class Rollouts:
    """In place of a server: a rollout changes the repository, or fails.

    Attributes:
        fails: each rollout fails, and leaves the repository as it was.
        asked: the versions that were to answer.
    """

    def __init__(self):
        self.fails, self.asked = False, []

    def __call__(self, repository, access, switch_to, timeout_s):
        self.asked.append(switch_to)
        if self.fails:
            raise ServerError("the server is away")
        switch(repository, switch_to)

    def die_half_way(self, repository, access, switch_to, timeout_s):
        """The router has both versions, and nobody asks for the new one yet."""
        after = switched(repository, switch_to)
        before = Versions.load(repository)
        put(repository, before.beside(after.named))
        raise Killed


class Site:
    """One repository, with all that happens to it."""

    def __init__(self, folder, kind=None, classes=CLASSES, epsilon=EPSILON, **goal):
        self.graphs = GraphSet.load(write_graph_set(folder / "onnx", classes))
        self.folder, self.repository, self.said = folder, folder / "repository", []
        self.loss = FidelityLoss(kind or ("top1" if classes else "cosine"))
        self.assemble(epsilon, **goal)
        self.evidence = live_folder(self.repository)
        self.at, self.clock_s, self.written = 1.7e9, lambda: 1.7e9, 0
        self.access = object()

    def assemble(self, epsilon=EPSILON, **goal):
        file = self.folder / "first.json"
        live_artifact(self.graphs, self.loss, epsilon, **goal).save(file)
        assemble(self.graphs, file, self.repository, RepositorySettings())

    def keeper(self):
        return LiveKeeper(self.repository, self.access, self.said.append, clock_s=self.clock_s)

    def step(self, times=1):
        """A keeper that goes on from what there is, and ends."""
        for _ in range(times):
            keeper = self.keeper()
            keeper.step()
        return keeper.state

    @property
    def state_file(self):
        return self.evidence / NAME

    @property
    def live(self):
        return Versions.load(self.repository).live

    @property
    def artifact_file(self):
        return self.repository / f"router/{self.live}/calibration.json"

    @property
    def artifact(self):
        manifest.verify(self.repository)
        return Calibration.load(self.artifact_file)

    @property
    def header(self):
        """Of what the version that answers writes."""
        sha256 = manifest.sha256_file(self.artifact_file)
        return Header("", self.artifact.scoring_sha256, sha256, self.live)

    def journal(self):
        return Journal(self.evidence, self.header)

    def write(self, records):
        journal = self.journal()
        assert journal.append(records)
        journal.close()

    def traffic(self, count, worst=0.8, **changes):
        """A router writes of so many images and ends; those above `worst` are lost.

        Their scores are each hundredth in turn, so that a threshold t keeps a share of t.
        """
        self.write(self.records(count, worst, **changes))

    def records(self, count, worst=0.8, **changes):
        found = []
        for number in range(self.written, self.written + count):
            score = (37 * number % 100 + 0.5) / 100
            fields = {"score": score, "lost": score > worst, "change": score, "chance": 1.0}
            found.append(Record(**{**fields, "at": self.at + number, **changes}))
        self.written += count
        return found

    def mark(self):
        """A router goes back by itself."""
        self.evidence.mkdir(exist_ok=True)
        retreat_file(self.evidence, manifest.sha256_file(self.artifact_file)).touch()

    def kinds(self):
        """What happened, in one word each."""
        return [event["kind"] for event in self.keeper().state.events]


def in_place_of_servers(monkeypatch):
    """Rollouts from now on are the returned object's, and pages are their data alone."""
    rollouts = Rollouts()
    monkeypatch.setattr(calibration.live, "rollout", rollouts)
    without_pages(monkeypatch)
    return rollouts


def without_pages(monkeypatch):
    """Neither pages nor pauses, which take their time."""
    monkeypatch.setattr(calibration.live, "write_live", _write)
    without_pauses(monkeypatch)


def _write(path, data):
    path.write_text(json.dumps(data, allow_nan=False))


class Interruption:
    """Ends the process at one call of a function: before it does anything, or after it.

    Attributes:
        calls: so far.
    """

    def __init__(self, call, number=None, after=False):
        self._call, self._number, self._after, self.calls = call, number, after, 0

    def __call__(self, *arguments, **options):
        self.calls += 1
        is_the_one = self.calls == self._number
        if is_the_one and not self._after:
            raise Killed
        result = self._call(*arguments, **options)
        if is_the_one:
            raise Killed
        return result


def journals_in(folder: Path):
    return sorted(folder.glob("*.journal"))


@pytest.fixture(autouse=True)
def rollouts(monkeypatch):
    """In place of a server's, for every keeper of the test."""
    return in_place_of_servers(monkeypatch)


@pytest.fixture
def site(tmp_path):
    """A repository of a classifier, which nobody has asked yet."""
    return Site(tmp_path)
