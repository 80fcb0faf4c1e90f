"""What the tests of both HTML pages share: outputs, images and a reader of pages."""

import base64
import io
import re
from functools import cache
from html.parser import HTMLParser

import numpy as np
from PIL import Image

from calibration.images import SourceImage
from calibration.outputs import Made
from imaging import ImageError, decode, pixels_sha256
from routing import RungOutputs
from tests.unit.calibration_outputs import outputs_of
from tests.unit.fakes import CLASSES, LAYERS, D


def jpeg(row):
    buffer = io.BytesIO()
    Image.new("RGB", (20, 12), (row % 256, row // 256, 0)).save(buffer, "JPEG")
    return buffer.getvalue()


@cache
def pixels_of(row):
    """The hash of an image's pixels."""
    return pixels_sha256(decode(jpeg(row)))


def make_outputs(oracle, loss, head=True):
    """Image i is (oracle[i], 0, ...) apart from its full embedding; answers differ if loss[i]."""
    n = len(oracle)
    rng = np.random.default_rng(0)
    high = rng.normal(size=(n, D)).astype(np.float32)
    low = high.copy()
    low[:, 0] += np.asarray(oracle, np.float32)
    logits = np.eye(CLASSES, dtype=np.float32)
    lost, task = np.asarray(loss).astype(int), "classes" if head else None
    layers = rng.normal(size=(n, LAYERS + 1, D)).astype(np.float32)
    low_logits = logits[lost] + rng.uniform(0, 0.1, (n, CLASSES)).astype(np.float32)
    return outputs_of(
        RungOutputs(low, layers, low_logits if head else None),
        RungOutputs(high, None, logits[np.zeros(n, int)] if head else None),
        names=tuple(f"folder/{row:05d}.jpg" for row in range(n)),
        groups=tuple(map(str, range(n))),
        hashes=tuple(map(pixels_of, range(n))),
        made=Made({"vit_low": "0" * 64, "vit_high": "1" * 64}, "2" * 64, "3" * 64, task),
        title="made up images",
    )


class FakeSource:
    """The images of `make_outputs`; those in `gone` raise, `swapped` ones have other bytes."""

    spec = title = "made up"

    def __init__(self, count, gone=(), swapped=()):
        self.names = tuple(f"folder/{row:05d}.jpg" for row in range(count))
        self.gone, self.swapped = gone, swapped

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index):
        if index in self.gone:
            raise ImageError("cannot be read: No such file or directory")
        data = jpeg(index + 1 if index in self.swapped else index)
        return SourceImage(self.names[index], self.names[index], None, data)

    def fingerprint(self):
        return "made up"


class Page(HTMLParser):
    """A page taken apart: its text, its embedded files, and each section's text by heading."""

    def __init__(self, path):
        super().__init__()
        self.size = path.stat().st_size
        self.loaded, self.classes, self.sections = [], [], {"": ""}
        self._heading, self._inside, self._mute = "", False, False
        self.feed(path.read_text(encoding="utf-8"))
        self.text = squeeze(" ".join(self.sections.values()))
        self.sections = {squeeze(name): squeeze(text) for name, text in self.sections.items()}

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.loaded += [attrs[key] for key in ("src", "href", "data", "srcset") if key in attrs]
        self.classes += (attrs.get("class") or "").split()
        self._inside = tag in ("h1", "h2", "h3")
        self._mute = tag == "style"
        if self._inside:
            self._heading = ""

    def handle_endtag(self, tag):
        self._mute = False
        if self._inside:
            self._inside = False
            self.sections.setdefault(self._heading, "")

    def handle_data(self, data):
        if self._mute:
            assert "url(" not in data and "@import" not in data
        elif self._inside:
            self._heading += data
        else:
            self.sections[self._heading] = self.sections.get(self._heading, "") + " " + data

    def assert_self_contained(self):
        assert self.loaded
        for address in self.loaded:
            assert address.startswith("data:image/"), address[:80]
            if address.startswith("data:image/svg+xml;base64,"):
                inner = re.findall(r'(?:href|src)="([^"]*)"|url\(([^)]*)\)', svg_of(address))
                assert all((a or b).startswith("#") for a, b in inner)


def svg_of(uri):
    """An embedded figure."""
    head, _, body = uri.partition(",")
    assert head == "data:image/svg+xml;base64"
    return base64.b64decode(body).decode()


def drawn_words(uri):
    """What is written in a figure, in the order it is drawn: matplotlib leaves it as comments."""
    return [squeeze(word) for word in re.findall(r"<!-- (.*?) -->", svg_of(uri), re.S)]


def squeeze(text):
    """With single plain spaces, as people read it."""
    return " ".join(text.split())
