"""Asking without our client: the examples of the guide, and what plain HTTP and gRPC get."""

import base64
import gzip
import json
import os
import re
import subprocess
import urllib.request
from dataclasses import replace
from pathlib import Path

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from tritonclient.grpc import service_pb2, service_pb2_grpc

from client import GrpcClient
from client.messages import encode_images
from demo.page import Served
from demo.steps import DemoError
from export.repository import assemble
from tests.raw_http import bytes_input, framed, post
from tests.servers import running
from tests.tools import program

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "docs/examples"
COMMANDS = {"infer.sh": ["bash"], "infer.mjs": ["node"], "Infer.java": ["java"]}
ODD = ("tench, Tinca tinca", "cock:bird", "twice", "twice", "two\nlines", 'say "hi"', "hé 猫", "")


@pytest.fixture(scope="module")
def labels(graph_set):
    return (*ODD, *(f"class {index}" for index in range(len(ODD), graph_set.classes)))


@pytest.fixture(scope="module")
def labelled(build, graph_set, labels, tmp_path_factory):
    """The session's rungs with a name for each class."""
    named = replace(graph_set, labels=labels)
    folder = tmp_path_factory.mktemp("labelled") / "repository"
    with running(assemble(named, build / "calibration.json", folder)) as server:
        yield server


def likeliest(server, crop, labels, count=3):
    """What Triton is to say of the likeliest classes: index and name."""
    with GrpcClient(server.grpc_url) as client:
        (answer,) = client.infer([crop])
    return [(index, " ".join(labels[index].split())) for index, _ in answer.top(count)]


def named(element):
    """`value:index:name` of Triton's classification, as index and name."""
    _, index, *name = element.split(":", 2)
    return int(index), name[0] if name else ""


# --- the examples ------------------------------------------------------------------------------


def test_the_guide_shows_the_examples_as_they_are():
    guide = (ROOT / "docs/guide.md").read_text()
    assert sorted(path.name for path in EXAMPLES.iterdir()) == sorted(COMMANDS)
    for name in COMMANDS:
        assert f"(examples/{name})" in guide
        assert f"\n{(EXAMPLES / name).read_text()}```\n" in guide
        assert f"docs/examples/{name}" in (ROOT / "README.md").read_text()


def run_example(name, server, image, tmp_path):
    file = tmp_path / "an image.jpg"
    file.write_bytes(image)
    command = [*COMMANDS[name], EXAMPLES / name, file, server.http_url]
    # A proxy that is not there: this machine is reached without.
    environment = {**os.environ, "http_proxy": "http://127.0.0.1:9", "no_proxy": "", "NO_PROXY": ""}
    program(COMMANDS[name][0])
    return subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_an_example_prints_the_answer_as_json(name, labelled, crops, labels, tmp_path):
    done = run_example(name, labelled, crops[0], tmp_path)
    assert done.returncode == 0, done.stderr
    answer = {output["name"]: output["data"] for output in json.loads(done.stdout)["outputs"]}
    with GrpcClient(labelled.grpc_url) as client:
        (expected,) = client.infer(crops[:1])
    assert answer["escalated"] == [expected.escalated]
    assert answer["score"] == pytest.approx([expected.score], rel=1e-4)
    assert [named(one) for one in answer["logits"]] == likeliest(labelled, crops[0], labels)


@pytest.mark.parametrize("name", COMMANDS)
def test_an_example_prints_why_it_was_refused_and_fails(name, labelled, crops, tmp_path):
    done = run_example(name, labelled, base64.b64encode(crops[0]), tmp_path)
    assert done.returncode != 0
    assert "the image is base64 text" in json.loads(done.stdout)["error"]


# --- images over plain HTTP --------------------------------------------------------------------


def test_a_body_may_be_the_image_and_nothing_else(labelled, crops):
    status, answer = post(labelled, "adaptive_vit", None, crops[0])
    assert status == 200
    with GrpcClient(labelled.grpc_url) as client:
        (expected,) = client.infer(crops[:1])
    # The JSON, then the outputs' bytes in the order that it gives.
    outputs, start = json.JSONDecoder().raw_decode(answer.decode("latin-1"))
    for output in outputs["outputs"]:
        size = output["parameters"]["binary_data_size"]
        if output["name"] == "embedding":
            embedding = np.frombuffer(answer[start : start + size], np.float32)
        start += size
    assert start == len(answer)
    np.testing.assert_allclose(embedding, expected.embedding, rtol=1e-4, atol=1e-5)


