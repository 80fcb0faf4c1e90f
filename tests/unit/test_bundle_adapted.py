"""The record of an adapted state: what it says, and what is refused."""

from __future__ import annotations

import json
import resource
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from bundle.adapted import DIGITS, NAME, WEIGHTS, Adapted, AdaptedError
from bundle.manifest import sha256_file
from bundle.prints import encode, no_looks
from bundle.recipe import Recipe

ABOUT = {"seed": 3, "minutes": 1.5, "curve": [{"step": 0, "loss": None}, {"step": 4, "loss": 0.1}]}


@pytest.fixture
def state(tmp_path) -> Adapted:
    folder = tmp_path / "a state"
    folder.mkdir()
    save_file({"tower.weight": np.arange(6, dtype=np.float32)}, folder / WEIGHTS)
    prints = encode(["ab" * 32, "cd" * 32], no_looks(2))
    return Adapted(folder, Recipe(8, tome=2), "1" * 64, 16, "", prints, ABOUT).save()


def refused(folder: Path) -> str:
    with pytest.raises(AdaptedError) as caught:
        Adapted.load(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit(state: Adapted, **changes: object) -> None:
    content = json.loads((state.folder / NAME).read_text())
    content.update(changes)
    content = {name: value for name, value in content.items() if value is not ...}
    (state.folder / NAME).write_text(json.dumps(content))


def test_a_state_is_read_as_it_was_saved(state):
    assert state.sha256 == sha256_file(state.folder / WEIGHTS) and state.key == state.sha256[:12]
    assert Adapted.load(state.folder) == state
    assert {file.name for file in state.folder.iterdir()} == {NAME, WEIGHTS}
    keys = list(json.loads((state.folder / NAME).read_text()))
    assert keys[:3] == ["schema_version", "recipe", "teacher"] and keys[-1] == "image_prints"


def test_it_may_be_saved_again_over_another(state):
    save_file({"tower.weight": np.ones(6, np.float32)}, state.file)
    again = replace(state, about={"seed": 4}).save()
    assert again.sha256 != state.sha256 and Adapted.load(state.folder) == again


def test_where_a_record_cannot_be_written_what_lay_there_stays(state):
    other = state.folder / ".other"
    save_file({"tower.weight": np.ones(6, np.float32)}, other)
    before = {file.name: file.read_bytes() for file in state.folder.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50, limits[1]))  # as on a disk that is full
    try:
        with pytest.raises(OSError, match="File too large"):
            replace(state, about={"seed": 4}).save(other)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {file.name: file.read_bytes() for file in state.folder.iterdir()} == before
    assert Adapted.load(state.folder) == state
    again = replace(state, about={"seed": 4}).save(other)
    assert Adapted.load(state.folder) == again and not other.exists()


def test_what_is_missing_is_named(state, tmp_path):
    way_out = "give a folder that python -m adaptation distil has written"
    for folder in (tmp_path / "none", tmp_path):
        assert refused(folder) == f"adapted={folder}: no {folder / NAME}; {way_out}"
    state.file.unlink()
    assert refused(state.folder) == f"adapted={state.folder}: no {state.file}; {way_out}"
    (tmp_path / "file").write_text("text")
    assert "is not readable (NotADirectoryError" in refused(tmp_path / "file")


def test_weights_that_changed_or_are_no_weights_are_refused(state):
    data = state.file.read_bytes()
    state.file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert f"{state.file} differs from its SHA-256 in {NAME}; run" in refused(state.folder)
    state.file.write_bytes(data[:20])
    assert "differs from its SHA-256" in refused(state.folder)
    edit(state, sha256=sha256_file(state.file))
    assert "is not readable (SafetensorError" in refused(state.folder)


@pytest.mark.parametrize(
    "text", ["", "{", "null", "[]", "3", '"px=8"', "{}", "\udcff", "[" * 100_000]
)
def test_a_damaged_record_is_one_line(text, state):
    (state.folder / NAME).write_text(text, "utf-8", "surrogateescape")
    assert "is not readable (" in refused(state.folder)
    assert refused(state.folder).endswith("run python -m adaptation distil again")


@pytest.mark.parametrize(
    "changes",
    [
        {"schema_version": 2},
        {"recipe": "px=8,sharper"},
        {"recipe": None},
        {"recipe": ...},
        {"teacher": ...},
        {"image_px": "wide"},
        {"image_px": None},
        {"sha256": ...},
        {"image_prints": "no prints"},
        {"image_prints": "AAAA"},
        {"image_prints": 5},
    ],
)
def test_a_record_of_something_else_is_one_line(changes, state):
    edit(state, **changes)
    assert "is not readable (" in refused(state.folder)


def test_a_teacher_that_is_no_text_is_another(state):
    edit(state, teacher=5)
    with pytest.raises(AdaptedError, match="was trained by another model"):
        Adapted.load(state.folder).check_teacher("1" * 64, 16)


@pytest.mark.parametrize("text", ["px=8,tome=2", "tome=2,px=8,int8", "px=8,tome=2,fp16"])
def test_the_recipe_of_a_graph_names_the_weights_and_no_folder(text, state):
    recipe = replace(Recipe.parse(text), adapted=str(state.folder))
    found = state.of(recipe)
    assert found == replace(recipe, adapted=state.sha256[:DIGITS])
    assert str(state.folder) not in str(found)
    assert state.of(replace(found, align=True)) == replace(found, align=True)


@pytest.mark.parametrize("text", ["px=8", "px=12,tome=2", "px=8,tome=2,depth=1", "px=8,tome=3"])
def test_another_recipe_is_refused(text, state):
    recipe = replace(Recipe.parse(text), adapted=str(state.folder))
    with pytest.raises(AdaptedError) as caught:
        state.of(recipe)
    assert f"is of px=8,tome=2, not of {Recipe.parse(text)}; adapt" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_full_model_is_refused(state):
    state.check_teacher("1" * 64, 16)
    with pytest.raises(AdaptedError, match=r"another model \(111111111111….*222222222222…\)"):
        state.check_teacher("2" * 64, 16)
    with pytest.raises(AdaptedError, match="full model at 16 px, not at 32 px; adapt it again"):
        state.check_teacher("1" * 64, 32)
