"""The page to try a model in the browser: who may ask it, what it says, and how it starts."""

import re
import socket
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from client import InvalidRequestError, OverloadedError, Prediction, Task, UnavailableError
from client.outcomes import Shown
from demo import page
from demo.page import (
    MAX_BYTES,
    POLICY,
    Served,
    make_app,
    open_page,
    served_threshold,
    usual_metrics_url,
)
from demo.steps import DemoError
from tests.commands import run
from tests.unit.client_servers import grpc_server

FILES = Path(__file__).resolve().parents[2] / "demo/page"
OWN = {"Origin": "http://127.0.0.1:8010", "Host": "127.0.0.1:8010"}


def prediction(score=0.25, escalated=False, degraded=False, logits=(0.0, 2.0, 1.0)):
    values = None if logits is None else np.array(logits, np.float32)
    return Prediction(np.ones(4, np.float32), values, escalated, score, degraded)


def served(found, names=("ant", "<b>bee</b>"), threshold=0.5, kind="classes"):
    """A page's other side, whose server answers, or raises, this."""

    def infer(images, policy):
        client.asked.append((images, policy))
        if isinstance(found, Exception):
            raise found
        return [found]

    client = SimpleNamespace(url="10.0.0.7:8001", model="adaptive_vit", infer=infer, asked=[])
    return Served(client, "2.51.0", Shown(Task(kind), 5, names), lambda: threshold)


def ask(this, data=b"image", policy="auto", **headers):
    app = make_app(this).test_client()
    return app.post(f"/ask/{policy}", data=data, headers={**OWN, **headers})


def test_an_answer_has_what_the_page_shows():
    this = served(prediction())
    found = ask(this).json
    assert this.client.asked == [([b"image"], "auto")]
    assert (found["route"], found["score"], found["threshold"]) == ("cheap", 0.25, 0.5)
    names = [output["name"] for output in found["outputs"]]
    assert names == ["<b>bee</b>", "class 2", "ant"]  # as it is: the page shows it as text
    assert sum(output["value"] for output in found["outputs"]) == pytest.approx(1)
    assert found["time_ms"] >= 0
    assert ask(served(prediction(escalated=True)), policy="high").json["route"] == "full"
    assert ask(served(prediction(degraded=True))).json["route"] == "degraded"


def test_what_is_missing_is_null_and_no_nan():
    answer = ask(served(prediction(np.nan, logits=None), threshold=None))
    assert "NaN" not in answer.text
    assert (answer.json["score"], answer.json["threshold"], answer.json["kind"]) == (None,) * 3
    assert answer.json["outputs"] == [] and answer.json["norm"] == 2


@pytest.mark.parametrize(
    "error",
    [
        InvalidRequestError("not a JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF or HEIC image"),
        OverloadedError("the server at 10.0.0.7:8001 is overloaded: try later"),
        UnavailableError("no server answers at 10.0.0.7:8001"),
    ],
)
def test_a_picture_without_an_answer_has_one_line(error):
    answer = ask(served(error))
    assert (answer.status_code, answer.json) == (200, {"error": str(error)})


def test_a_picture_that_is_too_large_is_not_sent_on():
    this = served(prediction())
    assert "20,971,520 bytes" in ask(this, bytes(MAX_BYTES + 1)).json["error"]
    assert not this.client.asked
    assert ask(this, bytes(MAX_BYTES)).json["route"] == "cheap"


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "http://127.0.0.1:8011"},  # another program on this machine
        {"Origin": "null"},
        {"Origin": "https://127.0.0.1:8010"},
        {"Origin": ""},
    ],
)
def test_other_pages_may_not_ask(headers):
    this = served(prediction())
    answer = ask(this, **headers)
    assert (answer.status_code, answer.json) == (403, {"error": "only the page itself may ask"})
    assert not this.client.asked


