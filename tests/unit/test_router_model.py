"""The parts of the `router` model without Triton: settings, time budgets, metrics, the watch."""

import importlib
import shutil
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from calibration.sessions import open_session, run_session
from routing import CascadeRequest, Overrides
from tests.unit.fakes import FakeRung, images, make_calibration
from tests.unit.reference_files import collected, fitted

ROOT = Path(__file__).resolve().parents[2]
DEFAULTS = {
    "on_high_failure": "error",
    "high_timeout_ms": "10000",
    "client_parameters": "careful",
    "degrade_queue_depth": "0",
    "degrade_threshold": "",
    "audit_fraction": "0",
    "shadow_version": "0",
    "shadow_fraction": "0",
    "reference_check": "warn",
}
CERTIFIED = {
    "chosen_by": {"fidelity": "top1", "tolerance": None},
    "certificate": {"certified": True, "epsilon": 0.05},
}


class FakeMetric:
    def __init__(self):
        self.value, self.observed = 0.0, []

    def increment(self, amount):
        self.value += amount

    def set(self, value):
        self.value = value

    def observe(self, value):
        self.observed.append(value)


class FakeFamily:
    COUNTER, GAUGE, HISTOGRAM = "counter", "gauge", "histogram"

    def __init__(self, name, description, kind):
        assert description and name not in SERIES
        self.name = name
        SERIES[name] = {}

    def Metric(self, labels, buckets=None):  # noqa: N802, as Triton spells it
        return SERIES[self.name].setdefault(tuple(sorted(labels.items())), FakeMetric())


SERIES: dict[str, dict] = {}
WARNINGS: list[str] = []
INFOS: list[str] = []


class FakeTritonModelError(Exception):
    """What the python backend raises for a call that is made before `initialize` has returned."""


@pytest.fixture
def deployed(tmp_path, monkeypatch):
    """Imports a module of the deployed router, laid out as `export repository` does."""
    SERIES.clear()
    WARNINGS.clear()
    INFOS.clear()
    folder = tmp_path / "deployed_router"
    folder.mkdir()
    for file in (ROOT / "model_repository/router/1").glob("*.py"):
        shutil.copy(file, folder)
    shutil.copytree(ROOT / "routing", folder / "routing")
    backend = SimpleNamespace(
        MetricFamily=FakeFamily,
        Logger=SimpleNamespace(log_warn=WARNINGS.append, log_info=INFOS.append),
        TritonModelException=FakeTritonModelError,
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", backend)
    yield lambda name: importlib.import_module(f"deployed_router.{name}")
    for name in [name for name in sys.modules if name.startswith("deployed_router")]:
        del sys.modules[name]


def config(**changed):
    parameters = {k: {"string_value": v} for k, v in {**DEFAULTS, **changed}.items()}
    queue = {"default_queue_policy": {"max_queue_size": 64}}
    return {"parameters": parameters, "max_batch_size": 32, "dynamic_batching": queue}


# --- settings ------------------------------------------------------------------------------------


def test_the_defaults_change_no_answer(deployed):
    settings = deployed("settings").Settings.of(config())
    assert not settings.degrade_on_high_failure and settings.careful_only
    assert settings.relief is None and settings.high_timeout_s == 10
    assert settings.audit_fraction == settings.shadow_fraction == settings.shadow_version == 0


def test_what_an_operator_chooses_is_read(deployed):
    chosen = config(
        on_high_failure="low",
        client_parameters="any",
        degrade_queue_depth="8",
        degrade_threshold="2.5",
        audit_fraction="0.01",
    )
    settings = deployed("settings").Settings.of(chosen)
    assert settings.degrade_on_high_failure and not settings.careful_only
    assert (settings.relief.depth, settings.relief.full, settings.relief.highest) == (8, 32, 2.5)
    assert settings.audit_fraction == 0.01


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("on_high_failure", "maybe"),
        ("client_parameters", ""),
        ("high_timeout_ms", "0"),
        ("high_timeout_ms", "soon"),
        ("degrade_queue_depth", "33"),
        ("audit_fraction", "1.5"),
        ("audit_fraction", "nan"),
        ("shadow_fraction", "-0.1"),
        ("reference_check", "maybe"),
    ],
)
def test_a_setting_that_means_nothing_stops_the_load_by_name(deployed, name, value):
    with pytest.raises(ValueError, match=name):
        deployed("settings").Settings.of(config(**{name: value}))


def test_pressure_relief_needs_a_limit(deployed):
    with pytest.raises(ValueError, match="degrade_threshold"):
        deployed("settings").Settings.of(config(degrade_queue_depth="8"))


# --- the full rung's time budget -----------------------------------------------------------------


