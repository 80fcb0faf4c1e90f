import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from bundle import manifest, placing
from bundle.graphs import REFERENCE, GraphSet
from calibration.certify import Goal
from calibration.fidelity import Fidelity
from calibration.fit import Options, fit
from export.errors import UsageError
from export.repository import RepositoryError, assemble
from export.settings import MAX_BATCH_SIZE, Settings
from export.shared_weights import share_weights
from export.versions import add_version
from imaging import code_sha256
from routing import REFERENCE_MODEL, WEIGHTS, Calibration, CalibrationError
from tests.unit.calibration_outputs import make_outputs, with_losing_high, with_reference
from tests.unit.export_tiny import run_export
from tests.unit.fakes import make_calibration
from tests.unit.onnx_files import CLASSES, LAYERS, SIZE, D, write_rung_set
from tests.unit.quantised_files import ask


def write_inputs(folder, classes=CLASSES, shared=(), **changes):
    """Rungs and their artifact; those of the rungs in `shared` read weights that lie beside."""
    onnx = write_rung_set(folder / "onnx", classes)
    if shared:
        put_weights_beside(onnx, shared)
    rung_set = GraphSet.load(onnx)
    calibration = make_calibration(
        rungs=rung_set.rungs,
        image_shape=(3, SIZE, SIZE),
        preprocessing_sha256=rung_set.preprocessing_sha256(),
        embedding_dim=D,
        layers=LAYERS,
        classes=classes,
        **changes,
    )
    calibration.save(folder / "calibration.json")
    return rung_set, folder / "calibration.json"


def put_weights_beside(folder, names):
    """As `export rungs` does it, here with weights of 64 bytes and more."""
    files = [folder / f"{name}.onnx" for name in names]
    if len(files) == 1:  # shared with a graph that is not served
        files.append(shutil.copyfile(files[0], folder / "px9.onnx"))
    assert all(share_weights(files, folder / WEIGHTS, at_least_bytes=64).values())
    path = folder / "graphs.json"
    content = json.loads(path.read_text())
    for name in names:
        content["graphs"][name]["sha256"] = manifest.sha256_file(folder / f"{name}.onnx")
        content["graphs"][name]["weights_sha256"] = manifest.sha256_file(folder / WEIGHTS)
    path.write_text(json.dumps(content))


def placed(repository):
    return [repository / name / "1" / WEIGHTS for name in ("vit_low", "vit_high")]


def contents(folder):
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


def test_assembling_twice_gives_identical_bytes(tmp_path):
    rung_set, artifact = write_inputs(tmp_path)
    first = contents(assemble(rung_set, artifact, tmp_path / "one"))
    second = contents(assemble(rung_set, artifact, tmp_path / "two"))
    again = contents(assemble(rung_set, artifact, tmp_path / "one"))
    assert first == second == again
    assert sorted(tmp_path.glob(".*")) == []  # no left-over temporary folder


def test_everything_a_server_needs_is_there_and_listed(tmp_path):
    rung_set, artifact = write_inputs(tmp_path)
    out = assemble(rung_set, artifact, tmp_path / "repository")
    files = contents(out)
    assert Calibration.load(out / "router/1/calibration.json") == Calibration.load(artifact)
    for name in ("vit_low", "vit_high"):
        assert files[f"{name}/1/model.onnx"] == rung_set.files[name].read_bytes()
        warm_up = read_configs(out)[name].model_warmup
        assert [sample.batch_size for sample in warm_up] == [1, 8]
        assert all(list(sample.inputs["image"].dims) == [3, 8, 8] for sample in warm_up)
    assert set(json.loads(files["MANIFEST.json"])["files"]) == set(files) - {"MANIFEST.json"}
    manifest.verify(out)
    # Triton wants a version directory of the ensemble too, and copying may lose an empty one.
    kept = [name for name in sorted(files) if ".gitkeep" in name]
    assert kept == ["adaptive_tensor/1/.gitkeep", "adaptive_vit/1/.gitkeep"]
    assert list(read_configs(out)["adaptive_tensor"].input[0].dims) == [3, 8, 8]
    # Any folder in the root that is no model makes Triton exit.
    assert {p.name for p in out.iterdir() if p.is_dir()} == {
        p.name for p in Path("model_repository").iterdir()
    }
    for package, place in (("routing", "router/1"), ("imaging", "preprocess/1")):
        for source in Path(package).glob("*.py"):
            assert files[f"{place}/{package}/{source.name}"] == source.read_bytes()


