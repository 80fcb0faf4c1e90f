"""Training a student step by step: what a step does follows from its number alone.

The learning rate rises over the first tenth of the steps and falls as a cosine to nothing; AdamW
(Loshchilov and Hutter 2019, "Decoupled weight decay regularization") with gradients clipped to
length 1. The rate shrinks from each block to the one before (Howard and Ruder 2018, "Universal
language model fine-tuning"). Order and views are drawn by generators seeded with the epoch, so that
a run that was stopped and resumed ends, on a CPU, in the same bits. The head is never trained.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from bundle.fidelity import FidelityLoss
from export.families import blocks
from export.recipes.adapted import AdaptedRung
from routing import RungOutputs
from routing.fidelity import cosine, fidelity_loss

from .device import Device
from .halting import MOST_DEPTH, follow, halting_of, penalty
from .objective import Objective
from .patches import Patches
from .request import AdaptationError
from .teacher import Batch, Teacher, View

WARM_UP = 0.1  # of the steps
WEIGHT_DECAY = 0.05
PATIENCE = 4  # held-out looks without a better one, after which training stops
Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Settings:
    """What the search chooses.

    Attributes:
        rate: the highest learning rate, of what follows the blocks; the last block's is
            `rate * decay`.
        decay: of the rate from each block to the one before, and from the first block to all that
            precedes it; 1: all learn alike.
        frozen: share of the blocks, from the first, that keep their weights, with all that precedes
            them; 0: everything learns.
    """

    rate: float
    decay: float = 1.0
    frozen: float = 0.0

    def __str__(self) -> str:
        """For people to read."""
        said = f"learning rate {self.rate:g}, layer-wise decay {self.decay:g}"
        return f"{said}, the first {self.frozen:.0%} frozen" if self.frozen else said


@dataclass(frozen=True)
class Lesson:
    """What is learned, and what it is judged by.

    Attributes:
        teacher: has answered all of it.
        learned: the images to learn from, by the SHA-256 of their bytes.
        held_out: others.
        views: of each image to learn from.
        seed: of the order.
        objective: what is made small.
        fidelity: when an answer is acceptable in place of the full model's.
        device: where it runs.
        batch: views in a step.
        depth: blocks that patch tokens shall run through on average; None: as their gate has it, or
            none halts.
    """

    teacher: Teacher
    learned: Sequence[bytes]
    held_out: Sequence[bytes]
    views: int
    seed: int
    objective: Objective
    fidelity: FidelityLoss
    device: Device
    batch: int
    depth: float | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which each image is learned from once, but for less than a batch."""
        return max(1, len(self.learned) // self.batch)

    def at(self, step: int) -> Batch:
        """The views of a step: each epoch shows another view of each image, in another order."""
        epoch, place = divmod(step, self.steps_per_epoch)
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.learned))
        rows = order[place * self.batch : (place + 1) * self.batch]
        return self.teacher.batch(
            [View(self.learned[row], (epoch + int(row)) % self.views) for row in rows]
        )

    def helps(self, point: Point, start: Point) -> bool:
        """Whether a student is worth more than it began with, and its tokens halt soon enough.

        Where a depth was asked for, what it began with is worth something, too: without it there is
        no gate. A start whose tokens halt too late is no rival.
        """
        if not self.in_time(point, start):
            return False
        rival = point is not start and self.in_time(start, start)
        if self.depth is not None and not rival:
            return True
        return point.held_out.beats(start.held_out)

    def in_time(self, point: Point, start: Point) -> bool:
        """Whether tokens halt soon enough: as asked, or as they did at the start."""
        depth, asked = point.held_out.depth, self.depth or start.held_out.depth
        return depth is None or asked is None or depth <= MOST_DEPTH * asked

    def judge(self, student: AdaptedRung) -> Held:
        """What a student is worth on the images that are held out."""
        found: list[list[torch.Tensor]] = []
        distances = []
        halting, depth = halting_of(student), 0.0
        with torch.inference_mode():
            for start in range(0, len(self.held_out), 2 * self.batch):
                keys = self.held_out[start : start + 2 * self.batch]
                truth = self.teacher.batch([View(key, 0) for key in keys])
                with self.device.autocast():
                    answers = student.answers(truth.image)
                if halting is not None and halting.seen is not None:
                    depth += float(halting.seen.depth) * len(keys) / len(self.held_out)
                distances.append(float(self.objective(answers, truth)) * len(keys))
                low = [answers[0], *answers[2:]]
                high = [truth.embedding, *([] if truth.logits is None else [truth.logits])]
                found.append([*low, *high])
        arrays = [torch.cat(parts).float().cpu().numpy() for parts in zip(*found, strict=True)]
        half = len(arrays) // 2
        answered, wanted = (
            RungOutputs(part[0], None, part[1] if half > 1 else None)
            for part in (arrays[:half], arrays[half:])
        )
        lost = fidelity_loss(self.fidelity.to_dict(), answered, wanted)
        return Held(
            sum(distances) / len(self.held_out),
            float(1 - lost.mean()),
            float(cosine(answered.embedding, wanted.embedding).mean()),
            None if halting is None else depth,
        )


