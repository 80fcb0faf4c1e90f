"""Is the ONNX file the model? Names, types, shapes and values against the library, or an error.

Which tokens merge is a choice between numbers, as is whether an area's entropy is below a bound, or
a token's gate. Where the two are the same to within rounding, torch and ONNX Runtime may choose
another one each; both answers are then right, and they differ by more than rounding. Such images,
near ties, may be left out where a graph chooses tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from numpy.typing import NDArray

from export.errors import ExportError
from export.onnx_graph import COUNTS, INPUT_NAME, check_versions
from export.request import DEFAULT_ATOL, DEFAULT_RTOL

# Other sizes than the traced batch of 2, and odd ones, so that a batch baked into a shape shows.
BATCHES = (1, 3, 8)
# What an image keeps whose tokens were chosen in another way. That is for a token or two, or a
# cell, while a graph that chooses the wrong ones loses far more, for every image.
LEAST_COSINE = 0.9

# (image (B, 3, H, W)) -> output name -> tensor
Reference = Callable[[torch.Tensor], Mapping[str, torch.Tensor]]
# One batch: output name -> (B, ...) as ONNX Runtime answers (None: it failed) and as torch does.
Answers = tuple[Mapping[str, NDArray[Any] | None], Mapping[str, NDArray[Any]]]


@dataclass(frozen=True)
class Check:
    """One output compared at one batch size.

    Attributes:
        rung: the graph's name.
        batch: images in the batch.
        output: ONNX output name.
        max_abs_diff: largest absolute difference to the library.
        max_rel_diff: largest difference relative to the library's value, over values that are not
            below atol themselves.
        near_ties: images of the batch left out of both, see above.
    """

    rung: str
    batch: int
    output: str
    max_abs_diff: float
    max_rel_diff: float
    near_ties: int = 0


@dataclass(frozen=True)
class Failure:
    """Why one tensor of one rung is not what it should be.

    Attributes:
        rung: the graph's name.
        tensor: ONNX input or output name.
        reason: what is wrong, with the worst difference where values differ.
        max_abs_diff: the worst difference; None where structure differs.
    """

    rung: str
    tensor: str
    reason: str
    max_abs_diff: float | None = None


class ParityError(ExportError):
    """The exported graph differs from the model. Names every failing tensor.

    Attributes:
        failures: one per failing tensor, the worst batch of each.
    """

    def __init__(self, failures: list[Failure]) -> None:
        self.failures = failures
        found = "; ".join(f"{f.rung} {f.tensor}: {f.reason}" for f in failures)
        super().__init__(f"the ONNX graph differs from the model: {found}")


def check_parity(
    rung: str,
    file: Path,
    image_px: int,
    output_shapes: Mapping[str, tuple[int, ...]],
    reference: Reference,
    rtol: float = DEFAULT_RTOL,
    atol: float = DEFAULT_ATOL,
    may_differ: float = 0.0,
    images: NDArray[np.float32] | None = None,
) -> list[Check]:
    """Compare a rung's ONNX file with the library's own answers.

    Args:
        rung: name, for messages.
        file: the ONNX file.
        image_px: H = W of its input.
        output_shapes: name -> shape after the batch axis, in the expected order.
        reference: the library's outputs for a batch of images.
        rtol: accepted difference relative to the library's value.
        atol: accepted absolute difference, added to the relative one.
        may_differ: share of the images that may be answered in another way, see `_near_ties`; for
            graphs that choose tokens.
        images: as many as the largest batch, FP32 (B, 3, H, W); None: `sample_images`.

    Returns:
        One record per output and batch size.

    Raises:
        ParityError: anything differs. Values are compared only if the structure is right.
        ExportError: opset or IR version above the ceiling, or ONNX Runtime refuses the file.
    """
    model = onnx.load(file, load_external_data=False)
    check_versions(model)
    failures = structure_failures(rung, model, image_px, output_shapes)
    if failures:
        raise ParityError(failures)
    try:
        session = ort.InferenceSession(file, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions share no base class
        raise ExportError(f"ONNX Runtime does not load {file.name}: {error}") from error
    if images is None:
        images = sample_images(max(BATCHES), image_px, seed=0)
    batches: list[Answers] = []
    for batch in BATCHES:
        expected = reference(torch.from_numpy(images[:batch]))
        answers = _run(session, list(output_shapes), images[:batch])
        batches.append((answers, {name: expected[name].numpy() for name in output_shapes}))
    ties = _near_ties(batches, rtol, atol, may_differ)
    checks: list[Check] = []
    worst: dict[str, Failure] = {}
    for answered, truths in batches:
        for name, truth in truths.items():
            check, reason = _compare(rung, name, answered[name], truth, rtol, atol, ties)
            checks.append(check)
            before = worst.get(name)
            if reason and (before is None or check.max_abs_diff > (before.max_abs_diff or 0.0)):
                worst[name] = Failure(rung, name, reason, check.max_abs_diff)
    if worst:
        raise ParityError([worst[name] for name in output_shapes if name in worst])
    return checks


def structure_failures(
    rung: str, model: onnx.ModelProto, image_px: int, output_shapes: Mapping[str, tuple[int, ...]]
) -> list[Failure]:
    """Compare names, types, the dynamic batch axis and the shapes with what the contract says."""
    failures = _tensor_failures(
        rung, "input", list(model.graph.input), {INPUT_NAME: (3, image_px, image_px)}
    )
    return failures + _tensor_failures(rung, "output", list(model.graph.output), output_shapes)


def sample_images(count: int, px: int, seed: int) -> NDArray[np.float32]:
    """Seeded stand-ins for normalised photographs, (count, 3, px, px): coarse blobs plus noise.

    Noise alone would average out in the low rung's downsampling and check it on nearly flat images.
    """
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 7, 7, generator=generator)
    blobs = torch.nn.functional.interpolate(coarse, size=(px, px), mode="bicubic")
    noise = torch.randn(count, 3, px, px, generator=generator)
    return (blobs + 0.5 * noise).numpy()


def mixed_images(
    count: int, px: int, seed: int, mean: Sequence[float], std: Sequence[float]
) -> NDArray[np.float32]:
    """Images of which more and less is flat, so that they differ in the tokens that they keep.

    Those of `sample_images`, their values in whole levels from 0 to 255 as those of pictures are.
    From a line of its own on, each is of one colour at the left, and of levels that differ by one
    at the right; one image is so altogether and one nowhere.

    Args:
        count: of images, no multiple of 5.
        px: side of each.
        seed: of all that is random.
        mean: of the channels, that images are normalised by.
        std: standard deviation of the channels, the same.

    Returns:
        FP32 (count, 3, px, px), normalised.
    """
    generator = np.random.default_rng(seed)
    offset, scale = (np.reshape(values, (3, 1, 1)).astype(np.float32) for values in (mean, std))
    levels = ((sample_images(count, px, seed) * scale + offset) * 255).round().clip(0, 255)
    for number, image in enumerate(levels):
        # In an order in which the first ones, the smaller batches, are mixed as well.
        share = (5 * number + count // 2) % count / max(1, count - 1)
        flat = image[:, round(px * (1 - share)) :]  # (3, rows, px)
        flat[:] = generator.integers(0, 255, (3, 1, 1))
        flat[:, :, px // 2 :] += generator.integers(0, 2, flat[:, :, px // 2 :].shape)
    return np.asarray((levels / 255 - offset) / scale, dtype=np.float32)


def _tensor_failures(
    rung: str,
    role: str,
    found: list[onnx.ValueInfoProto],
    expected: Mapping[str, tuple[int, ...]],
) -> list[Failure]:
    names = [value.name for value in found]
    failures = [
        Failure(rung, name, f"{role} is missing (the graph has {', '.join(names) or 'none'})")
        for name in expected
        if name not in names
    ]
    failures += [
        Failure(rung, name, f"unexpected {role} (expected are {', '.join(expected)})")
        for name in names
        if name not in expected
    ]
    if not failures and names != list(expected):
        failures.append(Failure(rung, names[0], f"{role}s are in the order {', '.join(names)}"))
    for value in found:
        if value.name not in expected:
            continue
        tensor = value.type.tensor_type
        wanted = onnx.TensorProto.INT32 if value.name in COUNTS else onnx.TensorProto.FLOAT
        if tensor.elem_type != wanted:
            kind, other = map(onnx.TensorProto.DataType.Name, (tensor.elem_type, wanted))
            failures.append(Failure(rung, value.name, f"type is {kind}, expected {other}"))
        batch, *shape = (d.dim_param or d.dim_value for d in tensor.shape.dim) or (None,)
        if not isinstance(batch, str):
            failures.append(Failure(rung, value.name, f"batch axis is fixed at {batch}"))
        if tuple(shape) != expected[value.name]:
            reason = (
                f"shape after the batch axis is {tuple(shape)}, expected {expected[value.name]}"
            )
            failures.append(Failure(rung, value.name, reason))
    return failures


def _run(
    session: ort.InferenceSession, names: list[str], images: NDArray[np.float32]
) -> dict[str, NDArray[Any] | None]:
    try:
        answers = session.run(names, {INPUT_NAME: images})
    except Exception:  # a graph that fails at this batch size fails in every output
        return dict.fromkeys(names)
    return dict(zip(names, answers, strict=True))


def _compare(
    rung: str,
    name: str,
    answer: NDArray[Any] | None,
    truth: NDArray[Any],
    rtol: float,
    atol: float,
    ties: set[int],
) -> tuple[Check, str | None]:
    """The record, and what is wrong or None; rows in `ties` are left out."""
    batch = len(truth)
    broken = Check(rung, batch, name, float("inf"), float("inf"))
    if answer is None:
        return broken, f"ONNX Runtime fails at batch {batch}"
    if answer.shape != truth.shape:
        return broken, f"shape {answer.shape} at batch {batch}, expected {truth.shape}"
    if answer.dtype != truth.dtype:
        return broken, f"type {answer.dtype} at batch {batch}, expected {truth.dtype}"
    if not np.isfinite(answer).all():
        return broken, f"NaN or Inf at batch {batch}"
    kept = [row for row in range(batch) if row not in ties]
    difference = np.abs(answer[kept].astype(np.float64) - truth[kept])
    size = np.abs(truth[kept].astype(np.float64))
    relative = difference[size > atol] / size[size > atol]
    most, most_relative = (float(found.max(initial=0.0)) for found in (difference, relative))
    check = Check(rung, batch, name, most, most_relative, batch - len(kept))
    if (difference <= atol + rtol * size).all():
        return check, None
    reason = (
        f"differs by up to {check.max_abs_diff:.3g} at batch {batch} (rtol {rtol:g}, atol {atol:g})"
    )
    return check, reason


def _near_ties(batches: Sequence[Answers], rtol: float, atol: float, most: float) -> set[int]:
    """Rows to leave out of an exact comparison.

    Args:
        batches: each with the first B of the same images.
        rtol: accepted difference relative to torch's value.
        atol: accepted absolute difference, added to the relative one.
        most: share of the images that may be left out.

    Returns:
        The rows that differ in any batch; none where they are more than `most` of the images, or
        one's embedding keeps no cosine of `LEAST_COSINE`: then that is no matter of ties.
    """
    rows: set[int] = set()
    images = 0
    for answers, truths in batches:
        for name, truth in truths.items():
            answer = answers[name]
            if answer is None or answer.shape != truth.shape:
                return set()
            images = max(images, len(truth))
            beyond = ~(np.abs(answer - truth) <= atol + rtol * np.abs(truth))  # NaN is beyond
            found = np.flatnonzero(beyond.reshape(len(truth), -1).any(axis=1)).tolist()
            if any(not _cosine(answers, truths, row) >= LEAST_COSINE for row in found):
                return set()
            rows.update(found)
    return rows if len(rows) <= most * images else set()


def _cosine(
    answers: Mapping[str, NDArray[Any] | None], truths: Mapping[str, NDArray[Any]], row: int
) -> float:
    """Between an image's embeddings; NaN where one is not finite or not there."""
    answer, truth = answers["embedding"], truths["embedding"][row]
    if answer is None or answer.shape[1:] != truth.shape:
        return float("nan")
    return float(answer[row] @ truth / (np.linalg.norm(answer[row]) * np.linalg.norm(truth)))