def test_threads_are_set_on_both_rungs(tmp_path):
    rung_set, artifact = write_inputs(tmp_path)
    out = assemble(rung_set, artifact, tmp_path / "repository", Settings(intra_op_threads=6))
    for name in ("vit_low", "vit_high"):
        parameters = read_configs(out)[name].parameters
        assert parameters["intra_op_thread_count"].string_value == "6"
        assert parameters["inter_op_thread_count"].string_value == "1"


def test_instances_are_set_on_both_rungs_and_nowhere_else(tmp_path):
    rung_set, artifact = write_inputs(tmp_path)
    one = contents(assemble(rung_set, artifact, tmp_path / "one"))
    three = contents(assemble(rung_set, artifact, tmp_path / "three", Settings(instances=3)))
    changed = {name for name in one if one[name] != three[name]} - {manifest.NAME}
    assert changed == {"vit_low/config.pbtxt", "vit_high/config.pbtxt"}
    for name in ("vit_low", "vit_high"):
        assert read_configs(tmp_path / "one")[name].instance_group[0].count == 1
        assert read_configs(tmp_path / "three")[name].instance_group[0].count == 3


def read_configs(repository):
    return {
        path.parent.name: text_format.Parse(path.read_text(), ModelConfig())
        for path in repository.glob("*/config.pbtxt")
    }


def router_parameters(repository):
    found = read_configs(repository)["router"].parameters
    return {name: value.string_value for name, value in found.items()}


def test_the_defaults_are_what_stands_in_git(tmp_path):
    rung_set, artifact = write_inputs(tmp_path)
    out = assemble(rung_set, artifact, tmp_path / "repository")
    for name in ("router", "preprocess", "adaptive_vit"):
        assert read_configs(out)[name] == read_configs(Path("model_repository"))[name]
        assert (out / name / "config.pbtxt").read_text().startswith("# Written by python -m export")
    assert router_parameters(out) == {
        "on_high_failure": "error",
        "high_timeout_ms": "10000",
        "client_parameters": "careful",
        "degrade_queue_depth": "0",
        "degrade_threshold": "",
        "audit_fraction": "0",
        "shadow_version": "0",
        "shadow_fraction": "0",
        "task": "classes",
        "label_threshold": "0.5",
        "reference_check": "warn",
    }


def test_every_option_reaches_the_router(tmp_path):
    write_inputs(tmp_path)
    options = {
        "--on-high-failure": "low",
        "--high-timeout-ms": "750",
        "--client-parameters": "any",
        "--degrade-queue-depth": "16",
        "--degrade-threshold": "0.62500000001",
        "--audit-fraction": "0.05",
        "--reference-check": "off",
    }
    flat = [word for pair in options.items() for word in pair]
    result = run_repository(tmp_path, tmp_path / "repository", *flat)
    assert (result.exit_code, result.stderr) == (0, "")
    found = router_parameters(tmp_path / "repository")
    assert {f"--{name.replace('_', '-')}": value for name, value in found.items()} == {
        **options,
        "--shadow-version": "0",
        "--shadow-fraction": "0",
        "--task": "classes",
        "--label-threshold": "0.5",
    }


def test_clients_are_told_what_the_answers_mean(tmp_path):
    rung_set, artifact = write_inputs(tmp_path)
    labels = replace(
        Calibration.load(artifact),
        task="labels",
        chosen_by={"fidelity": "labels", "tolerance": None, "label_threshold": 0.3},
    )
    labels.save(artifact)
    with pytest.raises(RepositoryError, match=r"answers labels, and graphs\.json says classes"):
        assemble(rung_set, artifact, tmp_path / "repository")
    out = assemble(replace(rung_set, task="labels"), artifact, tmp_path / "repository")
    found = router_parameters(out)
    assert (found["task"], found["label_threshold"]) == ("labels", "0.3")
    again = tmp_path / "again.json"
    replace(labels, chosen_by={**labels.chosen_by, "label_threshold": 0.4}).save(again)
    with pytest.raises(RepositoryError, match="assemble a new repository"):
        add_version(out, again)
    replace(labels, threshold=9.0).save(again)
    assert add_version(out, again) == 2


