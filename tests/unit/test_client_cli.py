"""`python -m client infer`: misuse, rows, summary, JSON. No server."""

import io
import json
import math
import re
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

import client.__main__ as command_line
from client import AccessDeniedError, InvalidRequestError, NotServedError, Prediction, Task
from client.outcomes import Outcome, Shown, as_dict, ask, sentence, summarise, table
from tests.unit.client_servers import grpc_server, http_server, image

UNKNOWN = Task()


def prediction(escalated=False, score=0.5, head=True, degraded=False):
    logits = np.log(np.array([0.1, 0.7, 0.2], np.float32)) if head else None
    return Prediction(np.array([3, 4], np.float32), logits, escalated, score, degraded)


def rendered(outcomes, top=5, labels=(), task=UNKNOWN):
    console = Console(file=io.StringIO(), width=120)
    console.print(table(outcomes, Shown(task, top, labels)))
    return console.file.getvalue()


def as_json(outcomes, top=5, labels=(), task=UNKNOWN):
    """What a reader of the strict JSON gets of each image."""
    found = [as_dict(outcome, Shown(task, top, labels)) for outcome in outcomes]
    return json.loads(json.dumps(found, allow_nan=False))


@pytest.fixture
def folder(tmp_path):
    for name in ("b.JPG", "a.png", "deep/c.webp", "notes.txt"):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return tmp_path / "images"


# --- which files -------------------------------------------------------------------------------


def test_folders_are_searched_and_files_taken_as_they_are(folder):
    found, notes = command_line.find_images([folder / "notes.txt", folder, folder / "a.png"])
    assert [file.name for file in found] == ["notes.txt", "a.png", "b.JPG", "c.webp"]  # a.png once
    assert notes == [f"{folder}: skipped 1 file of other kinds (.txt 1): notes.txt"]


# --- many files --------------------------------------------------------------------------------


class FakeClient:
    """Answers by content; refuses what is not an image."""

    router = "router"

    def infer(self, images, *, policy):
        assert policy == "low"
        if images[0] == b"a.png":
            raise InvalidRequestError("not an image")
        return [prediction(escalated=images[0] == b"b.JPG")]


@pytest.mark.parametrize("concurrency", [1, 2, 9])
def test_a_refused_or_unreadable_file_does_not_stop_the_rest(concurrency, folder):
    files = [*command_line.find_images([folder])[0], folder / "gone.jpg"]
    ticks = []
    outcomes = ask(FakeClient(), files, concurrency, lambda: ticks.append(1), policy="low")
    assert [o.file for o in outcomes] == files
    assert [o.error for o in outcomes] == [
        "not an image",
        None,
        None,
        "cannot read it: No such file or directory",
    ]
    assert [o.prediction.escalated for o in outcomes[1:3]] == [True, False]
    assert len(ticks) == len(files)


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_ctrl_c_keeps_the_answers_that_are_there_and_waits_for_no_other(
    protocol, tmp_path, monkeypatch, capsys
):
    """The second image is answered while the first never is; then somebody presses Ctrl-C."""
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(image(number))
    held = threading.Event()

    def answer(number, asked, *_):
        if asked.images == [image(0)]:
            held.wait(20)
        elif asked.images == [image(2)]:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            held.wait(20)

    with (grpc_server if protocol == "grpc" else http_server)(answer) as (_, url):
        options = ("--url", url, "--protocol", protocol, "--concurrency", "2", "--json")
        monkeypatch.setattr(sys, "argv", ["client", "infer", str(tmp_path), *options])
        started = time.monotonic()
        with pytest.raises(SystemExit) as left:
            command_line.main()
        assert time.monotonic() - started < 10
        held.set()
    found = json.loads(capsys.readouterr().out)
    assert left.value.code == 130
    assert [(one["file"], one["score"]) for one in found["images"]] == [(f"{tmp_path}/1.png", 1.0)]
    assert found["summary"]["images"] == 1


@pytest.mark.parametrize("kind", [AccessDeniedError, NotServedError])
def test_a_server_that_hides_its_configuration_can_still_be_asked(kind):
    class Hiding(FakeClient):
        def server_version(self):
            return "2.51.0"

        def metadata(self, model=None):
            return {}

        def task(self):
            raise kind("not here")

    assert command_line._look_at_server(Hiding(), []) == ("2.51.0", Task())


def test_a_text_file_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "labels.txt").write_text("ant\nbee\n", "utf-8-sig")
    assert command_line.read_labels(tmp_path / "labels.txt") == ["ant", "bee"]


