"""`python -m demo`: export, calibrate or plan, assemble, serve, query, measure, show."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from rich.console import Console
from tritonclient.utils import InferenceServerException

from bundle.graphs import GraphsError
from client import ClientError
from perf.figures import PerfError
from routing import CalibrationError
from server import ServerError

from .errors import DemoError
from .roads import DEFAULT, MAX_RISK, MODELS, planned, prepare_road, resolutions
from .run import PAGE, serve_and_measure
from .tables import plan_table, result_table, sentences

ROOT = Path(__file__).resolve().parent.parent


def main(arguments: list[str] | None = None) -> None:
    """Run the demo, or its steps only; a foreseeable error is one line and exit code 1."""
    parsed = _parse(arguments)
    started = time.monotonic()
    os.chdir(ROOT)
    try:
        model = MODELS[parsed.model]
        road = planned(model, parsed.risk or MAX_RISK) if parsed.plan else resolutions(model)
        prepare_road(road)
        summary = None if parsed.prepare else serve_and_measure(road)
    except (
        CalibrationError,
        ClientError,
        DemoError,
        InferenceServerException,
        PerfError,
        GraphsError,
        ServerError,
    ) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("stopped; what was made so far is in build/demo", file=sys.stderr)
        sys.exit(130)
    seconds = time.monotonic() - started
    if summary is None:
        print(f"rungs in {road.onnx}, calibration {road.artifact}, its report {road.report}")
        print(f"took {seconds:.0f} s; serve with python -m server --repository {road.repository}")
        return
    console = Console()
    console.print(result_table(summary))
    if "plan" in summary:
        console.print(plan_table(summary))
    for sentence in sentences(summary):
        print(sentence)
    pages = [str(page) for page in (PAGE, road.plan, road.report) if page is not None]
    print(f"took {seconds:.0f} s; open {', '.join(pages[:-1])} and {pages[-1]}")


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m demo",
        description="Export, calibrate, serve, query and measure a Vision Transformer on crops of "
        "shipped photographs. Steps done before are not done again. Writes build/demo/.",
    )
    parser.add_argument(
        "--model",
        choices=MODELS,
        default=DEFAULT,
        help="what to serve: pretrained DINOv2 ViT-S/14, or a toy with random weights that is "
        f"through in a fraction of the time (default: {DEFAULT})",
    )
    parser.add_argument(
        "--prepare",
        action="store_true",
        help="stop before the last step, with a model repository to serve or to measure",
    )
    parser.add_argument(
        "--plan",
        action="store_true",
        help="serve the cheapest certified cascade that calibration finds, beside its alternatives",
    )
    parser.add_argument(
        "--risk",
        type=_share,
        help="with --plan: largest share of answers that may differ from the full model's "
        f"(default: {MAX_RISK})",
    )
    parsed = parser.parse_args(arguments)
    if parsed.risk is not None and not parsed.plan:
        parser.error("--risk is for a plan; add --plan (make demo PLAN=1)")
    return parsed


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share between 0 and 1, such as 0.02")
    return share


if __name__ == "__main__":
    main()
