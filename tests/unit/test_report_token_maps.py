"""Where tokens went, drawn over the picture: the right areas at the right places, and numbers."""

import base64
import io
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from report import page
from report.page import HIGH_COLOUR, LOW_COLOUR
from report.token_maps import TokenMap, token_maps

MIXED = np.ones((8, 8), np.int32)
MIXED[:4, 4:], MIXED[6:, :2] = 4, 2  # at the top right, and at the bottom left
DEPTHS = np.array([[3, 1], [0, 3]], np.int32)


def picture(colour=(200, 0, 0), size=16):
    return np.full((size, size, 3), colour, np.uint8)


def apt(patches=MIXED, tokens=46, caption="cat.jpg"):
    return TokenMap("apt", picture(), np.array([tokens]), patches.reshape(-1), caption)


def halt(patches=DEPTHS, tokens=(5, 3, 2), caption="dog.jpg"):
    return TokenMap("halt", picture(), np.array(tokens), patches.reshape(-1), caption)


def drawings(html):
    """Each drawing, parsed."""
    return [
        ElementTree.fromstring(svg) for svg in re.findall(r"<svg[^>]*role=.*?</svg>", html, re.S)
    ]


def shaded(svg):
    """The patches under each path that is filled, by its opacity."""
    side = int(svg.get("viewBox").split()[-1])
    found = {}
    for path in svg.iterfind("g/path"):
        area = found.setdefault(float(path.get("fill-opacity")), np.zeros((side, side), bool))
        runs = re.findall(r"M(\d+) (\d+)H(\d+)v1H(\d+)z", path.get("d"))
        assert "".join(f"M{a} {b}H{c}v1H{d}z" for a, b, c, d in runs) == path.get("d")
        for left, y, right, back in runs:
            assert left == back and not area[int(y), int(left) : int(right)].any()
            area[int(y), int(left) : int(right)] = True
    return found


def test_coarse_cells_are_tinted_and_every_cell_has_its_border():
    (svg,) = drawings(token_maps([apt()]))
    assert svg.get("viewBox") == "0 0 8 8" and svg.find("g").get("fill") == LOW_COLOUR
    (middle, some), (most, all_of) = sorted(shaded(svg).items())
    assert 0 < middle < most < 1
    np.testing.assert_array_equal(some, MIXED == 2)
    np.testing.assert_array_equal(all_of, MIXED == 4)
    cells = re.findall(r"M(\d+) (\d+)h(\d+)v\3h-\3z", svg.find("path").get("d"))
    covered = np.zeros((8, 8), int)
    for x, y, cell in (map(int, found) for found in cells):
        covered[y : y + cell, x : x + cell] += 1
        assert (MIXED[y : y + cell, x : x + cell] == cell).all()
    assert (covered == 1).all() and len(cells) == 1 + 1 + 44


def test_patches_are_shaded_by_the_blocks_they_ran_through():
    (svg,) = drawings(token_maps([halt()]))
    assert svg.find("g").get("fill") == HIGH_COLOUR and svg.find("path") is None
    one, three = (shaded(svg)[opacity] for opacity in sorted(shaded(svg)))
    np.testing.assert_array_equal(one, DEPTHS == 1)
    np.testing.assert_array_equal(three, DEPTHS == 3)
    light, dark = sorted(shaded(svg))
    assert dark == pytest.approx(3 * light, abs=2e-3)


def test_captions_and_alternative_texts_say_the_numbers():
    # 46 cells and a CLS token, of 64 patches and one; then CLS and registers.
    assert apt(tokens=47).sentence() == "47 of 65 tokens (72\xa0%)"
    assert apt(tokens=51).sentence() == "51 of 69 tokens (74\xa0%)"
    assert apt(np.ones((2, 2), int), tokens=5).sentence() == "5 of 5 tokens (100\xa0%)"
    assert halt().sentence() == "tokens ran through 2.0 of 3 blocks on average"  # 10 / 5
    html = token_maps([apt(), halt()])
    first, second = (svg.get("aria-label") for svg in drawings(html))
    assert first == (
        "cat.jpg: 46 of 64 tokens (72\xa0%); 44 cells of 1 × 1, 1 cell of 2 × 2, 1 cell of 4 × 4"
    )
    assert second.endswith("patches through 0: 1, patches through 1: 1, patches through 3: 2")
    for one in (apt(), halt()):
        assert f"<figcaption>{one.caption}<br>{one.sentence()}</figcaption>" in html


def test_the_legend_names_the_shades_that_are_there_and_no_other():
    html = token_maps([apt(MIXED.clip(max=1), 65), apt(np.full((2, 2), 2), 2), halt()])
    first, second = re.findall(r'<p class="legend">(.*?)</p>', html)
    assert re.findall(r"</svg>(.*?)</span>", first) == [
        "one token for each patch",
        "for 2 × 2 patches",
    ]
    assert re.findall(r"</svg>(.*?)</span>", second) == ["0 of 3 blocks", "1", "3"]
    assert re.findall(r'fill-opacity="(.*?)"', second)[1:] == [
        path.get("fill-opacity") for path in drawings(html)[2].iterfind("g/path")
    ]
    assert token_maps([]).count("legend") == 0


def test_pictures_are_embedded_small_in_colour_under_cells_and_pale_under_depths():
    large, encoded = picture(size=900), io.BytesIO()
    Image.fromarray(large).save(encoded, "PNG")
    tokens, sides = np.array([46]), MIXED.reshape(-1)
    rows = [
        TokenMap("apt", large, tokens, sides, "as an array"),
        TokenMap("apt", encoded.getvalue(), tokens, sides, "as a file"),
        halt(),
    ]
    colours = []
    for svg in drawings(token_maps(rows)):
        head, _, body = svg.find("image").get("href").partition(",")
        image = Image.open(io.BytesIO(base64.b64decode(body)))
        assert (head, image.format) == ("data:image/jpeg;base64", "JPEG")
        assert max(image.size) <= 256
        colours.append(image.convert("RGB").getpixel((5, 5)))
    assert colours[0] == colours[1] == pytest.approx((200, 0, 0), abs=8)
    red, green, blue = colours[2]
    assert red == green == blue > 128


def test_a_caption_is_text():
    html = token_maps([apt(caption='<b>"x"</b>')])
    assert "<b>" not in html
    (svg,) = drawings(html)
    assert svg.get("aria-label").startswith('<b>"x"</b>: ')


@pytest.mark.parametrize(
    ("kind", "tokens", "patches", "said"),
    [
        ("tome", [5], [1], "kind 'tome' is none of apt, halt"),
        ("apt", [5], [1, 1], "2 patches fill no square"),
        ("apt", [5], [], "0 patches fill no square"),
        ("apt", [5], [3], "no patch of apt can be 3"),
        ("halt", [5, 4], [3], "no patch of halt can be 3"),
    ],
)
def test_what_cannot_be_drawn_is_refused(kind, tokens, patches, said):
    with pytest.raises(ValueError, match=said):
        TokenMap(kind, picture(), np.array(tokens), np.array(patches, int), "x")


def test_the_styles_it_needs_are_those_of_every_page():
    base = (Path(page.__file__).parent / "templates/base.html.j2").read_text()
    names = set(re.findall(r'class="(\w+)"', token_maps([apt(), halt()])))
    assert names == {"cells", "legend", "tokens"}
    assert all(f"  .{name} {{" in base for name in names)
