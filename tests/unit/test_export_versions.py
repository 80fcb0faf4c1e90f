"""Another version of the router in an assembled repository: added, switched to, dropped."""

import errno
import json
import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from bundle import config as configs
from bundle import manifest
from bundle.versions import VersionError, Versions, drop, present, put, switch
from export import versions as export_versions
from export.repository import RepositoryError, RepositorySettings, assemble
from export.versions import add_version
from routing import Calibration, CalibrationError, ManifestError, RungRecord
from tests.unit.export_tiny import run_export
from tests.unit.test_export_repository import contents, write_inputs

ENSEMBLES = ("adaptive_vit", "adaptive_tensor")
CONFIGS = {f"{name}/config.pbtxt" for name in ("router", *ENSEMBLES)}


@pytest.fixture
def repository(tmp_path):
    return assemble(*write_inputs(tmp_path), tmp_path / "repository")


@pytest.fixture
def permissive(tmp_path):
    """Clients may leave the certificate, so they may pin a former version as well."""
    settings = RepositorySettings(client_parameters="any")
    return assemble(*write_inputs(tmp_path), tmp_path / "permissive", settings)


@pytest.fixture
def artifact(tmp_path, repository):
    """Another threshold for the same rungs."""
    return change_artifact(tmp_path, "second", threshold=0.75)


def change_artifact(folder, name, **changes):
    path = folder / f"{name}.json"
    replace(Calibration.load(folder / "calibration.json"), **changes).save(path)
    return path


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def left_over(folder):
    """Files and folders that only an unfinished command leaves."""
    beside = [path for path in folder.iterdir() if path.name.startswith(".")]
    listed = set(json.loads((folder / "repository/MANIFEST.json").read_text())["files"])
    return beside + sorted(set(contents(folder / "repository")) - listed - {manifest.NAME})


# --- added ---------------------------------------------------------------------------------------


def test_a_version_is_complete_and_listed_and_answers_nobody(tmp_path, repository, artifact):
    before = contents(repository)
    assert add_version(repository, artifact) == 2
    after = contents(repository)
    manifest.verify(repository)
    first = {name[9:] for name in after if name.startswith("router/1/")}
    second = {name[9:] for name in after if name.startswith("router/2/")}
    assert first == second
    assert {n for n in second if after[f"router/1/{n}"] != after[f"router/2/{n}"]} == {
        "calibration.json"
    }
    assert Calibration.load(repository / "router/2/calibration.json").threshold == 0.75
    assert {name for name in before if before[name] != after[name]} == {manifest.NAME}
    # Triton would hand it to whoever asks the router and pins no version.
    assert Versions.load(repository) == Versions(live=1, served=(1,))
    assert left_over(tmp_path) == []


def test_a_version_may_shadow_the_one_that_answers_and_is_not_loaded(repository, artifact):
    add_version(repository, artifact, shadow_fraction=0.1)
    assert Versions.load(repository) == Versions(1, (1,), shadow=2, shadow_fraction=0.1)


def test_the_third_stands_beside_the_one_that_answers(tmp_path, repository, artifact):
    add_version(repository, artifact)
    switch(repository, 2)
    assert add_version(repository, change_artifact(tmp_path, "third", threshold=0.9)) == 3
    assert Versions.load(repository) == Versions(live=2, served=(2,))
    assert present(repository) == [1, 2, 3]


def test_the_command_needs_no_rungs(tmp_path, repository, artifact):
    shutil.rmtree(tmp_path / "onnx")
    options = ("--calibration", artifact, "--out", repository, "--shadow", 0.25)
    result = run_export("repository", "--add-version", *options)
    assert (result.code, result.err) == (0, "")
    assert "added router/2" in result.out and "--to 2" in result.out
    assert Versions.load(repository).shadow_fraction == 0.25


# --- refused -------------------------------------------------------------------------------------


OTHER = RungRecord(8, "px=8", "f" * 64)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"vit_low": OTHER}, CalibrationError, "vit_low: .* is not the file that was calibrated"),
        ({"vit_high": OTHER}, CalibrationError, "vit_high: .* is not the file that was calibrated"),
        ({"preprocessing_sha256": "3" * 64}, RepositoryError, "another preprocessing than the"),
        ({"imaging_sha256": "e" * 64}, RepositoryError, "imaging is not the code that decoded"),
    ],
)
def test_an_artifact_of_other_things_is_refused(tmp_path, repository, changes, error, message):
    if changes.keys() <= {"vit_low", "vit_high"}:
        changes = {"rungs": {**Calibration.load(tmp_path / "calibration.json").rungs, **changes}}
    others = change_artifact(tmp_path, "others", threshold=0.125, **changes)
    before = contents(repository)
    with pytest.raises(error, match=message):
        add_version(repository, others)
    assert contents(repository) == before