def test_the_queue_of_every_model_is_bounded(tmp_path):
    rung_set, artifact = write_inputs(tmp_path)
    out = assemble(rung_set, artifact, tmp_path / "repository", Settings(max_queue=7))
    configs = read_configs(out)
    for ensemble in ("adaptive_vit", "adaptive_tensor"):
        assert not configs.pop(ensemble).HasField("dynamic_batching")
    assert len(configs) == 4
    for name, config in configs.items():
        policy = config.dynamic_batching.default_queue_policy
        assert policy.max_queue_size == 7, name
        if name == "preprocess":  # its config says why
            continue
        assert policy.allow_timeout_override and policy.timeout_action == policy.REJECT
        # Without one Triton takes no request's own timeout, which may only be shorter.
        assert policy.default_timeout_microseconds > 0
    assert list(configs["preprocess"].dynamic_batching.preferred_batch_size) == [1]


def test_only_the_first_version_of_the_router_is_served(tmp_path):
    rung_set, artifact = write_inputs(tmp_path)
    configs = read_configs(assemble(rung_set, artifact, tmp_path / "repository"))
    assert list(configs["router"].version_policy.specific.versions) == [1]
    for ensemble in ("adaptive_vit", "adaptive_tensor"):
        assert configs[ensemble].ensemble_scheduling.step[-1].model_version == 1


def test_the_largest_batch_is_that_of_the_models(tmp_path):
    assert {c.max_batch_size for c in read_configs(Path("model_repository")).values()} == {
        MAX_BATCH_SIZE
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"instances": 0}, "--instances 0 must be 1 or more"),
        ({"intra_op_threads": 0}, "--intra-op-threads 0 must be 1 or more"),
        ({"max_queue": 0}, "--max-queue 0 must be 1 or more"),
        ({"high_timeout_ms": -1}, "--high-timeout-ms -1 must be 1 or more"),
        ({"audit_fraction": 1.5}, "--audit-fraction 1.5 must be between 0 and 1"),
        ({"audit_fraction": math.nan}, "--audit-fraction nan must be between 0 and 1"),
        ({"degrade_queue_depth": 8}, "--degrade-queue-depth and --degrade-threshold go together"),
        ({"degrade_threshold": 0.9}, "--degrade-queue-depth and --degrade-threshold go together"),
        (
            {"degrade_queue_depth": 33, "degrade_threshold": 0.9},
            r"--degrade-queue-depth 33 must be 1 to 32 \(the largest batch\)",
        ),
        ({"degrade_queue_depth": -1}, "--degrade-queue-depth -1 must be 1 to 32"),
        (
            {"degrade_queue_depth": 8, "degrade_threshold": 0.5},
            "--degrade-threshold 0.5 must be finite and above the calibrated threshold 0.5",
        ),
        (
            {"degrade_queue_depth": 8, "degrade_threshold": math.inf},
            "--degrade-threshold inf must be finite",
        ),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused(tmp_path, options, message):
    rung_set, artifact = write_inputs(tmp_path)
    with pytest.raises(UsageError, match=message) as refusal:
        assemble(rung_set, artifact, tmp_path / "repository", Settings(**options))
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "repository").exists()


def test_what_always_escalates_cannot_be_degraded(tmp_path):
    rung_set, artifact = write_inputs(tmp_path, threshold=None)
    settings = Settings(degrade_queue_depth=8, degrade_threshold=0.9)
    with pytest.raises(UsageError, match="this one always escalates"):
        assemble(rung_set, artifact, tmp_path / "repository", settings)


@pytest.mark.parametrize(
    "options",
    [
        ("--on-high-failure", "panic"),
        ("--client-parameters", "none"),
        ("--max-queue", "many"),
        ("--audit-fraction", "2"),
        ("--shadow", "0.1"),
    ],
)
def test_a_bad_option_is_one_line(tmp_path, options):
    write_inputs(tmp_path)
    result = run_repository(tmp_path, tmp_path / "repository", *options)
    assert (result.exit_code, result.stdout) == (2, "")
    assert options[0] in result.stderr and len(result.stderr.splitlines()) == 1