def test_base64_text_is_refused_with_the_way_to_send_an_image(labelled, crops):
    text = base64.b64encode(crops[0]).decode()
    for sent in (text, f"data:image/jpeg;base64,{text}"):
        head = {**bytes_input([b""]), "data": [sent]}
        del head["parameters"]
        status, answer = post(labelled, "adaptive_vit", {"inputs": [head]})
        assert status == 400
        message = json.loads(answer)["error"]
        assert "the image is base64 text, which is not decoded here; send the file's own" in message
        assert "Inference-Header-Content-Length: 0" in message
    # Among others it is named by its place.
    images = [crops[0], text.encode()]
    status, answer = post(
        labelled, "adaptive_vit", {"inputs": [bytes_input(images)]}, framed(*images)
    )
    assert status == 400 and "image 2 of 2: the image is base64" in json.loads(answer)["error"]


def test_a_body_may_be_compressed_and_the_answer_too(labelled, crops):
    head = {"inputs": [bytes_input([crops[0]])], "outputs": [{"name": "escalated"}]}
    text = json.dumps(head).encode()
    url = f"http://{labelled.http_url}/v2/models/adaptive_vit/infer"
    headers = {
        "Inference-Header-Content-Length": str(len(text)),
        "Content-Encoding": "gzip",
        "Accept-Encoding": "gzip",
    }
    body = gzip.compress(text + framed(crops[0]))
    with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=60) as answer:
        assert answer.headers["Content-Encoding"] == "gzip"
        (output,) = json.loads(gzip.decompress(answer.read()))["outputs"]
    assert output["name"] == "escalated"


# --- Triton's classification extension ---------------------------------------------------------


@pytest.mark.parametrize("protocol", [triton_http, triton_grpc])
@pytest.mark.parametrize("model", ["adaptive_vit", "adaptive_tensor", "router"])
def test_triton_names_the_classes_of_every_model_that_answers(
    protocol, model, labelled, crops, images, labels
):
    url = labelled.http_url if protocol is triton_http else labelled.grpc_url
    rows = encode_images(crops[:2]) if model == "adaptive_vit" else images[:2]
    name, datatype = ("image_bytes", "BYTES") if model == "adaptive_vit" else ("image", "FP32")
    tensor = protocol.InferInput(name, list(rows.shape), datatype)
    tensor.set_data_from_numpy(rows)
    everything = protocol.InferRequestedOutput("logits", class_count=len(labels))
    with protocol.InferenceServerClient(url) as client:
        found = client.infer(model, [tensor], outputs=[everything]).as_numpy("logits")
    for row, crop in zip(found, crops[:2], strict=True):
        said = [named(element.decode()) for element in row]
        assert said[:3] == likeliest(labelled, crop, labels)
        assert dict(said) == {i: " ".join(name.split()) for i, name in enumerate(labels)}


def test_the_page_to_try_a_model_names_the_classes_as_the_server_does(labelled, labels):
    with GrpcClient(labelled.grpc_url) as client:
        served = Served.look(client, (), labelled.metrics_url)
        with pytest.raises(DemoError, match="--labels has 1 names, the model 200 classes"):
            Served.look(client, ["one"], None)
    names = [" ".join(name.split()) or f"class {index}" for index, name in enumerate(labels)]
    assert list(served.shown.labels) == names


# --- gRPC --------------------------------------------------------------------------------------


def test_the_server_does_not_describe_itself_to_grpcurl(labelled):
    guide = (ROOT / "docs/guide.md").read_text()
    assert re.search(r"no reflection.*grpc_service\.proto", guide, re.DOTALL)
    with grpc.insecure_channel(labelled.grpc_url, [("grpc.enable_http_proxy", 0)]) as channel:
        call = channel.stream_stream("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo")
        with pytest.raises(grpc.RpcError) as refused:
            list(call(iter([b""]), timeout=30))
    assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_grpc_takes_an_image_as_it_is_among_the_contents(labelled, crops):
    message = service_pb2.ModelInferRequest(model_name="adaptive_vit")
    tensor = message.inputs.add(name="image_bytes", datatype="BYTES", shape=[1, 1])
    tensor.contents.bytes_contents.append(crops[0])
    with grpc.insecure_channel(labelled.grpc_url, [("grpc.enable_http_proxy", 0)]) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        answer = triton_grpc.InferResult(stub.ModelInfer(message, timeout=60))
    with GrpcClient(labelled.grpc_url) as client:
        (expected,) = client.infer(crops[:1])
    embedding = answer.as_numpy("embedding")[0]
    np.testing.assert_allclose(embedding, expected.embedding, rtol=1e-4, atol=1e-5)