def test_an_artifact_that_is_there_already_is_refused(tmp_path, repository, artifact):
    with pytest.raises(RepositoryError, match="router/1 has this artifact already"):
        add_version(repository, tmp_path / "calibration.json")
    add_version(repository, artifact)
    with pytest.raises(RepositoryError, match="router/2 has this artifact already"):
        add_version(repository, artifact)


@pytest.mark.parametrize("name", ["vit_low/1/model.onnx", "router/config.pbtxt"])
def test_a_repository_that_is_not_as_assembled_is_refused_and_not_blessed(
    repository, artifact, name
):
    flip_a_bit(repository / name)
    before = contents(repository)
    with pytest.raises(ManifestError, match=f"{name} differs from its SHA-256"):
        add_version(repository, artifact)
    assert contents(repository) == before


def test_what_an_interrupted_command_left_is_not_overwritten(repository, artifact):
    (repository / "router/2").mkdir()
    with pytest.raises(RepositoryError, match="router/2 is not listed .*; remove it and try again"):
        add_version(repository, artifact)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--shadow", 2), "Invalid value for '--shadow'"),
        (("--shadow", "nan"), "Invalid value for '--shadow'"),
        (("--max-queue", 9), "--add-version changes the artifact only"),
        (("--out", "nowhere"), "MANIFEST.json is missing or unreadable"),
    ],
)
def test_a_bad_request_is_one_line(tmp_path, repository, artifact, options, message):
    before = contents(repository)
    known = ("--calibration", artifact, "--out", repository)
    result = run_export("repository", "--add-version", *known, *options)
    assert (result.code, result.out) == (2, "")
    assert message in result.err and len(result.err.splitlines()) == 1
    assert contents(repository) == before


# --- a full disk, a sudden end -------------------------------------------------------------------


def full(path):
    return OSError(errno.ENOSPC, "No space left on device", str(path))


def failing_at(call, number):
    """The method `call`, whose call of that number, from 0, finds the disk full."""
    calls = []

    def instead(path, *arguments, **options):
        calls.append(path)
        if len(calls) == number + 1:
            raise full(path)
        return call(path, *arguments, **options)

    return instead


def test_a_disk_full_while_copying_changes_nothing(tmp_path, repository, artifact, monkeypatch):
    def copy_half(version, *_):
        (version / "routing").mkdir()
        (version / "routing/policy.py").write_text("half a li")
        raise full(version / "routing/policy.py")

    before = contents(repository)
    monkeypatch.setattr(export_versions, "complete_router", copy_half)
    options = ("--calibration", artifact, "--out", repository)
    result = run_export("repository", "--add-version", *options)
    assert (result.code, result.out) == (2, "")
    assert result.err.endswith("routing/policy.py: No space left on device\n")
    assert len(result.err.splitlines()) == 1
    assert contents(repository) == before and left_over(tmp_path) == []


# The new artifact, then the files beside those that they replace.
@pytest.mark.parametrize("number", range(6))
def test_a_disk_full_at_any_write_changes_nothing(
    tmp_path, repository, artifact, monkeypatch, number
):
    before = contents(repository)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", failing_at(Path.write_text, number))
        with pytest.raises(OSError, match="No space left on device"):
            add_version(repository, artifact, shadow_fraction=0.1)
    assert contents(repository) == before and left_over(tmp_path) == []
    manifest.verify(repository)
    add_version(repository, artifact)  # nothing is in the way of the next attempt


def nothing(repository, artifact):
    pass


def add_with_shadow(repository, artifact):
    add_version(repository, artifact, shadow_fraction=0.1)


def switch_to_2(repository, artifact):
    switch(repository, 2)


def drop_2(repository, artifact):
    drop(repository, 2)


# A new version's artifact, which is still apart; then each time the manifest, three configs, the
# manifest; a switch by way of both versions loaded.
@pytest.mark.parametrize(
    ("before", "change", "renames"),
    [
        (nothing, add_with_shadow, 6),
        (add_with_shadow, switch_to_2, 10),
        (add_with_shadow, drop_2, 5),
    ],
)
def test_a_sudden_end_between_any_two_renames_leaves_what_verifies(
    tmp_path, repository, artifact, monkeypatch, before, change, renames
):
    before(repository, artifact)
    found = []
    rename = Path.replace

    def look_first(path, target):
        as_it_is = shutil.copytree(repository, tmp_path / f"killed-{len(found)}")
        manifest.verify(as_it_is)
        found.append(Versions.load(as_it_is))
        return rename(path, target)

    monkeypatch.setattr(Path, "replace", look_first)
    change(repository, artifact)
    manifest.verify(repository)
    assert len(found) == renames
    monkeypatch.undo()
    for number in range(renames):  # whatever was left, a switch completes it
        switch(tmp_path / f"killed-{number}", 1)
        manifest.verify(tmp_path / f"killed-{number}")
    for versions in (*found, Versions.load(repository)):
        assert versions.named <= set(versions.served)
        assert versions.shadow in (0, 2)


