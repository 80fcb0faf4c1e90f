"""Options that several commands of `python -m calibration` take, and what they say."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from bundle.alignment import AlignmentError
from bundle.graphs import GraphsError, GraphSet
from bundle.versions import VersionError
from client import InvalidRequestError, Tls
from imaging import PreprocessingError
from report.terminal import Bars
from routing import CalibrationError, ManifestError
from routing.fidelity import KINDS
from server.errors import ServerUsageError

from .certify import CertifyError
from .chunks import MissingAnswersError
from .evaluate import EvaluateError
from .fidelity import FidelityError
from .fit import FitError
from .images import ImagesError, ImageSource, open_images
from .live_state import LiveError
from .outputs import OutputsError
from .served import ServedError, ServedRungs
from .splits import GROUPINGS, SplitError

ERRORS = (
    *(
        AlignmentError,
        CalibrationError,
        CertifyError,
        EvaluateError,
        FidelityError,
        FitError,
        GraphsError,
    ),
    *(ImagesError, LiveError, MissingAnswersError, OutputsError, PreprocessingError),
    *(ManifestError, ServedError, ServerUsageError, SplitError, VersionError),
)
BARS = Bars(Console(stderr=True))
FOLDER = Path("build/calibration")
ONNX = Path("build/onnx")
ANSWERS = Path("build/answers")
OUTPUTS = FOLDER / "outputs.json"
ARTIFACT = FOLDER / "calibration.json"
SAMPLE_CROPS = 1200

Images = Annotated[
    str, typer.Option(help="A folder (recursive), a tiny-imagenet-200 tree, or `sample`.")
]
Limit = Annotated[
    int | None, typer.Option(min=1, help="At most this many images, evenly spread; `sample`: 1200.")
]
Seed = Annotated[int, typer.Option(help="Of the sample crops.")]
OnnxFolder = Annotated[Path, typer.Option("--onnx", help="Folder written by `export rungs`.")]
AnswersFolder = Annotated[
    Path, typer.Option(help="Where graphs' answers are kept, for this command and others.")
]
OutputsFile = Annotated[Path, typer.Option("--outputs", help="File written by `collect`.")]
ArtifactFile = Annotated[Path, typer.Option("--calibration", help="File written by `fit`.")]
FidelityKind = Annotated[
    str | None,
    typer.Option(
        metavar="|".join(KINDS),
        help="When a cheap answer is a loss: another class, another set of labels, a value too far "
        "off, or a cosine too small. Default: top1 of classes, labels of independent labels, "
        "cosine without a head; of a value there is none.",
    ),
]
Tolerance = Annotated[
    float | None,
    typer.Option(
        help="With cosine: a cosine below 1 - tolerance is a loss (default: 0.1). With value: a "
        "larger difference is one."
    ),
]
Relative = Annotated[
    bool, typer.Option("--relative", help="With value: the tolerance is a share of the value.")
]
LabelThreshold = Annotated[
    float | None,
    typer.Option(
        help="With labels: from which probability on a label is in the set (default: 0.5)."
    ),
]
GroupBy = Annotated[
    str,
    typer.Option(
        metavar="|".join(GROUPINGS),
        help="Images of one group stay in one split: of one source file, folder or content.",
    ),
]
TestShare = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=0.8,
        help="Of the images, to measure on and for nothing else; where there is none, cross-fitted "
        "fit images measure (default: 0.2 with 5,000 images or more, else none).",
    ),
]
SplitSeed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of the splits.")]
Url = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT",
        help="Ask the rungs of the server whose gRPC port this is, instead of running them here; "
        "--onnx is what its repository was assembled from.",
    ),
]
TlsCa = Annotated[
    Path | None,
    typer.Option(help="With --url: over TLS, to a server whose certificate this one vouches for."),
]
TlsCert = Annotated[
    Path | None, typer.Option(help="With it: certificate to show to a server that asks for one.")
]
TlsKey = Annotated[Path | None, typer.Option(help="Its private key.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def source(images: str, limit: int | None, seed: int, crops: int = SAMPLE_CROPS) -> ImageSource:
    """The images that `--images`, `--limit` and `--seed` name; `crops` of the sample by default.

    Raises:
        ImagesError: there are none.
    """
    if images == "sample":
        return open_images(f"sample:{seed}", limit or crops)
    found = open_images(images, limit)
    if found.note:
        BARS.say(found.note)
    return found


@contextmanager
def served(
    url: str | None,
    graph_set: GraphSet,
    ca: Path | None,
    certificate: Path | None,
    key: Path | None,
) -> Iterator[ServedRungs | None]:
    """The server at `--url`, until the context ends; None without `--url`.

    Raises:
        ServedError: it does not answer, serves other rungs, or the TLS options do not go together.
    """
    try:
        tls = Tls(ca, certificate, key) if ca or certificate or key else None
        if tls is not None:
            tls.grpc_credentials()  # refuses files that are not what they should be
    except InvalidRequestError as error:
        raise ServedError(str(error)) from None
    if url is None:
        if tls is not None:
            raise ServedError("--tls-ca is for a server; give its --url")
        yield None
        return
    with ServedRungs(url, graph_set, tls) as asked:
        if graph_set.reference_record is not None:
            BARS.say(
                "the reference is another graph than the full rung, is not served, and runs here"
            )
        yield asked
