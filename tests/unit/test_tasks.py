"""What a model answers, from its config to the certificate: labels, values, one output.

Tiny models are exported, run and calibrated as a user's are, by the commands.
"""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from bundle.graphs import GraphSet
from calibration.certify import Goal
from calibration.evaluate import EvaluateError, evaluate
from calibration.fidelity import Fidelity, FidelityError
from calibration.fit import EscalationRate, FitError, Options, Threshold, fit
from calibration.outputs import Made, Outputs
from export.errors import UsageError
from export.pretrained import load_backbone
from routing import (
    RUNGS,
    Calibration,
    CalibrationError,
    escalation_mask,
)
from routing.policy import Overrides
from tests.unit.calibrating import run
from tests.unit.export_tiny import run_export, save_tiny

pytestmark = pytest.mark.usefixtures("remembered_exports", "remembered_figures")

PROCESSOR = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "size": {"height": 16, "width": 16},
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
IMAGES = 240
LABELS = {"problem_type": "multi_label_classification", "num_labels": 5}
VALUE = {"problem_type": "regression", "num_labels": 1}
NAMES = dict(enumerate(("sea", "sky", "sand", "sun", "sail")))
GOAL = Goal(0.1, 0.9, "ltt")
TOLERANCE = 0.3


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of random images, some smooth and some noisy."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for index in range(IMAGES):
        coarse = Image.fromarray(rng.integers(0, 256, (2, 2, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((16, 16), Image.Resampling.BILINEAR), np.float64)
        noise = rng.normal(size=smooth.shape) * 200 * rng.uniform() ** 2
        pixels = np.clip(smooth + noise, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:03d}.png")
    return folder


def workplace(folder, images, config, *options):
    """A user's folder with exported rungs and what `collect` stores of the images."""
    model = save_tiny(folder / "model", "ViTForImageClassification", PROCESSOR, **config)
    done = run_export("rungs", "--model", model, "--out", folder / "build/onnx", *options)
    assert done.code == 0, done.err
    assert run(folder, "collect", "--images", images) == 0
    return folder


@pytest.fixture(scope="module")
def labels(tmp_path_factory, images):
    config = {**LABELS, "id2label": NAMES, "label2id": {v: k for k, v in NAMES.items()}}
    return workplace(tmp_path_factory.mktemp("labels"), images, config)


@pytest.fixture(scope="module")
def value(tmp_path_factory, images):
    return workplace(tmp_path_factory.mktemp("value"), images, VALUE)


def loaded(folder):
    outputs = Outputs.load(folder / "build/calibration/outputs.json")
    return outputs, GraphSet.load(folder / "build/onnx")


def answering(task, outputs):
    return replace(outputs, made=replace(outputs.made, task=task))


def artifact(folder):
    return Calibration.load(folder / "build/calibration/calibration.json")


# --- what a model answers --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "task"),
    [
        ({"num_labels": 3}, "classes"),
        ({"num_labels": 3, "problem_type": "single_label_classification"}, "classes"),
        ({"num_labels": 3, "problem_type": "multi_label_classification"}, "labels"),
        ({"num_labels": 1, "problem_type": "multi_label_classification"}, "labels"),
        ({"num_labels": 3, "problem_type": "regression"}, "value"),
        ({"num_labels": 1, "problem_type": "regression"}, "value"),
        ({"num_labels": 1}, "value"),
        ({"num_labels": 0}, None),
    ],
)
def test_the_task_is_that_of_problem_type_and_the_number_of_outputs(config, task, tmp_path):
    model = save_tiny(tmp_path / "model", "ViTForImageClassification", **config)
    assert load_backbone(str(model)).task == task


def test_a_task_can_be_given_where_the_config_does_not_say_it(tmp_path):
    model = save_tiny(tmp_path / "model", "ViTForImageClassification", num_labels=1)
    backbone = load_backbone(str(model))
    assert backbone.answering("labels").task == "labels"
    with pytest.raises(UsageError, match="one output names no class"):
        backbone.answering("classes")
    headless = load_backbone(str(save_tiny(tmp_path / "base", "ViTModel")))
    with pytest.raises(UsageError, match="it has none"):
        headless.answering("value")
    for options, said in (
        (("--task", "colour"), "--task"),
        # Refused for its resolution, once the model is read and it was said what it is taken for.
        (("--low", "px=5"), "taken as a value; if it is the logit of a label, give --task labels"),
        (("--task", "labels", "--head", "linear", "--images", tmp_path), "--head linear answers"),
    ):
        done = run_export("rungs", "--model", model, "--out", tmp_path / "onnx", *options)
        assert done.code == 2 and said in " ".join(done.err.split())


def test_one_output_that_is_said_to_name_a_class_is_refused_before_anything_is_exported(tmp_path):
    model = save_tiny(tmp_path / "model", "ViTForImageClassification", PROCESSOR, num_labels=1)
    config = json.loads((model / "config.json").read_text())
    config["problem_type"] = "single_label_classification"  # transformers would not write it
    (model / "config.json").write_text(json.dumps(config))
    done = run_export("rungs", "--out", tmp_path / "onnx", "--model", model)
    assert done.code == 2
    assert "requires `num_labels > 1`" in " ".join(done.err.split())
    assert not (tmp_path / "onnx").exists()


def test_export_records_the_task(labels, value):
    for folder, task in ((labels, "labels"), (value, "value")):
        outputs, graphs = loaded(folder)
        record = json.loads((folder / "build/onnx/graphs.json").read_text())
        assert record["task"] == graphs.task == outputs.task == task


# --- independent labels ----------------------------------------------------------------------


def sets_differ(low, high, threshold=0.5):
    def inside(logits):
        return 1 / (1 + np.exp(-logits.astype(np.float64))) >= threshold

    return (inside(low.logits) != inside(high.logits)).any(axis=1)


def certified_errors(fitted, loss):
    """Certify images kept low with a loss, counted here."""
    rows = fitted.splits["certify"]
    escalated = escalation_mask(fitted.scores[rows], fitted.calibration.threshold, Overrides())
    return int((~escalated & loss[rows]).sum())


@pytest.mark.parametrize("threshold", [0.5, 0.7])
def test_the_certified_loss_of_labels_is_another_set(labels, threshold):
    outputs, graphs = loaded(labels)
    fidelity = Fidelity.asked(graphs.task, None, label_threshold=threshold)
    assert fidelity.kind == "labels"
    fitted = fit(outputs, graphs, GOAL, Options(fidelity))
    expected = sets_differ(outputs.low, outputs.high, threshold)
    first = outputs.low.logits.argmax(axis=1) != outputs.high.logits.argmax(axis=1)
    np.testing.assert_array_equal(fitted.loss, expected)
    assert (expected & ~first).sum() > 20  # of which another first class knows nothing
    calibration, certificate = fitted.calibration, fitted.calibration.certificate
    assert certificate["certified"] and calibration.metrics["escalation_rate"] > 0
    assert certificate["errors"] == certified_errors(fitted, expected)
    assert (certificate["fidelity"], certificate["label_threshold"]) == ("labels", threshold)
    words = f"gives another set of labels at probability {threshold:g} than the full rung"
    assert words in certificate["statement"]
    measured = fitted.splits[calibration.metrics["split"]]
    assert calibration.metrics["agreement_low"] == pytest.approx(1 - expected[measured].mean())
    assert not any(name.startswith("accuracy") for name in calibration.metrics)


def test_labels_use_signals_that_mean_something_for_them(labels):
    outputs, graphs = loaded(labels)
    fitted = fit(outputs, graphs, GOAL, Options(Fidelity("labels")))
    assert set(fitted.values) == {"label_margin", "cls_path", "cls_regression"}
    nearest = np.abs(outputs.low.logits.astype(np.float64)).min(axis=1)
    rows = fitted.splits["certify"]  # on the fit split they are out of fold
    np.testing.assert_allclose(fitted.values["label_margin"][rows], -nearest[rows])
    assert fitted.calibration.metrics["signals"]["label_margin"]["auroc"] > 0.6
    with pytest.raises(FitError, match="margin means nothing for a model that answers labels"):
        fit(outputs, graphs, GOAL, Options(Fidelity("labels"), signal="margin"))


def test_an_artifact_of_labels_scores_and_is_evaluated_after_a_round_trip(labels, tmp_path):
    outputs, graphs = loaded(labels)
    half = len(outputs) // 2
    known, new = outputs.rows(np.arange(half)), outputs.rows(np.arange(half, len(outputs)))
    options = Options(Fidelity("labels", label_threshold=0.4), signal="label_margin")
    fitted = fit(known, graphs, EscalationRate(0.3), options)
    fitted.save(tmp_path / "calibration.json")
    calibration = Calibration.load(tmp_path / "calibration.json")
    assert calibration.task == "labels" and Fidelity.of(calibration) == options.fidelity
    np.testing.assert_array_equal(calibration.score(known.low), fitted.scores)
    evaluation = evaluate(calibration, new)
    escalated = escalation_mask(calibration.score(new.low), calibration.threshold, Overrides())
    lost = ~escalated & sets_differ(new.low, new.high, 0.4)
    assert evaluation.errors == lost.sum() > 0
    with pytest.raises(EvaluateError, match="a model that answers classes and not labels"):
        evaluate(calibration, answering("classes", new))


# --- a value ---------------------------------------------------------------------------------


@pytest.mark.parametrize("relative", [False, True])
def test_the_risk_of_one_output_is_that_of_its_value(value, relative):
    outputs, graphs = loaded(value)
    fidelity = Fidelity.asked(graphs.task, "value", TOLERANCE, relative)
    fitted = fit(outputs, graphs, GOAL, Options(fidelity))
    low, high = outputs.low.logits[:, 0], outputs.high.logits[:, 0]
    allowed = TOLERANCE * np.abs(high) if relative else TOLERANCE
    expected = np.abs(low - high) > allowed
    np.testing.assert_array_equal(fitted.loss, expected)
    calibration, certificate = fitted.calibration, fitted.calibration.certificate
    # Top-1 of one output is always the same, and would lose nothing and escalate nothing.
    assert 0.1 < expected.mean() < 0.9
    assert calibration.metrics["escalation_rate"] > 0
    if certificate["certified"]:
        assert certificate["errors"] == certified_errors(fitted, expected)
    assert certificate["certified"] or relative  # on a share of a value near 0 nothing is
    assert set(fitted.values) == {"cls_path", "cls_regression"}
    assert (certificate["tolerance"], certificate["relative"]) == (TOLERANCE, relative)
    size = "30 %" if relative else "0.3"
    words = f"gives a value that differs by more than {size} from the full rung's"
    assert words in Fidelity.of(calibration).words()
    measured = fitted.splits[calibration.metrics["split"]]
    assert calibration.metrics["agreement_low"] == pytest.approx(1 - expected[measured].mean())


def test_a_value_has_no_class_to_agree_on(value):
    outputs, graphs = loaded(value)
    fitted = fit(outputs, graphs, EscalationRate(0.2), Options(Fidelity("cosine")))
    assert not any(name.startswith(("agree", "accuracy")) for name in fitted.calibration.metrics)
    with pytest.raises(FidelityError, match="top1 means nothing for a model that answers a value"):
        fit(outputs, graphs, EscalationRate(0.2), Options(Fidelity("top1")))


@pytest.mark.parametrize("command", ["report", "fit", "align"])
def test_every_command_asks_which_difference_of_a_value_matters(value, command, capsys):
    if command == "report":  # it takes the loss of an artifact where there is one
        (value / "build/calibration/calibration.json").unlink(missing_ok=True)
    goal = ("--max-risk", 0.1) if command == "fit" else ()
    assert run(value, command, *goal) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "give --fidelity value --tolerance X" in line
    tolerance = ("--fidelity", "value", "--tolerance", TOLERANCE)
    assert run(value, command, *goal, *tolerance) == 0


def test_an_artifact_of_an_earlier_release_that_compared_one_output_is_refused(value):
    outputs, graphs = loaded(value)
    calibration = fit(outputs, graphs, Threshold(1.0), Options(Fidelity("cosine"))).calibration
    content = calibration.to_dict()
    del content["task"]
    assert Calibration.from_dict(content) == calibration
    content["chosen_by"] = {**content["chosen_by"], "fidelity": "top1", "tolerance": None}
    with pytest.raises(CalibrationError, match="top1 compares classes, and this model names none"):
        Calibration.from_dict(content)


def test_outputs_of_another_task_are_not_calibrated(labels):
    outputs, graphs = loaded(labels)
    with pytest.raises(FitError, match="a model that answers classes and not labels; collect"):
        fit(answering("classes", outputs), graphs, GOAL, Options(Fidelity("labels")))


# --- pages -----------------------------------------------------------------------------------


def test_pages_show_sets_of_labels_and_values(labels, value, capsys):
    assert run(labels, "fit", "--max-risk", 0.1) == 0
    assert run(value, "fit", "--max-risk", 0.1, "--fidelity", "value", "--tolerance", 0.3) == 0
    for folder, settings, shown, loss in (
        (labels, (), "full: s", "gives another set of labels at probability 0.5"),
        (value, ("--fidelity", "value", "--tolerance", 0.3), "full: ", "differs by more than 0.3"),
    ):
        assert run(folder, "report") == 0
        nothing = ("--out", "build/calibration/analysis.html")
        (folder / "build/calibration/calibration.json").rename(folder / "kept.json")
        assert run(folder, "report", *nothing, *settings) == 0
        (folder / "kept.json").rename(folder / "build/calibration/calibration.json")
        for page in ("report", "analysis"):
            text = (folder / f"build/calibration/{page}.html").read_text()
            assert shown in text and loss in text
            assert "class 0" not in text and "another class" not in text
    text = (labels / "build/calibration/report.html").read_text()
    assert "gives the full rung&#39;s set of labels" in text
    capsys.readouterr()
    assert run(labels, "report", "--json") == 0
    analysis = json.loads(capsys.readouterr().out)
    assert [loss["kind"] for loss in analysis["losses"]] == ["labels", "cosine"]
    assert {"cls_path"} < set(analysis["spearman"]) and "margin" not in analysis["spearman"]


# --- dynamic int8 ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dynamic(tmp_path_factory, images):
    folder = tmp_path_factory.mktemp("dynamic")
    return workplace(folder, images, {"num_labels": 3}, "--low", "px=8,int8")


def test_nothing_is_certified_about_a_graph_whose_answers_depend_on_the_batch(dynamic, capsys):
    assert run(dynamic, "fit", "--max-risk", 0.1) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == (
        "error: vit_low is px=8,int8: with dynamic int8 an image's answer depends on the others in "
        "its batch, so nothing can be certified about it; export it with int8=static; give "
        "--escalation-rate or --threshold to go without"
    )
    assert not (dynamic / "build/calibration/calibration.json").exists()
    for target in (("--escalation-rate", 0.2), ("--threshold", 1.0)):
        assert run(dynamic, "fit", *target) == 0
        warning = " ".join(capsys.readouterr().err.split())
        assert "warning: vit_low is px=8,int8: with dynamic int8 an image's answer" in warning
        assert artifact(dynamic).certificate is None


@pytest.mark.parametrize("name", [*RUNGS, "reference"])
def test_any_graph_of_dynamic_int8_is_refused_by_name(value, dynamic, name):
    outputs, graphs = loaded(value)
    graph = replace(loaded(dynamic)[1].low, name="dynamic")
    mixed = graphs.adding(graph)
    mixed = replace(mixed, roles={**mixed.roles, name: "dynamic"})
    same = replace(outputs, made=Made.by(mixed))
    with pytest.raises(FitError, match=f"{name} is px=8,int8: with dynamic int8"):
        fit(same, mixed, GOAL, Options(Fidelity("value", 0.3)))


def test_a_certificate_of_an_earlier_release_about_dynamic_int8_is_refused(labels):
    outputs, graphs = loaded(labels)
    content = fit(outputs, graphs, GOAL, Options(Fidelity("labels"))).calibration.to_dict()
    Calibration.from_dict(content)
    content["rungs"]["vit_high"]["recipe"] += ",int8"
    with pytest.raises(CalibrationError, match="vit_high is px=16,int8, and with dynamic int8"):
        Calibration.from_dict(content)
    content["rungs"]["vit_high"]["recipe"] += "=static"
    Calibration.from_dict(content)
