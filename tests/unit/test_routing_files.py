import json
import py_compile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bundle import manifest
from routing import (
    WEIGHTS,
    Calibration,
    CalibrationError,
    ManifestError,
    RungRecord,
)
from tests.unit.fakes import make_calibration


def array(values):
    return {"dtype": "float64", "shape": [len(values)], "values": values}


def linear(length, bias=0.0):
    return {"weights": array([0.0] * length), "bias": array([bias])}


@pytest.mark.parametrize("shape", [(0,), (1,), (2, 3), (4, 5, 6)])
def test_coefficients_and_reference_scores_round_trip_bit_exactly(tmp_path, shape):
    rng = np.random.default_rng(0)
    weights = rng.normal(size=3 * 3 + 1 + 4) * 1e-7  # 3L + 1 + D of the fake
    coefficients = {"weights": weights, "bias": np.array([1 / 3])}
    scores = rng.normal(size=shape).astype(np.float32)
    calibration = make_calibration(
        signal="cls_regression", coefficients=coefficients, reference_scores=scores
    )
    calibration.save(tmp_path / "a.json")
    loaded = Calibration.load(tmp_path / "a.json")
    for name, values in coefficients.items():
        np.testing.assert_array_equal(loaded.coefficients[name], values)
        assert loaded.coefficients[name].dtype == values.dtype
    assert loaded.reference_scores.dtype == np.float32
    np.testing.assert_array_equal(loaded.reference_scores, scores)


