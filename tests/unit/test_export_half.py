"""FP16 rungs are the FP32 rung within a stated fidelity, with FP32 ends."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from export.onnx_graph import check_versions
from export.parity import sample_images
from export.recipes.half import to_half
from tests.unit.quantised_files import FULL_PX, ask, cosines, export_static_vit

pytestmark = pytest.mark.usefixtures("remembered_exports")

IMAGES = sample_images(8, FULL_PX, seed=4)


@pytest.fixture(scope="module", params=[32, FULL_PX])
def pair(request, tmp_path_factory):
    rung = onnx.load(export_static_vit(tmp_path_factory.mktemp("onnx"), request.param))
    return rung, to_half(rung)


def test_outputs_are_fp32_and_within_a_hundredth(pair):
    whole, half = (ask(model, IMAGES) for model in pair)
    for name, value in whole.items():
        assert half[name].dtype == np.float32 and half[name].shape == value.shape
        assert np.abs(half[name] - value).max() < 0.01 * np.abs(value).max()
    assert cosines(whole["embedding"], half["embedding"]).min() > 0.9999
    assert not np.array_equal(whole["embedding"], half["embedding"])


def test_all_weights_are_fp16_and_take_half(pair):
    rung, half = pair
    assert half.ByteSize() < 0.55 * rung.ByteSize()
    kinds = {initializer.data_type for initializer in half.graph.initializer}
    assert TensorProto.FLOAT16 in kinds and TensorProto.FLOAT not in kinds


def test_the_graph_contract_and_the_version_limits_hold(pair):
    rung, half = pair
    check_versions(half)
    assert list(half.graph.input) == list(rung.graph.input)
    assert list(half.graph.output) == list(rung.graph.output)
    assert not half.metadata_props and {node.domain for node in half.graph.node} == {""}


def test_a_resize_reads_the_image_itself_and_conversions_stay_at_the_ends(pair):
    rung, half = pair
    resizes = [node for node in half.graph.node if node.op_type == "Resize"]
    assert len(resizes) == sum(node.op_type == "Resize" for node in rung.graph.node)
    assert all(node.input[0] == "image" for node in resizes)
    # One for the image or its resized copy, one for each output.
    assert sum(node.op_type == "Cast" for node in half.graph.node) == 1 + len(half.graph.output)


def test_equal_inputs_give_equal_bytes_and_the_argument_stays(pair):
    rung, half = pair
    before = rung.SerializeToString(deterministic=True)
    again = to_half(rung)
    assert again.SerializeToString(deterministic=True) == half.SerializeToString(deterministic=True)
    assert rung.SerializeToString(deterministic=True) == before
