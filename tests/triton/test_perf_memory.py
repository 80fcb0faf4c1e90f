"""Memory of real servers, each with the models of one system."""

import numpy as np
import pytest
import tritonclient.grpc as triton

from perf import original
from perf.memory import measure_memory
from perf.systems import ADAPTIVE, HIGH, LOW

pytestmark = pytest.mark.alone
REQUESTS = 5


def test_a_server_of_one_rung_serves_that_rung_only(build, images):
    served = []

    def exercise(server):
        with triton.InferenceServerClient(server.grpc_url) as client:
            index = client.get_model_repository_index()
            served.extend(model.name for model in index.models if model.state == "READY")
            image = triton.InferInput("image", [1, *images.shape[1:]], "FP32")
            for row in images[:REQUESTS]:
                image.set_data_from_numpy(row[np.newaxis])
                client.infer("vit_low", [image])

    weights = build / "onnx/px32.onnx"
    use = measure_memory(build / "model_repository", ["vit_low"], exercise, [weights])
    assert served == ["vit_low"]
    assert use.weights_mib == pytest.approx(weights.stat().st_size / 2**20)
    # The weights are in it, the tritonserver and the model's Python as well, and nothing huge.
    assert use.weights_mib + 20 < use.peak_pss_mib <= use.peak_rss_mib < 2000


def test_the_three_tables_are_measured_together(build, monkeypatch):
    monkeypatch.setattr(original, "FORWARD_RUNS", 5)
    monkeypatch.setattr(original, "FORWARD_WARMUP", 2)
    stages = []
    result = original.measure_original(build, 10, lambda title, total: stages.append(title))
    assert result["forward_ms"]["vit_low"] < result["forward_ms"]["vit_high"]
    latency = {name: spread["median"] for name, spread in result["latency_ms"].items()}
    assert set(latency) == {LOW, HIGH, ADAPTIVE} and latency[LOW] < latency[HIGH]
    # With both rungs, the router and no more: less than two servers, more than either.
    memory = {name: use["peak_pss_mib"] for name, use in result["memory"].items()}
    assert max(memory[LOW], memory[HIGH]) < memory[ADAPTIVE] < 1.5 * (memory[LOW] + memory[HIGH])
    # The weights that both rungs share count once.
    weights = {name: use["weights_mib"] for name, use in result["memory"].items()}
    shared_mib = (build / "onnx/weights.bin").stat().st_size / 2**20
    assert weights[ADAPTIVE] == pytest.approx(weights[LOW] + weights[HIGH] - shared_mib)
    assert 0 <= result["escalation_rate"] <= 1
    assert result["environment"]["triton_version"].startswith("2.")
    assert stages.count("the three systems in turn") in (30, 60)  # measured twice if disturbed
    assert stages.count("peak memory") == 3