# --- the full model, for the audit of a cascade whose full rung is cheaper ------------------------


@pytest.fixture(scope="module")
def cheaper(tmp_path_factory):
    """Rungs beside the full model, and what `fit` certifies about it."""
    folder = tmp_path_factory.mktemp("cheaper")
    rung_set = with_reference(GraphSet.load(write_rung_set(folder / "onnx")))
    outputs = with_losing_high(make_outputs(rung_set, 800), share=0.02)
    fitted = fit(outputs, rung_set, Goal(0.1, 0.9, "ltt"), Options(Fidelity("top1")))
    assert fitted.calibration.certificate["certified"]
    fitted.save(folder / "calibration.json")
    return rung_set, folder / "calibration.json"


AUDITED = Settings(audit_fraction=0.1, instances=2, intra_op_threads=3)


def test_an_audit_of_a_cascade_with_a_cheaper_full_rung_gets_the_full_model(cheaper, tmp_path):
    rung_set, artifact = cheaper
    out = assemble(rung_set, artifact, tmp_path / "repository", AUDITED)
    manifest.verify(out)
    placed_file = f"{REFERENCE_MODEL}/1/model.onnx"
    assert (out / placed_file).read_bytes() == rung_set.reference.file.read_bytes()
    assert manifest.listed(out)[placed_file] == rung_set.reference.record.sha256
    high, reference = (read_configs(out)[name] for name in ("vit_high", REFERENCE_MODEL))
    assert [sample.batch_size for sample in reference.model_warmup] == [1]
    assert (high.instance_group[0].count, reference.instance_group[0].count) == (2, 1)
    assert reference.parameters["intra_op_thread_count"].string_value == "3"
    for config in (high, reference):
        del config.model_warmup[:], config.instance_group[:]
    assert high == reference


def test_without_an_audit_the_full_model_stays_away(cheaper, tmp_path):
    assert not (assemble(*cheaper, tmp_path / "repository") / REFERENCE_MODEL).exists()


def test_the_full_model_must_be_the_one_that_was_certified_about(cheaper, tmp_path):
    rung_set, artifact = cheaper
    without = replace(rung_set, roles={**rung_set.roles, REFERENCE: rung_set.high.name})
    with pytest.raises(RepositoryError, match="names no reference"):
        assemble(without, artifact, tmp_path / "repository", AUDITED)
    other = rung_set.adding(replace(rung_set.reference, file=rung_set.low.file))
    with pytest.raises(CalibrationError, match="vit_reference: .* not the file"):
        assemble(other, artifact, tmp_path / "repository", AUDITED)
    earlier = tmp_path / "earlier.json"
    replace(Calibration.load(artifact), reference=None).save(earlier)
    with pytest.raises(RepositoryError, match="earlier release.* fit again"):
        assemble(rung_set, earlier, tmp_path / "repository", AUDITED)
    assemble(rung_set, earlier, tmp_path / "repository")  # which audits nothing


def test_a_version_certified_about_another_full_model_is_refused(cheaper, tmp_path):
    rung_set, artifact = cheaper
    out = assemble(rung_set, artifact, tmp_path / "repository", AUDITED)
    live = Calibration.load(artifact)
    other = tmp_path / "other.json"
    replace(live, threshold=0.1, reference=rung_set.rungs["vit_low"]).save(other)
    with pytest.raises(CalibrationError, match="vit_reference: .* not the file"):
        add_version(out, other)
    replace(live, threshold=0.1).save(other)
    assert add_version(out, other) == 2


def test_shared_weights_lie_once_under_a_name_in_each_version_directory(tmp_path):
    rung_set, artifact = write_inputs(tmp_path, shared=("vit_low", "vit_high"))
    out = assemble(rung_set, artifact, tmp_path / "repository")
    low, high = placed(out)
    assert os.path.samefile(low, high) and low.stat().st_nlink == 2
    # Not the export's own, which a later export replaces or a user edits.
    assert not os.path.samefile(low, tmp_path / "onnx" / WEIGHTS)
    assert low.read_bytes() == (tmp_path / "onnx" / WEIGHTS).read_bytes()
    listed = json.loads((out / manifest.NAME).read_text())["files"]
    assert {f"vit_low/1/{WEIGHTS}", f"vit_high/1/{WEIGHTS}"} <= set(listed)
    manifest.verify(out)
    files = {name: out / name / "1/model.onnx" for name in rung_set.rungs}
    Calibration.load(out / "router/1/calibration.json").check_rungs(files)


