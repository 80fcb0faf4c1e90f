"""What is assembled of graphs and an artifact, and what is refused instead."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from bundle import manifest
from bundle.graphs import GraphSet
from export.errors import UsageError
from export.repository import MAX_BATCH_SIZE, RepositoryError, RepositorySettings, assemble
from export.shared_weights import share_weights
from export.versions import add_version
from imaging import code_sha256
from routing import WEIGHTS, Calibration, CalibrationError
from tests.unit.export_tiny import run_export
from tests.unit.fakes import make_calibration
from tests.unit.onnx_files import CLASSES, LAYERS, SIZE, D, write_graph_set


def write_inputs(folder, classes=CLASSES, shared=(), **changes):
    """Rungs and their artifact; those of the rungs in `shared` read weights that lie beside."""
    onnx = write_graph_set(folder / "onnx", classes)
    if shared:
        put_weights_beside(onnx, shared)
    graphs = GraphSet.load(onnx)
    calibration = make_calibration(
        rungs=graphs.rungs,
        image_shape=(3, SIZE, SIZE),
        preprocessing_sha256=graphs.preprocessing_sha256(),
        embedding_dim=D,
        layers=LAYERS,
        classes=classes,
        **changes,
    )
    calibration.save(folder / "calibration.json")
    return graphs, folder / "calibration.json"


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


def contents(folder):
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


def read_configs(repository):
    return {
        path.parent.name: text_format.Parse(path.read_text(), ModelConfig())
        for path in repository.glob("*/config.pbtxt")
    }


def router_parameters(repository):
    found = read_configs(repository)["router"].parameters
    return {name: value.string_value for name, value in found.items()}


def run_repository(folder, out, *more):
    options = ("--onnx", folder / "onnx", "--calibration", folder / "calibration.json")
    return run_export("repository", *options, "--out", out, *more)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Graphs and an artifact that nobody changes."""
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def repository(inputs, tmp_path_factory):
    """Assembled of them, with the settings of git."""
    return assemble(*inputs, tmp_path_factory.mktemp("assembled") / "repository")


@pytest.fixture
def out(tmp_path):
    return tmp_path / "repository"


def test_assembling_twice_gives_identical_bytes(inputs, repository, tmp_path, out):
    first, again = contents(assemble(*inputs, out)), contents(assemble(*inputs, out))
    assert first == again == contents(repository)
    assert list(tmp_path.iterdir()) == [out]  # no left-over temporary folder


def test_everything_a_server_needs_is_there_and_listed(inputs, repository):
    graphs, artifact = inputs
    files, configs = contents(repository), read_configs(repository)
    assert Calibration.load(repository / "router/1/calibration.json") == Calibration.load(artifact)
    for name in ("vit_low", "vit_high"):
        assert files[f"{name}/1/model.onnx"] == graphs.files[name].read_bytes()
        warm_up = configs[name].model_warmup
        assert [sample.batch_size for sample in warm_up] == [1, 8]
        assert all(list(sample.inputs["image"].dims) == [3, 8, 8] for sample in warm_up)
    assert set(json.loads(files["MANIFEST.json"])["files"]) == set(files) - {"MANIFEST.json"}
    manifest.verify(repository)
    # Triton wants a version directory of the ensemble too, and copying may lose an empty one.
    kept = [name for name in sorted(files) if ".gitkeep" in name]
    assert kept == ["adaptive_tensor/1/.gitkeep", "adaptive_vit/1/.gitkeep"]
    assert list(configs["adaptive_tensor"].input[0].dims) == [3, 8, 8]
    # Any folder in the root that is no model makes Triton exit.
    assert {p.name for p in repository.iterdir() if p.is_dir()} == {
        p.name for p in Path("model_repository").iterdir()
    }
    for package, place in (("routing", "router/1"), ("imaging", "preprocess/1")):
        for source in Path(package).glob("*.py"):
            assert files[f"{place}/{package}/{source.name}"] == source.read_bytes()
    deployed = code_sha256(repository / "preprocess/1/imaging")
    assert deployed == Calibration.load(artifact).imaging_sha256 == code_sha256()
    # Only the first version of the router is served.
    assert list(configs["router"].version_policy.specific.versions) == [1]
    for ensemble in ("adaptive_vit", "adaptive_tensor"):
        assert configs[ensemble].ensemble_scheduling.step[-1].model_version == 1


ANSWERING = ("adaptive_tensor", "adaptive_vit", "router")


