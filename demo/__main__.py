"""`python -m demo`: export, calibrate or plan, assemble, serve, query, measure, show."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from tritonclient.utils import InferenceServerException

from client import DEFAULT_GRPC_URL, ClientError
from report import terminal
from server import ServerError

from .adapt import run_adapt
from .pictures import OUT as PICTURES
from .pictures import make_pictures
from .roads import MAX_RISK, MODELS, planned, prepare_road, resolutions
from .run import serve_and_measure
from .show import PAGE, print_summary
from .steps import DemoError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.callback(invoke_without_command=True)
def demo(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Option(
            help="What to serve: dinov2-small, a pretrained DINOv2 ViT-S/14, or static-vit, a toy "
            "with random weights that is through in a fraction of the time."
        ),
    ] = "dinov2-small",
    prepare: Annotated[
        bool, typer.Option("--prepare", help="Stop with a model repository to serve or measure.")
    ] = False,
    plan: Annotated[
        bool,
        typer.Option(
            "--plan", help="Serve the cheapest certified cascade that a planner finds, measured."
        ),
    ] = False,
    risk: Annotated[
        float | None,
        typer.Option(
            help="With --plan: largest share of answers that may differ from the full model's "
            f"(default: {MAX_RISK})."
        ),
    ] = None,
) -> None:
    """Export, calibrate, serve, query and measure a Vision Transformer on crops of photographs.

    Steps done before are not done again. Writes build/demo/ where it is started.
    """
    if context.invoked_subcommand is not None:
        return
    if model not in MODELS:
        raise DemoError(f"--model {model!r}: give {' or '.join(MODELS)}")
    if risk is not None and not plan:
        raise DemoError("--risk is for a plan; add --plan (make demo PLAN=1)")
    if risk is not None and not 0 < risk < 1:
        raise DemoError(f"--risk {risk:g} is no share between 0 and 1, such as 0.02")
    started = time.monotonic()
    road = planned(model, risk or MAX_RISK) if plan else resolutions(model)
    prepare_road(road)
    if prepare:
        print(f"made {', '.join(str(step.makes) for step in road.steps)}")
        print(f"serve with python -m server --repository {road.folder}/model_repository")
        return
    print_summary(serve_and_measure(road))
    pages = [str(page) for page in (PAGE, road.plan, road.report) if page is not None]
    print(f"took {time.monotonic() - started:.0f} s; open {' and '.join(pages)}")


@app.command("pictures")
def pictures_command(
    out: Annotated[Path, typer.Option(help="Folder to write.")] = PICTURES,
    crops: Annotated[int, typer.Option(min=1, help="Of each picture, at several scales.")] = 1,
) -> None:
    """Fetch pictures of many kinds from Debian packages, once, for trying out and for judging."""
    for name, count in make_pictures(out, crops, terminal.Bars(Console(stderr=True))).items():
        print(f"{out / name}: {count:,} images")


@app.command("adapt")
def adapt_command() -> None:
    """Adapt two cheap graphs to pictures of many kinds, and compare them with what they were.

    Writes build/adapt/.
    """
    started = time.monotonic()
    run_adapt(terminal.Bars(Console(stderr=True)))
    print(f"took {time.monotonic() - started:.0f} s")


@app.command("tokens")
def tokens_command() -> None:
    """Compare five ways to spend half of the cost, as they are and trained, on varied pictures.

    Writes build/tokens/.
    """
    from .tokens import PAGE as TOKENS_PAGE
    from .tokens import print_tokens, run_tokens

    started = time.monotonic()
    print_tokens(run_tokens(terminal.Bars(Console(stderr=True))))
    print(f"took {time.monotonic() - started:.0f} s; open {TOKENS_PAGE}")


@app.command("live")
def live_command(
    risk: Annotated[
        float, typer.Option(help="Largest share of answers that may differ from the full rung's.")
    ] = MAX_RISK,
    audited: Annotated[
        int, typer.Option(min=1, help="Images that both rungs answer before the stream changes.")
    ] = 1500,
) -> None:
    """Serve without a calibration, and let a stream of pictures certify a threshold.

    Then the stream changes, and the router goes back to the full rung. Writes build/live/.
    """
    from .live import PAGE as LIVE_PAGE
    from .live import print_live, run_live

    if not 0 < risk < 1:
        raise DemoError(f"--risk {risk:g} is no share between 0 and 1, such as 0.02")
    started = time.monotonic()
    print_live(run_live(risk, audited))
    print(f"took {time.monotonic() - started:.0f} s; open {LIVE_PAGE}")


@app.command("page")
def page_command(
    url: Annotated[str, typer.Option(help="HOST:PORT of the server's gRPC.")] = DEFAULT_GRPC_URL,
    port: Annotated[
        int, typer.Option(min=0, max=65_535, help="Of the page, on loopback; 0: a free one.")
    ] = 8010,
    metrics_url: Annotated[
        str | None,
        typer.Option(
            help="Where the server tells its threshold. [default: port 8002 beside gRPC's 8001]"
        ),
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option(help="Class names, one per line. [default: those of the server]"),
    ] = None,
) -> None:
    """Try a served model in the browser: drop a picture, see its route, score and answer."""
    from .page import run_page

    run_page(url, port, metrics_url, labels, partial(print, flush=True))


def main() -> None:
    """Run the command line; a foreseeable error is one line and exit code 2."""
    # ValueError: graphs, a calibration or measurements that cannot be.
    errors = (ClientError, DemoError, InferenceServerException, ServerError, ValueError)
    terminal.run(app, errors)


if __name__ == "__main__":
    main()
