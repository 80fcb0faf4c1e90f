"""Pictures of many kinds: each in one folder, fetched once, and nothing left of a failure."""

import subprocess
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from bundle.recipe import Recipe
from demo import adapt, pictures
from demo.pictures import (
    FEWEST,
    SHARES,
    STAMPS,
    WALLPAPERS,
    divide_in_two,
    make_pictures,
)
from demo.steps import DemoError
from report.terminal import Bars

QUIET = Bars(Console(quiet=True))
KINDS = {"animals": 40, "food": FEWEST, "people": FEWEST - 1}
PAPERS = 20


def save(file, mode, seed):
    file.parent.mkdir(parents=True, exist_ok=True)
    size = (60, 40, len(mode))
    pixels = np.random.default_rng(seed).integers(0, 256, size).astype(np.uint8)
    Image.fromarray(pixels, mode).save(file)


class Packages:
    """The system's package client, as far as it is used, and how often it was asked."""

    def __init__(self):
        self.asked = Counter()

    def run(self, command, cwd, **_):
        self.asked[command[0]] += 1
        package = command[-1]
        if command[0] == "apt-get":
            (cwd / f"{package}_1_all.deb").touch()
        else:
            share = cwd / package / "usr/share"
            licence = share / "doc" / package / "copyright"
            licence.parent.mkdir(parents=True)
            licence.write_text(f"licence of {package}")
            if package == STAMPS:
                for kind, count in KINDS.items():
                    for i in range(count):
                        file = share / "tuxpaint/stamps" / kind / f"group{i % 3}" / f"{i}.png"
                        save(file, "RGBA", i)
            if package == "plasma-workspace-wallpapers":
                for i in range(PAPERS):
                    for size in ("small", "large"):
                        file = share / "wallpapers" / f"paper{i}" / "contents" / f"{size}.png"
                        save(file, "RGB", 1000 + i)
        return subprocess.CompletedProcess(command, 0, "", "")


@pytest.fixture
def packages(monkeypatch):
    client = Packages()
    monkeypatch.setattr(pictures.subprocess, "run", client.run)
    monkeypatch.setattr(pictures.shutil, "which", lambda name: f"/usr/bin/{name}")
    return client


def test_a_picture_is_in_one_folder_and_kinds_of_few_are_left_out(packages, tmp_path):
    found = make_pictures(tmp_path / "out", 1, QUIET)
    names = {part: list((tmp_path / "out" / part).rglob("*.jpg")) for part in SHARES}
    assert found == {part: len(files) for part, files in names.items()}
    seen = [(file.parent.name, file.stem) for files in names.values() for file in files]
    kept = {"animals": 40, "food": FEWEST, "scenery": PAPERS}
    assert len(seen) == len(set(seen)) and Counter(kind for kind, _ in seen) == kept
    for part, share in SHARES.items():
        assert found[part] == pytest.approx(share * len(seen), abs=3)
    licences = {file.name for file in (tmp_path / "out").glob("*.copyright")}
    assert licences == {f"{package}.copyright" for package in (STAMPS, *WALLPAPERS)}


def test_they_are_fetched_once_and_drawn_alike(packages, tmp_path):
    first = make_pictures(tmp_path / "one", 1, QUIET)
    assert make_pictures(tmp_path / "one", 1, QUIET) == first
    assert packages.asked == {tool: 1 + len(WALLPAPERS) for tool in ("apt-get", "dpkg-deb")}
    make_pictures(tmp_path / "two", 1, QUIET)
    for file in (tmp_path / "one").rglob("*.jpg"):
        again = tmp_path / "two" / file.relative_to(tmp_path / "one")
        assert again.read_bytes() == file.read_bytes()


def test_crops_of_a_picture_lie_in_a_folder_of_its_own(packages, tmp_path):
    make_pictures(tmp_path / "out", 3, QUIET)
    crops = Counter(file.parent for file in (tmp_path / "out").rglob("*.jpg"))
    assert set(crops.values()) == {3}
    shapes = {Image.open(file).size for file in (tmp_path / "out" / "images").rglob("*.jpg")}
    assert len(shapes) > 3 and all(width == height for width, height in shapes)


def test_without_the_client_or_a_package_it_is_one_line_and_nothing_is_left(
    packages, tmp_path, monkeypatch
):
    def fails(command, **_):
        return subprocess.CompletedProcess(command, 100, "", "E: Unable to locate package\n")

    monkeypatch.setattr(pictures.subprocess, "run", fails)
    with pytest.raises(DemoError, match=f"`apt-get download {STAMPS}` failed: E: Unable to loc"):
        make_pictures(tmp_path / "out", 1, QUIET)
    monkeypatch.setattr(pictures.shutil, "which", lambda name: None)
    with pytest.raises(DemoError, match="there is no apt-get here"):
        make_pictures(tmp_path / "out", 1, QUIET)
    assert list(tmp_path.iterdir()) == []


def test_pictures_to_judge_by_are_no_pictures_to_learn_from(packages, tmp_path):
    make_pictures(tmp_path / "out", 3, QUIET)
    counts = divide_in_two(tmp_path / "out", tmp_path / "divided")
    pictures = {
        side: {file.parent.resolve() for file in (tmp_path / "divided" / side).glob("*/*/*.jpg")}
        for side in ("learn", "test")
    }
    assert {side: len(found) for side, found in pictures.items()} == counts
    assert not pictures["learn"] & pictures["test"] and all(counts.values())
    everything = {file.parent.resolve() for file in (tmp_path / "out").rglob("*.jpg")}
    assert pictures["learn"] | pictures["test"] == everything
    parts = {picture.parts[-3] for picture in pictures["test"]}
    assert parts == {"judge", "images"}  # a head has learned what those in `head` are
    assert divide_in_two(tmp_path / "out", tmp_path / "divided") == counts  # again, no harm


def test_adapting_is_a_command_that_a_user_can_type(packages, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = []

    def study(command, **_):
        asked.append(command)
        return subprocess.CompletedProcess(command, len(asked) - 1)

    monkeypatch.setattr(adapt, "CROPS", 2)
    make_pictures(adapt.OUT / "pictures", 2, QUIET)
    monkeypatch.setattr(adapt.subprocess, "run", study)
    adapt.run_adapt(QUIET)
    options = dict(zip(asked[0][4::2], asked[0][5::2], strict=True))
    for name in ("--images", "--test", "--head-images"):
        assert list((tmp_path / options[name]).glob("*/*"))
    for recipe in options["--recipes"].split(";"):
        Recipe.parse(recipe)
    with pytest.raises(DemoError, match="failed with exit code 1"):
        adapt.run_adapt(QUIET)
