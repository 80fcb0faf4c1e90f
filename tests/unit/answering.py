"""A cache of answers in a test's folder, and what tests of it compare."""

import numpy as np

from calibration.answers import AnswerCache
from calibration.outputs import wanted
from tests.unit.image_files import MemorySource

CHUNK = 32  # images of a file, where tests need several of them
COUNT = 2 * CHUNK + 20  # three files of each graph, the last of them short


class StoppedError(Exception):
    """What a test interrupts a run with."""


def files_of(tmp_path, graph=None, source=None, graphs=None):
    """The files of a graph's answers, or of everything."""
    if graph is None:
        return sorted((tmp_path / "answers").rglob("*.npz"))
    cache = AnswerCache(tmp_path / "answers", source, graphs)
    return sorted((tmp_path / "answers" / cache.key(graph)).iterdir(), key=first_row)


def first_row(file):
    return int(file.name.split("-")[0])


def stop_after(images):
    """A progress callback that interrupts once so many images are done."""
    done = []

    def progress(count):
        done.append(count)
        if sum(done) >= images:
            raise StoppedError

    return progress


def assert_same(one, other):
    """Whether two `Answered` hold the same bits."""
    assert one.outputs.keys() == other.outputs.keys()
    for name, outputs in one.outputs.items():
        for field in ("embedding", "cls_layers", "logits"):
            first, second = (getattr(found, field) for found in (outputs, other.outputs[name]))
            assert (first is None) == (second is None)
            if first is not None:
                assert first.dtype == second.dtype
                np.testing.assert_array_equal(first, second)
    for field, values in vars(one.pictures).items():
        np.testing.assert_array_equal(values, getattr(other.pictures, field))


class Answering:
    """Fills and reads a cache for some rungs, or for what else is asked."""

    def __init__(self, graph_set, folder):
        self.folder, self.graphs = folder, graph_set

    def _cache(self, source, graphs, what):
        graphs = graphs or self.graphs
        cache = AnswerCache(self.folder / "answers", source, graphs)
        return cache, wanted(graphs) if what is None else what

    def fill(self, source, progress=lambda count: None, graphs=None, what=None, rows=None):
        cache, what = self._cache(source, graphs, what)
        return cache.fill(what, rows, progress)

    def read(self, source, graphs=None, what=None, rows=None):
        cache, what = self._cache(source, graphs, what)
        return cache.read(what, rows)

    def at_once(self, count, graphs=None):
        """The answers for so many images of a run of its own that nothing stops."""
        graphs = graphs or self.graphs
        cache, what = (
            AnswerCache(self.folder / "other", MemorySource(count), graphs),
            wanted(graphs),
        )
        cache.fill(what)
        return cache.read(what)
