"""Reference answers of a fit: some images that nothing was fitted on, and what they were answered.

They are read again from where `collect` found them, and travel with the artifact, resized and
cropped as the rungs take them; `--reference-images 0` keeps them at home.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace

import numpy as np

from bundle.graphs import GraphSet
from imaging import Preprocessing
from routing import ReferenceAnswers

from .images import ImagesError, open_images
from .outputs import Outputs
from .record import Fit
from .running import DecodedImage, decode_ahead

REFERENCE_IMAGES = 32


def with_reference_answers(
    fitted: Fit,
    outputs: Outputs,
    graph_set: GraphSet,
    images: int = REFERENCE_IMAGES,
    say: Callable[[str], None] = lambda line: None,
) -> Fit:
    """A fit whose artifact names reference answers for at most so many images.

    The images are read again from the source of the outputs. Where fewer can be had, `say` is
    called with a line that says so; where none can, the fit stays as it is.
    """
    if images == 0:
        return fitted
    # Rows that nothing was fitted on, one of each group, evenly over the ranks of the score.
    unfitted = fitted.independent[np.argsort(fitted.scores[fitted.independent], kind="stable")]
    places = np.linspace(0, len(unfitted) - 1, min(images, len(unfitted))).round().astype(int)
    rows = unfitted[places]
    try:
        source = open_images(outputs.source)
    except ImagesError as error:
        say(f"no reference answers: {error}")
        return fitted
    where = {name: index for index, name in enumerate(source.names)}
    wanted = {outputs.names[row]: row for row in rows if outputs.names[row] in where}
    preprocessing = Preprocessing.from_dict(graph_set.preprocessing)
    batches = [[where[name] for name in wanted]]
    with closing(decode_ahead(source, batches, preprocessing)) as decoded:
        (found,) = decoded
    there = [item for item in found if isinstance(item, DecodedImage)]
    same = [image for image in there if image.sha256 == outputs.hashes[wanted[image.name]]]
    if len(same) < len(rows):
        say(f"{len(rows) - len(same)} of {len(rows)} reference images are gone or have changed")
    if not same:
        return fitted
    kept = np.array([wanted[image.name] for image in same])
    answers = ReferenceAnswers.of(
        np.stack([image.tensor for image in same]),
        outputs.low.rows(kept),
        outputs.high.rows(kept),
        None if outputs.reference is None else outputs.reference.rows(kept),
        fitted.scores[kept],
    )
    named = {"sha256": hashlib.sha256(answers.to_bytes()).hexdigest(), "images": len(answers)}
    calibration = replace(fitted.calibration, reference_answers=named)
    return replace(fitted, calibration=calibration, answers=answers)
