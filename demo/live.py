"""A server that starts without a calibration and earns its threshold from a stream of pictures.

The stream draws pictures of many kinds at random; `python -m calibration live` runs beside it, as
it would in production. Then the stream changes: every third picture is now one of those that the
cheap rung gets wrong although it is sure. What the service does not know is found offline from both
rungs' answers about every picture: the escalation that an oracle would need, and which answers were
right.
"""

from __future__ import annotations

import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from bundle.versions import live_folder
from calibration.anytime import AnytimeTest, share_of_delta
from calibration.fidelity import Fidelity
from calibration.images import open_images
from calibration.live import keeping
from calibration.live_state import MARGINS, NAME
from calibration.outputs import Outputs
from client import GrpcClient
from report.live_page import write_live
from report.terminal import Bars
from routing import Calibration, journal
from server import Access, Security, TritonServer

from .pictures import OUT as PICTURES
from .pictures import make_pictures
from .steps import DemoError, Step, begin, prepare

OUT = Path("build/live")
PAGE, SUMMARY = OUT / "index.html", OUT / "summary.json"
REPOSITORY = OUT / "model_repository"
AUDITED = 1500  # images, then the stream changes
MOST_REQUESTS, MOST_S = 8000, 420.0  # or then
AFTER_REQUESTS, AFTER_S = 1500, 120.0  # of the second
IN_FLIGHT = 6
LOOK_S = 2.0
FLOOR = 0.25  # more than the default, so that minutes are enough
STREAMS = 200  # simulated, to see how often a certificate is wrong
AFTER = (100, 200, 500, 1000, 2000)  # audited images of each

bars = Bars(Console(stderr=True))


@dataclass
class Stream:
    """What was asked and answered.

    Attributes:
        rows: of the pictures that were asked about, in the order of the answers.
        lost: whether each answer names another class than the full rung does.
        points: what was seen in between, see `run_live`.
    """

    rows: list[int] = field(default_factory=list)
    lost: list[bool] = field(default_factory=list)
    points: list[dict[str, Any]] = field(default_factory=list)


class Population:
    """Every picture of the stream, and what both rungs say of it.

    Attributes:
        encoded: the picture files.
        scores: the router's, FP32 (N,), in its first units.
        lost: whether the cheap answer is a loss, BOOL (N,).
        truth: the full rung's class, (N,).
    """

    def __init__(self, outputs: Outputs, artifact: Calibration) -> None:
        source = open_images(outputs.source)
        where = {name: row for row, name in enumerate(source.names)}
        self.encoded = [source[where[name]].data for name in outputs.names]
        self.scores = artifact.score(outputs.low).astype(np.float64)
        self.lost = Fidelity.of(artifact).loss(outputs)
        assert outputs.high.logits is not None
        self.truth = outputs.high.logits.argmax(axis=1)

    def __len__(self) -> int:
        return len(self.encoded)

    def escalation(self, threshold: float | None) -> float:
        """The share of the pictures that a threshold escalates."""
        return 1.0 if threshold is None else float((self.scores > threshold).mean())

    def risk(self, threshold: float) -> float:
        """The share of the pictures that a threshold keeps low with a loss."""
        return float(((self.scores <= threshold) & self.lost).mean())

    def oracle(self, epsilon: float) -> float:
        """The least escalation of any threshold whose risk is at most epsilon."""
        good = [t for t in np.unique(self.scores) if self.risk(t) <= epsilon]
        return self.escalation(max(good, default=None))

    def deceptive(self, threshold: float | None) -> NDArray[np.intp]:
        """Pictures that the cheap rung gets wrong although it is sure, some at least."""
        wrong = np.flatnonzero(self.lost)
        wrong = wrong[np.argsort(self.scores[wrong], kind="stable")]
        kept = wrong[self.scores[wrong] <= (-np.inf if threshold is None else threshold)]
        return kept if len(kept) >= 5 else wrong[:12]