def test_the_artifact_round_trips_bit_exactly(tmp_path):
    reference = RungRecord(4, "px=4", "3" * 64, "4" * 64)
    calibration = make_calibration(
        threshold=0.1 + 0.2, metrics={"agreement_with_high": 1 / 3}, reference=reference
    )
    calibration.save(tmp_path / "a.json")
    loaded = Calibration.load(tmp_path / "a.json")
    assert loaded == calibration and loaded.reference == reference
    loaded.save(tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_always_high_is_written_as_null(tmp_path):
    make_calibration(threshold=None).save(tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text())["threshold"] is None
    assert Calibration.load(tmp_path / "a.json").threshold is None


def test_cls_layers_of_another_width_than_the_embedding(tmp_path):
    layers, width, classes = 3, 7, 5  # the embedding has 4 numbers
    fields = {
        "signal": "layer_lens",
        "coefficients": {
            "lens_weights": np.zeros((2, width, classes), np.float32),
            "lens_bias": np.zeros((2, classes), np.float32),
            "weights": np.zeros(6),
            "bias": np.zeros(1),
        },
        "layers": layers,
        "classes": classes,
    }
    with pytest.raises(CalibrationError, match="do not fit the model"):
        make_calibration(**fields)
    made = make_calibration(**fields, layer_dim=width)
    made.save(tmp_path / "a.json")
    assert Calibration.load(tmp_path / "a.json") == made
    assert "layer_dim" not in make_calibration().to_dict()  # of most models, as before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 99}, "schema version 99"),
        ({"signal": "tea_leaves"}, "signal 'tea_leaves' is unknown"),
        ({"signal": "margin", "classes": None}, "needs logits"),
        ({"coefficients": {"w": array([1.0])}}, "takes coefficients"),
        ({"signal": "cls_regression", "coefficients": linear(99)}, "do not fit the model"),
        ({"signal": "cls_regression", "coefficients": linear(14, bias=1e400)}, "not finite"),
        ({"coefficients": {"w": {**array([1.0]), "dtype": "object"}}}, "array of object"),
        ({"coefficients": {"w": {**array([1.0]), "shape": [7]}}}, "invalid field"),
        ({"threshold": None, "certificate": {"certified": True}}, "there is none"),
        ({"rungs": {}}, "rungs must be vit_low and vit_high"),
        ({"score_map": {"sign": 1, "knots": [0, 0], "values": [0, 1]}}, "strictly increasing"),
        ({"surprise": 1}, "surprise"),
        ({"image_shape": [3, 4]}, "invalid field"),
    ],
)
def test_an_invalid_artifact_is_refused_in_one_line(tmp_path, change, message):
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps({**make_calibration().to_dict(), **change}))
    with pytest.raises(CalibrationError, match=message) as error:
        Calibration.load(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_a_half_written_artifact_is_refused(tmp_path, content):
    path = tmp_path / "calibration.json"
    path.write_text(content)
    with pytest.raises(CalibrationError):
        Calibration.load(path)


def test_a_missing_artifact_says_what_to_run(tmp_path):
    with pytest.raises(CalibrationError, match="calibration fit"):
        Calibration.load(tmp_path / "calibration.json")


def test_check_rungs_names_the_file_that_differs(tmp_path):
    files = {name: tmp_path / f"{name}.onnx" for name in ("vit_low", "vit_high")}
    for name, file in files.items():
        file.write_text(name)
    rungs = make_calibration().rungs
    right = {
        name: type(rung)(rung.px, rung.recipe, manifest.sha256_file(files[name]))
        for name, rung in rungs.items()
    }
    calibration = make_calibration(rungs=right)
    calibration.check_rungs(files)
    files["vit_high"].write_text("another")
    with pytest.raises(CalibrationError, match=r"vit_high: vit_high\.onnx is not the file"):
        calibration.check_rungs(files)
    files["vit_high"].unlink()
    with pytest.raises(CalibrationError, match="vit_high: no ONNX file at"):
        calibration.check_rungs(files)


def test_weights_beside_a_graph_are_part_of_what_it_is(tmp_path):
    file, weights = tmp_path / "a.onnx", tmp_path / WEIGHTS
    file.write_text("graph")
    weights.write_text("weights")
    alone = RungRecord(2, "px=2", manifest.sha256_file(file))
    record = replace(alone, weights_sha256=manifest.sha256_file(weights))
    assert alone.fingerprint == alone.sha256
    others = [alone, replace(record, sha256="0" * 64), replace(record, weights_sha256="0" * 64)]
    assert record.fingerprint not in {other.fingerprint for other in others}
    assert replace(record, px=3, recipe="px=3", layers=1).fingerprint == record.fingerprint

    def which():
        """Which of the records the files are."""
        return [other.fault(file, "differs") is None for other in (record, *others)]

    assert which() == [True, True, False, False]
    weights.write_text("others")
    assert which() == [False, True, False, False]
    weights.unlink()
    assert which() == [False, True, False, False]
    file.write_text("another")
    assert which() == [False] * 4


def test_check_rungs_refuses_altered_weights(tmp_path):
    rungs, files = {}, {}
    for name in ("vit_low", "vit_high"):
        files[name] = tmp_path / name / "model.onnx"
        files[name].parent.mkdir()
        files[name].write_text(name)
        (tmp_path / name / WEIGHTS).write_text("weights")
        hashes = [manifest.sha256_file(f) for f in (files[name], tmp_path / name / WEIGHTS)]
        rungs[name] = RungRecord(2, "px=2", *hashes)
    calibration = make_calibration(rungs=rungs)
    calibration.save(tmp_path / "a.json")
    loaded = Calibration.load(tmp_path / "a.json")
    assert loaded == calibration and loaded.rungs == rungs
    loaded.check_rungs(files)
    (tmp_path / "vit_high" / WEIGHTS).write_text("others")
    with pytest.raises(CalibrationError, match=r"vit_high: weights\.bin is not the file") as error:
        loaded.check_rungs(files)
    assert "\n" not in str(error.value) and "the weights that model.onnx reads" in str(error.value)


@pytest.mark.parametrize("name", ["model.onnx", WEIGHTS])
def test_a_file_that_was_cut_short_or_is_missing_is_named_as_such(tmp_path, name):
    graph, weights = tmp_path / "model.onnx", tmp_path / WEIGHTS
    graph.write_text("a graph")
    weights.write_text("some weights")
    record = RungRecord(
        2,
        "px=2",
        manifest.sha256_file(graph),
        manifest.sha256_file(weights),
        size_bytes=graph.stat().st_size,
        weights_size_bytes=weights.stat().st_size,
    )
    assert record.fault(graph, "differs") is None
    file = tmp_path / name
    content = file.read_bytes()
    file.write_bytes(content[:4])
    of = f"it has 4 of {len(content)} bytes"
    assert record.fault(graph, "differs").startswith(f"{name} was cut short: {of}")
    file.write_bytes(content[:-1] + b"!")
    assert record.fault(graph, "differs").startswith(f"{name} differs")
    unknown = replace(record, size_bytes=None, weights_size_bytes=None)  # of an earlier release
    file.write_bytes(content[:4])
    assert unknown == record and unknown.fault(graph, "differs").startswith(f"{name} differs")
    file.unlink()
    assert record.fault(graph, "differs").startswith(f"{name} is missing")


def test_an_artifact_of_an_earlier_release_has_self_contained_rungs(tmp_path):
    content = make_calibration().to_dict()
    for rung in content["rungs"].values():
        del rung["weights_sha256"], rung["layers"]
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps(content))
    assert Calibration.load(path) == make_calibration()


def test_the_manifest_names_what_changed(tmp_path):
    (tmp_path / "router").mkdir()
    file = tmp_path / "router" / "config.pbtxt"
    file.write_text("a")
    manifest.write(tmp_path)
    manifest.verify(tmp_path)
    file.write_text("b")
    with pytest.raises(ManifestError, match=r"router/config\.pbtxt differs"):
        manifest.verify(tmp_path)
    file.unlink()
    with pytest.raises(ManifestError, match=r"router/config\.pbtxt is listed .* but missing"):
        manifest.verify(tmp_path)
    (tmp_path / "MANIFEST.json").unlink()
    with pytest.raises(ManifestError, match="missing or unreadable"):
        manifest.verify(tmp_path)