def test_the_logits_of_whatever_answers_have_the_names_of_their_classes(inputs, tmp_path, out):
    graphs, artifact = inputs
    odd = ("tench, Tinca tinca", "cock:bird", "two\nlines\u2028or three", "twice")
    assemble(replace(graphs, labels=odd), artifact, out)
    for model in ANSWERING:
        (logits,) = (o for o in read_configs(out)[model].output if o.name == "logits")
        named = (out / model / logits.label_filename).read_text("utf-8")
        assert named == "tench, Tinca tinca\ncock:bird\ntwo lines or three\ntwice\n"
        assert f"{model}/labels.txt" in manifest.listed(out)
    assert list(logits.dims) == [CLASSES]  # the router's: Triton takes no other from the artifact
    replace(Calibration.load(artifact), threshold=9.0).save(tmp_path / "next.json")
    assert add_version(out, tmp_path / "next.json") == 2
    assert read_configs(out)["router"].output[0].label_filename == "labels.txt"


def test_where_nobody_named_the_classes_no_configuration_asks_for_names(inputs, out):
    assemble(replace(inputs[0], labels=None), inputs[1], out)
    assert not [name for name in manifest.listed(out) if name.endswith("labels.txt")]
    for model in ANSWERING:
        assert not any(output.label_filename for output in read_configs(out)[model].output)


def test_the_defaults_are_what_stands_in_git(inputs, out):
    repository = assemble(replace(inputs[0], labels=None), inputs[1], out)
    ours, theirs = read_configs(repository), read_configs(Path("model_repository"))
    for name in ("router", "preprocess", "adaptive_vit"):
        assert ours[name] == theirs[name]
        text = (repository / name / "config.pbtxt").read_text()
        assert text.startswith("# Written by python -m export")
    assert {config.max_batch_size for config in theirs.values()} == {MAX_BATCH_SIZE}
    assert router_parameters(repository) == {
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
        "live_folder": "",
    }


def test_every_option_reaches_its_model_and_no_other(inputs, repository, out):
    router = {
        "--on-high-failure": "low",
        "--high-timeout-ms": "750",
        "--client-parameters": "any",
        "--degrade-queue-depth": "16",
        "--degrade-threshold": "0.62500000001",
        "--audit-fraction": "0.05",
        "--reference-check": "off",
    }
    served = {"--intra-op-threads": 6, "--instances": 3, "--max-queue": 7}
    flat = [word for pair in (*router.items(), *served.items()) for word in pair]
    result = run_repository(inputs[1].parent, out, *flat)
    assert (result.code, result.err) == (0, "")
    manifest.verify(out)
    assert {f"--{k.replace('_', '-')}": v for k, v in router_parameters(out).items()} == {
        **router,
        "--shadow-version": "0",
        "--shadow-fraction": "0",
        "--task": "classes",
        "--label-threshold": "0.5",
        "--live-folder": "",  # goes with --live
    }
    configs = read_configs(out)
    for name in ("vit_low", "vit_high"):
        config = configs[name]
        assert config.instance_group[0].count == 3
        assert config.parameters["intra_op_thread_count"].string_value == "6"
        assert config.parameters["inter_op_thread_count"].string_value == "1"
        assert read_configs(repository)[name].instance_group[0].count == 1
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
    for name in ("preprocess", "router"):  # threads and instances are those of the rungs
        assert configs[name].instance_group == read_configs(repository)[name].instance_group


def test_clients_are_told_what_the_answers_mean(inputs, tmp_path, out):
    graphs, artifact = inputs
    chosen_by = {"fidelity": "labels", "tolerance": None, "label_threshold": 0.3}
    labels = replace(Calibration.load(artifact), task="labels", chosen_by=chosen_by)
    labels.save(tmp_path / "labels.json")
    with pytest.raises(RepositoryError, match=r"answers labels, and graphs\.json says classes"):
        assemble(graphs, tmp_path / "labels.json", out)
    assemble(replace(graphs, task="labels"), tmp_path / "labels.json", out)
    found = router_parameters(out)
    assert (found["task"], found["label_threshold"]) == ("labels", "0.3")
    again = tmp_path / "again.json"
    replace(labels, chosen_by={**chosen_by, "label_threshold": 0.4}).save(again)
    with pytest.raises(RepositoryError, match="assemble a new repository"):
        add_version(out, again)
    replace(labels, threshold=9.0).save(again)
    assert add_version(out, again) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"degrade_queue_depth": 8}, "--degrade-queue-depth and --degrade-threshold go together"),
        ({"degrade_threshold": 0.9}, "--degrade-queue-depth and --degrade-threshold go together"),
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
def test_a_setting_that_makes_no_sense_is_refused(inputs, out, options, message):
    with pytest.raises(UsageError, match=message) as refusal:
        assemble(*inputs, out, RepositorySettings(**options))
    assert "\n" not in str(refusal.value) and not out.exists()


def test_what_always_escalates_cannot_be_degraded(tmp_path, out):
    settings = RepositorySettings(degrade_queue_depth=8, degrade_threshold=0.9)
    with pytest.raises(UsageError, match="this one always escalates"):
        assemble(*write_inputs(tmp_path, threshold=None), out, settings)


