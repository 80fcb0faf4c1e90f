"""A repository whose files do not belong together must not start, and must say which file."""

import shutil

import numpy as np
import pytest
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from bundle import manifest
from server import ServerStartError, ServerUsageError, TritonServer
from tests.servers import running


@pytest.fixture
def repository(build, tmp_path):
    return shutil.copytree(build / "model_repository", tmp_path / "model_repository")


def start(repository):
    with TritonServer(repository, free_ports=True):
        pass


def test_swapped_onnx_files_are_refused(repository):
    low, high = (repository / name / "1/model.onnx" for name in ("vit_low", "vit_high"))
    low.unlink()
    shutil.copyfile(high, low)
    with pytest.raises(ServerStartError, match=r"vit_low.* is not the file that was calibrated"):
        start(repository)


def test_an_edited_copy_of_the_core_is_refused(repository):
    path = repository / "router/1/routing/policy.py"
    path.write_text(path.read_text() + "\n# edited\n")
    with pytest.raises(ServerStartError, match=r"router/1/routing/policy\.py differs"):
        start(repository)


def test_a_missing_onnx_file_is_named(repository):
    (repository / "vit_high/1/model.onnx").unlink()
    with pytest.raises(ServerStartError, match=r"vit_high.*model\.onnx"):
        start(repository)


def test_another_version_of_a_rung_is_refused_and_would_not_be_served(
    repository, images, monkeypatch
):
    (repository / "vit_low/2").mkdir()
    shutil.copyfile(repository / "vit_high/1/model.onnx", repository / "vit_low/2/model.onnx")
    with pytest.raises(ServerUsageError, match=r"vit_low/2/model\.onnx is not listed"):
        start(repository)
    monkeypatch.setattr(manifest, "refuse_unlisted", lambda repository: None)
    with pytest.raises(ServerStartError, match=r"router.*vit_low/2/model\.onnx is not listed"):
        start(repository)
    # Nor where somebody lists it.
    manifest.write(repository)
    with (
        running(repository) as served,
        triton.InferenceServerClient(served.grpc_url) as client,
    ):
        image = triton.InferInput("image", [1, *images[0].shape], "FP32")
        image.set_data_from_numpy(images[:1])
        unpinned, first = (client.infer("vit_low", [image], version) for version in ("", "1"))
        assert unpinned.get_response().model_version == "1"
        assert np.array_equal(unpinned.as_numpy("embedding"), first.as_numpy("embedding"))
        with pytest.raises(InferenceServerException, match="'vit_low' version 2 is not"):
            client.infer("vit_low", [image], "2")
