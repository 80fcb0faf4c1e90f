"""The two roads from nothing to an assembled model repository: two resolutions, and a plan.

Both train the same head on the same crops. Crops for the head, for calibration and for testing are
separate draws of one stream.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from .errors import DemoError, StepError
from .steps import OUT, Step, code_hash, prepare

BACKBONE = "dinov2-small"
LOW, HIGH = "px=112", "px=224"
# What a user could serve instead; `python -m perf` measures them beside the router.
BESIDE = ("px=140", "px=168", "px=196", "tome=8")
MAX_RISK, CONFIDENCE = 0.05, 0.9
HEAD_CROPS, HEAD_SEED = 600, 11
CALIBRATION_CROPS, CALIBRATION_SEED = 1200, 12
TEST_CROPS, TEST_SEED = 200, 13
HEAD = OUT / "head"

PLAN, PLAN_CACHES = OUT / "plan", OUT / "plan-cache"
PLAN_PX, PLAN_CROPS = 224, 2400
PLAN_CANDIDATES = (
    "px=112,int8=static,align; px=84,int8=static,align; px=70,int8=static,align; "
    "px=84,depth=8,int8=static,align"
)
PLAN_HIGHS = "fp32; int8=static"
PLAN_BESIDE = "px=140; px=168; px=196; tome=8; tome=16"
# One for each core that the demo assumes: a cascade's two graphs take turns on them.
PLAN_INSTANCES = 2


@dataclass(frozen=True)
class Road:
    """The steps, and what they leave to serve.

    Attributes:
        steps: in order.
        onnx: folder of the graphs.
        artifact: calibration.json.
        report: page of the calibration.
        repository: the assembled model repository.
        plan: page of the plan; None where there is none.
    """

    steps: tuple[Step, ...]
    onnx: Path
    artifact: Path
    report: Path
    repository: Path
    plan: Path | None = None

    @property
    def last_title(self) -> str:
        """Of what follows the steps."""
        count = len(self.steps) + 1
        return f"{count}/{count} Serve, query and measure"


def resolutions() -> Road:
    """The model at two resolutions, the threshold certified for that pair."""
    onnx, outputs, artifact = OUT / "onnx", OUT / "outputs.npz", OUT / "calibration.json"
    report, repository = OUT / "report.html", OUT / "model_repository"
    beside = [argument for recipe in BESIDE for argument in ("--beside", recipe)]
    export = Step(
        "2/7 Export the cheap and the full rung",
        onnx,
        (
            *("export", "rungs", "--model", BACKBONE, "--low", LOW, "--high", HIGH, *beside),
            *("--head", "linear", "--images", HEAD, "--out", onnx),
        ),
    )
    collect = Step(
        "3/7 Run both rungs over fresh crops",
        outputs,
        (
            *("calibration", "collect", "--images", "sample", "--limit", CALIBRATION_CROPS),
            *("--seed", CALIBRATION_SEED, "--onnx", onnx, "--out", outputs),
        ),
    )
    fit = Step(
        "4/7 Choose a signal and certify a threshold",
        artifact,
        (
            *("calibration", "fit", "--fidelity", "top1", "--max-risk", MAX_RISK),
            *("--confidence", CONFIDENCE, "--signal", "auto", "--onnx", onnx),
            *("--outputs", outputs, "--out", artifact),
        ),
    )
    steps = (
        _head("1/7"),
        export,
        collect,
        fit,
        _report("5/7", onnx, artifact, outputs, report),
        _repository("6/7", onnx, artifact, repository, ()),
    )
    return Road(steps, onnx, artifact, report, repository)


def planned(max_risk: float) -> Road:
    """The cheapest certified cascade that the planner finds.

    Args:
        max_risk: the largest share of answers that may differ from the full model's.
    """
    onnx, artifact = PLAN / "onnx", PLAN / "calibration.json"
    report, repository = PLAN / "report.html", PLAN / "model_repository"
    plan = Step(
        "2/5 Plan: export, run and price the candidates, certify and choose a cascade",
        PLAN,
        (
            *("calibration", "plan", "--model", BACKBONE, "--px", PLAN_PX, "--images", "sample"),
            *("--limit", PLAN_CROPS, "--seed", CALIBRATION_SEED, "--head-images", HEAD),
            *("--max-risk", max_risk, "--confidence", CONFIDENCE),
            *("--candidates", PLAN_CANDIDATES, "--highs", PLAN_HIGHS, "--beside", PLAN_BESIDE),
            *("--instances", PLAN_INSTANCES, "--out", PLAN, "--cache", _cache()),
            "--require-certificate",
        ),
        ("client", "perf", "server"),  # it serves the candidates to price them
    )
    instances = ("--instances", PLAN_INSTANCES)
    steps = (
        _head("1/5"),
        plan,
        _report("3/5", onnx, artifact, PLAN / "outputs.npz", report),
        _repository("4/5", onnx, artifact, repository, instances),
    )
    return Road(steps, onnx, artifact, report, repository, PLAN / "plan.html")


def prepare_road(road: Road) -> None:
    """Go the road.

    Raises:
        DemoError: a command failed, or the plan chose nothing.
    """
    if road.plan is not None:
        _drop_other_caches()
    try:
        prepare(road.steps)
    except StepError as error:
        if error.makes == PLAN and _chose_nothing():
            raise DemoError(
                "no certified cascade is cheaper than the full model, so there is nothing to "
                f"serve; {PLAN / 'plan.html'} shows what was tried"
            ) from None
        raise


def _cache() -> Path:
    """Of graphs and their answers: they outlive another risk, but not another code."""
    return PLAN_CACHES / code_hash()[:16]


def _drop_other_caches() -> None:
    for cache in PLAN_CACHES.glob("*"):
        if cache != _cache():
            shutil.rmtree(cache)


def _chose_nothing() -> bool:
    """Whether plan.json was written, and without a choice."""
    try:
        return json.loads((PLAN / "plan.json").read_text())["chosen"] is None
    except OSError:
        return False


def _head(number: str) -> Step:
    return Step(
        f"{number} Cut training crops for the classification head",
        HEAD,
        ("calibration", "sample", "--out", HEAD, "--count", HEAD_CROPS, "--seed", HEAD_SEED),
    )


def _report(number: str, onnx: Path, artifact: Path, outputs: Path, report: Path) -> Step:
    return Step(
        f"{number} Show what the calibration is worth",
        report,
        (
            *("calibration", "report", "--calibration", artifact, "--outputs", outputs),
            *("--onnx", onnx, "--out", report),
        ),
    )


def _repository(
    number: str, onnx: Path, artifact: Path, repository: Path, options: tuple[object, ...]
) -> Step:
    return Step(
        f"{number} Assemble the model repository",
        repository,
        (
            *("export", "repository", "--onnx", onnx, "--calibration", artifact),
            # The demo asks for either rung by itself, and perf for thresholds of its own.
            *("--out", repository, "--client-parameters", "any", *options),
        ),
    )