@pytest.mark.parametrize(
    "options",
    [
        ("--on-high-failure", "panic"),
        ("--client-parameters", "none"),
        ("--instances", "0"),
        ("--intra-op-threads", "0"),
        ("--max-queue", "0"),
        ("--max-queue", "many"),
        ("--high-timeout-ms", "-1"),
        ("--degrade-queue-depth", "33"),
        ("--degrade-queue-depth", "-1"),
        ("--audit-fraction", "1.5"),
        ("--audit-fraction", "nan"),
        ("--shadow", "0.1"),
        ("--live-folder", "evidence"),
        ("--max-risk", "0.05"),
        ("--confidence", "0.95"),
        ("--fidelity", "cosine"),
        ("--tolerance", "0.2"),
        ("--relative",),
        ("--label-threshold", "0.4"),
        ("--audit-floor", "0.1"),
    ],
)
def test_a_bad_option_is_one_line(inputs, out, options):
    result = run_repository(inputs[1].parent, out, *options)
    assert (result.code, result.out) == (2, "")
    assert options[0] in result.err and len(result.err.splitlines()) == 1


def change_preprocessing(folder, **fields):
    """Edit graphs.json by hand."""
    path = folder / "onnx/graphs.json"
    content = json.loads(path.read_text())
    content["preprocessing"].update(fields)
    path.write_text(json.dumps(content, indent=3, sort_keys=True))


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: (f / "onnx/vit_high.onnx").unlink(), "no ONNX file at"),
        (lambda f: (f / "onnx/graphs.json").unlink(), "export rungs first"),
        (lambda f: (f / "calibration.json").unlink(), "calibration fit first"),
        (lambda f: (f / "onnx/vit_low.onnx").write_bytes(b"x"), "not the file that was calibrated"),
        (lambda f: write_graph_set(f / "onnx", seeds=(8, 9)), "not the file that was calibrated"),
        (lambda f: change_preprocessing(f, resample="lanczos"), "is not the one that was"),
        (lambda f: change_preprocessing(f, mean=[0.5, 0.5, 0.4]), "is not the one that was"),
        (lambda f: change_preprocessing(f, resample="magic"), "graphs.json cannot be carried out"),
        (lambda f: change_preprocessing(f, contrast=2), "graphs.json cannot be carried out"),
        (lambda f: change_preprocessing(f, std=None), "graphs.json cannot be carried out"),
        (lambda f: write_inputs(f, imaging_sha256="e" * 64), "imaging is not the code that"),
        (lambda f: write_inputs(f, imaging_sha256=""), "imaging is not the code that"),
        (lambda f: put_a_foreign_file(f), "no assembled repository"),
    ],
)
def test_what_does_not_belong_together_is_refused_in_one_line(tmp_path, out, break_it, message):
    write_inputs(tmp_path)
    break_it(tmp_path)
    before = contents(tmp_path)
    result = run_repository(tmp_path, out)
    assert (result.code, result.out) == (2, "")
    assert message in result.err and len(result.err.strip().splitlines()) == 1
    assert result.err.startswith("error: ") and contents(tmp_path) == before


def put_a_foreign_file(folder):
    (folder / "repository").mkdir()
    (folder / "repository/thesis.txt").write_text("precious")


def test_a_preprocessing_that_is_laid_out_otherwise_is_the_same(tmp_path, out):
    _, artifact = write_inputs(tmp_path)
    change_preprocessing(tmp_path, mean=[0.5, 0.5, 0.5])
    assemble(GraphSet.load(tmp_path / "onnx"), artifact, out)


def test_a_failed_assembly_keeps_the_old_repository(inputs, tmp_path, out):
    before = contents(assemble(*inputs, out))
    (tmp_path / "calibration.json").write_text("{")
    with pytest.raises(CalibrationError):
        assemble(inputs[0], tmp_path / "calibration.json", out)
    assert contents(out) == before


@pytest.mark.parametrize("below", ["repository", "deeper/repository"])
def test_out_below_a_file_is_one_line(inputs, below):
    result = run_repository(inputs[1].parent, inputs[1] / below)
    assert result.code == 2 and len(result.err.splitlines()) == 1
    assert result.err.startswith(f"error: {inputs[1]}")
    assert result.err.endswith(": Not a directory\n")


def test_a_headless_ensemble_has_no_logits(tmp_path, out):
    assemble(*write_inputs(tmp_path, classes=None), out)
    config = read_configs(out)["adaptive_vit"]
    kept = {"embedding", "escalated", "score", "degraded"}
    assert {output.name for output in config.output} == kept
    assert set(config.ensemble_scheduling.step[1].output_map) == kept
    assert not (out / "labels.txt").exists()
