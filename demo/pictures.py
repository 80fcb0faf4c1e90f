"""Pictures of many kinds, from Debian packages, to try out what one stream of photographs flatters.

Eleven kinds: cut-out drawings and photographs of Tux Paint (animals, food, vehicles, ...)
and desktop wallpapers. A picture is in one folder only: `head` teaches a linear head its kinds,
`images` is the unlabelled folder that a user would have, and `judge` is kept for judging what was
tuned on those. Packages are fetched and verified by the system's own client and are unpacked, not
installed.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from bundle.placing import folder_beside
from report.terminal import Bars

from .steps import DemoError

OUT = Path("build/pictures")
STAMPS = "tuxpaint-stamps-default"
WALLPAPERS = (
    "gnome-backgrounds",
    "lomiri-wallpapers",
    "mate-backgrounds",
    "plasma-workspace-wallpapers",
)
SCENERY = "scenery"
FEWEST, MOST = 15, 160  # pictures of a kind: fewer teach no head, more would be most of all
SHARES = {"head": 0.33, "images": 0.57, "judge": 0.1}
LONGEST_PX = 512
TEST_SHARE = 0.29  # of the folder `images`, for `divide_in_two`
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


def make_pictures(out: Path, crops: int, bars: Bars) -> dict[str, int]:
    """Fetch the packages and write the folders, once; returns the number of images in each.

    Args:
        out: folder to write; one that is whole is left as it is.
        crops: of each picture, at several scales; with more than one a picture is a folder, for
            `--group-by folder`.
        bars: where to show progress.

    Raises:
        DemoError: a package cannot be fetched or unpacked, or it does not hold what it should.
    """
    if not out.exists():
        for tool in ("apt-get", "dpkg-deb"):
            if shutil.which(tool) is None:
                raise DemoError(f"pictures come from Debian packages, and there is no {tool} here")
        out.parent.mkdir(parents=True, exist_ok=True)
        with folder_beside(out) as folder:
            _write(folder, crops, bars)
            folder.rename(out)
    return {name: sum(1 for file in (out / name).rglob("*.jpg")) for name in SHARES}


def divide_in_two(pictures: Path, out: Path) -> dict[str, int]:
    """Pictures to learn from and others to judge by, as links; returns their numbers.

    `judge` and a part of `images` judge; the rest of `images` and `head`, whose labels are not
    looked at, are learned from.

    Args:
        pictures: what `make_pictures` wrote with several crops of each picture.
        out: folder to write; an earlier one goes.
    """
    shutil.rmtree(out, ignore_errors=True)
    counts = {"learn": 0, "test": 0}
    for part in SHARES:
        for kind in sorted((pictures / part).iterdir()):
            names = sorted((picture.name for picture in kind.iterdir()), key=_drawn)
            tests = {"head": 0, "images": round(TEST_SHARE * len(names))}.get(part, len(names))
            for number, name in enumerate(names):
                target = "test" if number < tests else "learn"
                link = out / target / kind.name / name
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to((kind / name).resolve())
                counts[target] += 1
    return counts


def _write(folder: Path, crops: int, bars: Bars) -> None:
    packages = folder / "packages"
    packages.mkdir()
    for package in (STAMPS, *WALLPAPERS):
        bars.say(f"fetch {package}")
        _run(["apt-get", "download", package], packages)
        (archive,) = packages.glob(f"{package}_*.deb")
        _run(["dpkg-deb", "-x", archive.name, package], packages)
        licence = packages / package / "usr/share/doc" / package / "copyright"
        shutil.copyfile(licence, folder / f"{package}.copyright")
    found = _kinds(packages)
    if len(found) < 2:
        raise DemoError(f"{STAMPS} holds no pictures by kind; is it another release?")
    with bars.stage("crop", sum(map(len, found.values()))) as bar:
        for kind, files in found.items():
            for part, names in _divided(files).items():
                for name in names:
                    _crops(files[name], folder / part / kind / name, crops)
                    bar.advance()
    shutil.rmtree(packages)


def _run(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode != 0:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no reason given"]
        raise DemoError(f"`{' '.join(command)}` failed: {lines[-1]}")


def _kinds(packages: Path) -> dict[str, dict[str, Path]]:
    """The files of each kind, by the name of the picture; kinds with too few pictures left out."""
    found: dict[str, dict[str, Path]] = defaultdict(dict)
    stamps = packages / STAMPS / "usr/share/tuxpaint/stamps"
    for file in _images(stamps):
        place = file.relative_to(stamps)
        found[place.parts[0]]["-".join(place.with_suffix("").parts[1:])] = file
    for package in WALLPAPERS:
        for file in _images(packages / package / "usr/share"):
            # The same wallpaper comes in several sizes, as "Kay/contents/images/5120x2880.png".
            place = file.relative_to(packages / package / "usr/share")
            name = place.parts[1] if "contents" in place.parts else file.stem
            largest = found[SCENERY].get(name, file)
            if file.stat().st_size >= largest.stat().st_size:
                found[SCENERY][name] = file
    return {
        kind: dict(sorted(files.items(), key=lambda item: _drawn(item[0]))[:MOST])
        for kind, files in sorted(found.items())
        if len(files) >= FEWEST
    }


def _images(folder: Path) -> Iterator[Path]:
    return (file for file in sorted(folder.rglob("*")) if file.suffix.lower() in SUFFIXES)


def _drawn(name: str) -> str:
    """What puts pictures in an order that has nothing to do with their names."""
    return hashlib.sha256(name.encode()).hexdigest()


def _divided(files: dict[str, Path]) -> dict[str, list[str]]:
    """The pictures of one kind in each folder, by its share."""
    ordered = sorted(files, key=_drawn)
    ends = np.round(np.cumsum(list(SHARES.values())) * len(ordered)).astype(int)
    return {
        part: ordered[start:end]
        for part, start, end in zip(SHARES, [0, *ends[:-1]], ends, strict=True)
    }


def _crops(file: Path, place: Path, crops: int) -> None:
    """Crops of a picture at random scales, or of a cut-out on a ground of random width."""
    rng = np.random.default_rng(int(_drawn(place.name)[:8], 16))
    with Image.open(file) as image:
        image.thumbnail((4 * LONGEST_PX, 4 * LONGEST_PX))
        picture = image.convert("RGBA")
    cut_out = picture.getextrema()[3][0] < 255
    for number in range(crops):
        side = rng.uniform(0.5, 1.0)
        width, height = picture.size
        if cut_out:
            edge = round(max(width, height) / side)
            ground = Image.new("RGBA", (edge, edge), "white")
            corner = (int(rng.integers(edge - width + 1)), int(rng.integers(edge - height + 1)))
            ground.alpha_composite(picture, corner)
            crop = ground
        else:
            edge = max(1, round(side * min(width, height)))
            left, top = int(rng.integers(width - edge + 1)), int(rng.integers(height - edge + 1))
            crop = picture.crop((left, top, left + edge, top + edge))
        crop.thumbnail((LONGEST_PX, LONGEST_PX))
        target = place.with_name(f"{place.name}.jpg") if crops == 1 else place / f"{number}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        crop.convert("RGB").save(target, quality=92)
