"""`python -m demo`: export, calibrate, assemble, serve, query, measure, show."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from tritonclient.utils import InferenceServerException

from calibration.sample import crops as sample_crops
from client import ClientError
from imaging import Preprocessing
from perf.analyzer import PerfAnalyzerError
from routing import Calibration, CalibrationError, RungSet, RungSetError
from server import ServerError, TritonServer

from .page import write_page
from .serve import DemoError, image_tensors, measure, measure_overhead, query
from .summary import summarise

ROOT = Path(__file__).resolve().parent.parent
OUT = Path("build/demo")
BACKBONE, LOW_PX, HIGH_PX = "dinov2-small", 112, 224
# What a user could serve instead; `python -m perf` measures them beside the router.
STATIC_PX = "140,168,196"
MAX_RISK, CONFIDENCE = 0.05, 0.9
# Separate draws of the same stream of crops.
HEAD_CROPS, HEAD_SEED = 600, 11
CALIBRATION_CROPS, CALIBRATION_SEED = 1200, 12
TEST_CROPS, TEST_SEED = 200, 13

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


def serve_and_measure() -> dict[str, Any]:
    """Serve the repository, ask it about unseen crops, measure it, write the results."""
    console.rule("[bold]7/7 Serve, query and measure", align="left")
    rung_set = RungSet.load(ONNX)
    calibration = Calibration.load(ARTIFACT)
    labels = rung_set.labels
    crops = list(sample_crops(TEST_CROPS, TEST_SEED))
    with console.status("starting tritonserver"):
        server = TritonServer(REPOSITORY, free_ports=True)
        server.start()
    try:
        served = query(server, crops, labels)
        tensors = image_tensors(crops, Preprocessing.from_dict(rung_set.preprocessing))
        passes = measure(server, tensors, OUT / "perf")
        overhead = measure_overhead(server, tensors)
        environment = {"triton_version": server.version, **describe_machine()}
    finally:
        server.stop()
    resolutions_px = (LOW_PX, HIGH_PX)
    summary = summarise(
        BACKBONE, resolutions_px, served, passes, overhead, calibration.certificate, environment
    )
    (OUT / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    data = [crop.data for crop in crops]
    write_page(OUT / "index.html", summary, served, calibration.threshold, data, labels)
    return summary


def describe_machine() -> dict[str, object]:
    """What the figures depend on."""
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].split(":", 1)[1].strip() if names else cpu
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "onnxruntime": version("onnxruntime-gpu"),
    }


def print_table(summary: dict[str, Any]) -> None:
    """The result on stdout."""
    table = Table(title=f"{summary['images']} unseen crops, {BACKBONE} at {LOW_PX}/{HIGH_PX} px")
    table.add_column("")
    for column in ("accuracy", "p50 latency", "images/s"):
        table.add_column(column, justify="right")
    names = {"low": "cheap rung always", "high": "full rung always", "adaptive": "adaptive"}
    for key, name in names.items():
        table.add_row(
            name,
            f"{summary['accuracy'][key]:.1%}",
            f"{summary['latency_ms_p50'][key]:.1f} ms",
            f"{summary['throughput_per_s'][key]:.1f}",
        )
    Console().print(table)
    print(
        f"{summary['speedup_vs_high']:.2f}x as fast as the full rung (bound "
        f"{summary['cascade_bound']:.2f}x, efficiency {summary['cascade_efficiency']:.2f}); "
        f"{summary['escalation_rate']:.1%} escalated; {summary['agreement_with_high']:.1%} "
        f"answered as the full rung; router overhead {summary['router_overhead']:.2f}"
    )
    certificate = summary["certificate"]
    print(
        f"certified before: risk at most {certificate['epsilon']:.0%} with confidence "
        f"{certificate['confidence']:.0%}; seen on these crops: {summary['realised_risk']:.1%}"
        if certificate["certified"]
        else "nothing is certified: every image goes to the full rung"
    )


def main(arguments: list[str] | None = None) -> None:
    """Run the demo, or its first six steps; a foreseeable error is one line and exit code 1."""
    parser = argparse.ArgumentParser(
        prog="python -m demo",
        description="Export, calibrate, serve, query and measure DINOv2 ViT-S/14 on crops of "
        "shipped photographs. Steps done before are not done again. Writes build/demo/.",
    )
    parser.add_argument(
        "--prepare",
        action="store_true",
        help="stop after step 6, with a model repository to serve or to measure",
    )
    only_prepare = parser.parse_args(arguments).prepare
    started = time.monotonic()
    os.chdir(ROOT)
    try:
        prepare()
        summary = None if only_prepare else serve_and_measure()
    except (
        CalibrationError,
        ClientError,
        DemoError,
        InferenceServerException,
        PerfAnalyzerError,
        RungSetError,
        ServerError,
    ) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("stopped; what was made so far is in build/demo", file=sys.stderr)
        sys.exit(130)
    seconds = time.monotonic() - started
    if summary is None:
        print(f"rungs in {ONNX}, calibration {ARTIFACT}, its report {REPORT}")
        print(f"took {seconds:.0f} s; serve with python -m server --repository {REPOSITORY}")
        return
    print_table(summary)
    print(f"took {seconds:.0f} s; open {OUT / 'index.html'} and {REPORT}")


if __name__ == "__main__":
    main()
