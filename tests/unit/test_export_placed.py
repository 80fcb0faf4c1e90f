"""Which files an assembled repository holds beside its rungs: the full model, shared weights."""

import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest

from bundle import manifest, placing
from bundle.graphs import REFERENCE, GraphSet
from calibration.certify import Goal
from calibration.fidelity import Fidelity
from calibration.fit import Options, fit
from export.repository import RepositoryError, RepositorySettings, assemble
from export.versions import add_version
from routing import REFERENCE_MODEL, WEIGHTS, Calibration, CalibrationError
from tests.unit.calibration_outputs import make_outputs, with_losing_high, with_reference
from tests.unit.onnx_files import SIZE, write_graph_set
from tests.unit.quantised_files import ask
from tests.unit.test_export_repository import read_configs, write_inputs

# --- the full model, for the audit of a cascade whose full rung is cheaper ------------------------


@pytest.fixture(scope="module")
def cheaper(tmp_path_factory):
    """Rungs beside the full model, and what `fit` certifies about it."""
    folder = tmp_path_factory.mktemp("cheaper")
    graphs = with_reference(GraphSet.load(write_graph_set(folder / "onnx")))
    outputs = with_losing_high(make_outputs(graphs, 800), share=0.02)
    fitted = fit(outputs, graphs, Goal(0.1, 0.9, "ltt"), Options(Fidelity("top1")))
    assert fitted.calibration.certificate["certified"]
    fitted.save(folder / "calibration.json")
    return graphs, folder / "calibration.json"


AUDITED = RepositorySettings(audit_fraction=0.1, instances=2, intra_op_threads=3)


def test_an_audit_of_a_cascade_with_a_cheaper_full_rung_gets_the_full_model(cheaper, tmp_path):
    graphs, artifact = cheaper
    out = assemble(graphs, artifact, tmp_path / "repository", AUDITED)
    manifest.verify(out)
    placed_file = f"{REFERENCE_MODEL}/1/model.onnx"
    assert (out / placed_file).read_bytes() == graphs.reference.file.read_bytes()
    assert manifest.listed(out)[placed_file] == graphs.reference.record.sha256
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
    graphs, artifact = cheaper
    without = replace(graphs, roles={**graphs.roles, REFERENCE: graphs.high.name})
    with pytest.raises(RepositoryError, match="names no reference"):
        assemble(without, artifact, tmp_path / "repository", AUDITED)
    other = graphs.adding(replace(graphs.reference, file=graphs.low.file))
    with pytest.raises(CalibrationError, match="vit_reference: .* not the file"):
        assemble(other, artifact, tmp_path / "repository", AUDITED)
    earlier = tmp_path / "earlier.json"
    replace(Calibration.load(artifact), reference=None).save(earlier)
    with pytest.raises(RepositoryError, match="earlier release.* fit again"):
        assemble(graphs, earlier, tmp_path / "repository", AUDITED)
    assemble(graphs, earlier, tmp_path / "repository")  # which audits nothing


def test_a_version_certified_about_another_full_model_is_refused(cheaper, tmp_path):
    graphs, artifact = cheaper
    out = assemble(graphs, artifact, tmp_path / "repository", AUDITED)
    live = Calibration.load(artifact)
    other = tmp_path / "other.json"
    replace(live, threshold=0.1, reference=graphs.rungs["vit_low"]).save(other)
    with pytest.raises(CalibrationError, match="vit_reference: .* not the file"):
        add_version(out, other)
    replace(live, threshold=0.1).save(other)
    assert add_version(out, other) == 2


# --- weights that lie beside a graph --------------------------------------------------------------


def placed(repository):
    return [repository / name / "1" / WEIGHTS for name in ("vit_low", "vit_high")]


def test_shared_weights_lie_once_under_a_name_in_each_version_directory(tmp_path):
    graphs, artifact = write_inputs(tmp_path, shared=("vit_low", "vit_high"))
    out = assemble(graphs, artifact, tmp_path / "repository")
    low, high = placed(out)
    assert os.path.samefile(low, high) and low.stat().st_nlink == 2
    # Not the export's own, which a later export replaces or a user edits.
    assert not os.path.samefile(low, tmp_path / "onnx" / WEIGHTS)
    assert low.read_bytes() == (tmp_path / "onnx" / WEIGHTS).read_bytes()
    listed = json.loads((out / manifest.NAME).read_text())["files"]
    assert {f"vit_low/1/{WEIGHTS}", f"vit_high/1/{WEIGHTS}"} <= set(listed)
    manifest.verify(out)
    files = {name: out / name / "1/model.onnx" for name in graphs.rungs}
    Calibration.load(out / "router/1/calibration.json").check_rungs(files)


def test_weights_lie_beside_the_rung_alone_that_reads_them(tmp_path):
    graphs, artifact = write_inputs(tmp_path, shared=("vit_high",))
    low, high = placed(assemble(graphs, artifact, tmp_path / "repository"))
    assert high.is_file() and not low.exists()


def test_a_copy_without_hard_links_is_the_same_repository(tmp_path):
    graphs, artifact = write_inputs(tmp_path, shared=("vit_low", "vit_high"))
    out = assemble(graphs, artifact, tmp_path / "repository")
    copy = shutil.copytree(out, tmp_path / "copy")
    low, high = placed(copy)
    assert not os.path.samefile(low, high)
    manifest.verify(copy)
    files = {name: copy / name / "1/model.onnx" for name in graphs.rungs}
    Calibration.load(copy / "router/1/calibration.json").check_rungs(files)
    image = np.random.default_rng(0).normal(size=(2, 3, SIZE, SIZE)).astype(np.float32)
    for name, file in files.items():
        for output, value in ask(graphs.files[name], image).items():
            np.testing.assert_array_equal(ask(file, image)[output], value)


def test_where_no_second_name_can_be_given_weights_are_copied(tmp_path, monkeypatch):
    def refuse(source, target):
        raise OSError("no links here")

    graphs, artifact = write_inputs(tmp_path, shared=("vit_low", "vit_high"))
    monkeypatch.setattr(placing.os, "link", refuse)
    out = assemble(graphs, artifact, tmp_path / "repository")
    low, high = placed(out)
    assert not os.path.samefile(low, high) and low.read_bytes() == high.read_bytes()
    manifest.verify(out)


def test_altered_or_missing_weights_are_refused(tmp_path):
    graphs, artifact = write_inputs(tmp_path, shared=("vit_low", "vit_high"))
    weights = tmp_path / "onnx" / WEIGHTS
    intact = weights.read_bytes()
    weights.write_bytes(intact[:-1] + bytes([intact[-1] ^ 1]))
    with pytest.raises(CalibrationError, match=r"vit_low: weights\.bin is not the file that was"):
        assemble(graphs, artifact, tmp_path / "repository")
    weights.unlink()
    with pytest.raises(CalibrationError, match=r"vit_low: weights\.bin is missing"):
        assemble(graphs, artifact, tmp_path / "repository")
    weights.write_bytes(intact)
    assemble(graphs, artifact, tmp_path / "repository")
