"""Steps 1 to 6: from nothing to an assembled model repository, by commands a user would type."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from .errors import DemoError

OUT = Path("build/demo")
BACKBONE, LOW_PX, HIGH_PX = "dinov2-small", 112, 224
# What a user could serve instead; `python -m perf` measures them beside the router.
STATIC_PX = "140,168,196"
MAX_RISK, CONFIDENCE = 0.05, 0.9
# Separate draws of the same stream of crops; the test crops are a third.
HEAD_CROPS, HEAD_SEED = 600, 11
CALIBRATION_CROPS, CALIBRATION_SEED = 1200, 12

console = Console(stderr=True)


class Step(NamedTuple):
    """One command of the demo, and the file or folder it makes."""

    title: str
    makes: Path
    arguments: tuple[object, ...]


HEAD, ONNX, OUTPUTS = OUT / "head", OUT / "onnx", OUT / "outputs.npz"
ARTIFACT, REPORT = OUT / "calibration.json", OUT / "report.html"
REPOSITORY = OUT / "model_repository"
STEPS = (
    Step(
        "1/7 Cut training crops for the classification head",
        HEAD,
        ("calibration", "sample", "--out", HEAD, "--count", HEAD_CROPS, "--seed", HEAD_SEED),
    ),
    Step(
        "2/7 Export the cheap and the full rung",
        ONNX,
        (
            *("export", "rungs", "--model", BACKBONE, "--low-px", LOW_PX, "--high-px", HIGH_PX),
            *("--static-px", STATIC_PX, "--head", "linear", "--images", HEAD, "--out", ONNX),
        ),
    ),
    Step(
        "3/7 Run both rungs over fresh crops",
        OUTPUTS,
        (
            *("calibration", "collect", "--images", "sample", "--limit", CALIBRATION_CROPS),
            *("--seed", CALIBRATION_SEED, "--onnx", ONNX, "--out", OUTPUTS),
        ),
    ),
    Step(
        "4/7 Choose a signal and certify a threshold",
        ARTIFACT,
        (
            *("calibration", "fit", "--fidelity", "top1", "--max-risk", MAX_RISK),
            *("--confidence", CONFIDENCE, "--signal", "auto", "--onnx", ONNX),
            *("--outputs", OUTPUTS, "--out", ARTIFACT),
        ),
    ),
    Step(
        "5/7 Show what the calibration is worth",
        REPORT,
        (
            *("calibration", "report", "--calibration", ARTIFACT, "--outputs", OUTPUTS),
            *("--onnx", ONNX, "--out", REPORT),
        ),
    ),
    Step(
        "6/7 Assemble the model repository",
        REPOSITORY,
        (
            *("export", "repository", "--onnx", ONNX, "--calibration", ARTIFACT),
            *("--out", REPOSITORY),
        ),
    ),
)


def prepare() -> None:
    """From nothing to an assembled model repository; a step already done is not done again.

    Each finished step leaves a stamp: a hash over its command, the steps before it and the code.
    From the first step whose stamp is missing or differs, everything is made anew.

    Raises:
        DemoError: a command failed; what it printed is on the terminal.
    """
    stamps = OUT / "stamps"
    stamps.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(_code())
    fresh = True
    for step in STEPS:
        line = ["python", "-m", *map(str, step.arguments)]
        digest.update("\0".join(line).encode())
        stamp = stamps / step.makes.name
        fresh = fresh and stamp.is_file() and stamp.read_text() == digest.hexdigest()
        console.rule(f"[bold]{step.title}", align="left")
        console.print(f"$ {' '.join(line)}", style="dim", markup=False, highlight=False)
        if fresh and step.makes.exists():
            console.print("done before, nothing has changed")
            continue
        fresh = False
        stamp.unlink(missing_ok=True)
        if step.makes.is_dir():
            shutil.rmtree(step.makes)
        done = subprocess.run([sys.executable, *line[1:]])
        if done.returncode != 0:
            raise DemoError(f"`{' '.join(line)}` failed with exit code {done.returncode}")
        stamp.write_text(digest.hexdigest())


def _code() -> bytes:
    """Everything that the steps' results depend on besides their commands."""
    folders = ("calibration", "export", "imaging", "model_repository", "routing")
    files = [path for folder in folders for path in Path(folder).rglob("*") if path.is_file()]
    files = [path for path in files if "__pycache__" not in path.parts]
    files += Path().glob("requirements*.txt")
    return b"".join(str(path).encode() + path.read_bytes() for path in sorted(files))
