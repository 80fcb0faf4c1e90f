"""The keystone, for every signal: an artifact of each is served beside the others."""

import asyncio
import shutil
from dataclasses import replace

import numpy as np
import pytest
import tritonclient.grpc as triton

from bundle import config as configs
from bundle import manifest
from bundle.graphs import GraphSet
from calibration.fidelity import Fidelity
from calibration.fit import EscalationRate, Options, fit
from calibration.outputs import Outputs
from client import AsyncGrpcClient, GrpcClient, HttpClient, Task
from export.repository import answer_parameters
from routing import SIGNALS, Calibration, Overrides, RungOutputs, escalation_mask
from tests.servers import running
from tests.shared_build import shared
from tests.triton.conftest import ESCALATION_RATE, make_build

RTOL = 1e-4  # FP32 matrix products sum in another order at another batch size


def make_artifacts(folder):
    """SIGNAL.json of each signal, fitted to the session's outputs."""
    made = shared("static_vit", make_build)
    stored, rungs = Outputs.load(made / "outputs.json"), GraphSet.load(made / "onnx")
    for name, signal in SIGNALS.items():
        # The same logits stand for independent labels where a signal is about those.
        task = signal.task or "classes"
        made_by = replace(stored.made, task=task)
        outputs, graph_set = replace(stored, made=made_by), replace(rungs, task=task)
        options = Options(Fidelity.asked(task, None), signal=name)
        found = fit(outputs, graph_set, EscalationRate(ESCALATION_RATE), options)
        found.calibration.save(folder / f"{name}.json")


@pytest.fixture(scope="module")
def routers(build, tmp_path_factory):
    """(server, artifact of each signal): one router for each, before the same rungs."""
    repository = tmp_path_factory.mktemp("signals") / "model_repository"
    shutil.copytree(build / "model_repository", repository)
    made = shared("signals", make_artifacts)
    artifacts = {}
    for name in SIGNALS:
        shutil.copytree(repository / "router", repository / f"router_{name}")
        path = repository / f"router_{name}/1/calibration.json"
        shutil.copyfile(made / f"{name}.json", path)
        artifacts[name] = Calibration.load(path)
        config = repository / f"router_{name}/config.pbtxt"
        message = configs.read(config)
        message.name = f"router_{name}"
        for key, value in answer_parameters(artifacts[name]).items():
            configs.set_parameter(message, key, value)
        config.write_text(configs.text(message))
    shutil.rmtree(repository / "adaptive_vit")
    manifest.write(repository)
    with running(repository) as server:
        yield server, artifacts


@pytest.fixture(scope="module")
def client(routers):
    with triton.InferenceServerClient(routers[0].grpc_url) as open_client:
        yield open_client


def ask(client, model, image):
    tensor = triton.InferInput("image", list(image.shape), "FP32")
    tensor.set_data_from_numpy(image)
    return client.infer(model, [tensor])


def rung_outputs(answer):
    return RungOutputs(*(answer.as_numpy(n) for n in ("embedding", "cls_layers", "logits")))


def test_every_client_learns_what_the_answers_mean(routers):
    server, _ = routers

    async def task(model):
        async with AsyncGrpcClient(server.grpc_url, tensor_model=model) as client:
            return await client.task()

    for signal, kind in (("label_margin", "labels"), ("margin", "classes")):
        model = f"router_{signal}"
        assert asyncio.run(task(model)) == Task(kind)
        for client_class, url in ((GrpcClient, server.grpc_url), (HttpClient, server.http_url)):
            with client_class(url, tensor_model=model) as client:
                assert client.task() == Task(kind)


@pytest.mark.parametrize("name", SIGNALS)
def test_one_image_gets_the_offline_score_bit_for_bit(routers, client, images, name):
    calibration = routers[1][name]
    assert calibration.signal == name
    for image in images[:8]:
        low = rung_outputs(ask(client, "vit_low", image[None]))
        answer = ask(client, f"router_{name}", image[None])
        score = calibration.score(low)
        np.testing.assert_array_equal(answer.as_numpy("score")[:, 0], score)
        expected = escalation_mask(score, calibration.threshold, Overrides())
        np.testing.assert_array_equal(answer.as_numpy("escalated")[:, 0], expected)


@pytest.mark.parametrize("name", SIGNALS)
def test_a_batch_gets_the_offline_scores_and_decisions(routers, client, images, name):
    calibration = routers[1][name]
    score = calibration.score(rung_outputs(ask(client, "vit_low", images[:32])))
    expected = escalation_mask(score, calibration.threshold, Overrides())
    assert 0 < expected.sum() < 32, "the crops must mix easy and hard"
    for batch in (1, 5, 32):
        answers = [
            ask(client, f"router_{name}", images[start : min(start + batch, 32)])
            for start in range(0, 32, batch)
        ]
        live = np.concatenate([answer.as_numpy("score")[:, 0] for answer in answers])
        escalated = np.concatenate([answer.as_numpy("escalated")[:, 0] for answer in answers])
        np.testing.assert_allclose(live, score, rtol=RTOL, atol=RTOL * np.ptp(score))
        sure = np.abs(score - calibration.threshold) > RTOL * np.ptp(score)
        assert sure.sum() >= 31
        np.testing.assert_array_equal(escalated[sure], expected[sure])