def write_listed(folder):
    """A repository of two models, with a manifest over it."""
    for name in ("vit_low/1/model.onnx", "router/1/model.py", "router/1/routing/policy.py"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text(name)
    (folder / "router/config.pbtxt").write_text("router")
    manifest.write(folder)
    return folder


def write_file(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("something else")


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("vit_low/2/model.onnx", write_file),
        ("vit_low/2", Path.mkdir),
        ("vit_low/2", lambda path: path.symlink_to("1", target_is_directory=True)),
        ("vit_low/1/model.onnx.data", write_file),
        ("another_model/1/model.py", write_file),
        ("another_model", Path.mkdir),
        ("another_model", lambda path: path.symlink_to("vit_low")),
        ("router/1/policy.py", write_file),
        ("router/1/routing/signals", lambda path: path.symlink_to("/nowhere")),
        ("router/1/routing/policy.so", write_file),
        ("router/1/MANIFEST.json", write_file),
        ("router/configs/other.pbtxt", write_file),
        ("router/2.onnx/1/model.onnx", write_file),
        ("notes.txt", write_file),
    ],
)
def test_what_the_manifest_does_not_list_is_refused_by_name(tmp_path, name, make):
    write_listed(tmp_path)
    make(tmp_path / name)
    for check in (manifest.verify, manifest.refuse_unlisted):
        with pytest.raises(ManifestError, match=f"^{name} is not listed .*; remove it") as error:
            check(tmp_path)
        assert "\n" not in str(error.value)
    manifest.write(tmp_path)  # it may be listed, but for a link to a folder
    if (tmp_path / name).is_file():
        manifest.verify(tmp_path)


@pytest.mark.parametrize("name", ["MANIFEST.json.0", "router/config.pbtxt.1"])
def test_what_an_interrupted_update_leaves_is_let_be(tmp_path, name):
    write_file(write_listed(tmp_path) / name)
    manifest.verify(tmp_path)
    manifest.refuse_unlisted(tmp_path)


def write_sources(folder):
    """A repository whose Python files are Python; returns the source to compile."""
    write_listed(folder)
    source = folder / "router/1/routing/policy.py"
    for path in folder.rglob("*.py"):
        path.write_text("ANSWER = 1\n")
    manifest.write(folder)
    return source


def compiled(source, mode=py_compile.PycInvalidationMode.TIMESTAMP, **more):
    return Path(py_compile.compile(str(source), doraise=True, invalidation_mode=mode, **more))


def test_bytecode_that_python_left_is_let_be(tmp_path):
    source = write_sources(tmp_path)
    compiled(source)
    compiled(source, optimize=2)
    compiled(tmp_path / "router/1/model.py")
    written = compiled(source)
    # While Python writes it, and of a Python that has been replaced since.
    written.with_name(f"{written.name}.140213374").write_bytes(b"")
    written.with_name("policy.cpython-310.pyc").write_bytes(written.read_bytes())
    (tmp_path / "router/__pycache__").mkdir()
    manifest.verify(tmp_path)
    manifest.refuse_unlisted(tmp_path)


@pytest.mark.parametrize(
    "mode",
    [py_compile.PycInvalidationMode.UNCHECKED_HASH, py_compile.PycInvalidationMode.CHECKED_HASH],
)
def test_bytecode_that_python_may_load_without_a_look_at_the_source_is_refused(tmp_path, mode):
    source = write_sources(tmp_path)
    compiled(source, mode)
    for check in (manifest.verify, manifest.refuse_unlisted):
        with pytest.raises(
            ManifestError, match=r"^router/1/routing/__pycache__/policy\.\S+\.pyc is not listed"
        ):
            check(tmp_path)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("router/1/routing/__pycache__/signals.cpython-311.pyc", write_file),  # of no source
        ("router/1/routing/__pycache__/policy.py", write_file),
        ("router/1/routing/__pycache__/policy.cpython-311.pyc", lambda p: p.symlink_to("/nowhere")),
        ("router/1/routing/__pycache__/policy.so", write_file),
        ("router/1/routing/__pycache__/inner", Path.mkdir),
        ("router/2/__pycache__", Path.mkdir),  # makes no version
        ("router/2/__pycache__/model.cpython-311.pyc", write_file),
    ],
)
def test_what_else_lies_with_bytecode_is_refused(tmp_path, name, make):
    write_sources(tmp_path)
    (tmp_path / name).parent.mkdir(parents=True)
    make(tmp_path / name)
    with pytest.raises(ManifestError, match=f"^{name} is not listed"):
        manifest.verify(tmp_path)


def test_a_repository_may_be_reached_by_a_link_and_a_listed_file_be_one(tmp_path):
    repository = write_listed(tmp_path / "repository")
    file = repository / "vit_low/1/model.onnx"
    file.rename(tmp_path / "elsewhere.onnx")
    file.symlink_to(tmp_path / "elsewhere.onnx")
    (tmp_path / "link").symlink_to(repository)
    manifest.verify(tmp_path / "link")


def test_scores_are_fp32_in_oracle_units():
    from tests.unit.fakes import FakeRung, images

    scores = make_calibration().score(FakeRung(0.0)(images(0.25, 0.5)))
    assert scores.dtype == np.float32
    np.testing.assert_array_equal(scores, np.float32([0.25, 0.5]))