def test_a_second_sudden_end_leaves_what_verifies_too(repository, artifact, monkeypatch):
    add_version(repository, artifact)
    rename = Path.replace
    for renames in (1, 1, 2, 1, 3):
        with monkeypatch.context() as patched:
            patched.setattr(Path, "replace", failing_at(rename, renames))
            with pytest.raises(OSError, match="No space"):
                switch(repository, 3 - Versions.load(repository).live)
        manifest.verify(repository)
    switch(repository, 2)
    assert json.loads((repository / manifest.NAME).read_text()).keys() == {
        "schema_version",
        "files",
        "live",
    }


# --- switched to and dropped ---------------------------------------------------------------------


def test_the_switch_ends_the_shadow_and_leaves_only_what_answers_loaded(repository, artifact):
    add_version(repository, artifact, shadow_fraction=0.1)
    assert switch(repository, 2) == Versions.load(repository) == Versions(2, (2,))
    manifest.verify(repository)
    assert manifest.Manifest.read(repository).live == 2
    assert switch(repository, 1) == Versions.load(repository) == Versions(1, (1,))
    assert {name for name in contents(repository) if name in CONFIGS} == CONFIGS


def test_a_former_version_can_be_pinned_where_clients_may_leave_the_certificate(
    tmp_path, permissive, artifact
):
    add_version(permissive, artifact)
    assert Versions.load(permissive) == Versions(1, (1,))
    assert switch(permissive, 2) == Versions.load(permissive) == Versions(2, (1, 2))
    add_version(permissive, change_artifact(tmp_path, "third", threshold=0.9))
    assert switch(permissive, 2) == Versions(2, (1, 2))
    assert switch(permissive, 3) == Versions(3, (2, 3))
    # A higher one would answer whoever pins none.
    assert switch(permissive, 2) == Versions.load(permissive) == Versions(2, (2,))


def test_switching_to_what_answers_only_ends_the_shadow(repository, artifact):
    add_version(repository, artifact, shadow_fraction=0.1)
    assert switch(repository, 1) == Versions(1, (1,))


def test_a_candidate_that_an_earlier_release_loaded_is_named_and_taken_out(repository, artifact):
    add_version(repository, artifact)
    put(repository, Versions(1, (1, 2)))
    result = run_export("versions", "--repository", repository)
    assert result.out == "router/1 answers; router/2 can be pinned too\n"
    assert "router/2 is loaded above router/1" in result.err
    assert "versions --live 1" in result.err and len(result.err.splitlines()) == 1
    assert run_export("versions", "--repository", repository, "--live", 1).err == ""
    assert Versions.load(repository) == Versions(1, (1,))


def test_a_version_is_dropped_with_its_shadow(tmp_path, repository, artifact):
    before = contents(repository)
    add_version(repository, artifact, shadow_fraction=0.1)
    drop(repository, 2)
    assert contents(repository) == before
    assert left_over(tmp_path) == []


def test_a_damaged_version_can_be_dropped(repository, artifact):
    add_version(repository, artifact)
    flip_a_bit(repository / "router/2/calibration.json")
    with pytest.raises(ManifestError, match=r"router/2/calibration\.json differs"):
        switch(repository, 2)
    drop(repository, 2)
    manifest.verify(repository)
    assert present(repository) == [1]


def test_the_version_that_answers_is_not_dropped(repository, artifact):
    with pytest.raises(VersionError, match="version 1 is the one that answers; switch"):
        drop(repository, 1)
    add_version(repository, artifact)
    switch(repository, 2)
    drop(repository, 1)
    assert Versions.load(repository) == Versions(2, (2,))


def test_a_drop_that_ends_early_leaves_what_verifies(repository, artifact, monkeypatch):
    def remove_half(folder):
        (folder / "calibration.json").unlink()
        raise OSError(errno.EACCES, "Permission denied", str(folder))

    add_version(repository, artifact)
    monkeypatch.setattr(manifest.shutil, "rmtree", remove_half)
    with pytest.raises(OSError, match="Permission denied"):
        drop(repository, 2)
    monkeypatch.undo()
    assert present(repository) == [1]
    manifest.verify(repository)
    for number in range(6):  # the next changes do not forget what still lies there
        with monkeypatch.context() as patched, suppress(OSError):
            patched.setattr(Path, "replace", failing_at(Path.replace, number))
            switch(repository, 1)
        manifest.verify(repository)
    with pytest.raises(RepositoryError, match="router/2 is not listed .*; remove it and try again"):
        add_version(repository, artifact)
    shutil.rmtree(repository / "router/2")
    assert add_version(repository, artifact) == 2
    assert "apart" not in json.loads((repository / manifest.NAME).read_text())


