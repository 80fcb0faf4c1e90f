"""Certify from live traffic: read what the routers write, test, and roll out what is certified.

    router ─► NAME.live/*.journal ─► state.json ─► router/<N+1> ─► server rollout
                                         └─► live.html

One process keeps a repository. It may be stopped at any point, by kill -9 too, and goes on where it
was: what it has read and what it made of it are one file (`live_state`), and a version that was
being rolled out is rolled out again. It answers nobody, so nobody waits for it.
"""

from __future__ import annotations

import fcntl
import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

from bundle import manifest
from bundle.placing import working_folder
from bundle.versions import VersionError, Versions, drop, live_folder, present
from export.repository import RepositoryError
from export.versions import add_version
from report.live_page import write_live
from routing import Calibration, ManifestError, threshold_text
from routing.journal import retreat_file
from server.access import Access
from server.errors import ServerError, ServerUsageError
from server.rollout import RolloutInterruptedError, rollout

from .journals import Part, parts
from .live_artifact import artifact_of, missing, page_data
from .live_state import GAIN, NAME, STRETCH, LiveError, State
from .outputs import Made

PAGE, LOCK = "live.html", "lock"
PAGE_EVERY_S = 60.0  # drawing takes as much of a core as some tens of cheap answers
KEPT = 2  # versions of the router: the one that answers and the one before it
_TROUBLES = (RepositoryError, ManifestError, VersionError, ServerError, ServerUsageError, OSError)