def test_weights_lie_beside_the_rung_alone_that_reads_them(tmp_path):
    rung_set, artifact = write_inputs(tmp_path, shared=("vit_high",))
    low, high = placed(assemble(rung_set, artifact, tmp_path / "repository"))
    assert high.is_file() and not low.exists()


def test_a_copy_without_hard_links_is_the_same_repository(tmp_path):
    rung_set, artifact = write_inputs(tmp_path, shared=("vit_low", "vit_high"))
    out = assemble(rung_set, artifact, tmp_path / "repository")
    copy = shutil.copytree(out, tmp_path / "copy")
    low, high = placed(copy)
    assert not os.path.samefile(low, high)
    manifest.verify(copy)
    files = {name: copy / name / "1/model.onnx" for name in rung_set.rungs}
    Calibration.load(copy / "router/1/calibration.json").check_rungs(files)
    image = np.random.default_rng(0).normal(size=(2, 3, SIZE, SIZE)).astype(np.float32)
    for name, file in files.items():
        for output, value in ask(rung_set.files[name], image).items():
            np.testing.assert_array_equal(ask(file, image)[output], value)


def test_where_no_second_name_can_be_given_weights_are_copied(tmp_path, monkeypatch):
    def refuse(source, target):
        raise OSError("no links here")

    rung_set, artifact = write_inputs(tmp_path, shared=("vit_low", "vit_high"))
    monkeypatch.setattr(placing.os, "link", refuse)
    out = assemble(rung_set, artifact, tmp_path / "repository")
    low, high = placed(out)
    assert not os.path.samefile(low, high) and low.read_bytes() == high.read_bytes()
    manifest.verify(out)


def test_altered_or_missing_weights_are_refused(tmp_path):
    rung_set, artifact = write_inputs(tmp_path, shared=("vit_low", "vit_high"))
    weights = tmp_path / "onnx" / WEIGHTS
    intact = weights.read_bytes()
    weights.write_bytes(intact[:-1] + bytes([intact[-1] ^ 1]))
    with pytest.raises(CalibrationError, match=r"vit_low: weights\.bin is not the file that was"):
        assemble(rung_set, artifact, tmp_path / "repository")
    weights.unlink()
    with pytest.raises(CalibrationError, match=r"vit_low: weights\.bin is missing"):
        assemble(rung_set, artifact, tmp_path / "repository")
    weights.write_bytes(intact)
    assemble(rung_set, artifact, tmp_path / "repository")


def test_a_headless_ensemble_has_no_logits(tmp_path):
    rung_set, artifact = write_inputs(tmp_path, classes=None)
    out = assemble(rung_set, artifact, tmp_path / "repository")
    kept = {"embedding", "escalated", "score", "degraded"}
    for ensemble in ("adaptive_vit", "adaptive_tensor"):
        config = read_configs(out)[ensemble]
        assert {output.name for output in config.output} == kept
        assert set(config.ensemble_scheduling.step[-1].output_map) == kept
    assert not (out / "labels.txt").exists()


def test_other_onnx_files_than_the_calibrated_are_refused(tmp_path):
    _, artifact = write_inputs(tmp_path)
    others = GraphSet.load(write_rung_set(tmp_path / "others", seeds=(8, 9)))
    with pytest.raises(CalibrationError, match="vit_low.* is not the file that was calibrated"):
        assemble(others, artifact, tmp_path / "repository")
    assert not (tmp_path / "repository").exists()


def change_preprocessing(folder, **fields):
    """Edit graphs.json by hand."""
    path = folder / "onnx/graphs.json"
    content = json.loads(path.read_text())
    content["preprocessing"].update(fields)
    path.write_text(json.dumps(content, indent=3, sort_keys=True))