def test_a_repository_that_an_earlier_release_assembled_is_read_and_switched(repository, artifact):
    """Its configs are the text of git, its manifest does not say which version answers, and tensors
    have no ensemble.
    """
    as_an_earlier_release(repository)
    assert add_version(repository, artifact) == 2
    before = Versions.load(repository)
    assert (before.live, before.served, before.tensors, before.fault) == (1, (1,), 0, "")
    assert switch(repository, 2) == Versions.load(repository) == Versions(2, (2,), tensors=0)
    manifest.verify(repository)
    assert manifest.Manifest.read(repository).live == 2
    drop(repository, 1)
    assert not (repository / "adaptive_tensor").exists()


def as_an_earlier_release(repository):
    """Make what was assembled just now look as an earlier release assembled it."""
    for name in ("router", "adaptive_vit"):
        source = Path("model_repository") / name / "config.pbtxt"
        shutil.copyfile(source, repository / name / "config.pbtxt")
    shutil.rmtree(repository / "adaptive_tensor")
    manifest.write(repository)


def test_ensembles_that_name_different_versions_are_a_fault_that_a_switch_mends(
    repository, artifact
):
    add_version(repository, artifact)
    put(repository, Versions(1, (1, 2), tensors=2))
    found = Versions.load(repository)
    assert found.named == {1, 2}
    assert "adaptive_tensor is answered by router/2 and adaptive_vit by router/1" in found.warning
    with pytest.raises(VersionError, match="version 2 is the one that answers"):
        drop(repository, 2)
    assert switch(repository, 1) == Versions.load(repository) == Versions(1, (1,))


@pytest.mark.parametrize("change", [switch, drop])
@pytest.mark.parametrize("version", [0, 2, -1])
def test_an_unknown_version_is_named_with_those_there_are(repository, change, version):
    before = contents(repository)
    with pytest.raises(VersionError, match=f"has no version {version}; in .*repository: 1$"):
        change(repository, version)
    assert contents(repository) == before


def let_triton_choose(config):
    config.version_policy.latest.num_versions = 1


def forget_the_shadow(config):
    del config.parameters["shadow_version"]


def shadow_in_words(config):
    config.parameters["shadow_version"].string_value = "two"


def ask_twice(config):
    config.ensemble_scheduling.step.add(model_name="router")


def name_no_version(ensemble):
    ensemble.ensemble_scheduling.step[-1].model_version = -1


@pytest.mark.parametrize(
    ("model", "change", "more", "message"),
    [
        ("router", let_triton_choose, "", "does not name the versions to load"),
        ("router", forget_the_shadow, "", "has no parameter 'shadow_version'"),
        ("router", shadow_in_words, "", "invalid literal"),
        *((e, ask_twice, "", "asks the router in 2 steps, not in one") for e in ENSEMBLES),
        *((e, name_no_version, "", "does not name the version of the router") for e in ENSEMBLES),
        ("router", lambda config: None, "verses: 2\n", "is no model configuration"),
    ],
)
def test_a_config_of_another_make_is_refused(repository, model, change, more, message):
    path = repository / model / "config.pbtxt"
    config = configs.read(path)
    change(config)
    path.write_text(configs.text(config) + more)
    manifest.write(repository)
    with pytest.raises(VersionError, match=f"{message}.*assemble again") as refusal:
        Versions.load(repository)
    assert "\n" not in str(refusal.value)


def test_the_command_switches_drops_and_says_what_is_served(permissive, artifact):
    add_version(permissive, artifact, shadow_fraction=0.1)

    def versions(*options):
        result = run_export("versions", "--repository", permissive, *options)
        assert (result.code, result.err) == (0, "")
        return result.out

    assert versions() == "router/1 answers; router/2 shadows 10% of the images\n"
    assert versions("--live", 2) == "router/2 answers; router/1 can be pinned too\n"
    assert versions("--drop", 1) == "router/2 answers\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--live", 3), "the router has no version 3"),
        (("--drop", 1), "version 1 is the one that answers"),
        (("--repository", "nowhere"), "nowhere/router/config.pbtxt: No such file or directory"),
    ],
)
def test_a_change_that_cannot_be_is_one_line(repository, options, message):
    result = run_export("versions", "--repository", repository, *options)
    assert (result.code, result.out) == (2, "")
    assert message in result.err and len(result.err.splitlines()) == 1