@pytest.mark.parametrize(
    ("outputs", "said"),
    [
        ([{"name": "logits", "shape": [-1, 3]}], "--labels has 2 names, the model 3 classes"),
        ([{"name": "embedding", "shape": [-1, 3]}], "has no head, so --labels names nothing"),
        ([{"name": "logits", "shape": [-1, 2]}], None),
        ([{"name": "logits", "shape": [-1, -1]}], None),  # a server that leaves it open
    ],
)
def test_labels_are_held_against_the_models_outputs(outputs, said):
    class Described(FakeClient):
        def server_version(self):
            return "2.51.0"

        def metadata(self, model=None):
            return {"outputs": outputs if model == "router" else []}

        def task(self):
            return Task("classes")

    if said is None:
        assert command_line._look_at_server(Described(), ["ant", "bee"])[1] == Task("classes")
        return
    with pytest.raises(command_line.UsageError, match=said):
        command_line._look_at_server(Described(), ["ant", "bee"])


# --- what is shown -----------------------------------------------------------------------------

OUTCOMES = [
    Outcome(Path("[red]easy.jpg"), prediction(), None, 10.0),
    Outcome(Path("hard.jpg"), prediction(escalated=True, score=math.nan), None, 30.0),
    Outcome(Path("text.jpg"), None, "not an image", 1.0),
]


def test_the_table_shows_answers_scores_paths_and_errors():
    degraded = Outcome(Path("down.jpg"), prediction(degraded=True), None, 1.0)
    lines = rendered([*OUTCOMES, degraded], 2, ["ant", "bee"]).splitlines()
    easy, hard, text, down = (
        next(line for line in lines if file in line)
        for file in ("[red]easy.jpg", "hard.jpg", "text.jpg", "down.jpg")  # not taken for markup
    )
    assert "bee 70.0%" in easy and "0.5" in easy and " no " in easy and "10.0" in easy
    assert " yes " in hard and "not an image" in text and "full rung down" in down


AB, LABELS, VALUE, CLASSES = ["ant", "bee"], Task("labels"), Task("value"), [-2.30, -0.357, -1.609]


def label(index, name, probability):
    return {"index": index, "label": name, "probability": pytest.approx(probability, abs=1e-4)}


@pytest.mark.parametrize(
    ("logits", "task", "top", "labels", "lines", "fields"),
    [
        (None, UNKNOWN, 5, (), ["|embedding| 5.000"], {"top": None}),
        # What was asked for, also beyond the labels.
        (CLASSES, UNKNOWN, 2, AB, ["bee 70.0%", "class 2 20.0%"], {}),
        # All of the set, whatever --top says; more than 100 % together.
        ([2, -0.4, 0, 3], LABELS, 1, AB, ["label 3 95.3%", "ant 88.1%", "label 2 50.0%"], {}),
        (
            *([2, -0.4, 0, 3], Task("labels", 0.9), 5, AB, ["label 3 95.3%"]),
            {"top": None, "labels": [label(3, None, 0.9526)]},
        ),
        # An empty set says which came nearest.
        ([-2, -0.4], LABELS, 5, AB, ["no label (bee 40.1%)"], {"top": None, "labels": []}),
        ([0.4], LABELS, 5, (), ["label 0 59.9%"], {"labels": [label(0, None, 0.5987)]}),
        *(
            # One output is shown as its value also where the server says nothing.
            (*([-1.5], task, 5, names, [line]), {"top": None, "values": [value]})
            for task in (VALUE, UNKNOWN)
            for names, line, value in (
                ((), "-1.5", {"label": None, "value": -1.5}),
                (["age"], "age -1.5", {"label": "age", "value": -1.5}),
            )
        ),
        ([0.25, 2e6], VALUE, 1, ["age"], ["age 0.25", "value 1 2e+06"], {"top": None}),
    ],
)
def test_an_answer_is_shown_as_its_task_says(logits, task, top, labels, lines, fields):
    found = np.array(logits, np.float32) if logits else None
    answer = Prediction(np.array([3, 4], np.float32), found, False, 0.5, False)
    outcomes = [Outcome(Path("x.jpg"), answer, None, 1.0)]
    text = rendered(outcomes, top, labels, task)
    rows = [line.split("│")[2].strip() for line in text.splitlines() if line.startswith("│")]
    assert rows == lines
    assert ("top 2" in text) == (logits is CLASSES)
    (image,) = as_json(outcomes, top, labels, task)
    assert fields.items() <= image.items()


