"""The benchmarks run and measure what they name; no test asserts a time."""

import numpy as np

from perf.costs import collecting, fitting, scoring
from routing import RungSet
from tests.unit.calibration_outputs import CLASS_SIGNALS
from tests.unit.image_files import write_images
from tests.unit.onnx_files import write_rung_set


def test_every_signal_is_timed_on_outputs_of_the_asked_shape(monkeypatch):
    monkeypatch.setattr(scoring, "ROUNDS", 3)
    assert set(scoring.measure(2, layers=4, dim=8, classes=5)) == set(CLASS_SIGNALS)
    rows = scoring.outputs(2, layers=4, dim=8, classes=5)
    assert rows.cls_layers.shape == (2, 5, 8) and rows.logits.shape == (2, 5)


def test_the_made_up_outputs_can_be_fitted():
    cost = fitting.measure(300, layers=4, dim=8, classes=5)
    assert cost.seconds > 0 and cost.peak_gib >= cost.peak_before_gib > 0


def test_collect_is_timed_beside_its_sessions(tmp_path):
    rung_set = RungSet.load(write_rung_set(tmp_path / "onnx"))
    folder = write_images(tmp_path / "images", *(f"{i}.png" for i in range(20)))
    done = []
    found = collecting.measure(rung_set, str(folder), 20, 2, lambda: done.append(1))
    assert len(done) == len(found.sessions) == len(found.whole) == 2
    assert collecting.Rounds([(2.0, 1.0)] * 2, [(3.0, 4.0)] * 2).ratio(0) == 1.5
    assert np.isfinite(found.ratio(1))
