"""What takes seconds and comes out the same each time is remembered.

Exports by torch are, under build/tests; fits of signals and figures, while a file's tests run.
"""

import copy
import hashlib
import os
import pickle

import pytest

from tests.shared_build import FOLDER, locked, state

EXPORTS = FOLDER / "exports"
KEPT = 200  # graphs, the newest; all unit tests together ask for some thirty


@pytest.fixture
def graph_set(tmp_path):
    """Two tiny rungs with a head of four classes."""
    return _rungs(tmp_path / "onnx")


@pytest.fixture
def headless(tmp_path):
    """Two tiny rungs without a head."""
    return _rungs(tmp_path / "headless", classes=None)


def _rungs(folder, **options):
    from bundle.graphs import GraphSet
    from tests.unit.onnx_files import write_graph_set

    return GraphSet.load(write_graph_set(folder, **options))


@pytest.fixture
def answering(graph_set, tmp_path):
    """A cache of answers below `tmp_path`, by default of these rungs."""
    from tests.unit.answering import Answering

    return Answering(graph_set, tmp_path)


@pytest.fixture(scope="module")
def remembered_exports():
    """Each graph is exported once, by whichever test of whichever process asks for it first.

    Asked for in `pytestmark`, and not by tests of the exporter itself. The fixture's value is the
    function that exports anew.
    """
    from export import onnx_graph

    anew = onnx_graph.export_onnx

    def export_onnx(module, image_px, output_names, file, opset):
        kept = EXPORTS / f"{_key(module, image_px, output_names, opset)}.onnx"
        with locked(kept.with_suffix(".lock")):
            if not kept.exists():
                model = anew(module, image_px, output_names, file, opset)
                unfinished = kept.with_suffix(".unfinished")
                unfinished.write_bytes(file.read_bytes())
                unfinished.rename(kept)
                _forget()
                return model
        os.utime(kept)
        file.write_bytes(kept.read_bytes())
        return onnx_graph.onnx.load(kept)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_graph, "export_onnx", export_onnx)
        yield anew


@pytest.fixture(scope="module")
def remembered_fits():
    """The signals of the same images, losses and seed are fitted once in a file.

    Asked for in `pytestmark` where many tests fit the same. The fixture's value forgets them.
    """
    from calibration import fit
    from planner import select

    known = {}
    with pytest.MonkeyPatch.context() as patch:
        for name in ("fit_coefficients", "out_of_fold"):
            _remember(name, getattr(fit, name), known, (fit, select), patch)
        yield known.clear


@pytest.fixture(scope="module")
def remembered_figures():
    """Equal figures on the pages of a file are drawn once; used as `remembered_fits` is."""
    from report import calibration_page, figures, performance_page, plan_page

    known, pages = {}, (calibration_page, performance_page, plan_page)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("bars", "chart", "histogram"):
            _remember(name, getattr(figures, name), known, pages, patch)
        yield known.clear


def _remember(name, anew, known, modules, patch):
    """Let these modules, where they use the function, have equal results of equal arguments."""

    def remembering(*arguments, **more):
        told = [argument for argument in arguments if not callable(argument)]  # no bars
        key = hashlib.sha256(pickle.dumps((name, told, more))).digest()
        if key not in known:
            known[key] = anew(*arguments, **more)
        return copy.deepcopy(known[key])

    for module in modules:
        if hasattr(module, name):
            patch.setattr(module, name, remembering)


def _key(module, image_px, output_names, opset):
    """What a graph depends on: the module, and the code and libraries that export it."""
    import torch

    found = hashlib.sha256(state("export").encode())
    found.update(repr((module, image_px, output_names, opset)).encode())
    for name, tensor in sorted([*module.named_parameters(), *module.named_buffers()]):
        found.update(name.encode() + tensor.detach().contiguous().numpy().tobytes())
    for name, part in module.named_modules():  # a threshold of its own, say
        plain = {key: value for key, value in vars(part).items() if _is_plain(value)}
        found.update(repr((name, sorted(plain.items()))).encode())
    # Tables that were worked out beforehand may be neither: they show in what it answers.
    images = torch.randn(2, 3, image_px, image_px, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        answers = module.eval()(images)
    for answer in (answers,) if isinstance(answers, torch.Tensor) else answers:
        found.update(answer.contiguous().numpy().tobytes())
    return found.hexdigest()


def _is_plain(value):
    parts = value if isinstance(value, tuple) else (value,)
    return all(isinstance(part, bool | int | float | str) for part in parts)


def _forget():
    graphs = sorted(EXPORTS.glob("*.onnx"), key=lambda file: file.stat().st_mtime)
    for old in graphs[:-KEPT]:
        old.unlink(missing_ok=True)
