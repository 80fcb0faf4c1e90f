"""`collect` from a server: what is asked, and what is no source. The server is a fake."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tritonclient.utils import InferenceServerException

from bundle.graphs import GraphSet
from calibration import answers as answers_module
from calibration import options
from calibration import served as module
from calibration.answers import AnswerCache
from calibration.outputs import Outputs, wanted
from calibration.running import open_session, run_session
from calibration.served import ServedError, ServedRungs
from tests.unit.calibration_outputs import with_reference
from tests.unit.image_files import MemorySource
from tests.unit.onnx_files import CLASSES, LAYERS, SIZE, D, write_graph_set


class FakeTriton:
    """A server of two rungs, by ONNX Runtime; the first calls of a model raise `refusals`."""

    def __init__(self, graph_set, version="2.51.0", refusals=(), shapes=None):
        self.sessions = {name: open_session(file) for name, file in graph_set.files.items()}
        self.version, self.refusals, self.shapes = version, list(refusals), shapes or {}
        self.asked, self.closed = [], False

    def __call__(self, url, creds, **options):
        self.url, self.creds = url, creds
        return self

    def close(self):
        self.closed = True

    def get_server_metadata(self, client_timeout):
        return SimpleNamespace(version=self.version)

    def get_model_metadata(self, model, version, client_timeout):
        assert version == "1"
        session = self.sessions[model]
        outputs = {tensor.name: list(tensor.shape[1:]) for tensor in session.get_outputs()}
        shapes = {"image": [3, SIZE, SIZE], **outputs, **self.shapes}
        tensors = [
            SimpleNamespace(name=name, datatype="FP32", shape=[-1, *shape])
            for name, shape in shapes.items()
            if shape
        ]
        return SimpleNamespace(inputs=tensors[:1], outputs=tensors[1:])

    def infer(self, model, inputs, model_version, outputs, client_timeout):
        assert model_version == "1"
        if self.refusals:
            raise self.refusals.pop(0)
        names = [output.name() for output in outputs]
        image = np.frombuffer(inputs[0]._raw_content, np.float32).reshape(inputs[0].shape())
        self.asked.append((model, len(image), tuple(names)))
        found = run_session(self.sessions[model], image, layers="cls_layers" in names)
        return SimpleNamespace(as_numpy=lambda name: getattr(found, name))


@pytest.fixture
def serve(monkeypatch):
    def start(server, graph_set, url="127.0.0.1:8001"):
        monkeypatch.setattr(module.triton, "InferenceServerClient", server)
        monkeypatch.setattr(module, "_PAUSE_S", 0.0)
        return ServedRungs(url, graph_set)

    return start


def overloaded():
    return InferenceServerException("Exceeds maximum queue size", "StatusCode.UNAVAILABLE")


@pytest.fixture
def collected(graph_set, tmp_path):
    """The outputs that a server, or this machine, answers."""

    def collected(source, served=None, rungs=graph_set, progress=lambda count: None):
        cache = AnswerCache(tmp_path / "answers", source, rungs, served)
        cache.fill(wanted(rungs), progress=progress)
        return Outputs.of(cache.read(wanted(rungs)), rungs, cache)

    return collected


def test_outputs_of_a_server_are_those_of_its_rungs(graph_set, serve, collected):
    server = FakeTriton(graph_set)
    with serve(server, graph_set) as served:
        found = collected(MemorySource(20), served)
    local = collected(MemorySource(20))
    np.testing.assert_array_equal(found.low.cls_layers, local.low.cls_layers)
    np.testing.assert_array_equal(found.high.logits, local.high.logits)
    assert found.runtime["name"] == "tritonserver 2.51.0" and server.closed
    assert server.asked[2:4] == [  # after the probe's
        ("vit_low", 16, ("embedding", "cls_layers", "logits")),
        ("vit_high", 16, ("embedding", "logits")),
    ]


def test_a_full_queue_is_waited_for_and_a_fault_is_not(graph_set, serve, collected):
    server = FakeTriton(graph_set, refusals=[overloaded(), overloaded()])
    with serve(server, graph_set) as served:
        assert len(collected(MemorySource(3), served)) == 3
        server.refusals = [InferenceServerException("the graph\nfails", "StatusCode.INTERNAL")]
        with pytest.raises(ServedError, match="the graph fails") as error:
            served.graphs()["vit_low"](np.zeros((1, 3, SIZE, SIZE), np.float32))
        assert server.refusals == [] and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({"image": [3, 9, 9]}, "image is FP32 [3, 8, 8] there and FP32 [3, 9, 9] on the server"),
        ({"embedding": [D + 1]}, "embedding is"),
        ({"cls_layers": [LAYERS, D]}, "cls_layers is"),
        ({"cls_layers": None}, "cls_layers is FP32 [4, 6] there and no such tensor"),
        ({"logits": [CLASSES + 1]}, "logits is"),
    ],
)
def test_a_server_of_other_shapes_is_refused_before_an_image_is_read(
    graph_set, serve, shapes, words
):
    server = FakeTriton(graph_set, shapes=shapes)
    with pytest.raises(ServedError) as error:
        serve(server, graph_set)
    assert words in str(error.value) and "vit_low at 127.0.0.1:8001" in str(error.value)
    assert server.closed


def other_rungs(tmp_path, seeds):
    return GraphSet.load(write_graph_set(tmp_path / f"other {seeds}", seeds=seeds))


def answer_files(tmp_path):
    """What is kept besides pictures and what tells servers apart."""
    files = (tmp_path / "answers").glob("*/*.npz")
    return [file for file in files if "embedding" in np.load(file)]


@pytest.mark.parametrize(("seeds", "rung"), [((7, 2), "vit_low"), ((1, 7), "vit_high")])
def test_a_server_of_other_weights_of_the_same_shapes_is_refused(
    graph_set, serve, collected, tmp_path, seeds, rung
):
    with (
        serve(FakeTriton(other_rungs(tmp_path, seeds)), graph_set) as served,
        pytest.raises(ServedError, match=f"{rung} at 127.0.0.1:8001 is not the rung in --onnx"),
    ):
        collected(MemorySource(20, broken=[0, 3]), served)
    assert answer_files(tmp_path) == []


def changed(server, **changes):
    """The server, with some of its outputs made other ones; those that were not asked for stay."""
    infer = server.infer

    def other(*arguments, **options):
        answer = infer(*arguments, **options)

        def as_numpy(name):
            values = answer.as_numpy(name)
            return values if values is None else changes.get(name, lambda same: same)(values)

        return SimpleNamespace(as_numpy=as_numpy)

    server.infer = other
    return server


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("logits", lambda values: values[:, ::-1], "of the norm apart"),  # another head alone
        ("logits", lambda values: values[:, :-1], "in another shape"),
        ("embedding", lambda values: np.repeat(values, 2, axis=1), "in another shape"),
        ("embedding", lambda values: values.astype(np.float16), "in another shape"),
        ("cls_layers", lambda values: values[:, 1:], "in another shape"),
        ("cls_layers", lambda values: None, "in another shape"),
    ],
)
def test_a_server_of_other_rungs_is_refused(
    graph_set, serve, collected, tmp_path, name, change, words
):
    server = changed(FakeTriton(graph_set), **{name: change})
    said = f"vit_low at 127.0.0.1:8001 is not the rung in --onnx: .*{words}"
    with serve(server, graph_set) as served, pytest.raises(ServedError, match=said) as error:
        collected(MemorySource(20), served)
    assert "\n" not in str(error.value)
    assert answer_files(tmp_path) == []


@pytest.mark.parametrize("other", ["weights", "shape"])
@pytest.mark.parametrize(
    ("stops", "error"), [(False, ServedError), (True, KeyboardInterrupt)], ids=["to the end", "^C"]
)
def test_a_model_deployed_while_a_server_is_asked_leaves_nothing_behind(
    graph_set, serve, collected, tmp_path, monkeypatch, stops, error, other
):
    """Nor where whoever waits stops before the server is asked whether it is the same."""
    monkeypatch.setattr(answers_module, "CHUNK", 16)
    server, kept = FakeTriton(graph_set), []

    def redeploy(count):
        kept.append(len(answer_files(tmp_path)))
        server.sessions = FakeTriton(other_rungs(tmp_path, (1, 7))).sessions
        if other == "shape":
            changed(server, logits=lambda values: values[:, :-1])
        if stops and len(kept) == 2:
            raise KeyboardInterrupt

    words = None if stops else "another model was deployed meanwhile"
    with serve(server, graph_set) as served, pytest.raises(error, match=words):
        collected(MemorySource(40), served, progress=redeploy)
    assert max(kept) > 0 and answer_files(tmp_path) == []


def test_a_server_that_answers_a_little_otherwise_is_asked_anew(graph_set, serve, collected):
    read = []
    for noise in (0.0, 1e-6, 0.01):  # rounding is the same server, 1 % another model like it
        more = dict.fromkeys(("embedding", "logits"), lambda same, noise=noise: same * (1 + noise))
        served = serve(changed(FakeTriton(graph_set), **more), graph_set)
        source = MemorySource(20)
        collected(source, served)
        read.append(len(set(source.read)) == 20)  # and not the probe's images alone
    assert read == [True, False, True]


def test_only_a_server_on_this_machine_has_a_known_processor(graph_set, serve):
    for url, known in (("localhost:8001", True), ("10.0.0.7:8001", False)):
        served = serve(FakeTriton(graph_set), graph_set, url)
        assert (served.runtime["processor"] is not None) == known
        assert "10.0.0.7" not in str(served.runtime)  # it travels with the artifact


def test_a_reference_that_is_not_served_runs_here(graph_set, serve, collected):
    rungs = with_reference(graph_set)
    server = FakeTriton(graph_set)
    with serve(server, rungs) as served:
        assert len(collected(MemorySource(5), served, rungs).reference) == 5
    assert {model for model, *_ in server.asked} == {"vit_low", "vit_high"}


@pytest.mark.parametrize("change", ["nothing", "here", "server", "release", "processor"])
def test_answers_of_another_runtime_are_made_anew(graph_set, serve, collected, monkeypatch, change):
    collected(MemorySource(16), serve(FakeTriton(graph_set), graph_set))
    if change == "processor":
        monkeypatch.setattr(module, "processor", lambda: {"vendor": "", "model": "", "int8": []})
    version = "2.60.0" if change == "release" else "2.51.0"
    url = "127.0.0.1:9001" if change == "server" else "127.0.0.1:8001"
    served = None if change == "here" else serve(FakeTriton(graph_set, version), graph_set, url)
    source = MemorySource(16)
    collected(source, served)
    assert (len(set(source.read)) == 16) == (change != "nothing")


def test_answers_of_another_processor_are_made_anew_here_too(collected, monkeypatch):
    found = []
    for facts in ({"int8": ["avx2"]}, {"int8": ["avx2"]}, {"int8": ["avx512_vnni"]}):
        monkeypatch.setattr(
            answers_module, "local_runtime", lambda facts=facts: {"name": "ort", **facts}
        )
        source = MemorySource(4)
        collected(source)
        found.append(len(source.read))
    assert found == [4, 0, 4]


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ((None, "cert", None), "a client cert without a key"),
        (("none", None, None), "cannot read none for TLS: No such file"),
        (("ca", None, None), "ca holds no certificate in PEM format"),
    ],
)
def test_tls_files_that_cannot_be_used_are_told_before_a_server_is_asked(
    names, said, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path("ca").write_text("none")
    files = [None if name is None else Path(name) for name in names]
    with pytest.raises(ServedError, match=said), options.served("127.0.0.1:1", None, *files):
        pass
