"""The road from a model and unlabelled images to an adapted state, or to "it did not help".

A tenth of the images are held out by their groups; nothing is learned from them, and they choose
the start, the settings, the state and whether it helped. The student starts from the model's own
weights and, where that answers better, an alignment fitted by ridge regression.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bundle.adapted import Adapted
from bundle.fidelity import FidelityLoss
from bundle.prints import encode
from bundle.recipe import Recipe
from calibration.align import fit_map
from calibration.splits import group_keys
from export.backbones import Backbone
from export.errors import first_line
from export.families import blocks
from export.request import spread
from report.terminal import Bars
from routing.provenance import RELEASE

from .device import Device
from .halting import IMAGES, begin, halting_of
from .interrupts import interrupts
from .objective import Objective
from .patches import Patches
from .request import MINUTES, AdaptationError, Request, check_images
from .result import Result, in_words, written
from .resuming import UNFINISHED, check_same, identity_of, unfinished_in
from .teacher import Images, Teacher, View
from .training import DivergedError, Held, Lesson, Run, Settings, Weights, fitting

HELD_OUT = 0.1  # of the groups
FEWEST_HELD_OUT, MOST_HELD_OUT = 10, 400  # groups; images: each look runs the student on them
LOOKS = 12  # at the held-out images in a training
# Gentle rates keep what the weights know: at 1e-4 they first forget much of it.
SETTINGS = (Settings(1e-5), Settings(3e-5), Settings(3e-5, decay=0.8), Settings(3e-5, frozen=0.5))
TRIAL = 0.03  # of the steps, for each of the settings


def distil(backbone: Backbone, request: Request, fidelity: FidelityLoss, bars: Bars) -> Result:
    """Train a recipe's weights to answer as the full model, and write them where that helped.

    Args:
        backbone: the model, with its head.
        request: what is wanted.
        fidelity: when an answer is acceptable.
        bars: where to show progress.

    Raises:
        AdaptationError: a request that cannot be met, or training that left the numbers before it
            was worth anything.
        UsageError: the recipe is not for this model.
        OSError: a file cannot be written.
        KeyboardInterrupt: stopped; the best state so far lies in `out` if it helped.
    """
    request = request.at(backbone.default_px[1])
    px = request.px or 0
    for one in (Recipe(px), request.recipe):
        backbone.check(one, px, trains=True)
    unfinished = request.out / UNFINISHED
    if request.resume != unfinished.is_file():
        raise AdaptationError(
            f"nothing to resume in {request.out}; leave --resume out"
            if request.resume
            else f"{request.out} holds a training that was stopped; add --resume to go on with it, "
            f"or remove {unfinished}"
        )
    objective = Objective(backbone.task)
    identity = identity_of(backbone, request, objective, fidelity)
    resumed = unfinished_in(unfinished, identity) if request.resume else None
    request.out.mkdir(parents=True, exist_ok=True)
    device = Device.find()
    bars.say(f"train on {device.words}")
    teacher = Teacher(backbone, px, request.cache, request.seed, device, request.batch)
    images = teacher.read_images(request.source, request.rows, bars)
    learned, held_out = divide(images, request)
    teacher.answer(request.source, images, learned, request.views, bars)
    lesson = Lesson(
        teacher=teacher,
        learned=[images.keys[row] for row in learned],
        held_out=[images.keys[row] for row in held_out],
        views=request.views,
        seed=request.seed,
        objective=objective,
        fidelity=fidelity,
        device=device,
        batch=request.batch,
        depth=request.recipe.halt or None,
    )
    groups = np.array(group_keys(images.pictures, request.group_by))[learned]
    identity |= {"learned": _sha256(lesson.learned), "held_out": _sha256(lesson.held_out)}
    if resumed is not None:
        check_same(resumed, identity, unfinished)
    return _Training(backbone, request, lesson, images, groups, identity, bars).run(resumed)


def divide(images: Images, request: Request) -> tuple[list[int], list[int]]:
    """The images to learn from and those to hold out; no group, and no picture, is on both sides.

    Raises:
        AdaptationError: too few.
    """
    groups = np.array(group_keys(images.pictures, request.group_by))
    names = np.unique(groups)
    check_images(len(names))
    rng = np.random.default_rng(request.seed)
    share = min(HELD_OUT, MOST_HELD_OUT / len(groups))
    chosen = rng.permutation(names)[: max(FEWEST_HELD_OUT, round(share * len(names)))]
    held_out = np.isin(groups, chosen)
    return np.flatnonzero(~held_out).tolist(), np.flatnonzero(held_out).tolist()


class _StoppedError(Exception):
    """Training was stopped by the user, between two steps."""


class _Training:
    """Start, search, training and verdict of one student."""

    def __init__(
        self,
        backbone: Backbone,
        request: Request,
        lesson: Lesson,
        images: Images,
        groups: NDArray[np.str_],  # of the images to learn from
        identity: Mapping[str, Any],
        bars: Bars,
    ) -> None:
        self._request, self._lesson, self._bars = request, lesson, bars
        self._backbone = backbone
        self._images, self._groups = images, groups
        self._student = lesson.device.take(backbone.trainable(request.recipe))
        self._patches = Patches(self._student.model, request.recipe.px or 0)
        self._began = time.monotonic()
        self._spent = 0.0  # seconds of the run that is resumed
        self._identity = dict(identity)

    def run(self, resumed: Mapping[str, Any] | None) -> Result:
        """Train, perhaps from the state of a run that was stopped, and write what came of it."""
        try:
            return self._run(resumed)
        except torch.cuda.OutOfMemoryError:
            pass  # what the error holds goes first: its frames have the tensors of the step
        raise AdaptationError(self._too_large())

    def _too_large(self) -> str:
        """What to do where a step does not fit into the memory of the GPU."""
        size, unfinished = fitting(self._student, self._lesson), self._request.out / UNFINISHED
        if not size:
            return "the GPU has no room for a step with one view; free memory, or adapt another"
        way_out = f"give --batch {size}"
        if unfinished.is_file():
            way_out = f"free memory and add --resume, or remove {unfinished} and {way_out}"
        return (
            f"the GPU has no room for steps with {self._lesson.batch} views, {size} fit; {way_out}"
        )

    def _run(self, resumed: Mapping[str, Any] | None) -> Result:
        unfinished = self._request.out / UNFINISHED
        run, notes = self._begun() if resumed is None else self._resumed(resumed)
        with interrupts() as stopped, contextlib.suppress(_StoppedError):
            try:
                self._train(run, notes, stopped)
            except DivergedError as error:
                if not run.best:
                    raise
                self._bars.say(f"{error}; training ends with the best state before")
        result = self._verdict(run, notes)
        if stopped:
            self._bars.say("stopped; what was learned is kept")
            raise KeyboardInterrupt
        unfinished.unlink(missing_ok=True)
        return result

    def _begun(self) -> tuple[Run, dict[str, Any]]:
        """A run at its first step, its start and its settings chosen."""
        lesson, student = self._lesson, self._student
        self._open_gate()
        plain = lesson.judge(student)
        start = plain
        if student.alignment is not None:
            self._align()
            start = lesson.judge(student)
            if not start.beats(plain):
                start = plain
                torch.nn.init.zeros_(student.alignment.weight)
                torch.nn.init.zeros_(student.alignment.bias)
        notes = {"plain": asdict(plain), "start": asdict(start), "aligned": start is not plain}
        without = "as it is" if plain.depth is None else "not aligned"
        self._bars.say(f"begins with {in_words(start)} ({without}: {in_words(plain)})")
        weights = {name: value.clone() for name, value in student.weights().items()}
        settings, steps, trials = self._search(weights)
        notes["trials"] = trials
        student.load(weights)
        return Run(student, lesson, settings, steps, self._patches), notes

    def _open_gate(self) -> None:
        """Let tokens halt at the depth that is asked for; a gate that was trained stays."""
        rung, lesson = halting_of(self._student), self._lesson
        if rung is None or lesson.depth is None or self._backbone.gate is not None:
            return
        self._bars.say("fit the first coordinate of tokens, which says when they halt")
        rows = spread(len(lesson.learned), IMAGES)  # of every kind: folders are often sorted by it
        some = [View(lesson.learned[row], 0) for row in rows]
        begin(rung, lesson.teacher.batch(some).image, lesson.depth, self._request.seed)

    def _align(self) -> None:
        """Let the alignment be what a ridge regression on the images to learn from finds."""
        lesson, student = self._lesson, self._student
        assert student.alignment is not None
        inputs, lacking = [], []
        keys = lesson.learned
        with self._bars.stage("align", len(keys)) as bar, torch.inference_mode():
            for start in range(0, len(keys), 2 * lesson.batch):
                some = keys[start : start + 2 * lesson.batch]
                truth = lesson.teacher.batch([View(key, 0) for key in some])
                with lesson.device.autocast():
                    embedding, layers, *_ = student.answers(truth.image)
                inputs.append(student.tokens(embedding, layers).float().cpu().numpy())
                lacking.append((truth.embedding - embedding.float()).cpu().numpy())
                bar.advance(len(some))
        weights, bias = fit_map(
            np.concatenate(inputs).astype(np.float64),
            np.concatenate(lacking).astype(np.float64),
            self._groups,
            self._request.seed,
        )
        with torch.no_grad():
            put = lesson.device.put
            student.alignment.weight.copy_(put(weights.T.astype(np.float32)))
            student.alignment.bias.copy_(put(bias.astype(np.float32)))

    def _search(self, start: Weights) -> tuple[Settings, int, list[dict[str, Any]]]:
        """Short trainings by each of `SETTINGS`; the one with the least distance, and all steps."""
        lesson, request = self._lesson, self._request
        steps = (request.epochs or 1) * lesson.steps_per_epoch
        if request.epochs is None:
            steps = self._affordable()
        trial = max(2, round(TRIAL * steps))
        found: list[tuple[float, Settings]] = []
        trials = []
        with self._bars.stage("try settings", trial * len(SETTINGS)) as bar:
            for settings in SETTINGS:
                self._student.load(start)
                run = Run(self._student, lesson, settings, trial, self._patches)
                with contextlib.suppress(DivergedError):
                    for _ in range(trial):
                        run.take_step()
                        bar.advance()
                    held = run.look().held_out
                    found.append((held.distance, settings))
                    trials.append({**asdict(settings), "steps": trial, "held_out": asdict(held)})
        if not found:
            raise AdaptationError("every setting left the numbers at once; is the model sound?")
        settings = min(found, key=lambda trial: trial[0])[1]
        self._bars.say(f"{settings}, {steps:,} steps of {lesson.batch}")
        return settings, steps, trials

    def _affordable(self) -> int:
        """How many steps fit into the minutes, trials and looks included."""
        lesson = self._lesson
        run = Run(self._student, lesson, SETTINGS[0], 8, self._patches)
        run.take_step()
        began = time.monotonic()
        for _ in range(4):
            run.take_step()
        step = (time.monotonic() - began) / 4
        began = time.monotonic()
        lesson.judge(self._student)
        look = time.monotonic() - began
        minutes = self._request.minutes or MINUTES
        taken = time.monotonic() - self._began + (LOOKS + 1 + len(SETTINGS)) * look
        affordable = (60 * minutes - taken) / step
        least_trials = 2 * len(SETTINGS)
        steps = int(min(affordable - least_trials, affordable / (1 + TRIAL * len(SETTINGS))))
        if steps < LOOKS:
            # Twice as many as at the least.
            needed = math.ceil((taken + 2 * (LOOKS + least_trials) * step) / 60)
            raise AdaptationError(
                f"{minutes:g} minutes are too few: a step takes {step:.1f} s here, a look at the "
                f"held-out images {look:.1f} s; give --minutes {needed} or more"
            )
        return steps

    def _train(self, run: Run, notes: dict[str, Any], stopped: list[int]) -> None:
        """Take steps, with looks in between, to the end or until it is stopped."""
        marks = {round(run.steps * look / LOOKS) for look in range(1, LOOKS + 1)}
        if not run.curve:
            run.look()
        title = f"train {self._request.recipe}"
        with self._bars.stage(title, run.steps) as bar:
            bar.advance(run.step)
            while not run.is_done and not stopped:
                loss = run.take_step()
                if run.step in marks:
                    held = run.look().held_out
                    self._keep(run, notes)
                    title = f"train {self._request.recipe}: held-out {held.acceptable:.1%}"
                bar.describe(f"{title}, loss {loss:.3f}")
                bar.advance()
            if stopped:
                self._keep(run, notes)
                raise _StoppedError  # out of the stage, whose bar stays where it is

    def _keep(self, run: Run, notes: dict[str, Any]) -> None:
        """Write what `--resume` goes on with; training goes on where that cannot be."""
        file = self._request.out / UNFINISHED
        fresh = file.with_suffix(".fresh")
        seconds = self._spent + time.monotonic() - self._began
        content = {"identity": self._identity, "notes": notes, "seconds": seconds, **run.state()}
        try:
            torch.save(content, fresh)
            os.replace(fresh, file)
        except (OSError, RuntimeError) as error:  # torch says RuntimeError where a disk is full
            fresh.unlink(missing_ok=True)
            self._bars.say(f"the state so far cannot be kept ({first_line(error)})")

    def _resumed(self, state: Mapping[str, Any]) -> tuple[Run, dict[str, Any]]:
        """The run that was stopped."""
        self._spent = state["seconds"]
        settings = Settings(**state["settings"])
        run = Run(self._student, self._lesson, settings, state["steps"], self._patches)
        run.restore(state)
        return run, state["notes"]

    def _verdict(self, run: Run, notes: dict[str, Any]) -> Result:
        """Write the best state where it is better than what it began with."""
        request, lesson = self._request, self._lesson
        minutes = (self._spent + time.monotonic() - self._began) / 60
        plain, start = Held(**notes["plain"]), Held(**notes["start"])
        point = run.best_point
        about = {
            "release": RELEASE,
            "environment": lesson.device.environment(),
            "minutes": minutes,
            "seed": request.seed,
            "images": {"learned": len(lesson.learned), "held_out": len(lesson.held_out)},
            "views": lesson.views,
            "batch": lesson.batch,
            "steps": {"taken": run.step, "of": run.steps, "best": point.step},
            "settings": asdict(run.settings),
            "depth": lesson.depth,
            "layers": len(blocks(self._student.model)),
            **notes,
            "curve": [asdict(look) for look in run.curve],
        }
        found = Result(None, plain, start, point.held_out, minutes, about)
        if not lesson.helps(point, run.curve[0]):
            return found
        pictures = self._images.pictures
        state = Adapted(
            folder=request.out,
            recipe=request.recipe,
            teacher=str(self._identity["teacher"]),
            image_px=request.px or 0,
            sha256="",
            image_prints=encode(pictures.hashes, pictures.looks),
            about=about,
        )
        resumable = (request.out / UNFINISHED).is_file()
        return replace(found, adapted=written(state, run.best, resumable))


def _sha256(keys: Sequence[bytes]) -> str:
    return sha256(b"".join(keys)).hexdigest()
