"""What adaptation is worth on pictures of many kinds: cheap graphs as they are, aligned, adapted.

Six crops of each picture, at several scales; no picture is on both sides. A linear head knows the
kinds of some of the pictures to learn from; training sees no label.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

from report.terminal import Bars

from .pictures import divide_in_two, make_pictures
from .steps import DemoError, console

OUT = Path("build/adapt")
CROPS = 6
# The trainings; all else takes some sixteen minutes on two cores.
MINUTES = 21


def run_adapt(bars: Bars) -> None:
    """Make the pictures and run the study.

    Raises:
        DemoError: the pictures cannot be had, or the study failed.
    """
    pictures = OUT / "pictures"
    make_pictures(pictures, CROPS, bars)
    counts = divide_in_two(pictures, OUT / "divided")
    bars.say(f"{counts['learn']} pictures to learn from, {counts['test']} others to judge by")
    command = (
        "adaptation study --model dinov2-small --recipes 'px=84; px=112' "
        f"--images {OUT}/divided/learn --test {OUT}/divided/test --head-images {pictures}/head "
        f"--group-by folder --views 1 --minutes {MINUTES} --cache {OUT}/teacher --out {OUT}"
    )
    console.print(f"$ python -m {command}", style="dim", markup=False, highlight=False)
    done = subprocess.run([sys.executable, "-m", *shlex.split(command)])
    if done.returncode != 0:
        raise DemoError(f"the study failed with exit code {done.returncode}")
