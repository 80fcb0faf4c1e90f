"""The `router` compares its answers with the calibration's at its start, and tells or refuses."""

import importlib
import threading
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from calibration.running import open_session, run_session
from tests.unit.reference_files import collected, fitted
from tests.unit.router_parts import TooEarlyError, backend, deployed, make_metrics, wait_for

__all__ = ["backend", "deployed", "make_metrics"]  # fixtures


@pytest.fixture(scope="module")
def fit_with_answers(tmp_path_factory):
    """An artifact as `fit` saves it, and the rungs that it was made with."""
    folder = tmp_path_factory.mktemp("fitted")
    graph_set, outputs = collected(folder)
    fitted(graph_set, outputs).save(folder / "calibration.json")
    fitted(graph_set, outputs, images=0).save(folder / "none.json")
    return graph_set, folder / "calibration.json"


class Rungs:
    """Both rungs by ONNX Runtime, as a server's; `faults` are raised first, one a call."""

    def __init__(self, deployed, graph_set, faults=(), change=lambda outputs: outputs):
        self._outputs = importlib.import_module("deployed_router.routing").RungOutputs
        self._sessions = {name: open_session(file) for name, file in graph_set.files.items()}
        self._faults, self._change = list(faults), change
        self.batches = []

    def ask(self, name):
        def rung(image):
            self.batches.append((name, len(image)))
            if self._faults:
                raise self._faults.pop(0)
            found = run_session(self._sessions[name], image, layers=name == "vit_low")
            return self._outputs(**vars(self._change(found)))

        return rung


@pytest.fixture
def check(deployed, fit_with_answers, make_metrics, monkeypatch):
    """Starts the comparison of one instance, with pauses of no length to speak of."""
    made = []
    graph_set, artifact = fit_with_answers
    module = deployed("reference_check")
    monkeypatch.setattr(module, "_FIRST_TRY_S", 0.001)
    monkeypatch.setattr(module, "_LONGEST_PAUSE_S", 0.002)

    def start(mode, first=True, file=artifact, **rungs):
        calibration = importlib.import_module("deployed_router.routing").Calibration.load(file)
        asked = Rungs(deployed, graph_set, **rungs)
        metrics = make_metrics()
        report = metrics.set_reference_outcome if first else None
        low, high = asked.ask("vit_low"), asked.ask("vit_high")
        made.append(module.ReferenceCheck(mode, calibration, file, low, high, report))
        return made[-1], asked

    yield start
    for one in made:
        one.stop()


@pytest.fixture
def outcome(backend):
    """What the metrics say was found."""
    names = ("same", "within_slack", "other")
    return lambda: [n for n in names if backend.value("reference_answers", outcome=n)]


def other_classes(outputs):
    return replace(outputs, logits=-outputs.logits)


def no_number(outputs):
    return replace(outputs, embedding=np.full_like(outputs.embedding, np.nan))


def test_answers_as_calibrated_are_told_and_cost_each_image_one_call_of_each_rung(
    check, backend, outcome
):
    """One by one: a client's image waits behind one of them at most."""
    found, asked = check("warn")
    wait_for(lambda: outcome() == ["same"])
    wait_for(lambda: backend.infos)
    assert found.refusal is None and backend.warnings == []
    assert "router: this server answers as the calibration did: of 32 refer" in backend.infos[0]
    assert Counter(asked.batches) == {("vit_low", 1): 32, ("vit_high", 1): 32}


def test_other_answers_are_a_warning_with_both_sides(check, backend, outcome):
    found, _ = check("warn", change=other_classes)
    wait_for(lambda: backend.warnings)
    assert outcome() == ["other"] and found.refusal is None and backend.infos == []
    (warning,) = backend.warnings
    assert "computes other answers than the calibration did; calibrate here" in warning
    assert "Calibrated on onnxruntime 1." in warning and "; this is " in warning


@pytest.mark.parametrize(
    ("change", "first", "told", "said"),
    [
        (other_classes, True, ["other"], "computes other answers"),
        (other_classes, False, [], "computes other answers"),  # the second instance, too
        (no_number, True, ["other"], "NaN"),
        (None, True, ["same"], None),
    ],
)
def test_refusing_lasts_until_the_answers_agree_and_stays_if_they_do_not(
    check, outcome, change, first, told, said
):
    released = threading.Event()

    def held(outputs):
        released.wait(30)
        return change(outputs) if change else outputs

    found, _ = check("refuse", first=first, change=held)
    assert "still comparing" in found.refusal
    released.set()
    wait_for(lambda: found.refusal is None or "still comparing" not in found.refusal)
    assert outcome() == told
    if said is None:
        assert found.refusal is None
    else:
        assert said in found.refusal and "computes other answers" in found.refusal
        assert "\n" not in found.refusal


def test_rungs_that_are_not_there_yet_are_asked_again_without_a_word(
    check, deployed, backend, outcome
):
    error = deployed("rung_calls").RungError
    faults = [
        TooEarlyError("BLS is only supported during the 'execute' function."),
        error("vit_low failed: Server not ready", is_outage=True),
        error("vit_low failed: broken", is_outage=False),
        error("vit_low failed: broken", is_outage=False),
    ]
    check("warn", faults=faults)
    wait_for(lambda: outcome() == ["same"])
    assert backend.warnings == [
        "router: reference answers not compared yet: vit_low failed: broken"
    ]


@pytest.mark.parametrize(
    ("mode", "first", "file"),
    [
        ("off", True, "calibration.json"),
        ("warn", False, "calibration.json"),
        ("warn", True, "none.json"),
    ],
)
def test_nothing_is_asked_where_nobody_wants_to_know(
    check, outcome, fit_with_answers, mode, first, file
):
    found, asked = check(mode, first, fit_with_answers[1].with_name(file))
    found.stop()
    time.sleep(0.05)
    assert asked.batches == [] and found.refusal is None and outcome() == []


def test_refusing_without_reference_answers_stops_the_load(check, fit_with_answers):
    with pytest.raises(ValueError, match="no reference answers in this artifact"):
        check("refuse", file=fit_with_answers[1].with_name("none.json"))


def test_unloading_ends_the_comparison_at_the_next_image(check, outcome):
    entered, released = threading.Event(), threading.Event()

    def held(outputs):
        entered.set()
        released.wait(30)
        return outputs

    found, asked = check("warn", change=held)
    assert entered.wait(10)
    stopping = threading.Thread(target=found.stop)
    stopping.start()
    released.set()
    stopping.join(10)
    assert not stopping.is_alive() and not found._thread.is_alive()
    assert len(asked.batches) <= 3 and outcome() == []
