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
from .steps import CODE, OUT, Step, code_hash, prepare

MAX_RISK, CONFIDENCE = 0.05, 0.9
HEAD_CROPS, HEAD_SEED = 600, 11
CALIBRATION_CROPS, CALIBRATION_SEED = 1200, 12
TEST_CROPS, TEST_SEED = 200, 13
HEAD = OUT / "head"

PLAN, PLAN_CACHES = OUT / "plan", OUT / "plan-cache"
PLAN_CROPS = 2400
PLAN_HIGHS = "fp32; int8=static"
# One for each core that the demo assumes: a cascade's two graphs take turns on them.
PLAN_INSTANCES = 2


@dataclass(frozen=True)
class Model:
    """What the demo serves, and how it makes it cheap.

    Attributes:
        name: as `export rungs --model`.
        low_px: of the cheap rung of the two resolutions.
        high_px: of the full rung.
        beside: recipes of what a user could serve instead; `python -m perf` measures them beside
            the router.
        plan_candidates: recipes of the planner's cheap graphs.
        plan_beside: recipes of what it compares with.
    """

    name: str
    low_px: int
    high_px: int
    beside: tuple[str, ...]
    plan_candidates: str
    plan_beside: str


MODELS = {
    model.name: model
    for model in (
        Model(
            "dinov2-small",
            low_px=112,
            high_px=224,
            beside=("px=140", "px=168", "px=196", "tome=8"),
            plan_candidates="px=112,int8=static,align; px=84,int8=static,align; "
            "px=70,int8=static,align; px=84,depth=8,int8=static,align",
            plan_beside="px=140; px=168; px=196; tome=8; tome=16",
        ),
        # A toy whose weights are random: a minute instead of many, and nothing to learn from it
        # but that every step works.
        Model(
            "static-vit",
            low_px=32,
            high_px=64,
            beside=("px=48", "tome=8"),
            plan_candidates="px=48,int8=static,align; px=32,int8=static,align; "
            "px=32,depth=8,int8=static,align",
            plan_beside="px=48; tome=8",
        ),
    )
}
DEFAULT = "dinov2-small"


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


def resolutions(model: Model) -> Road:
    """A model at two resolutions, the threshold certified for that pair."""
    onnx, collected, artifact = OUT / "onnx", OUT / "collected", OUT / "calibration.json"
    outputs = collected / "outputs.json"
    report, repository = OUT / "report.html", OUT / "model_repository"
    beside = [argument for recipe in model.beside for argument in ("--beside", recipe)]
    export = Step(
        "2/7 Export the cheap and the full rung",
        onnx,
        (
            *("export", "rungs", "--model", model.name, "--low", f"px={model.low_px}"),
            *("--high", f"px={model.high_px}", *beside),
            *("--head", "linear", "--images", HEAD, "--out", onnx),
        ),
    )
    collect = Step(
        "3/7 Run both rungs over fresh crops",
        collected,
        (
            *("calibration", "collect", "--images", "sample", "--limit", CALIBRATION_CROPS),
            *("--seed", CALIBRATION_SEED, "--onnx", onnx, "--out", outputs),
            *("--answers", collected / "answers"),  # they come and go with what names them
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


def planned(model: Model, max_risk: float) -> Road:
    """The cheapest certified cascade that the planner finds.

    Args:
        model: to plan for.
        max_risk: the largest share of answers that may differ from the full model's.
    """
    onnx, artifact = PLAN / "onnx", PLAN / "calibration.json"
    report, repository = PLAN / "report.html", PLAN / "model_repository"
    plan = Step(
        "2/5 Plan: export, run and price the candidates, certify and choose a cascade",
        PLAN,
        (
            *("planner", "plan", "--model", model.name, "--px", model.high_px),
            *("--images", "sample", "--limit", PLAN_CROPS, "--seed", CALIBRATION_SEED),
            *("--head-images", HEAD),
            *("--max-risk", max_risk, "--confidence", CONFIDENCE),
            *(
                "--candidates",
                model.plan_candidates,
                "--highs",
                PLAN_HIGHS,
                "--beside",
                model.plan_beside,
            ),
            *("--instances", PLAN_INSTANCES, "--out", PLAN),
            *("--cache", _cache(), "--answers", _cache() / "answers"),
            "--require-certificate",
        ),
        ("client", "perf", "planner", "report", "server"),  # it serves the candidates to price them
    )
    instances = ("--instances", PLAN_INSTANCES)
    steps = (
        _head("1/5"),
        plan,
        _report("3/5", onnx, artifact, PLAN / "outputs.json", report),
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
    return PLAN_CACHES / code_hash((*CODE, "planner"))[:16]


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
        ("report",),
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
