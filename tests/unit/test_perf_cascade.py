"""The sections of summary.json, computed from hand-written measurements."""

import json

import numpy as np
import pytest

from bundle.graphs import GraphSet
from calibration.fidelity import Fidelity
from perf.cascade import Measured
from perf.harness import Paired, is_a_loss
from perf.memory import MemoryUse, memory_figures
from perf.record import write
from perf.systems import model_section
from tests.unit.fakes import make_calibration
from tests.unit.onnx_files import CLASSES, SIZE, D, write_graph_set
from tests.unit.perf_measured import make_answer, make_system

HIGH = [make_answer(100.0, names=0), make_answer(100.0, names=1)]
LOW = [make_answer(10.0, names=0), make_answer(30.0, names=2)]
NEVER = [make_answer(11.0, names=0), make_answer(36.0, names=2)]
ADAPTIVE = [make_answer(20.0, names=0), make_answer(60.0, True, names=1)]
ENSEMBLE = [make_answer(24.0, names=0), make_answer(64.0, True, names=1)]
SHARE = {
    "static-low": LOW,
    "static-high": HIGH,
    "adaptive-0": NEVER,
    "adaptive": ADAPTIVE,
    "ensemble": ENSEMBLE,
}
ANOTHER_CLASS = is_a_loss({"fidelity": "top1"})
PAIRED = Paired([SHARE, SHARE])
SYSTEMS = [make_system(name) for name in SHARE]


def sections(paired=PAIRED, systems=SYSTEMS, disagrees=ANOTHER_CLASS, labels=None, **of):
    return Measured(paired, [], **of).sections(systems, disagrees, labels)


# --- answers -----------------------------------------------------------------------------------


def test_every_system_has_its_answers_beside_its_cost():
    found = sections(labels=[0, 1] * 2)["answers"]
    assert list(found) == list(SHARE)
    low, adaptive = found["static-low"], found["adaptive"]
    assert low["title"] == "title of static-low"
    assert (low["agreement_with_high"], low["escalation_rate"], low["accuracy"]) == (0.5, 0, 0.5)
    assert (adaptive["agreement_with_high"], adaptive["escalation_rate"]) == (1.0, 0.5)
    assert (adaptive["p50_ms"], adaptive["cost_ms"]["values"]) == (40.0, [40.0, 40.0])
    assert adaptive["cost_ratio"]["values"] == [0.4, 0.4]


def test_accuracy_is_against_the_labels_in_the_order_of_the_answers():
    def accuracy(*labels):
        return sections(labels=labels)["answers"]["static-high"]["accuracy"]

    assert accuracy(0, 1, 0, 1) == 1.0
    assert accuracy(1, 0, 0, 1) == 0.5
    assert accuracy(2, 1, 2, 2) == 0.25
    with pytest.raises(ValueError, match="zip"):
        accuracy(0, 1)


@pytest.mark.parametrize(("labels", "head"), [(None, True), ([0] * 4, False)])
def test_without_labels_or_without_a_head_there_is_no_accuracy(labels, head):
    share = {name: [make_answer(head=head)] * 2 for name in SHARE}
    found = sections(Paired([share] * 2), disagrees=lambda mine, full: False, labels=labels)
    assert {answer["accuracy"] for answer in found["answers"].values()} == {None}


# --- figures -----------------------------------------------------------------------------------


def test_the_figures_with_one_request_in_flight():
    found = sections()
    medians = {name: spread["median"] for name, spread in found.items() if name != "answers"}
    assert medians == pytest.approx(
        {
            "router_overhead_c1": 1.15,  # of 11 / 10 and 36 / 30
            "speedup_c1": 2.5,
            "bound_c1": 1 / (0.2 + 0.5),
            "cascade_efficiency_c1": 2.5 * 0.7,
            "ensemble_over_router": 1.1,  # 44 / 40
        }
    )
    without = [system for system in SYSTEMS if system.name != "ensemble"]
    assert "ensemble_over_router" not in sections(systems=without)