class LiveKeeper:
    """Keeps one repository; make it with `keeping`.

    Attributes:
        state: all that is known.
        trouble: why the last rollout did not succeed; empty: it did.
    """

    def __init__(
        self,
        repository: Path,
        access: Access,
        say: Callable[[str], None],
        timeout_s: float = 120.0,
        clock_s: Callable[[], float] = time.time,
    ) -> None:
        self._repository, self._access, self._timeout_s = repository, access, timeout_s
        self._say, self._clock_s = say, clock_s
        self._drawn_s = -math.inf
        self._drawn_after: list[dict[str, Any]] = []
        self.folder = live_folder(repository)
        self.trouble = ""
        artifact = self._live()[1]
        self._check(artifact)
        self.folder.mkdir(parents=True, exist_ok=True)
        is_new = not (self.folder / NAME).exists()
        self.state = State.load(self.folder / NAME, artifact)
        if is_new:
            self._note("start", "every image goes to the full rung")

    def step(self) -> None:
        """Read what is new, test, roll out what follows from it, and draw the page.

        Raises:
            LiveError: the evidence is of other graphs than the repository's.
            OSError: a journal cannot be read, or the state cannot be written.
        """
        self._finish()
        version, artifact = self._live()
        self._check(artifact)
        if artifact.scoring_sha256 != self.state.scoring and not self.state.pending:
            raise LiveError(
                f"{self.folder} holds evidence about other graphs or another score than "
                f"{self._repository}; remove that folder, or assemble with another --live-folder"
            )
        before = self.state.audited
        read, number = list(parts(self.folder, self.state.places)), self.state.number
        for part in read:
            self._count(part, number)
        self.state.places = {part.file.name: part.place for part in read}
        self._heed(artifact, version)
        if self.state.audited > before or not self.state.points:
            self.state.point(self._clock_s())
        self._save()
        for part in read:
            if part.is_over:  # it is read to its end, and that is written down
                part.file.unlink(missing_ok=True)
        self._change(version, artifact)
        self._save()
        self._draw()

    def _draw(self) -> None:
        """Draw the page where something has happened, and else now and then."""
        now, last = time.monotonic(), self.state.events[-1:]
        if now - self._drawn_s >= PAGE_EVERY_S or last != self._drawn_after:
            write_live(self.folder / PAGE, self.page())
            self._drawn_s, self._drawn_after = now, last

    def take_score(self, other: Calibration) -> None:
        """Test the score of another artifact: a test of its own, of what comes from now on.

        Until it certifies a threshold every image escalates.

        Args:
            other: made with the same graphs, by `calibration fit`; its images are no evidence.

        Raises:
            LiveError: it was made with other graphs, or has no scores to take thresholds from.
        """
        artifact, state = self._live()[1], self.state
        if Made.of(other).difference(Made.of(artifact)) is not None:
            raise LiveError("--score: that artifact was made with other graphs than are served")
        if not len(other.reference_scores):
            raise LiveError("--score: that artifact has no reference scores; fit again")
        artifact = replace(
            artifact,
            threshold=None,
            certificate={**(artifact.certificate or {}), "certified": False},
            chosen_by={**artifact.chosen_by, "signal": other.signal},
            signal=other.signal,
            coefficients=other.coefficients,
            score_map=other.score_map,
        )
        if artifact.scoring_sha256 == state.scoring:
            return  # it is tested already
        fresh = deepcopy(state)
        fresh.retreat()
        fresh.test_quantiles(other.reference_scores)
        self._test_score(fresh, artifact, f"{other.signal} is tested")

    def page(self) -> dict[str, Any]:
        """What the page shows, as `report.live_page` describes it."""
        return {"repository": str(self._repository), **page_data(self.state, *self._live())}

    def summary(self) -> str:
        """Where things stand, in one line."""
        state, figures = self.state, self.state.figures()
        if state.served.threshold is None:
            return f"{state.audited:,} images audited: {missing(state)}"
        return (
            f"{state.audited:,} images audited: {figures['escalation']:.1%} escalate at threshold "
            f"{threshold_text(state.served.threshold)}, {figures['lost']} of {state.images:,} are "
            f"lost; {state.served.audit_share:.1%} are audited from now on"
        )

    def _check(self, artifact: Calibration) -> None:
        if not artifact.is_live:
            raise LiveError(
                f"what answers in {self._repository} has a calibration of its own; assemble a "
                "repository with python -m export repository --live, or let a live version answer"
            )

    def _live(self) -> tuple[int, Calibration]:
        """The version that answers by what the repository says, and its artifact."""
        version = Versions.load(self._repository).live
        return version, Calibration.load(self._artifact_file(version))

    def _artifact_file(self, version: int) -> Path:
        return self._repository / f"router/{version}/calibration.json"

    def _count(self, part: Part, number: int) -> None:
        """Count what is new, as long as it is for the test of this number.

        Where a journal has ended that, another instance may have written its own before.
        """
        state = self.state
        state.damaged += part.damaged
        if part.header is None:
            return
        if part.header.scoring != state.scoring:
            state.other += len(part.records)
            return
        if state.number != number:
            state.audited += len(part.records)
            return
        contradicted = state.observe(part.records)
        if contradicted is not None:
            self._stop_routers()
            self._tell_retreat("{} of {} audited images were lost".format(*contradicted))

    def _heed(self, artifact: Calibration, version: int) -> None:
        """Take over what a router has decided by itself."""
        artifact_sha256 = manifest.sha256_file(self._artifact_file(version))
        marked = retreat_file(self.folder, artifact_sha256).exists()
        if marked and artifact.threshold is not None and self.state.served.threshold is not None:
            self.state.retreat()
            self._tell_retreat("a router found so")

    def _stop_routers(self) -> None:
        """Let the routers go back within a moment: a rollout takes seconds, and may fail."""
        live = self._artifact_file(Versions.load(self._repository).live)
        with suppress(OSError):
            retreat_file(self.folder, manifest.sha256_file(live)).touch()

    def _tell_retreat(self, reason: str) -> None:
        self._note(
            "retreat",
            f"traffic contradicts the certificate ({reason}): every image goes to the full rung, "
            f"and test {self.state.number} begins",
        )

    def _change(self, version: int, artifact: Calibration) -> None:
        """Roll out what follows from the state, if it differs enough from what answers."""
        state, floor = self.state, artifact.chosen_by["audit_floor"]
        if state.pending:
            return  # the next step tries that one again
        if state.thresholds is None and len(state.stretch) >= STRETCH:
            fresh = deepcopy(state)
            artifact = replace(artifact, score_map=fresh.teach())
            self._test_score(fresh, artifact, "the score's range is known")
            return
        threshold, share = state.wanted(floor)
        if artifact.threshold != state.served.threshold:
            now = state.served
            self._roll_out(
                artifact_of(state, artifact, now.threshold, now.audit_share), "as decided"
            )
        elif self._is_worth_it(threshold, share, floor):
            self._roll_out(artifact_of(state, artifact, threshold, share), "certified")

    def _is_worth_it(self, threshold: float | None, share: float, floor: float) -> bool:
        served, test = self.state.served, self.state.test()
        if threshold is None or test is None:
            return False
        if served.threshold is None:
            return True
        kept = test.counts(threshold)[0] - test.counts(served.threshold)[0]
        is_bolder = threshold > served.threshold and kept >= GAIN * test.images
        return is_bolder or share <= served.audit_share / 2 or floor == share < served.audit_share

    def _test_score(self, fresh: State, artifact: Calibration, why: str) -> None:
        """Go on with a state about another score, once the version that writes it is added."""
        former, self.state = self.state, fresh
        fresh.scoring = artifact.scoring_sha256
        if not self._roll_out(artifact_of(fresh, artifact, None, 1.0), why):
            former.events, self.state = fresh.events, former

    def _roll_out(self, artifact: Calibration, why: str) -> bool:
        """Add a version and let it answer; where that fails it is tried again at the next step.

        Returns:
            Whether it was added.
        """
        try:
            self._clear()
            with working_folder("live") as folder:
                file = folder / "calibration.json"
                artifact.save(file)
                self.state.pending = add_version(self._repository, file)
        except _TROUBLES as error:
            self._tell_trouble(error)
            return False
        self._save()
        self._finish(why)
        return True

    def _finish(self, why: str = "as it was being done") -> None:
        """Let the version answer that is pending, if one is."""
        state = self.state
        if not state.pending:
            return
        try:
            if state.pending in present(self._repository):
                rollout(self._repository, self._access, state.pending, self._timeout_s)
        except RolloutInterruptedError as error:  # by somebody who wants this to end, too
            raise KeyboardInterrupt from error
        except _TROUBLES as error:
            self._tell_trouble(error)
            return
        self.trouble = ""
        version, artifact = self._live()
        state.pending = 0
        share = artifact.chosen_by["audit_share"]
        state.serve(artifact.threshold, share)
        at = "every image escalates"
        if artifact.threshold is not None:
            at = f"threshold {threshold_text(artifact.threshold)}"
        self._note("rollout", f"router/{version} answers, {why}: {at}, {share:.1%} audited")
        self._save()
        with suppress(*_TROUBLES):  # the next rollout tries again
            self._clear()

    def _clear(self) -> None:
        """Remove what an interrupted addition left, and versions that are no longer needed."""
        there = present(self._repository)
        for place in (self._repository / "router").iterdir():
            if place.name.isdigit() and int(place.name) not in there:
                shutil.rmtree(place)
        versions = Versions.load(self._repository)
        former = [number for number in there if number < versions.live][-(KEPT - 1) :]
        for number in set(there) - {versions.live, *former, *versions.named, versions.shadow}:
            if Calibration.load(self._artifact_file(number)).is_live:  # not one that somebody added
                drop(self._repository, number)
        live = manifest.sha256_file(self._artifact_file(versions.live))
        for file in self.folder.glob(f"{retreat_file(self.folder, '').name}*"):
            if file != retreat_file(self.folder, live):
                file.unlink(missing_ok=True)

    def _tell_trouble(self, error: Exception) -> None:
        if str(error) != self.trouble:  # it may be every step's
            self._note("failed", f"not rolled out: {error}")
        self.trouble = str(error)

    def _note(self, kind: str, words: str) -> None:
        self.state.event(kind, words, self._clock_s())
        self._say(words)

    def _save(self) -> None:
        self.state.save(self.folder / NAME)


@contextmanager
def keeping(
    repository: Path, access: Access, say: Callable[[str], None], timeout_s: float = 120.0
) -> Iterator[LiveKeeper]:
    """The only keeper of a repository, until the context ends.

    Args:
        repository: assembled with `export repository --live`.
        access: how to reach the server, which must have been started with `--allow-reload`.
        say: told what happens, a line at a time.
        timeout_s: seconds that a version may take to load.

    Raises:
        LiveError: the repository has a calibration of its own, another process keeps it, or the
            evidence is of another promise.
        VersionError: it is no assembled repository.
        OSError: the folder of the evidence cannot be written.
    """
    folder = live_folder(repository)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise LiveError(f"another process certifies from {folder}; let it") from None
        yield LiveKeeper(repository, access, say, timeout_s)
