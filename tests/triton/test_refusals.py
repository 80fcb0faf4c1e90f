"""A repository whose files do not belong together must not start, and must say which file."""

import shutil

import pytest

from server import ServerStartError, TritonServer


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
