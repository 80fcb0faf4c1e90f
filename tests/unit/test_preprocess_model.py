"""The `preprocess` model without Triton: one request's trouble is not its neighbours'."""

import importlib
import io
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from imaging import Preprocessing

ROOT = Path(__file__).resolve().parents[2]
SPEC = Preprocessing(8, 8, 10, "bicubic", (0.5,) * 3, (0.25,) * 3)


class FakeTritonError(Exception):
    INTERNAL, INVALID_ARG = "INTERNAL", "INVALID_ARG"

    def __init__(self, message, code):
        super().__init__(message)
        self.code = code


class FakeRequest:
    def __init__(self, *images):
        self.encoded = np.array(images, dtype=object).reshape(-1, 1)


def fake_backend(folder, logged):
    """What the model uses of Triton's python backend."""
    return SimpleNamespace(
        TritonError=FakeTritonError,
        InferenceResponse=lambda tensors=(), error=None: SimpleNamespace(
            tensors=tensors, error=error
        ),
        Tensor=lambda name, array: (name, array),
        Logger=SimpleNamespace(log_error=logged.append),
        get_model_dir=lambda: str(folder),
        get_input_tensor_by_name=lambda request, name: SimpleNamespace(
            as_numpy=lambda: request.encoded
        ),
    )


@pytest.fixture
def logged():
    return []


@pytest.fixture
def model(tmp_path, monkeypatch, logged):
    """The deployed model, laid out as `export repository` does."""
    folder = tmp_path / "deployed_preprocess"
    folder.mkdir()
    shutil.copy(ROOT / "model_repository/preprocess/1/model.py", folder)
    shutil.copytree(ROOT / "imaging", folder / "imaging")
    (folder / "preprocessing.json").write_text(json.dumps(SPEC.to_dict()))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("os.nice", lambda more: None)  # this process goes on with other tests
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", fake_backend(folder, logged))
    module = importlib.import_module("deployed_preprocess.model")
    limits = {"max_bytes": {"string_value": "1000000"}, "max_pixels": {"string_value": "1000000"}}
    model = module.TritonPythonModel()
    model.initialize({"model_config": json.dumps({"parameters": limits})})
    yield model
    for name in [name for name in sys.modules if name.startswith("deployed_preprocess")]:
        del sys.modules[name]


def png(width=12, height=9):
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (200, 100, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def test_good_requests_are_answered_around_a_bad_one(model):
    requests = [FakeRequest(png()), FakeRequest(b"x"), FakeRequest(png(), png(20, 30))]
    good, bad, batch = model.execute(requests)
    assert bad.error.code == "INVALID_ARG"
    assert str(bad.error) == "not a JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF or HEIC image"
    for response, images in ((good, 1), (batch, 2)):
        ((name, tensor),) = response.tensors
        assert response.error is None and name == "image"
        assert tensor.shape == (images, 3, 8, 8) and tensor.dtype == np.float32


def test_a_bad_image_of_a_batch_is_numbered(model):
    (response,) = model.execute([FakeRequest(png(), b"")])
    assert str(response.error) == "image 2 of 2: the image is empty (0 bytes)"


@pytest.mark.parametrize(
    "error", [OverflowError("too large to convert"), MemoryError(), ValueError("two\nlines")]
)
def test_what_nobody_foresaw_fails_one_request_alone(model, logged, error):
    preprocessing = model.preprocessing

    def failing(image):
        if image.width == 13:
            raise error
        return preprocessing(image)

    model.preprocessing = failing
    requests = [FakeRequest(png()), FakeRequest(png(13)), FakeRequest(png())]
    before, bad, after = model.execute(requests)
    assert bad.error.code == "INTERNAL" and "\n" not in str(bad.error)
    assert str(bad.error).startswith(f"the image could not be preprocessed: {type(error).__name__}")
    assert len(logged) == 1
    for response in (before, after):
        assert response.error is None and len(response.tensors) == 1


@pytest.mark.parametrize("shape", [(0, 1), (1, 0), (0,), (1,)])
def test_a_request_without_images_is_refused(model, shape):
    """Also one that declares none and holds some: it comes as a row of them."""
    request = FakeRequest()
    request.encoded = np.full(shape, png(), dtype=object)
    (answer,) = model.execute([request])
    assert answer.error.code == "INVALID_ARG" and "no image" in str(answer.error)