@dataclass(frozen=True)
class Held:
    """What a student is worth on images it has not learned.

    Attributes:
        distance: the objective.
        acceptable: share of the answers that could stand in for the full model's.
        cosine: mean, of the embeddings.
        depth: mean number of blocks that patch tokens ran through; None: none halts.
    """

    distance: float
    acceptable: float
    cosine: float
    depth: float | None = None

    def beats(self, other: Held) -> bool:
        """Whether more answers are acceptable, or as many and nearer ones."""
        return (self.acceptable, -self.distance) > (other.acceptable, -other.distance)


@dataclass(frozen=True)
class Point:
    """One look at the held-out images.

    Attributes:
        step: steps taken.
        loss: mean objective of the steps since the look before; None: before the first step.
        held_out: what the student was worth.
    """

    step: int
    loss: float | None
    held_out: Held


@dataclass
class Run:
    """A student under training.

    Attributes:
        student: with all weights of its transformer.
        lesson: what it learns.
        settings: how.
        steps: of the whole schedule.
        patches: reads the student's patch tokens; None: they are not matched.
        step: steps taken.
        curve: looks at the held-out images; the first is at the weights it began with.
        best: the weights of `best_point`.
    """

    student: AdaptedRung
    lesson: Lesson
    settings: Settings
    steps: int
    patches: Patches | None = None
    step: int = 0
    curve: list[Point] = field(default_factory=list)
    best: Weights = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Make the optimiser."""
        self._losses: list[float] = []
        self.student.eval().requires_grad_(False)  # no dropout: its draws could not be resumed
        groups = _groups(self.student, self.settings)
        for group in groups:
            group["params"][0].requires_grad_(True)
        self._optimiser = torch.optim.AdamW(groups, lr=self.settings.rate)
        self._rates = [float(group["lr"]) for group in groups]
        self._parameters = [group["params"][0] for group in groups]

    @property
    def best_point(self) -> Point:
        """The look with the least distance of those that beat the first, or else the first."""
        better = [point for point in self.curve if self.lesson.helps(point, self.curve[0])]
        return min(better or self.curve[:1], key=_distance)

    @property
    def is_done(self) -> bool:
        """Whether all steps are taken, or the last looks were all farther off than one before.

        Of looks at which tokens halt too late none counts as near.
        """
        in_time = [point for point in self.curve if self.lesson.in_time(point, self.curve[0])]
        nearest = min(in_time, key=_distance, default=None)
        late = 0 if nearest is None else len(self.curve) - 1 - self.curve.index(nearest)
        return self.step >= self.steps or late >= PATIENCE

    def look(self) -> Point:
        """Judge the student as it is, and keep its weights where they are the best so far."""
        loss = float(np.mean(self._losses)) if self._losses else None
        point = Point(self.step, loss, self.lesson.judge(self.student))
        if not math.isfinite(point.held_out.distance):
            raise DivergedError(self.step)
        self.curve.append(point)
        self._losses = []
        if point is self.best_point:
            self.best = {k: value.cpu().clone() for k, value in self.student.weights().items()}
        return point

    def take_step(self) -> float:
        """One step of the optimiser; returns its objective.

        Raises:
            DivergedError: the objective or a gradient is no number; no weight has changed.
        """
        truth = self.lesson.at(self.step)
        factor = schedule(self.step, self.steps)
        for group, rate in zip(self._optimiser.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        with self.lesson.device.autocast():
            answers = self.student.answers(truth.image)
        patches = None if self.patches is None else self.patches.take(truth.patches.shape[1])
        distance = self.lesson.objective(answers, truth, patches)
        halting = halting_of(self.student)
        if halting is not None and halting.seen is not None and self.lesson.depth:
            distance = distance + penalty(halting.seen, self.lesson.depth)
        self._optimiser.zero_grad(set_to_none=True)
        distance.backward()  # type: ignore[no-untyped-call]
        length = nn.utils.clip_grad_norm_(self._parameters, 1.0)
        value = float(distance.detach())
        if not (math.isfinite(value) and math.isfinite(float(length))):
            raise DivergedError(self.step)
        self._optimiser.step()
        if halting is not None and self.lesson.depth:
            follow(halting, self.lesson.depth)
        self.step += 1
        self._losses.append(value)
        return value

    def state(self) -> dict[str, Any]:
        """Everything that `restore` needs, of tensors and JSON types."""
        return {
            "step": self.step,
            "steps": self.steps,
            "settings": asdict(self.settings),
            "losses": self._losses,
            "curve": [asdict(point) for point in self.curve],
            "student": self.student.weights(),
            "optimiser": self._optimiser.state_dict(),
            "best": self.best,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where a run with the same lesson, settings and steps was."""
        self.step, self._losses = state["step"], list(state["losses"])
        self.curve = [Point(**{**p, "held_out": Held(**p["held_out"])}) for p in state["curve"]]
        self.student.load(state["student"])
        self._optimiser.load_state_dict(state["optimiser"])
        self.best = state["best"]