def run_live(max_risk: float, audited: int = AUDITED) -> dict[str, Any]:
    """Do it, and write summary.json and index.html.

    Args:
        max_risk: the risk to certify, 0..1.
        audited: images that both rungs have answered when the stream changes.

    Returns:
        `epsilon`, `confidence`, `oracle_escalation`; `points`, each with the `requests` answered
        and images `audited` until then, the `threshold` that answers and its `escalation_rate`, the
        share of the stream's pictures that it escalates; `realised_risk`, the share of the first
        stream's answers that differ from the full rung's; `retreated_after`, in requests of the
        second stream, None where it did not; `after_retreat`, the share of its answers then that
        differ; `simulated_violations`, of `STREAMS` streams drawn from the same pictures.

    Raises:
        DemoError: a step failed, or no answer came.
    """
    make_pictures(PICTURES, 1, bars)
    steps = _steps(max_risk)
    prepare(steps[:-1], OUT)
    shutil.rmtree(journal.live_folder(REPOSITORY, ""), ignore_errors=True)  # of the run before
    begin(len(steps), steps, steps[-1].title)
    if subprocess.run([sys.executable, "-m", *shlex.split(steps[-1].command)]).returncode != 0:
        raise DemoError(f"`python -m {steps[-1].command}` failed")
    artifact = Calibration.load(REPOSITORY / "router/1/calibration.json")
    population = Population(Outputs.load(OUT / "collected/outputs.json"), artifact)
    begin(len(steps) + 1, steps, "Serve, stream pictures, certify, change the stream")
    rng, first, second = np.random.default_rng(7), Stream(), Stream()
    server = TritonServer(
        REPOSITORY, free_ports=True, security=Security(allow_reload=True), stop_patience_s=0
    )
    with server:
        with _certifying(server.grpc_url), GrpcClient(server.grpc_url) as client:
            everything = np.arange(len(population))
            _ask(client, population, everything, rng, first, partial(_enough, audited))
            threshold = _state()["served"]["threshold"]
            deceptive = population.deceptive(threshold)
            changed = np.concatenate([everything, deceptive])
            weights = np.repeat(
                [2 / 3 / len(everything), 1 / 3 / len(deceptive)],
                [len(everything), len(deceptive)],
            )
            _ask(client, population, changed, rng, second, _retreated, weights)
            retreated_after = len(second.rows) if _marks() or _state()["number"] > 1 else None
            after = Stream()
            _ask(client, population, changed, rng, after, lambda s: len(s.rows) >= 200, weights)
        figures = _served_figures(server.metrics_url)
        with keeping(REPOSITORY, Access(server.grpc_url), lambda line: None) as keeper:
            keeper.step()
            page = keeper.page()
    oracle, state = population.oracle(max_risk), _state()
    summary = {
        "epsilon": max_risk,
        "confidence": state["confidence"],
        "pictures": len(population),
        "oracle_escalation": oracle,
        "points": first.points,
        "realised_risk": float(np.mean(first.lost)),
        "certified_threshold": threshold,
        "certified_risk_of_pictures": None if threshold is None else population.risk(threshold),
        "retreated_after": retreated_after,
        "after_retreat": float(np.mean(after.lost)),
        "simulated_violations": _simulate(population, max_risk, 1 - state["confidence"]),
    }
    SUMMARY.write_text(json.dumps(summary, indent=2) + "\n")
    figures |= {"realised_risk": summary["realised_risk"], "oracle_escalation": oracle}
    write_live(PAGE, {**page, "served_figures": figures})
    return summary


def print_live(summary: dict[str, Any]) -> None:
    """Say on the terminal what came of it."""
    last, after = summary["points"][-1], summary["retreated_after"]
    found = summary["simulated_violations"]
    noticed = f"{after:,} requests later every image went to the full rung"
    for line in (
        f"{last['requests']:,} requests, {last['audited']:,} images audited: "
        f"{last['escalation_rate']:.1%} escalate, an oracle would need "
        f"{summary['oracle_escalation']:.1%}; {summary['realised_risk']:.2%} of the answers "
        f"differ from the full rung's, at most {summary['epsilon']:.2%} may",
        f"the stream changed, and {'nothing came of it' if after is None else noticed}",
        f"simulated: {found['wrong']} of {found['streams']} streams ever certified a threshold "
        f"that is worse than promised; at most {found['allowed']:.1%} may",
    ):
        Console().print(line, markup=False, highlight=False, soft_wrap=True)


def _steps(max_risk: float) -> tuple[Step, ...]:
    onnx, collected = OUT / "onnx", OUT / "collected"
    return (
        Step(
            "Export the cheap and the full rung, with a head for the kinds of pictures",
            onnx,
            "export rungs --model dinov2-small --low px=140,int8=static --high px=224 "
            f"--head linear --images {PICTURES}/head --out {onnx}",
        ),
        Step(
            "Answer every picture by both rungs, to know what the service does not",
            collected,
            f"calibration collect --images {PICTURES}/images --onnx {onnx} "
            f"--out {collected}/outputs.json --answers {collected}/answers",
        ),
        Step(
            "Assemble a repository without a calibration",
            REPOSITORY,
            f"export repository --live --max-risk {max_risk:g} --audit-floor {FLOOR} --instances 2 "
            f"--onnx {onnx} --out {REPOSITORY}",
        ),
    )


