"""Artifacts with reference answers, made by the product's own functions from tiny rungs."""

from dataclasses import replace

import numpy as np
from PIL import Image

from bundle.graphs import GraphSet
from calibration.answers import AnswerCache
from calibration.fidelity import Fidelity
from calibration.fit import EscalationRate, Options, fit
from calibration.images import open_images
from calibration.outputs import Made, Outputs, collect
from calibration.reference import REFERENCE_IMAGES, with_reference_answers
from tests.unit.onnx_files import write_graph_set

IMAGES = 200
SEEDS = (1, 2)


def write_pictures(folder, count=IMAGES, seed=0):
    """Noise of one colour each, so that the tiny rungs tell them apart."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for index in range(count):
        noise = rng.integers(-40, 40, (10, 12, 3)) + rng.integers(40, 216, 3)
        Image.fromarray(noise.astype(np.uint8)).save(folder / f"{index:03d}.png")
    return folder


def collected(folder, answering=SEEDS, served=SEEDS):
    """The rungs to serve, and outputs in their name.

    Args:
        folder: written to.
        answering: seeds of the graphs that are run for the outputs.
        served: seeds of the rungs. Where they are others, the outputs are what another runtime may
            compute from the same files.
    """
    if not (folder / "images").exists():
        write_pictures(folder / "images")
    rungs = {
        seeds: GraphSet.load(write_graph_set(folder / "onnx{}-{}".format(*seeds), seeds=seeds))
        for seeds in {answering, served}
    }
    source = open_images(str(folder / "images"))
    collect(AnswerCache(folder / "answers", source, rungs[answering]), folder / "outputs.json")
    outputs = Outputs.load(folder / "outputs.json")
    return rungs[served], replace(outputs, made=Made.by(rungs[served]))


def fitted(graph_set, outputs, target=None, images=REFERENCE_IMAGES, say=lambda line: None):
    """`python -m calibration fit`, to be saved."""
    target = target or EscalationRate(0.3)
    found = fit(outputs, graph_set, target, Options(Fidelity("top1")))
    return with_reference_answers(found, outputs, graph_set, images, say)