def test_the_saturated_figures_are_taken_turn_by_turn_with_the_cores_that_everybody_had():
    def turn(low, high, adaptive):
        costs = {"static-low": low, "static-high": high, "adaptive": adaptive}
        return {
            name: [
                make_answer(ms, escalated=name == "adaptive" and i == 0, cpu_ms=0.9 * ms)
                for i in range(4)
            ]
            for name, ms in costs.items()
        }

    found = sections(
        Paired([turn(25, 100, 62.5), turn(20, 100, 50)]),
        [make_system(name) for name in ("static-low", "static-high", "adaptive")],
        **{"load": "saturated", "in_flight": 8, "cores": 1},
    )
    assert found["speedup_saturated"]["values"] == pytest.approx([1.6, 2.0])
    assert found["cpu_speedup_saturated"]["values"] == pytest.approx([1.6, 2.0])
    assert found["bound_saturated"]["values"] == pytest.approx([2.0, 1 / 0.45])
    assert found["cascade_efficiency_saturated"]["values"] == pytest.approx([0.8, 0.9])
    section = found["saturated"]
    assert (section["cores"], section["in_flight"]) == (1, 8)
    assert section["systems"]["adaptive"]["escalation_rate"] == 0.25
    assert section["systems"]["static-high"]["cpu_ms"]["median"] == pytest.approx(90)
    assert "answers" not in found and not section["systems"]["adaptive"]["disturbed"]


def use(pss, gpu=None, weights=5.0):
    return MemoryUse(pss, pss + 10, gpu, weights)


def test_memory_is_the_median_of_the_runs_and_its_ratio_is_taken_turn_by_turn():
    peaks = {
        "static-low": [use(300.0), use(310.0), use(350.0)],
        "static-high": [use(400.0), use(390.0), use(400.0)],
        "adaptive": [use(770.0), use(700.0), use(750.0)],
    }
    found = memory_figures(peaks)
    assert found["memory"]["static-low"] == {
        "peak_pss_mib": 310.0,
        "peak_rss_mib": 320.0,
        "gpu_mib": None,
        "weights_mib": 5.0,
    }
    assert found["peak_memory_ratio"]["values"] == pytest.approx([1.1, 1.0, 1.0])


def test_the_memory_of_a_gpu_is_kept_where_there_is_one():
    peaks = {name: [use(1.0, gpu=900.0)] for name in ("static-low", "static-high", "adaptive")}
    assert memory_figures(peaks)["memory"]["adaptive"]["gpu_mib"] == 900.0


# --- what is served ----------------------------------------------------------------------------


def test_the_model_is_described_without_its_files(tmp_path):
    assert model_section(GraphSet.load(write_graph_set(tmp_path))) == {
        "backbone": "tiny",
        "image_shape": [3, SIZE, SIZE],
        "low": f"px={SIZE // 2}",
        "high": f"px={SIZE}",
        "embedding_dim": D,
        "classes": CLASSES,
    }


def test_fidelity_is_told_in_words():
    by_class = {"fidelity": "top1", "tolerance": None}
    by_cosine = {"fidelity": "cosine", "tolerance": 0.05}

    def words(calibration):
        return Fidelity.of(calibration).agreement()

    assert words(make_calibration(chosen_by=by_class)) == "names the same class"
    assert words(make_calibration(chosen_by=by_cosine)) == (
        "has an embedding of cosine 0.95 or more"
    )
    by_value = {"fidelity": "value", "tolerance": 0.1, "relative": True}
    assert words(make_calibration(chosen_by=by_value)) == "gives a value within 10 %"
    by_labels = {"fidelity": "labels", "tolerance": None, "label_threshold": 0.3}
    assert words(make_calibration(chosen_by=by_labels)) == (
        "gives the same set of labels at probability 0.3"
    )


# --- the file ----------------------------------------------------------------------------------


def test_a_summary_is_written_in_one_piece(tmp_path):
    path = tmp_path / "new" / "summary.json"
    write({"seconds": 1.5}, path)
    write({"seconds": 2.5}, path)
    assert json.loads(path.read_text()) == {"seconds": 2.5}
    assert [found.name for found in path.parent.iterdir()] == ["summary.json"]


@pytest.mark.parametrize("value", [float("nan"), np.float32(1), object()])
def test_what_is_no_json_is_refused_and_the_last_summary_stays(tmp_path, value):
    path = tmp_path / "summary.json"
    write({"seconds": 1.5}, path)
    with pytest.raises((ValueError, TypeError)):
        write({"seconds": value}, path)
    assert json.loads(path.read_text()) == {"seconds": 1.5}