def test_another_preprocessing_than_the_calibrated_is_refused(tmp_path):
    _, artifact = write_inputs(tmp_path)
    change_preprocessing(tmp_path, mean=[0.5, 0.5, 0.4])
    with pytest.raises(RepositoryError, match="preprocessing in graphs.json is not the one that"):
        assemble(GraphSet.load(tmp_path / "onnx"), artifact, tmp_path / "repository")
    assert not (tmp_path / "repository").exists()
    change_preprocessing(tmp_path, mean=[0.5, 0.5, 0.5])  # laid out otherwise, but the same
    assemble(GraphSet.load(tmp_path / "onnx"), artifact, tmp_path / "repository")


@pytest.mark.parametrize("other", ["e" * 64, ""])
def test_another_decoder_than_the_calibrated_is_refused(tmp_path, other):
    """An artifact of an earlier release does not say which it was."""
    rung_set, artifact = write_inputs(tmp_path, imaging_sha256=other)
    with pytest.raises(RepositoryError, match="imaging is not the code that decoded") as error:
        assemble(rung_set, artifact, tmp_path / "repository")
    assert "\n" not in str(error.value) and not (tmp_path / "repository").exists()


def test_the_decoder_that_is_deployed_is_the_one_calibrated(tmp_path):
    rung_set, artifact = write_inputs(tmp_path)
    repository = assemble(rung_set, artifact, tmp_path / "repository")
    deployed = code_sha256(repository / "preprocess/1/imaging")
    assert deployed == Calibration.load(artifact).imaging_sha256 == code_sha256()


def test_a_foreign_folder_is_left_alone(tmp_path):
    rung_set, artifact = write_inputs(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("precious")
    with pytest.raises(RepositoryError, match="no assembled repository"):
        assemble(rung_set, artifact, tmp_path / "mine")
    assert (tmp_path / "mine/thesis.txt").read_text() == "precious"


def test_a_failed_assembly_keeps_the_old_repository(tmp_path):
    rung_set, artifact = write_inputs(tmp_path)
    out = assemble(rung_set, artifact, tmp_path / "repository")
    before = contents(out)
    artifact.write_text("{")
    with pytest.raises(CalibrationError):
        assemble(rung_set, artifact, out)
    assert contents(out) == before


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: (f / "onnx/vit_high.onnx").unlink(), "no ONNX file at"),
        (lambda f: (f / "onnx/graphs.json").unlink(), "export rungs first"),
        (lambda f: (f / "calibration.json").unlink(), "calibration fit first"),
        (lambda f: (f / "onnx/vit_low.onnx").write_bytes(b"x"), "not the file that was calibrated"),
        (lambda f: change_preprocessing(f, resample="lanczos"), "is not the one that was"),
        (lambda f: change_preprocessing(f, resample="magic"), "graphs.json cannot be carried out"),
        (lambda f: change_preprocessing(f, contrast=2), "graphs.json cannot be carried out"),
        (lambda f: change_preprocessing(f, std=None), "graphs.json cannot be carried out"),
    ],
)
def test_the_command_says_in_one_line_what_is_missing(tmp_path, break_it, message):
    write_inputs(tmp_path)
    break_it(tmp_path)
    result = run_repository(tmp_path, tmp_path / "repository")
    assert result.exit_code == 2
    assert message in result.stderr and len(result.stderr.strip().splitlines()) == 1
    assert result.stderr.startswith("error: ") and result.stdout == ""


@pytest.mark.parametrize("below", ["repository", "deeper/repository"])
def test_out_below_a_file_is_one_line(tmp_path, below):
    write_inputs(tmp_path)
    result = run_repository(tmp_path, tmp_path / "calibration.json" / below)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {tmp_path / 'calibration.json'}")
    assert result.stderr.endswith(": Not a directory\n")
    assert len(result.stderr.splitlines()) == 1


def test_the_command_assembles(tmp_path):
    write_inputs(tmp_path)
    result = run_repository(tmp_path, tmp_path / "repository", "--instances", 2)
    assert (result.exit_code, result.stderr) == (0, "")
    manifest.verify(tmp_path / "repository")
    assert read_configs(tmp_path / "repository")["vit_low"].instance_group[0].count == 2


def run_repository(folder, out, *more):
    options = ("--onnx", folder / "onnx", "--calibration", folder / "calibration.json")
    return run_export("repository", *options, "--out", out, *more)