@contextmanager
def _certifying(url: str) -> Iterator[None]:
    """`python -m calibration live` beside the stream."""
    command = [sys.executable, "-m", "calibration", "live", "--url", url, "--every-s", f"{LOOK_S}"]
    process = subprocess.Popen([*command, "--repository", str(REPOSITORY)])
    try:
        yield
        if process.poll() is not None:
            raise DemoError(f"`python -m calibration live` ended with exit code {process.poll()}")
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def _ask(
    client: GrpcClient,
    population: Population,
    rows: NDArray[np.intp],
    rng: np.random.Generator,
    stream: Stream,
    is_over: Callable[[Stream], bool],
    chances: NDArray[np.float64] | None = None,
) -> None:
    """Ask about pictures drawn at random until it is over, and note what was seen."""
    started = looked = time.monotonic()
    before = len(stream.rows)

    def ask(row: int) -> tuple[int, bool]:
        (answer,) = client.infer([population.encoded[row]])
        assert answer.logits is not None
        return row, bool(answer.logits.argmax() != population.truth[row])

    with bars.stage("pictures", None) as bar, ThreadPoolExecutor(IN_FLIGHT) as pool:
        while not is_over(stream) and time.monotonic() - started < MOST_S:
            drawn = rng.choice(rows, IN_FLIGHT, p=chances).tolist()
            for row, lost in pool.map(ask, drawn):
                stream.rows.append(row)
                stream.lost.append(lost)
            if time.monotonic() - looked >= LOOK_S:
                looked = time.monotonic()
                point = _point(population, len(stream.rows))
                stream.points.append(point)
                bar.describe(f"{point['escalation_rate']:.0%} escalate, {point['audited']} audited")
            bar.advance(len(stream.rows) - before)
            before = len(stream.rows)
    stream.points.append(_point(population, len(stream.rows)))


def _enough(audited: int, stream: Stream) -> bool:
    seen = stream.points[-1]["audited"] if stream.points else 0
    return seen >= audited or len(stream.rows) >= MOST_REQUESTS


def _retreated(stream: Stream) -> bool:
    return bool(_marks()) or _state()["number"] > 1 or len(stream.rows) >= AFTER_REQUESTS


def _marks() -> list[Path]:
    """What a router leaves that has gone back to the full rung."""
    return list(live_folder(REPOSITORY).glob(f"{journal.RETREAT}-*"))


def _state() -> dict[str, Any]:
    with suppress(FileNotFoundError):
        state: dict[str, Any] = json.loads((live_folder(REPOSITORY) / NAME).read_text())
        return state
    return {"served": {"threshold": None}, "audited": 0, "number": 1, "confidence": 0.9}


def _point(population: Population, requests: int) -> dict[str, Any]:
    state = _state()
    threshold = state["served"]["threshold"]
    return {
        "requests": requests,
        "audited": state["audited"],
        "escalation_rate": population.escalation(threshold),
        "threshold": threshold,
    }


def _served_figures(metrics_url: str) -> dict[str, Any]:
    """What the router counted, over all its versions."""
    own_machine = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with own_machine.open(metrics_url, timeout=10) as answer:
        lines = answer.read().decode().splitlines()

    def total(series: str, label: str) -> int:
        counted = (line for line in lines if line.startswith(f"adaptive_vit_{series}{{"))
        return int(sum(float(line.split()[-1]) for line in counted if label in line))

    paths, reasons = ("low", "high", "audited", "degraded"), ("score", "audit")
    return {
        "requests": total("requests_total", 'outcome="ok"'),
        "images": {path: total("images_total", f'path="{path}"') for path in paths},
        "answered_twice": {
            reason: total("answered_twice_images_total", f'reason="{reason}"') for reason in reasons
        },
    }


def _simulate(population: Population, epsilon: float, delta: float) -> dict[str, Any]:
    """What the first test certifies of many streams drawn from the same pictures.

    Returns:
        `streams`; `wrong`, those of which a threshold worse than promised was certified at any
        moment, of which a share of `allowed` may; `escalation`, the median after so many audited
        images.
    """
    rng, wrong, share = np.random.default_rng(11), 0, delta * share_of_delta(1)
    found: dict[int, list[float]] = {images: [] for images in AFTER}
    with bars.stage("simulate streams", STREAMS) as bar:
        for _ in range(STREAMS):
            test = AnytimeTest(epsilon, share, MARGINS)
            for row in rng.integers(len(population), size=AFTER[-1]):
                test.observe(float(population.scores[row]), bool(population.lost[row]))
                if test.images in found:
                    found[test.images].append(population.escalation(test.threshold))
            threshold = test.threshold
            wrong += threshold is not None and population.risk(threshold) > epsilon
            bar.advance()
    escalation = {str(images): float(np.median(seen)) for images, seen in found.items()}
    return {"streams": STREAMS, "wrong": wrong, "allowed": share, "escalation": escalation}