@pytest.mark.parametrize("host", ["evil.example:8010", "127.0.0.1.evil.example", "10.0.0.7:8010"])
@pytest.mark.parametrize("path", ["/", "/server", "/page.js", "/ask/auto"])
def test_a_name_that_was_made_to_mean_this_machine_is_no_way_in(host, path):
    this = served(prediction())
    app = make_app(this).test_client()
    headers = {"Host": host, "Origin": f"http://{host}"}
    answer = app.post(path, headers=headers) if "ask" in path else app.get(path, headers=headers)
    assert answer.status_code == 400 and "not trusted" in answer.json["error"]
    assert not this.client.asked


@pytest.mark.parametrize("host", ["127.0.0.1:8010", "localhost:9000"])
def test_the_page_and_its_files_come_under_a_strict_policy(host):
    app = make_app(served(prediction())).test_client()
    for path in ("/", "/page.js", "/page.css", "/icon.svg", "/server", "/nothing"):
        answer = app.get(path, headers={"Host": host})
        assert answer.status_code == (404 if path == "/nothing" else 200)
        assert answer.headers["Content-Security-Policy"] == POLICY
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert app.get("/../page.py", headers={"Host": host}).status_code == 404


def test_the_page_has_nothing_inline_nothing_from_elsewhere_and_no_markup_of_others():
    page, script = ((FILES / name).read_text() for name in ("index.html", "page.js"))
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", page)
    assert set(re.findall(r'(?:src|href)="([^"]+)"', page)) == {"icon.svg", "page.css", "page.js"}
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval|https?:", script)


# --- the threshold -----------------------------------------------------------------------------


@contextmanager
def metrics_of(text):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/metrics"
        server.shutdown()


ONE = 'adaptive_vit_queue_limit{version="1"} 64\nadaptive_vit_threshold{version="1"} 0.25\n'
TEN = 'adaptive_vit_queue_limit{version="10"} 64\n'


@pytest.mark.parametrize(
    ("text", "threshold"),
    [
        (f"# HELP adaptive_vit_threshold Of 1.\n{ONE}", 0.25),
        (f'{TEN}{ONE}adaptive_vit_threshold{{version="10"}} -1.5e-05\n', -1.5e-5),
        (f"{ONE}{TEN}", None),  # the version that answers has none, or has taken it back
        ("nv_cpu_utilization 0.5\n", None),
    ],
)
def test_the_threshold_is_that_of_the_version_that_answers(text, threshold, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # no way to this machine
    with metrics_of(text) as url:
        assert served_threshold(url) == threshold
        assert served_threshold(url.replace("127.0.0.1", "0.0.0.0")) == threshold


def test_where_no_metrics_are_there_is_no_threshold():
    with metrics_of("") as url:
        pass
    assert served_threshold(url) is None
    assert served_threshold("no url") is None
    assert served_threshold("http://[no-address/metrics") is None


def test_metrics_are_looked_for_only_beside_the_usual_port():
    assert usual_metrics_url("10.0.0.7:8001") == "http://10.0.0.7:8002/metrics"
    # What listens on 8002 there may be another server.
    assert usual_metrics_url("127.0.0.1:9001") is None


def test_a_server_that_stands_still_names_no_classes_and_holds_nobody_up(monkeypatch):
    monkeypatch.setattr(page, "_LABELS_TIMEOUT_S", 0.5)
    told, waited = threading.Event(), []
    with grpc_server(lambda *_: waited.append(told.wait(30))) as (_, url):
        try:
            client = SimpleNamespace(url=url, model="adaptive_vit")
            assert page.served_labels(client, 3) == () and waited == []
        finally:
            told.set()


# --- the command -------------------------------------------------------------------------------


def test_a_server_that_is_not_there_is_one_line():
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        url = f"127.0.0.1:{nobody.getsockname()[1]}"
        ran = run("demo", "page", "--url", url)
    assert ran.code == 2 and ran.err.startswith(f"error: no server answers at {url}")
    assert ran.err.count("\n") == 1


def test_a_port_that_is_taken_is_one_line():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(DemoError, match=rf"--port {port} cannot be had .*; give another"):
            open_page(served(prediction()), port)


def test_the_page_listens_on_loopback_only():
    with open_page(served(prediction()), 0) as page:
        assert page.socket.getsockname() == ("127.0.0.1", page.port)
