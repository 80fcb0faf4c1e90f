"""The two roads from nothing to an assembled model repository: two resolutions, and a plan.

Both train the same head on the same crops. Crops for the head, for calibration and for testing are
separate draws of one stream, of the seeds 11, 12 and `TEST_SEED`.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from .steps import CODE, OUT, DemoError, Step, StepError, code_hash, prepare

MAX_RISK = 0.05
TEST_CROPS, TEST_SEED = 200, 13
PLAN, PLAN_CACHES = OUT / "plan", OUT / "plan-cache"
# One instance for each core that the demo assumes: a cascade's two graphs take turns on them.
INSTANCES = "--instances 2"


class Model(NamedTuple):
    """What the demo serves, and how it makes it cheap."""

    low_px: int  # of the cheap rung of the two resolutions
    high_px: int
    beside: str  # what a user could serve instead, for `python -m perf` to measure beside it
    plan: str  # the planner's cheap graphs, and what it compares with


MODELS = {
    "dinov2-small": Model(
        low_px=112,
        high_px=224,
        beside="--beside px=140 --beside px=168 --beside px=196 --beside tome=8",
        plan="--candidates 'px=112,int8=static,align; px=84,int8=static,align; "
        "px=70,int8=static,align; px=84,depth=8,int8=static,align' "
        "--beside 'px=140; px=168; px=196; tome=8; tome=16'",
    ),
    # A toy whose weights are random: a minute instead of many, and nothing to learn from it but
    # that every step works.
    "static-vit": Model(
        low_px=32,
        high_px=64,
        beside="--beside px=48 --beside tome=8",
        plan="--candidates 'px=48,int8=static,align; px=32,int8=static,align; "
        "px=32,depth=8,int8=static,align' --beside 'px=48; tome=8'",
    ),
}


@dataclass(frozen=True)
class Road:
    """The steps, and what they leave to serve.

    Attributes:
        folder: will hold onnx/, calibration.json, its report.html and model_repository/.
        steps: in order.
    """

    folder: Path
    steps: tuple[Step, ...]

    @property
    def report(self) -> Path:
        """Page of the calibration."""
        return self.folder / "report.html"

    @property
    def plan(self) -> Path | None:
        """Page of the plan; None where there is none."""
        return self.folder / "plan.html" if self.folder == PLAN else None


_HEAD = Step(
    "Cut training crops for the classification head",
    OUT / "head",
    f"calibration sample --out {OUT}/head --count 600 --seed 11",
)


def resolutions(name: str) -> Road:
    """A model of `MODELS` at two resolutions, the threshold certified for that pair."""
    model = MODELS[name]
    collected = OUT / "collected"
    steps = (
        _HEAD,
        Step(
            "Export the cheap and the full rung",
            OUT / "onnx",
            f"export rungs --model {name} --low px={model.low_px} --high px={model.high_px} "
            f"{model.beside} --head linear --images {OUT}/head --out {OUT}/onnx",
        ),
        Step(
            "Run both rungs over fresh crops",
            collected,  # the kept answers come and go with what names them
            f"calibration collect --images sample --limit 1200 --seed 12 --onnx {OUT}/onnx "
            f"--out {collected}/outputs.json --answers {collected}/answers",
        ),
        Step(
            "Choose a signal and certify a threshold",
            OUT / "calibration.json",
            f"calibration fit --fidelity top1 --max-risk {MAX_RISK} --confidence 0.9 --signal auto "
            f"--onnx {OUT}/onnx --outputs {collected}/outputs.json --out {OUT}/calibration.json",
        ),
    )
    return Road(OUT, (*steps, *_report_and_repository(OUT, collected / "outputs.json", "")))


def planned(name: str, max_risk: float) -> Road:
    """The cheapest certified cascade that the planner finds.

    Args:
        name: of `MODELS`.
        max_risk: the largest share of answers that may differ from the full model's.
    """
    model = MODELS[name]
    plan = Step(
        "Plan: export, run and price the candidates, certify and choose a cascade",
        PLAN,
        f"planner plan --model {name} --px {model.high_px} --images sample --limit 2400 "
        f"--seed 12 --head-images {OUT}/head --max-risk {max_risk} --confidence 0.9 "
        f"{model.plan} --highs 'fp32; int8=static' {INSTANCES} --out {PLAN} --cache {_cache()} "
        f"--answers {_cache()}/answers --require-certificate",
        ("client", "perf", "planner", "report", "server"),  # it serves the candidates to price them
    )
    rest = _report_and_repository(PLAN, PLAN / "outputs.json", f" {INSTANCES}")
    return Road(PLAN, (_HEAD, plan, *rest))


def _report_and_repository(folder: Path, outputs: Path, instances: str) -> tuple[Step, Step]:
    made = f"--onnx {folder}/onnx --calibration {folder}/calibration.json"
    return (
        Step(
            "Show what the calibration is worth",
            folder / "report.html",
            f"calibration report {made} --outputs {outputs} --out {folder}/report.html",
            ("report",),
        ),
        Step(
            "Assemble the model repository",
            folder / "model_repository",
            # The demo asks for either rung by itself, and perf for thresholds of its own.
            f"export repository {made} --out {folder}/model_repository --client-parameters any"
            + instances,
        ),
    )


def prepare_road(road: Road) -> None:
    """Go the road.

    Raises:
        DemoError: a command failed, or the plan chose nothing.
    """
    if road.plan is not None:
        for cache in set(PLAN_CACHES.glob("*")) - {_cache()}:
            shutil.rmtree(cache)
    try:
        prepare(road.steps)
    except StepError as error:
        found = PLAN / "plan.json"
        if error.step.makes == PLAN and found.exists():
            if json.loads(found.read_text())["chosen"] is None:
                raise DemoError(
                    "no certified cascade is cheaper than the full model, so there is nothing to "
                    f"serve; {PLAN}/plan.html shows what was tried"
                ) from None
        raise


def _cache() -> Path:
    """Of graphs and their answers: they outlive another risk, but not another code."""
    return PLAN_CACHES / code_hash((*CODE, "planner"))[:16]
