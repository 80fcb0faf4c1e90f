"""Where the tokens of a fit's images went: which are drawn, how many are counted, and the page."""

import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from bundle.graphs import GraphSet
from bundle.recipe import Recipe
from calibration import token_counts
from calibration.decisions import Decisions
from calibration.images import open_images
from calibration.outputs import Outputs
from calibration.record import Fit
from calibration.token_counts import COUNTED, DRAWN, as_seen, drawn, fit_counts
from export.graphs import export_graphs
from export.pretrained import pretrained
from export.request import GraphsRequest
from imaging import Preprocessing
from tests.unit.calibrating import run
from tests.unit.export_tiny import LAYERS, PX, QUIET, save_tiny
from tests.unit.pages import Page

pytestmark = pytest.mark.usefixtures("remembered_exports", "remembered_figures")

IMAGES, SIDE = 120, 4  # patches along an edge of the tiny model
FIT = ("fit", "--escalation-rate", 0.1, "--test-share", 0.5, "--signal", "cls_path")
RECIPES = {"apt": Recipe(PX, apt=(3.0,)), "halt": Recipe(PX, halt=0.0), "plain": Recipe(8)}


def write_images(folder):
    """Pictures of which more and more quarters, from none to all four, are noise."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(IMAGES):
        pixels = np.full((PX, PX, 3), rng.integers(0, 256, 3), np.uint8)
        for quarter in range(number % 5):
            y, x = PX // 2 * (quarter // 2), PX // 2 * (quarter % 2)
            pixels[y : y + 8, x : x + 8] = rng.integers(0, 256, (8, 8, 3))
        Image.fromarray(pixels).save(folder / f"{number:03d}.png")
    return folder


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """By a recipe of the cheap rung: a folder with a fit made of it, and the page of that."""
    top = tmp_path_factory.mktemp("tokens")
    model = pretrained(str(save_tiny(top / "model", "ViTForImageClassification")))
    images = write_images(top / "images")

    def make(name):
        folder = top / name
        if not folder.exists():
            folder.mkdir()
            backbone = replace(model, gate=(1.0, 0.0)) if name == "halt" else model
            export_graphs(backbone, GraphsRequest(folder / "build/onnx", RECIPES[name]), QUIET)
            assert run(folder, "collect", "--images", images) == 0
            assert run(folder, *FIT) == 0
            assert run(folder, "report") == 0
        return folder

    return make


def loaded(folder):
    outputs = Outputs.load(folder / "build/calibration/outputs.json")
    fitted = Fit.load(folder / "build/calibration/calibration.json", outputs)
    return fitted, outputs, open_images(outputs.source), GraphSet.load(folder / "build/onnx")


def page_of(folder):
    return Page(folder / "build/calibration/report.html")


def noisy_quarters(caption):
    return int(caption[:3]) % 5


def test_cells_are_coarse_where_the_images_are_flat(workplace):
    fitted, outputs, source, graphs = loaded(workplace("apt"))
    (counts,) = fit_counts(fitted, outputs, source, graphs)
    rows = fitted.splits["test"]
    assert (counts.rung, counts.kind, counts.most) == ("low rung", "apt", SIDE**2 + 1)
    assert counts.images == "the test split"
    escalated = Decisions.of(fitted, outputs, rows).escalated
    for name, side in (("kept low", ~escalated), ("escalated", escalated)):
        quarters = [noisy_quarters(outputs.names[row]) for row in rows[side]]
        # Of each quarter, a token or four; and the CLS token.
        assert counts.values[name].tolist() == [1 + 4 + 3 * noisy for noisy in quarters]
    assert len(counts.maps) == DRAWN
    for one in counts.maps:
        sides = np.full((SIDE, SIDE), 2)
        for quarter in range(noisy_quarters(one.caption)):
            y, x = 2 * (quarter // 2), 2 * (quarter % 2)
            sides[y : y + 2, x : x + 2] = 1
        np.testing.assert_array_equal(one.grid, sides)
        with Image.open(workplace("apt").parent / "images" / one.caption[:7]) as image:
            np.testing.assert_array_equal(one.picture, np.asarray(image))
    noisy = [noisy_quarters(one.caption) for one in counts.maps]
    assert noisy == sorted(noisy) and noisy[0] == 0 and noisy[-1] == 4


def test_the_page_says_where_the_tokens_of_cells_went(workplace):
    page = page_of(workplace("apt"))
    page.assert_self_contained()
    counts = fit_counts(*loaded(workplace("apt")))[0]
    values = np.concatenate(list(counts.values.values()))
    (text,) = (text for name, text in page.sections.items() if name.startswith("The low rung: "))
    assert "60 images of the test split" in text
    assert f"Tokens per image: mean {values.mean():.1f}" in text and ", of 17." in text
    for one in counts.maps:
        assert f"{one.caption} {one.sentence()}".replace("\xa0", " ") in text
    assert page.classes.count("tokens") == 1


def test_a_halting_rung_is_drawn_by_the_blocks_its_patches_ran_through(workplace):
    (counts,) = fit_counts(*loaded(workplace("halt")))
    assert (counts.kind, counts.most) == ("halt", LAYERS)
    for one in counts.maps:
        alive = [(one.patches > block).sum() for block in range(LAYERS)]
        assert (one.tokens - alive <= 1).all() and (one.tokens >= alive).all()  # the CLS token
    depths = {depth for one in counts.maps for depth in one.counts()}
    assert depths == {1, 2}
    text = page_of(workplace("halt")).text
    assert "Blocks that a token ran through, averaged over an image: mean 1." in text
    assert "of 2 blocks on average" in text


def test_ordinary_rungs_have_no_such_section_and_nothing_runs_for_it(workplace, monkeypatch):
    page = page_of(workplace("plain"))
    assert "Where the tokens went" not in page.sections and "tokens" not in page.classes
    assert "Where the tokens went" in page_of(workplace("apt")).sections
    monkeypatch.setattr(token_counts, "decode_ahead", None)
    assert fit_counts(*loaded(workplace("plain"))) == []


def test_images_that_are_gone_or_changed_are_not_counted(workplace, tmp_path):
    fitted, outputs, source, graphs = loaded(workplace("apt"))
    assert fit_counts(fitted, outputs, None, graphs) == []
    images = shutil.copytree(workplace("apt").parent / "images", tmp_path / "images")
    names = [outputs.names[row] for row in fitted.splits["test"]]
    (images / names[0]).unlink()
    Image.new("RGB", (PX, PX), (1, 2, 3)).save(images / names[1])
    (images / names[2]).write_bytes(b"no image")
    (counts,) = fit_counts(fitted, outputs, open_images(str(images)), graphs)
    assert sum(map(len, counts.values.values())) == len(names) - 3
    for name in names[3:]:
        os.truncate(images / name, 0)
    assert fit_counts(fitted, outputs, open_images(str(images)), graphs) == []


def test_a_graph_that_is_not_the_recorded_one_any_more_is_not_run(workplace, tmp_path):
    fitted, outputs, source, graphs = loaded(workplace("apt"))
    file = tmp_path / "other.onnx"
    file.write_bytes(graphs.low.file.read_bytes() + b"\0")
    other = replace(
        graphs, graphs={**graphs.graphs, graphs.low.name: replace(graphs.low, file=file)}
    )
    assert fit_counts(fitted, outputs, source, other) == []


def test_of_many_images_some_are_drawn_by_chance(workplace, monkeypatch):
    assert COUNTED < 1000
    monkeypatch.setattr(token_counts, "COUNTED", 10)
    (counts,) = fit_counts(*loaded(workplace("apt")))
    assert sum(map(len, counts.values.values())) == 10
    assert counts.images == "the test split, drawn by chance (seed 0)"


def test_fewest_median_and_most_are_drawn_and_both_decisions_where_there_are_two():
    totals = np.random.default_rng(0).permutation(101)
    none = np.zeros(101, bool)
    assert totals[drawn(totals, none)].tolist() == [0, 1, 2, 49, 50, 98, 99, 100]
    some = (totals == 60) | (totals == 70) | (totals == 80)
    assert totals[drawn(totals, some)].tolist() == [0, 1, 2, 50, 70, 98, 99, 100]
    assert totals[drawn(totals, ~some)].tolist() == [0, 1, 2, 50, 70, 98, 99, 100]
    assert totals[drawn(totals, ~none)].tolist() == [0, 1, 2, 49, 50, 98, 99, 100]
    assert drawn(np.array([5, 3, 4]), none[:3]) == [1, 2, 0]


def test_the_picture_is_what_the_graph_sees(tmp_path):
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:, 10:30] = np.random.default_rng(0).integers(0, 256, (20, 20, 3))
    Image.fromarray(pixels).save(tmp_path / "x.png")
    made = Preprocessing(20, 20, 20, "bicubic", (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    seen = as_seen((tmp_path / "x.png").read_bytes(), made)
    np.testing.assert_array_equal(seen, pixels[:, 10:30])