def test_the_summary_counts_answers_only():
    summary = summarise(OUTCOMES, wall_s=4.0)
    assert summary == {
        **{"images": 3, "errors": 1, "escalated": 1, "escalation_rate": 0.5},
        **{"latency_ms_p50": 20.0, "latency_ms_p95": pytest.approx(29.0), "images_per_s": 0.5},
    }
    assert sentence(summary) == (
        "3 images, 1 errors, 1 escalated (50.0%), latency p50 20.0 ms p95 29.0 ms, 0.5 images/s"
    )
    summary = summarise(OUTCOMES[2:], wall_s=1.0)
    assert summary["escalation_rate"] is None and sentence(summary) == "1 images, 1 errors"


def test_json_is_strict_json():
    easy, hard, refused = as_json(OUTCOMES, 1, ["ant", "bee", "cow"])
    assert easy["top"] == [{"class": 1, "label": "bee", "probability": pytest.approx(0.7)}]
    assert easy["embedding_norm"] == 5.0
    assert hard["score"] is None and hard["escalated"] is True
    assert refused == {"file": "text.jpg", "error": "not an image"}


# --- misuse ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "nowhere does not exist"),
        (["."], "holds no image"),
        (["a.png", "--policy", "medium"], "'medium' is not one of 'auto', 'low', 'high'"),
        (["a.png", "--protocol", "smtp"], "'smtp' is not one of 'grpc', 'http'"),
        (["a.png", "--threshold", "much"], "--threshold"),
        (["a.png", "--threshold", "nan"], "--threshold"),
        (["a.png", "--threshold", "1", "--policy", "low"], "no meaning with --policy low"),
        (["a.png", "--concurrency", "0"], "--concurrency"),
        (["a.png", "--labels", "none.txt"], "cannot read labels from none.txt: No such file"),
        (["a.png", "--labels", "empty"], "empty holds no labels"),
        (["a.png", "--labels", "bytes"], "cannot read labels from bytes: it is not UTF-8 text"),
        (["a.png", "--url", "http://127.0.0.1:1"], "HOST:PORT"),
        (["a.png", "--url", "127.0.0.1:1"], "no server answers at 127.0.0.1:1; start one with"),
        (["a.png", "--url", "127.0.0.1:1", "--protocol", "http"], "no server answers at"),
        (["a.png", "--timeout-s", "0"], "--timeout-s must be a positive number"),
        (["a.png", "--timeout-s", "nan"], "--timeout-s must be a positive number"),
        (["a.png", "--retries", "-1"], "--retries"),
        (["a.png", "--tls-cert", "a.png"], "TLS has a client cert without a key"),
        (["a.png", "--tls-key", "a.png"], "TLS has a client key without a cert"),
        (["a.png", "--tls-ca", "none.pem"], "cannot read none.pem for TLS: No such file"),
        (["a.png", "--tls-ca", "a.png"], "a.png holds no certificate in PEM format"),
        (["a.png", "--admin-key-file", "none"], "cannot read the admin key from none: No such"),
        (["a.png", "--colour"], "--colour"),
        ([], "paths"),
    ],
)
def test_misuse_is_one_line_and_exit_code_2(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if "a.png" in arguments:
        (tmp_path / "a.png").write_bytes(b"x")
        (tmp_path / "empty").touch()
        (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    monkeypatch.setattr(sys, "argv", ["client", "infer", *arguments])
    with pytest.raises(SystemExit) as left:
        command_line.main()
    printed = capsys.readouterr()
    assert left.value.code == 2
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert printed.err.startswith("error: ")
    assert said in printed.err


def test_without_a_verb_the_help_is_shown(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["client"])
    with pytest.raises(SystemExit) as left:
        command_line.main()
    printed = capsys.readouterr()
    assert (left.value.code, printed.err) == (2, "")
    assert "Usage:" in printed.out and "infer" in printed.out


def test_scores_on_both_sides_of_a_threshold_are_not_printed_as_one_number():
    scores = [float(np.float32(score)) for score in (15.65565, 15.655651)]
    outcomes = [Outcome(Path(f"{s}.jpg"), prediction(score=s), None, 1.0) for s in scores]
    printed = re.findall(r"│\s+(15\.\d+) +│", rendered(outcomes))
    assert [np.float32(text) for text in printed] == [np.float32(score) for score in scores]
