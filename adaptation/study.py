"""What adaptation is worth on pictures that no part has seen, and what more images would add.

Every recipe answers the same test images in four states, by as many images to learn from as asked:
as it is, aligned, adapted, and adapted and then aligned by the images that its training held out.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bundle.alignment import tokens
from bundle.fidelity import FidelityLoss
from bundle.prints import among, encode, joined, without
from bundle.recipe import Recipe
from calibration.align import fit_map
from calibration.images import ImageSource
from calibration.metrics import needed_escalation
from calibration.splits import group_keys
from export.backbones import Backbone
from export.recipes.adapted import AdaptedRung
from report.terminal import Bars
from routing import RungOutputs
from routing.fidelity import fidelity_loss
from routing.signals import margin

from .device import Device
from .distil import distil, divide
from .request import AdaptationError, Request, check_images
from .teacher import Batch, Images, Teacher, View

RISKS = (0.05, 0.02)
STUDY_MINUTES = 25.0
SHARES = (0.25, 1.0)  # of the images to learn from


@dataclass(frozen=True)
class Row:
    """A recipe in one state.

    Attributes:
        recipe: of the cheap graph.
        state: `plain`, `aligned`, `adapted` or `adapted+aligned`.
        train_images: that it learned from, those that its training held out included.
        test_images: that it was judged on.
        agreement: share of them whose answer could stand in for the full model's.
        needed_at_5, needed_at_2: share of them that must escalate, those with the smallest margin
            first, so that at most 5 or 2 % of all answers are lost, if that threshold were known;
            None: a loss is no other class.
        minutes: of training.
    """

    recipe: str
    state: str
    train_images: int
    test_images: int
    agreement: float
    needed_at_5: float | None
    needed_at_2: float | None
    minutes: float


@dataclass(frozen=True, eq=False)
class Subject:
    """What a study is of.

    Attributes:
        backbone: the model, with its head.
        recipes: of cheap graphs.
        test: the images to judge by.
        request: what else a training is asked for. Its recipe is not looked at; its minutes are
            for all trainings together, each gets its share by images and by pixels.
        fidelity: when an answer is acceptable.
        head_prints: of the images that a head was fitted on, `bundle.prints.encode`.
    """

    backbone: Backbone
    recipes: Sequence[Recipe]
    test: ImageSource
    request: Request
    fidelity: FidelityLoss
    head_prints: str = ""

    def __post_init__(self) -> None:
        """Refuse before the full model answers."""
        px = self.request.px or self.backbone.default_px[1]
        for recipe in self.recipes:
            self.backbone.check(recipe, px, trains=True)
            replace(self.request, recipe=recipe).at(px)
        check_images(round(SHARES[0] * self.request.groups))


def study(subject: Subject, bars: Bars) -> Iterator[Row]:
    """Judge each recipe in each state, by each share of the images to learn from.

    A training that does not help leaves the aligned start, which is then what the row says; one
    that cannot be has no row, but a line.

    Raises:
        AdaptationError: no test image is another picture than those to learn from, or the full
            model's answers cannot be had.
    """
    request = subject.request.at(subject.backbone.default_px[1])
    device = Device.find()
    teacher = Teacher(
        subject.backbone, request.px or 0, request.cache, request.seed, device, request.batch
    )
    learn = teacher.read_images(request.source, request.rows, bars)
    test = teacher.read_images(subject.test, range(len(subject.test)), bars)
    test_keys = _unlearned(test, learn, subject.head_prints, bars)
    groups = np.array(group_keys(learn.pictures, request.group_by))
    names = np.random.default_rng(request.seed).permutation(np.unique(groups))
    weights = {
        (recipe, share): share * (recipe.px or 0) ** 2
        for recipe in (recipe.at(request.px or 0) for recipe in subject.recipes)
        for share in SHARES
    }
    minutes = request.minutes or STUDY_MINUTES
    judge = _Judge(subject, teacher, test_keys, device)
    for (recipe, share), weight in weights.items():
        some = np.isin(groups, names[: round(share * len(names))])
        rows = np.flatnonzero(some)
        student = device.take(subject.backbone.trainable(recipe))
        plain = judge.answers(student, test_keys)
        if share == SHARES[0]:
            yield judge.row(recipe, "plain", 0, plain)
        keys = [learn.keys[row] for row in rows]
        aligned = judge.aligned(student, keys, groups[rows], request.seed, plain)
        yield judge.row(recipe, "aligned", len(rows), aligned)
        name = f"{recipe.slug(0)}-{len(rows)}"
        asked = replace(
            request,
            recipe=recipe,
            out=request.out / name,
            places=learn.pictures.places[rows].tolist(),
            minutes=None if request.epochs else minutes * weight / sum(weights.values()),
        )
        shutil.rmtree(asked.out, ignore_errors=True)
        try:
            result = distil(subject.backbone, asked, subject.fidelity, bars)
        except AdaptationError as error:
            bars.say(f"{recipe} does not learn from {len(rows):,} images: {error}")
            continue
        for line in result.lines():
            bars.say(line)
        adapted = aligned
        if result.adapted is not None:
            student.adopt(result.adapted)
            adapted = judge.answers(student, test_keys)
        yield judge.row(recipe, "adapted", len(rows), adapted, result.minutes)
        if result.adapted is not None:
            part = Images(learn.pictures.only(rows), tuple(learn.keys[row] for row in rows))
            held_out = divide(part, asked)[1]
            keys = [part.keys[row] for row in held_out]
            adapted = judge.aligned(student, keys, groups[rows][held_out], request.seed, adapted)
        yield judge.row(recipe, "adapted+aligned", len(rows), adapted, result.minutes)


class _Judge:
    """Answers of students for the test images, and what they are worth."""

    def __init__(
        self, subject: Subject, teacher: Teacher, keys: Sequence[bytes], device: Device
    ) -> None:
        self._subject, self._teacher, self._device = subject, teacher, device
        self._head = subject.backbone.linear_head
        truths = [
            [batch.embedding.cpu(), *([] if batch.logits is None else [batch.logits.cpu()])]
            for batch in self._batches(keys)
        ]
        embedding, *logits = (_joined(some) for some in zip(*truths, strict=True))
        self._truth = RungOutputs(embedding, None, logits[0] if logits else None)

    def answers(self, student: AdaptedRung, keys: Sequence[bytes]) -> RungOutputs:
        """What a student answers for images as they are served, in FP32."""
        try:
            with torch.inference_mode():
                parts = [
                    [answer.cpu() for answer in student.answers(batch.image)]
                    for batch in self._batches(keys)
                ]
        except torch.cuda.OutOfMemoryError:
            size = self._subject.request.batch
            raise AdaptationError(
                f"the GPU has no room for {2 * size} images; give --batch {max(1, size // 2)}"
            ) from None
        embedding, layers, *logits = (_joined(some) for some in zip(*parts, strict=True))
        return RungOutputs(embedding, layers, logits[0] if logits else None)

    def aligned(
        self,
        student: AdaptedRung,
        keys: Sequence[bytes],
        groups: NDArray[np.str_],
        seed: int,
        answered: RungOutputs,
    ) -> RungOutputs:
        """The answers for the test images, aligned by these images; or as they are."""
        if student.alignment is None:
            return answered
        found = self.answers(student, keys)
        wanted = _joined([batch.embedding.cpu() for batch in self._batches(keys)])
        lacking = (wanted - found.embedding).astype(np.float64)
        weights, bias = fit_map(tokens(found).astype(np.float64), lacking, groups, seed)
        embedding = answered.embedding + tokens(answered) @ weights + bias
        embedding = embedding.astype(np.float32)
        logits = None
        if self._head is not None:
            with torch.inference_mode():
                logits = self._head(torch.from_numpy(embedding)).numpy()
        return RungOutputs(embedding, answered.cls_layers, logits)

    def row(
        self, recipe: Recipe, state: str, images: int, answered: RungOutputs, minutes: float = 0.0
    ) -> Row:
        """What these answers for the test images are worth."""
        fidelity = self._subject.fidelity
        lost = fidelity_loss(fidelity.to_dict(), answered, self._truth)
        at_5 = at_2 = None
        if fidelity.kind == "top1":
            scores = margin(answered, {})
            at_5, at_2 = (needed_escalation(scores, lost, risk) for risk in RISKS)
        return Row(
            str(recipe), state, images, len(lost), float(1 - lost.mean()), at_5, at_2, minutes
        )

    def _batches(self, keys: Sequence[bytes]) -> Iterator[Batch]:
        size = 2 * self._subject.request.batch
        for start in range(0, len(keys), size):
            yield self._teacher.batch([View(key, 0) for key in keys[start : start + size]])


def _unlearned(test: Images, learn: Images, head_prints: str, bars: Bars) -> list[bytes]:
    """The test images that are no form of an image to learn from, or of one that taught a head."""
    pictures = learn.pictures
    prints = encode(pictures.hashes, pictures.looks)
    prints = joined(prints, without(head_prints, prints))
    seen = among(test.pictures.hashes, test.pictures.looks, prints)
    if seen.any():
        what = "test images are to be learned from or taught the head, and are left out"
        bars.say(f"{seen.sum()} {what}")
    if seen.all():
        raise AdaptationError("no test image is left: all are to be learned from or the head's")
    return [key for key, known in zip(test.keys, seen.tolist(), strict=True) if not known]


def _joined(parts: Sequence[torch.Tensor]) -> NDArray[np.float32]:
    return torch.cat(list(parts)).float().numpy()


def to_dict(rows: Sequence[Row]) -> dict[str, Any]:
    """`summary.json`."""
    return {"rows": [asdict(row) for row in rows], "environment": Device.find().environment()}
