"""Adaptation of tiny models on tiny pictures, for the tests of it and of what uses it."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from adaptation import distil as road
from adaptation.device import Device
from adaptation.objective import Objective
from adaptation.request import Request, judged_by
from adaptation.result import Result, written
from adaptation.teacher import Teacher
from adaptation.training import Lesson, Settings
from bundle.adapted import Adapted
from bundle.recipe import Recipe
from calibration.images import FolderImages
from export.backbones import Backbone
from report.terminal import Bar, Bars
from tests.unit.export_tiny import PX, QUIET

RECIPE = "px=8"
COUNT = 80
QUICK = (Settings(2e-3), Settings(1e-3))  # a tiny random model takes larger steps


def write_pictures(folder: Path, count: int = COUNT, seed: int = 0) -> Path:
    """Write pictures of smooth random colours, of which no two look alike."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        pixels = rng.integers(0, 256, (6, 6, 3), np.uint8)
        image = Image.fromarray(pixels).resize((24, 24), Image.Resampling.BICUBIC)
        image.save(folder / f"{index:03d}.png")
    return folder


def one_thread() -> Device:
    """A device on which tiny models are as quick as anywhere, beside other tests."""
    torch.set_num_threads(1)
    return Device("cpu", half=False)


def request(folder: Path, images: Path, recipe: str = RECIPE, **fields: object) -> Request:
    """A request whose state lies in `folder/state`, and the teacher's answers beside it."""
    given = {"epochs": 8, "cache": folder / "cache", "out": folder / "state", **fields}
    return Request(Recipe.parse(recipe), FolderImages(images), **given)


def adapt(backbone: Backbone, asked: Request, bars: Bars = QUIET) -> Result:
    """Train as the command does, in large steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(road, "SETTINGS", QUICK)
        patch.setattr(Device, "find", one_thread)
        return road.distil(backbone, asked, judged_by(backbone.task, None, None), bars)


def lesson(backbone: Backbone, asked: Request, device: Device | None = None) -> Lesson:
    """What `distil` lets a student learn."""
    device = device or one_thread()
    teacher = Teacher(backbone, PX, asked.cache, asked.seed, device)
    images = teacher.read_images(asked.source, asked.rows, QUIET)
    learned, held_out = road.divide(images, asked)
    teacher.answer(asked.source, images, learned, asked.views, QUIET)
    return Lesson(
        teacher,
        [images.keys[row] for row in learned],
        [images.keys[row] for row in held_out],
        asked.views,
        asked.seed,
        Objective(backbone.task),
        judged_by(backbone.task, None, None),
        device,
        asked.batch,
    )


class Watching(Bars):
    """Keeps what is said, and calls a function at each advance of the stage of training."""

    def __init__(self, at_step: Callable[[int], None] = lambda step: None) -> None:
        super().__init__(Console(quiet=True))
        self.lines: list[str] = []
        self._at_step = at_step

    def say(self, line: str) -> None:
        """Keep a line."""
        self.lines.append(line)

    @contextlib.contextmanager
    def stage(self, title: str, total: int | None) -> Iterator[Bar]:
        """A stage that is watched where it is the training."""
        with super().stage(title, total) as bar:
            yield _Watched(bar, self._at_step) if title.startswith("train ") else bar


class _Watched:
    def __init__(self, bar: Bar, at_step: Callable[[int], None]) -> None:
        self._at_step, self.describe, self._taken = at_step, bar.describe, 0

    def advance(self, count: int = 1) -> None:
        self._taken += count
        self._at_step(self._taken)


def interrupting(step: int, times: int = 1) -> Watching:
    """Bars that press Ctrl-C once so many steps are taken."""

    def press(taken: int) -> None:
        if taken == step:
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)

    return Watching(press)


def disturbed(backbone: Backbone, recipe: Recipe, folder: Path, prints: str = "") -> Adapted:
    """A state with weights that differ from the model's in every place, as training leaves one."""
    student = backbone.trainable(recipe)
    torch.manual_seed(3)
    weights = {
        name: value + 0.1 * torch.randn_like(value) if value.is_floating_point() else value
        for name, value in student.weights().items()
    }
    folder.mkdir(parents=True)
    teacher = backbone.weights_sha256
    return written(Adapted(folder, recipe, teacher, PX, "", prints, {"seed": 3}), weights, False)