def test_a_call_in_time_is_answered_and_its_error_passed_on(deployed):
    rungs = deployed("rungs")

    def call(x):
        if x < 0:
            raise rungs.RungError("vit_high failed: bad", is_outage=False)
        return x + 1

    budgeted = rungs.Budgeted("vit_high", call, budget_s=5)
    assert budgeted(1) == 2
    with pytest.raises(rungs.RungError, match="bad"):
        budgeted(-1)
    assert budgeted(2) == 3


def test_a_hung_call_costs_one_budget_and_then_refuses_until_it_returns(deployed):
    rungs = deployed("rungs")
    released, calls = threading.Event(), []

    def call(x):
        calls.append(x)
        released.wait(30)
        return x

    budgeted = rungs.Budgeted("vit_high", call, budget_s=0.2)
    with pytest.raises(rungs.LateError, match=r"no answer within 0.2 s") as late:
        budgeted(1)
    assert late.value.reason == "timeout" and late.value.is_outage
    for _ in range(3):
        with pytest.raises(rungs.LateError, match="has not answered") as refused:
            budgeted(2)
        assert refused.value.reason == "open"
    assert calls == [1]
    released.set()
    deadline = time.monotonic() + 10
    while True:
        try:
            assert budgeted(3) == 3
            return
        except rungs.LateError:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_an_outage_that_took_long_to_show_is_not_waited_for_again_at_once(deployed, monkeypatch):
    rungs = deployed("rungs")
    now, calls = [100.0], []
    monkeypatch.setattr(rungs, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def call(takes_s, is_outage):
        calls.append(takes_s)
        now[0] += takes_s
        raise rungs.RungError("vit_high failed: away", is_outage)

    budgeted = rungs.Budgeted("vit_high", call, budget_s=5)
    for takes_s, is_outage in ((0.01, True), (1.0, False), (1.0, True)):
        with pytest.raises(rungs.RungError, match="away"):
            budgeted(takes_s, is_outage)
    with pytest.raises(rungs.LateError, match="not there a moment ago") as refused:
        budgeted(0.0, True)
    assert refused.value.reason == "open" and calls == [0.01, 1.0, 1.0]
    now[0] += 2.01
    with pytest.raises(rungs.RungError, match="away"):
        budgeted(0.0, True)


# --- metrics -------------------------------------------------------------------------------------


def value(name, **labels):
    return SERIES[f"adaptive_vit_{name}"][tuple(sorted({"version": "1", **labels}.items()))].value


@pytest.fixture
def make_metrics(deployed):
    made = []

    def make(calibration=None, candidate=0):
        calibration = calibration or make_calibration(**CERTIFIED)
        made.append(deployed("metrics").Metrics("1", calibration, "ab" * 32, candidate, 64))
        return made[-1]

    yield make
    for metrics in made:
        metrics.stop()


def test_counts_reach_triton_as_sums(make_metrics):
    metrics = make_metrics()
    for _ in range(3):
        metrics.count("images_total", 2, path="low")
    metrics.count("images_in_flight", 5)
    metrics.count("images_in_flight", -5)
    metrics.observe("score", [0.1, 0.2])
    metrics.stop()
    assert value("images_total", path="low") == 6
    assert value("images_total", path="high") == 0
    assert value("images_in_flight") == 0
    (score,) = SERIES["adaptive_vit_score"].values()
    assert score.observed == [0.1, 0.2]


def test_identity_threshold_and_certified_risk_are_told(make_metrics):
    make_metrics()
    assert value("queue_limit") == 64
    assert value("threshold") == 0.5 and value("certified_risk") == 0.05
    assert (
        value("router_info", artifact="ab" * 6, signal="cls_path", low="0" * 12, high="1" * 12) == 1
    )


def test_without_a_certificate_there_is_no_certified_risk(make_metrics):
    make_metrics(make_calibration(threshold=None))
    assert "adaptive_vit_certified_risk" not in SERIES
    assert "adaptive_vit_threshold" not in SERIES


# --- the watch: audit and shadow -----------------------------------------------------------------


def wait_for(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def look(deployed, make_metrics):
    """Sends images through the cascade and its watch; returns the metrics."""
    watches = []
    deployed_routing = None

    def run(scores, high, calibration, candidate=None, overrides=None, repeats=1, **settings):
        nonlocal deployed_routing
        deployed_routing = importlib.import_module("deployed_router.routing")
        number = 2 if candidate else 0
        chosen = deployed("settings").Settings.of(config(shadow_version=str(number), **settings))
        metrics = make_metrics(calibration, number)
        watch = deployed("watch").Watch(chosen, calibration, candidate, high, metrics)
        watches.append(watch)
        request = CascadeRequest(images(*scores), overrides or Overrides())
        run_cascade = importlib.import_module("routing").run_cascade
        for _ in range(repeats):
            (answer,) = run_cascade([request], calibration, FakeRung(1.0), FakeRung(2.0))
            # The deployed copy compares with its own class of the same fields.
            asked = deployed_routing.CascadeRequest(
                request.image, deployed_routing.Overrides(**vars(request.overrides))
            )
            watch.look(asked, answer)
        return metrics

    yield run
    for watch in watches:
        watch.stop()


def audited(outcome):
    return value("audited_images_total", outcome=outcome)


def test_an_audit_asks_the_full_rung_about_kept_images_only(look):
    high = FakeRung(2.0)
    look([0.1, 0.2, 0.9], high, make_calibration(**CERTIFIED), audit_fraction="1")
    wait_for(lambda: audited("kept_ok") == 2)
    assert audited("escalated") == 1 and audited("kept_lost") == 0
    np.testing.assert_allclose([b[0, 0, 0, 0] for b in high.batches], [0.1, 0.2])


def other_class(image):
    outputs = FakeRung(2.0)(image)
    outputs.logits[:, 1] += 1
    return outputs


def test_traffic_that_contradicts_the_certificate_is_told_once(look):
    look([0.1], other_class, make_calibration(**CERTIFIED), audit_fraction="1", repeats=25)
    wait_for(lambda: audited("kept_lost") == 25)
    wait_for(lambda: value("certificate_contradicted_total") == 1)
    assert len(WARNINGS) == 1 and "contradicts the certificate" in WARNINGS[0]


def test_a_certificate_about_a_model_that_is_not_served_is_not_held_against_it(look):
    certificate = {"certified": True, "epsilon": 0.05, "reference": "full FP32 model"}
    calibration = make_calibration(**{**CERTIFIED, "certificate": certificate})
    look([0.1], other_class, calibration, audit_fraction="1", repeats=25)
    wait_for(lambda: audited("kept_lost") == 25)
    time.sleep(0.6)
    assert value("certificate_contradicted_total") == 0 and not WARNINGS


def test_requests_with_parameters_of_their_own_are_no_sample_of_the_traffic(look):
    high = FakeRung(2.0)
    look(
        [0.1],
        high,
        make_calibration(**CERTIFIED),
        overrides=Overrides(threshold=0.4),
        audit_fraction="1",
    )
    time.sleep(0.6)
    assert high.batches == [] and audited("kept_ok") == 0


def test_a_failing_full_rung_drops_audits_and_counts_them(look, deployed):
    def failing(image):
        raise deployed("rungs").RungError("vit_high is away", is_outage=True)

    look([0.1, 0.2], failing, make_calibration(**CERTIFIED), audit_fraction="1")
    wait_for(lambda: value("audit_dropped_total") == 2)


def test_a_full_waiting_line_drops_images_before_it_is_known_what_became_of_them(look):
    released = threading.Event()

    def stuck(image):
        released.wait(30)
        return FakeRung(2.0)(image)

    calibration = make_calibration(**CERTIFIED)
    look([0.1, 0.9], stuck, calibration, audit_fraction="1", repeats=100)
    wait_for(lambda: value("audit_dropped_total") > 100)
    counted = audited("escalated")
    released.set()
    assert counted < 50, "escalated images were counted while kept ones were dropped"


def test_a_candidate_of_other_rungs_is_refused(deployed, tmp_path):
    live = make_calibration()
    (tmp_path / "2").mkdir()
    make_calibration(0.3).save(tmp_path / "2/calibration.json")
    load = deployed("model")._load_candidate
    deployed_live = importlib.import_module("deployed_router.routing").Calibration.load(
        tmp_path / "2/calibration.json"
    )
    assert load(tmp_path / "2", deployed_live).threshold == 0.3
    other = {**live.rungs, "vit_low": replace(live.rungs["vit_low"], sha256="9" * 64)}
    make_calibration(rungs=other).save(tmp_path / "2/calibration.json")
    with pytest.raises(ValueError, match="made with other rungs"):
        load(tmp_path / "2", deployed_live)


def test_a_shadow_is_counted_without_another_call(look):
    high = FakeRung(2.0)
    calibration = make_calibration(0.5, **CERTIFIED)
    look([0.1, 0.4, 0.9], high, calibration, make_calibration(0.3), shadow_fraction="1")

    def counted(outcome):
        return value("shadow_images_total", candidate="2", outcome=outcome)

    wait_for(lambda: counted("both_low") == 1)
    assert (counted("only_candidate_high"), counted("both_high")) == (1, 1)
    assert counted("only_live_high") == 0 and high.batches == []


# --- reference answers: does this server answer as the calibration did? --------------------------


@pytest.fixture(scope="module")
def fit_with_answers(tmp_path_factory):
    """An artifact as `fit` saves it, and the rungs that it was made with."""
    folder = tmp_path_factory.mktemp("fitted")
    rung_set, outputs = collected(folder)
    fitted(rung_set, outputs).save(folder / "calibration.json")
    fitted(rung_set, outputs, images=0).save(folder / "none.json")
    return rung_set, folder / "calibration.json"


class Rungs:
    """Both rungs by ONNX Runtime, as a server's; `faults` are raised first, one a call."""

    def __init__(self, deployed, rung_set, faults=(), change=lambda outputs: outputs):
        self._outputs = importlib.import_module("deployed_router.routing").RungOutputs
        self._sessions = {name: open_session(file) for name, file in rung_set.files.items()}
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
    rung_set, artifact = fit_with_answers
    module = deployed("reference_check")
    monkeypatch.setattr(module, "_FIRST_TRY_S", 0.001)
    monkeypatch.setattr(module, "_LONGEST_PAUSE_S", 0.002)

    def start(mode, first=True, file=artifact, **rungs):
        calibration = importlib.import_module("deployed_router.routing").Calibration.load(file)
        asked = Rungs(deployed, rung_set, **rungs)
        metrics = make_metrics()
        report = metrics.set_reference_outcome if first else None
        low, high = asked.ask("vit_low"), asked.ask("vit_high")
        made.append(module.ReferenceCheck(mode, calibration, file, low, high, report))
        return made[-1], asked

    yield start
    for one in made:
        one.stop()


def outcome():
    names = ("same", "within_slack", "other")
    return [name for name in names if value("reference_answers", outcome=name)]


def other_classes(outputs):
    return replace(outputs, logits=-outputs.logits)


def test_answers_as_calibrated_are_told_and_cost_each_image_two_questions(check):
    found, asked = check("warn")
    wait_for(lambda: outcome() == ["same"])
    wait_for(lambda: INFOS)
    assert found.refusal is None and WARNINGS == []
    assert "router: this server answers as the calibration did: of 32 reference" in INFOS[0]
    assert [batch for batch in asked.batches if batch[0] == "vit_low"] == [("vit_low", 8)] * 4
    assert sum(rows for name, rows in asked.batches if name == "vit_high") < 64


def test_other_answers_are_a_warning_with_both_sides(check):
    found, _ = check("warn", change=other_classes)
    wait_for(lambda: WARNINGS)
    assert outcome() == ["other"] and found.refusal is None and INFOS == []
    assert "computes other answers than the calibration did; calibrate here" in WARNINGS[0]
    assert "Calibrated on onnxruntime 1." in WARNINGS[0] and "; this is " in WARNINGS[0]


def test_refusing_lasts_until_the_answers_agree_and_stays_if_they_do_not(check):
    released = threading.Event()

    def held(outputs):
        released.wait(30)
        return outputs

    found, _ = check("refuse", change=held)
    assert "still comparing" in found.refusal
    released.set()
    wait_for(lambda: found.refusal is None)


def test_a_router_that_refuses_says_what_it_found(check):
    found, _ = check("refuse", first=False, change=other_classes)  # the second instance, too
    wait_for(lambda: "computes other answers" in found.refusal)
    assert "\n" not in found.refusal and outcome() == []


def test_an_answer_that_is_no_number_is_another(check):
    found, _ = check(
        "refuse", change=lambda o: replace(o, embedding=np.full_like(o.embedding, np.nan))
    )
    wait_for(lambda: "computes other answers" in found.refusal)
    assert outcome() == ["other"] and "NaN" in found.refusal


def test_rungs_that_are_not_there_yet_are_asked_again_without_a_word(check, deployed):
    error = deployed("rungs").RungError
    faults = [
        FakeTritonModelError("BLS is only supported during the 'execute' function."),
        error("vit_low failed: Server not ready", is_outage=True),
        error("vit_low failed: broken", is_outage=False),
        error("vit_low failed: broken", is_outage=False),
    ]
    check("warn", faults=faults)
    wait_for(lambda: outcome() == ["same"])
    assert WARNINGS == ["router: reference answers not compared yet: vit_low failed: broken"]


@pytest.mark.parametrize(
    ("mode", "first", "file"),
    [
        ("off", True, "calibration.json"),
        ("warn", False, "calibration.json"),
        ("warn", True, "none.json"),
    ],
)
def test_nothing_is_asked_where_nobody_wants_to_know(check, fit_with_answers, mode, first, file):
    found, asked = check(mode, first, fit_with_answers[1].with_name(file))
    found.stop()
    time.sleep(0.05)
    assert asked.batches == [] and found.refusal is None and outcome() == []


def test_refusing_without_reference_answers_stops_the_load(check, fit_with_answers):
    with pytest.raises(ValueError, match="no reference answers in this artifact"):
        check("refuse", file=fit_with_answers[1].with_name("none.json"))


def test_unloading_ends_the_comparison_at_the_next_batch(check):
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
