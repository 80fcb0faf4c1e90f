"""The examples of the guide, with and without a head: what they ask a server that keeps it."""

import json
import os
import subprocess
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.raw_http import bytes_input, framed
from tests.tools import program

EXAMPLES = Path(__file__).resolve().parents[2] / "docs/examples"
COMMANDS = {"infer.sh": "bash", "infer.mjs": "node", "Infer.java": "java"}
IMAGE = bytes(range(256)) * 5
HEAD = {"name": "logits", "parameters": {"classification": 3}}


@contextmanager
def serving(outputs):
    """HOST:PORT of a server of an `adaptive_vit` with these outputs, and the questions it gets.

    It refuses a question about any other output as Triton does; None: it does not have the model.
    """
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def reply(self, status, answer):
            text = json.dumps(answer, separators=(",", ":")).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def do_GET(self):
            assert self.path == "/v2/models/adaptive_vit"
            if outputs is None:
                return self.reply(404, {"error": "unknown model"})
            tensors = [{"name": name, "datatype": "FP32", "shape": [-1, 4]} for name in outputs]
            self.reply(200, {"name": "adaptive_vit", "outputs": tensors})

        def do_POST(self):
            assert self.path == "/v2/models/adaptive_vit/infer"
            body = self.rfile.read(int(self.headers["Content-Length"]))
            size = int(self.headers["Inference-Header-Content-Length"])
            question = json.loads(body[:size])
            asked.append((question, body[size:]))
            names = [output["name"] for output in question["outputs"]]
            if outputs is None:
                return self.reply(404, {"error": "unknown model"})
            for name in names:
                if name not in outputs:
                    why = f"unexpected inference output '{name}' for model 'adaptive_vit'"
                    return self.reply(400, {"error": why})
            self.reply(200, {"outputs": [{"name": name} for name in names]})

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}", asked
        server.shutdown()


def run_example(name, url, tmp_path):
    (tmp_path / "image.jpg").write_bytes(IMAGE)
    command = [program(COMMANDS[name]), EXAMPLES / name, "image.jpg", url]
    environment = {**os.environ, "http_proxy": "http://127.0.0.1:9", "no_proxy": "", "NO_PROXY": ""}
    return subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("last", [HEAD, {"name": "embedding"}], ids=["head", "no head"])
def test_an_example_asks_for_classes_where_there_are_any_else_for_the_embedding(
    name, last, tmp_path
):
    outputs = ["embedding", "escalated", "score", "degraded", *["logits"] * (last is HEAD)]
    with serving(outputs) as (url, asked):
        done = run_example(name, url, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    ((question, binary),) = asked
    assert question["inputs"] == [bytes_input([IMAGE])] and binary == framed(IMAGE)
    assert question["outputs"] == [{"name": "escalated"}, {"name": "score"}, last]
    assert [output["name"] for output in json.loads(done.stdout)["outputs"]][2] == last["name"]


@pytest.mark.parametrize("name", COMMANDS)
def test_an_example_prints_what_a_server_without_the_model_says(name, tmp_path):
    with serving(None) as (url, _):
        done = run_example(name, url, tmp_path)
    assert done.returncode != 0 and json.loads(done.stdout) == {"error": "unknown model"}