def _distance(point: Point) -> float:
    return point.held_out.distance


class DivergedError(AdaptationError):
    """Training left the numbers.

    Attributes:
        step: at which.
    """

    def __init__(self, step: int) -> None:
        super().__init__(f"the objective is no number at step {step}")
        self.step = step


def fitting(student: AdaptedRung, lesson: Lesson) -> int:
    """How many views of a step fit into the GPU's memory: the batch halved until it does, or 0.

    The student's weights are others afterwards.
    """
    batch = lesson.batch // 2
    while batch:
        with contextlib.suppress(torch.cuda.OutOfMemoryError):
            Run(student, replace(lesson, batch=batch), Settings(0.0), 2).take_step()
            return batch
        batch //= 2
    return 0


def schedule(step: int, steps: int) -> float:
    """The learning rate of a step as a share of the highest."""
    warm = max(1, round(WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def _groups(student: AdaptedRung, settings: Settings) -> list[dict[str, Any]]:
    """Each weight that is trained, with its rate; vectors have no weight decay."""
    layers = blocks(student.model)
    below = {id(p): len(layers) - n for n, b in enumerate(layers) for p in b.parameters()}
    order = list(map(id, student.tower.parameters()))  # every family has them in the order it runs
    first = next(n for n, weight in enumerate(order) if weight in below)
    below |= dict.fromkeys(order[:first], len(layers) + 1)
    own = () if student.own is None else tuple(student.own.parameters())
    frozen = round(settings.frozen * len(layers))
    least = len(layers) - frozen if frozen else len(layers) + 1  # depth of the lowest that learns
    groups = [(weight, below.get(id(weight), 0)) for weight in student.tower.parameters()]
    groups = [(weight, depth) for weight, depth in groups if depth <= least]
    groups += [(weight, 0) for weight in own]
    if student.alignment is not None:
        groups += [(weight, 0) for weight in student.alignment.parameters()]
    return [
        {
            "params": [weight],
            "lr": settings.rate * settings.decay**depth,
            "weight_decay": WEIGHT_DECAY if weight.ndim > 1 else 0.0,
        }
        for weight, depth in groups
    ]
